"""The commands that write a folder or a file, on inputs of some kilobytes, for each section that disturbs them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from runs import arguments
from synthetic import texts

from .harness import Lab, Row, run


@dataclass
class Command:
    """words(lab, out, version): the command line; version 0 and 1 give different results. overwrites: `out` exists
    already, as version 0 made it, and is replaced."""

    name: str
    module: str
    words: Callable
    overwrites: bool = False
    suffix: str = ""                        # of `out`, where that is a file
    # The folder's files appear one after the other, each of them whole, and this one last: it is the record of the
    # others, and goes before they change.
    record: str = ""

    def line(self, lab: Lab, out: Path, version: int = 1) -> list[str]:
        flag = ["--overwrite"] if self.overwrites and version else []
        return [*map(str, self.words(lab, out, version)), *flag]


def inputs(lab: Lab) -> Path:
    """Texts, records, an adapter and a trained model, made once."""
    folder = lab.folder / "inputs"
    if not folder.exists():
        folder.mkdir()
        for version, kind in enumerate(("story", "legal")):
            found = texts(kind, 60)
            (folder / f"{version}.txt").write_text("\n\n".join(found))
            (folder / f"{version}.jsonl").write_text("".join(
                json.dumps({"text": f"{text} {text}", "id": str(i)}) + "\n" for i, text in enumerate(found)))
            words = ["--model.init", "pretrained", "--model.path", lab.base, "--seed", version]
            for name, more in (("adapter", ["--lora.rank", 4, "--optim.lr", 1e-2]), ("model", [])):
                out = folder / f"run_{name}_{version}"
                outcome = run("train", arguments(lab.sources, out, *words, *more, steps=3))
                assert outcome.status == 0, outcome.err
    return folder


def _pack(lab, out, version):
    return ["pack", "--tokenizer", lab.sources / "tok", "--out", out, "--heldout", 0.1, "--workers", 1,
            "--shard-tokens", 500, inputs(lab) / f"{version}.txt"]


def _clean(lab, out, version):
    return ["--preset", "web", "--min-chars", 20, "--out", out, inputs(lab) / f"{version}.jsonl"]


def _dedup(lab, out, version):
    return ["--workers", 1, "--out", out, inputs(lab) / f"{version}.jsonl"]


def _merge_adapter(lab, out, version):
    return ["merge", "--base", lab.base, "--adapter", inputs(lab) / f"run_adapter_{version}" / "adapter", "--out", out]


def _merge_model(lab, out, version):
    return ["merge", "--base", lab.base, "--model", inputs(lab) / f"run_model_{version}" / "final", "--alpha", 0.5,
            "--out", out]


def _extend(lab, out, version):
    return ["extend", "--model", lab.base, "--new-tokens", 5 + version, "--out", out, inputs(lab) / f"{version}.txt"]


def _train_tokenizer(lab, out, version):
    return ["train", "--vocab-size", 280 + version, "--out", out, inputs(lab) / f"{version}.txt"]


def _export(lab, out, version):
    checkpoint = max((inputs(lab) / f"run_model_{version}" / "checkpoints").glob("step_*"))
    # As `hf.py export` starts it: in a process of its own, in which no operation would be counted.
    return [checkpoint, "--out", out]


def _sample(lab, out, version):
    return ["replay", "--model", lab.base, "--documents", 3, "--max-new-tokens", 8, "--seed", version, "--out", out]


NEW = [
    Command("pack", "data", _pack), Command("clean", "clean", _clean, record="drops.json"),
    Command("dedup", "dedup", _dedup, record="dedup.json"),
    Command("merge of an adapter", "lora", _merge_adapter), Command("merge with a base", "forget", _merge_model),
    Command("extend", "tokenizer", _extend), Command("train a tokenizer", "tokenizer", _train_tokenizer),
    Command("export", "stages.export", _export), Command("sample replay", "forget", _sample, suffix=".jsonl"),
]
OVER = [replace(each, name=f"{each.name} --overwrite", overwrites=True) for each in NEW if not each.suffix]
ALL = [*NEW, *OVER]


def content(path: Path) -> dict:
    """{file: hash of its bytes} of a folder or a file, but for hidden ones; empty where nothing is."""
    path = Path(path)
    if path.is_file():
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    found = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in found.items()
            if not any(part.startswith(".") for part in Path(name).parts)}


def is_whole(each: Command, found: dict, old: dict, new: dict) -> bool:
    """Whether a disturbed command left what was there before, or all that it was to make."""
    if each.record:
        return all(digest in (old.get(name), new.get(name)) for name, digest in found.items()) and old.keys() <= {
            *found, *(old.keys() - new.keys()), each.record}
    return found in (old, new)


def made(lab: Lab, each: Command, version: int) -> Path:
    """What an undisturbed command makes, in a folder of its own; made once."""
    room = lab.folder / "made" / f"{each.name.replace(' ', '_')}_{version}"
    out = room / f"out{each.suffix}"
    if not room.exists():
        if each.overwrites and version:
            made(lab, each, 0)
        room.mkdir(parents=True)
        # With --overwrite there, as it is in the trial: what a command notes of its options would differ.
        if each.overwrites and version:
            shutil.copytree(made(lab, each, 0), out)
        outcome = run(each.module, each.line(lab, out, version))
        if outcome.status != 0:
            shutil.rmtree(room)
            raise AssertionError(f"{each.name}: {outcome}\n{outcome.err}")
    return out


def each_command(lab: Lab, row: Row):
    """Yield the commands that work undisturbed; one that does not is a failure of the row."""
    for each in ALL:
        try:
            made(lab, each, 1)
        except AssertionError as error:
            row.check(False, f"{each.name} fails undisturbed: {str(error).splitlines()[0]}")
            continue
        yield each


def put_old(lab: Lab, each: Command, out: Path):
    """What was there before, where the command overwrites."""
    if each.overwrites:
        shutil.copytree(made(lab, each, 0), out)
