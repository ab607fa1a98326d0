"""What `python data.py mix` makes: a table and a picture of what a recipe draws over a run, or a mixed JSONL file."""

import itertools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core import cli
from core.config import merge, read_toml
from core.errors import UserError
from core.files import new_file
from core.hashing import mix_keys, permute
from text import mixture
from text.corpus import utf8
from text.mixture import DataConfig, LengthConfig, SourceConfig, open_buckets
from text.packing import pack_sources
from text.shards import Shards

# ---- the preview of a recipe

@dataclass
class MixSettings:
    """What of a recipe decides the mix."""

    data: DataConfig = field(default_factory=DataConfig)
    train: LengthConfig = field(default_factory=LengthConfig)


def preview_mix(recipe: str, words: list[str], picture: Path) -> dict:
    """Print and draw what a recipe's plan draws under the settings `words`. Sources that are not packed yet are allowed
    where the length is given in steps or tokens."""
    values = read_toml(recipe)
    length = {key: value for key, value in values.get("train", {}).items() if key in vars(LengthConfig())}
    settings = merge(MixSettings(), {"data": values.get("data", {}), "train": length})
    settings = cli.parse(MixSettings, words, recipe=True, default=settings)
    config, T = settings.data, settings.data.context
    if not config.sources:
        raise UserError(f"{recipe} names no source; add one, e.g. --data.sources.domain.path shards/legal")
    missing = [name for name, source in config.sources.items() if not (source.path and Path(source.path).is_dir())]
    if missing and not (settings.train.steps or settings.train.tokens):
        raise UserError(f"data.sources.{missing[0]}.path is no folder, so an epoch has no length; make it with data.py "
                        f"pack, or give --train.steps")
    sources = open_buckets(config.sources)
    packings = pack_sources({name: Shards(s.path) for name, s in sources.items() if name not in missing}, config)
    rows_per_epoch = {name: packing.sequences for name, packing in packings.items()}
    plan = mixture.make_plan(config, settings.train, sources, rows_per_epoch)
    drawn = dict(zip(sources, plan[-1].tolist()))
    epochs = {name: drawn[name] / rows for name, rows in rows_per_epoch.items()}
    spans = measure_shares(config, sources, plan, 10)
    title = f"{config.schedule}, {len(plan) - 1:,} steps of {settings.train.batch_size} sequences"
    print(f"{title} of {T} tokens\n\n{'steps':>17} {'wanted':>8} {'domain':>8}   "
          + " ".join(f"{name[-12:]:>12}" for name in sources))
    for span in spans:
        print(f"{span['first_step']:>8}-{span['last_step']:<8} {span['wanted']:>8.3f} {span['domain']:>8.3f}   "
              + " ".join(f"{share:>12.3f}" for share in span["sources"].values()))
    print()
    for name, source in sources.items():
        read = f", read {epochs[name]:.2f} times" if name in epochs else ""
        print(f"{name} ({source.role}{', ' + source.stratum if source.stratum else ''}): {drawn[name]:,} sequences, "
              f"{drawn[name] * T:,} positions{read}")
    refusals, warnings = mixture.judge_epochs(epochs, sources)
    notes = [*mixture.describe_mix(config, sources), *warnings,
             *(f"warning: train.py refuses this plan: {refusal}" for refusal in refusals)]
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_shares(picture, title, sources, measure_shares(config, sources, plan, 200))
    print(*notes, f"picture: {picture}", sep="\n")
    shares, empty = mixture.replay_strata(sources, config.strata)
    return {"steps": len(plan) - 1, "batch_size": settings.train.batch_size, "context": T, "rows": spans,
            "schedule": config.schedule, "sequences": drawn, "epochs": epochs, "strata": shares, "empty_strata": empty,
            "notes": notes, "picture": str(picture)}


def measure_shares(config: DataConfig, sources: dict[str, SourceConfig], plan: np.ndarray, spans: int) -> list[dict]:
    """Over up to `spans` equal spans of the run: the steps, the domain share wanted and drawn, each source's share."""
    steps = len(plan) - 1
    domain = np.array([s.role == "domain" for s in sources.values()])
    wanted = mixture.weights_at(config, sources, steps)[:, domain].sum(1)
    edges = np.linspace(0, steps, min(steps, spans) + 1).round().astype(int).tolist()
    rows = []
    for first, last in itertools.pairwise(edges):
        shares = (plan[last] - plan[first]) / (plan[last] - plan[first]).sum()
        rows.append({"first_step": first, "last_step": last - 1, "wanted": float(wanted[first:last].mean()),
                     "domain": float(shares[domain].sum()), "sources": dict(zip(sources, shares.tolist()))})
    return rows


def draw_shares(path, title: str, sources: dict[str, SourceConfig], rows: list[dict]):
    """Draw the share of each source over the run as a PNG: domain sources at the bottom in warm colours, general text
    above them in cold ones, and a line for the domain share that was wanted."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    colours = {}
    for role, colour_map in (("domain", "YlOrRd"), ("general", "GnBu")):
        side = [name for name in sources if sources[name].role == role]
        colours |= {name: colormaps[colour_map](0.75 - 0.5 * i / len(side)) for i, name in enumerate(side)}
    # A step plot ends where its last value begins, so the last row stands twice.
    steps = [*(row["first_step"] for row in rows), rows[-1]["last_step"] + 1]
    rows = [*rows, rows[-1]]
    axes.stackplot(steps, [[row["sources"][name] for row in rows] for name in colours], colors=list(colours.values()),
                   labels=colours, step="post", linewidth=0)
    axes.step(steps, [row["wanted"] for row in rows], "k--", where="post", linewidth=1, label="domain, wanted")
    axes.set(xlim=(0, steps[-1]), ylim=(0, 1), xlabel="step", ylabel="share of the sequences drawn", title=title)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)


# ---- a mixed JSONL file for other tools

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
        # Records are drawn in random order and may not fit in memory: they wait in a file, and their places in it here.
        with tempfile.TemporaryFile(dir=out.parent) as spool:
            places = {"domain": [], "general": []}
            for side, records in (("domain", domain), ("general", general)):
                for record in records:
                    places[side].append(spool.tell())
                    line = json.dumps({**record, "source_type": side}, ensure_ascii=False, default=str)
                    spool.write(utf8(line) + b"\n")
            total = round(len(places["domain"]) / ratio) if total is None else total
            written = {"domain": round(total * ratio), "general": total - round(total * ratio)}
            for side, n in written.items():
                if not total or (n and not len(places[side])):
                    raise UserError(f"the {side} files hold no records, but {n or 'some'} are wanted of them")
            epochs = {side: n / max(1, len(places[side])) for side, n in written.items()}
            sides = {side: SourceConfig(role=side, max_epochs=max_epochs) for side in written}
            refusals, warnings = mixture.judge_epochs(epochs, sides, "--max-epochs {1}")
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


def _draw(side: str, n: int, places: list[int], seed: int) -> np.ndarray:
    """The places of n records: epoch after epoch, each a permutation of all. 5 of 3 records: 2 0 1, then 1 2."""
    epoch, position = np.divmod(np.arange(n), len(places))
    return np.array(places, np.int64)[permute(position, len(places), mix_keys(seed, side, "mix", epoch))]
