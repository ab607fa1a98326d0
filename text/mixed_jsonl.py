"""A mixed JSONL file for other tools: domain and general records in one random order, each with its source_type."""

import json
import tempfile
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import new_file
from core.hashing import mix_keys, permute
from text.corpus import utf8
from text.mixture import SourceConfig, judge_epochs


def mix_files(domain, general, out, *, ratio: float = 0.7, total: int | None = None, seed: int = 0,
              max_epochs: float = 16.0, overwrite: bool = False) -> dict:
    """Write `total` records to the JSONL file `out`, the share `ratio` of them from `domain`, in an order of `seed`.

    domain, general: iterators over records (dict), each read once. A side's records come in a new order in every epoch,
    none twice within one; each gets "source_type", the name of its side. total None: every domain record once.
    Returns {"total", "seed", "warnings", "domain": {"records", "written", "epochs"}, "general": ...}.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already; choose another --out or add --overwrite")
    if total is None and not ratio:
        raise UserError("without --total-samples the domain file gives the length, but --domain-ratio is 0")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Records are drawn in random order and may not fit in memory: they wait in a file, by their places in it.
        with tempfile.TemporaryFile(dir=out.parent) as spool:
            places = {"domain": _spool(domain, "domain", spool), "general": _spool(general, "general", spool)}
            total = round(len(places["domain"]) / ratio) if total is None else total
            written = {"domain": round(total * ratio), "general": total - round(total * ratio)}
            for side, n in written.items():
                if not total or (n and not len(places[side])):
                    raise UserError(f"the {side} files hold no records, but {n or 'some'} are wanted of them")
            epochs = {side: n / max(1, len(places[side])) for side, n in written.items()}
            sides = {side: SourceConfig(role=side, max_epochs=max_epochs) for side in written}
            refusals, warnings = judge_epochs(epochs, sides, "--max-epochs {1}")
            if refusals:
                raise UserError(refusals[0])
            lines = np.concatenate([_draw(side, n, places[side], seed) for side, n in written.items()])
            with new_file(out, "wb") as file:
                for line in permute(np.arange(total), total, mix_keys(seed, "mix")).tolist():
                    spool.seek(int(lines[line]))
                    file.write(spool.readline())
    except OSError as error:
        raise UserError(f"{out} could not be written: {error.strerror or error}; nothing is left of it") from None
    return {"total": total, "seed": seed, "warnings": warnings,
            **{side: {"records": len(places[side]), "written": n, "epochs": epochs[side]}
               for side, n in written.items()}}


def _spool(records, side: str, spool) -> np.ndarray:
    """int64 [records]: where each record stands in the file that it was written to."""
    places = []
    for record in records:
        places.append(spool.tell())
        line = json.dumps({**record, "source_type": side}, ensure_ascii=False, default=str)
        spool.write(utf8(line) + b"\n")
    return np.array(places, np.int64)


def _draw(side: str, n: int, places: np.ndarray, seed: int) -> np.ndarray:
    """The places of n records: epoch after epoch, each a permutation of all. 5 of 3 records: 2 0 1, then 1 2."""
    epoch, position = np.divmod(np.arange(n), max(1, len(places)))
    return places[permute(position, len(places), mix_keys(seed, side, "mix", epoch))] if n else places[:0]
