"""What a run left, in a form in which two runs are compared by `==`: every logged loss, every weight and moment."""

import hashlib
import json
from pathlib import Path

from safetensors import safe_open

# Of a record of metrics.jsonl, what is a function of the settings alone, and not of the clock.
KEYS = ("loss", "grad_norm", "lr", "domain_share", "sources", "methods")


def records(out: Path, kind: str) -> list[dict]:
    """The records of a kind; a killed process may leave half a line, which is none."""
    found = []
    path = Path(out) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and record.get("kind") == kind:
            found.append(record)
    return found


def steps_done(out: Path) -> int:
    return max((record["step"] for record in records(out, "train")), default=0)


def trace(out: Path) -> dict[str, set]:
    """{"train 3": every result that was logged for it}: one, however often the step was done."""
    found = {}
    for kind, keys in (("train", KEYS), ("eval", ("sources",))):
        for record in records(out, kind):
            value = json.dumps([record.get(key) for key in keys], sort_keys=True)
            # A step whose update was left out, because of what the suite planted there, is none that was done.
            if (kind == "train" and record["loss"] is None) or "NaN" in value or '"bits_per_byte": null' in value:
                continue
            found.setdefault(f"{kind} {record['step']}", set()).add(value)
    return found


def tensors(folder: Path) -> dict[str, list[str]]:
    """{tensor: hashes of the bytes, type and shape of its parts} in the safetensors files under a folder, whichever of
    the files holds which."""
    found = {}
    for file in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(file, "np") as opened:
            for name in opened.keys():      # noqa: SIM118
                part = opened.get_slice(name)
                digest = hashlib.sha256(f"{part.get_dtype()}{part.get_shape()}".encode())
                digest.update(_bytes_of(file, name))
                found.setdefault(name, []).append(digest.hexdigest())
    return {name: sorted(parts) for name, parts in found.items()}


def _bytes_of(file: Path, name: str) -> bytes:
    """Of one tensor, straight from the file: numpy knows no bfloat16."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        begin, end = json.loads(opened.read(size))[name]["data_offsets"]
        opened.seek(8 + size + begin)
        return opened.read(end - begin)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints by name, whether they verify or not, ascending."""
    found = [path for path in (Path(out) / "checkpoints").glob("step_*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def snapshot(out: Path) -> dict:
    """All that must be equal at the end of two runs of the same settings."""
    out, last = Path(out), checkpoints(out)[-1:]
    states = {path.name: json.loads(path.read_text()) for folder in last for path in folder.glob("*.json")
              if path.name != "manifest.json"}
    return {"losses": trace(out), "checkpoint": {path.name: tensors(path) for path in last}, "state": states,
            "final": tensors(out / "final"), "adapter": tensors(out / "adapter"),
            "eval.json": json.loads((out / "eval.json").read_text()), "plan": (out / "plan.jsonl").read_text()}


def differences(reference: dict, out: Path) -> list[str]:
    """What of a finished run is not bit for bit that of the reference."""
    try:
        found = snapshot(out)
    except (OSError, ValueError, KeyError) as error:
        return [f"{out.name} cannot be read: {error}"]
    several = [step for step, values in found["losses"].items() if len(values) > 1]
    return [f"{out.name}: {step} was logged with several results" for step in several] + [
        f"{out.name}: {what} differs{_where(reference[what], value)}" for what, value in found.items()
        if value != reference[what] and not (what == "losses" and several)]


def _where(mine, theirs) -> str:
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return ""
    names = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    return f" in {', '.join(sorted(names)[:3])}"
