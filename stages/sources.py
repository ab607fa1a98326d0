"""The sources of a run as packed folders: conversations that are named by their files are packed here, before the rest.

`data.sources.NAME.format chat` (or preference) with a path of records, .jsonl or what else text/conversations.py reads,
is packed with the model's tokenizer and chat template into RUN/packed/NAME, whole or not at all. A run that goes on
takes it as it is, where it is what the settings say; stages/build.py verifies it as it does each source.
"""

import dataclasses
import re
from pathlib import Path

from tqdm import tqdm

from core import checkpoint
from core.errors import UserError
from text.chat import describe, pack_conversations
from text.conversations import RECORDS
from text.corpus import describe_inputs
from text.kinds import list_files
from text.shards import packed_folders, read_manifest
from text.template import read_template


def is_packed(path: str) -> bool:
    return any(Path(path, name).is_file() for name in ("manifest.json", "buckets.json"))


def refuse_sources(sources: dict):
    """UserError for a source that is neither packed nor, where its format is one of conversations, files of them."""
    for name, source in sources.items():
        option, has_records = f"data.sources.{name}", source.format in ("chat", "preference")
        if not source.path or (not has_records and not Path(source.path).is_dir()):
            wrong = f"{source.path} does not exist" if source.path and not Path(source.path).exists() else (
                f"{source.path} is no folder" if source.path else "is not set")
            raise UserError(f"{option}.path {wrong}; name a folder made by data.py pack, or for conversations a .jsonl "
                            f"and {option}.format chat")
        if has_records and is_packed(source.path):
            continue
        if has_records and not source.path.startswith("hf://"):
            list_files([source.path], RECORDS)
        if has_records and not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"source {name!r} is packed into a folder of its name; give it one of letters, digits, - "
                            f"and _")
        if has_records and source.format == "preference" and source.learn == "all":
            raise UserError(f"{option}.learn all does nothing for preferences, whose answers alone are compared; leave "
                            f"it out")


def pack_sources(c, world, folder: Path | None, base, tokenizer) -> dict:
    """{name: SourceConfig} of the settings, each path a packed folder of the format that its source names. Rank 0
    packs, and the others wait for it."""
    sources = dict(c.data.sources)
    for name, source in sources.items():
        if source.format in ("", "text") or is_packed(source.path):
            refuse_other_format(name, source)
            continue
        assert folder is not None, "a run without a folder has no place to pack its sources"
        sources[name] = dataclasses.replace(source, path=str(folder / "packed" / name))
        if world.main:
            where = c.model.tokenizer or base.folder
            pack_source(name, source, folder, tokenizer, read_template(where))
        # The others begin when the folder is there.
        world.broadcast(None)
    return sources


def refuse_other_format(name: str, source):
    """UserError where a packed source is not of the format that the settings name."""
    for packed in packed_folders(source.path) if source.format else ():
        records = read_manifest(packed).get("records") or {"format": "text", "learn": "all"}
        if records["format"] != source.format:
            raise UserError(f"data.sources.{name}.format is {source.format}, but {source.path} was packed as "
                            f"{records['format']}; name its format, or pack it again with --format {source.format}")
        if source.learn == "all" != records["learn"]:
            raise UserError(f"data.sources.{name}.learn is all, but {source.path} was packed to learn responses; pack "
                            f"it again with --learn all")


def pack_source(name: str, source, folder: Path, tokenizer, template):
    """Pack a source of conversations into its folder of the run, unless that is done."""
    if tokenizer is None:
        raise UserError(f"source {name} is to be packed, and the model has no tokenizer; name one with "
                        f"--model.tokenizer")
    place, files = folder / "packed" / name, list_files([source.path], RECORDS)
    inputs, records = describe_inputs(files), describe(source.format, source.learn, template)
    # Before the first checkpoint all is packed anew: a file that was changed may have the size that it had.
    if is_packed(str(place)) and any(checkpoint.steps(folder / "checkpoints")):
        was = read_manifest(place)
        # What is left out as too long is counted there, and nothing is here.
        kept = {key: was["records"][key] for key in records} if was.get("records") else None
        if (kept, was["tokenizer"]["fingerprint"], was["inputs"]) == (records, tokenizer.fingerprint, inputs):
            return
        raise UserError(f"{source.path}, the tokenizer, its chat template or data.sources.{name} has changed since "
                        f"{place} was packed, and the run has begun with that; put them back, or choose another --out")
    with tqdm(unit=" documents", disable=None, desc=f"pack {name}") as bar:
        pack_conversations(files, tokenizer, template, place, source.format, learn=source.learn, bar=bar,
                           inputs=inputs, overwrite=True)
