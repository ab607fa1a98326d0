"""The index files of packed sources, manifest.json and buckets.json: each flipped bit of one is noticed, and each value
has its type, because an index may be a downloaded one.

Since the second version an index ends with the SHA-256 of all that stands before it: {..., "sha256": "9f86d0..."}.
Since the third a manifest says what its documents are: {..., "records": {"format": "chat", ...}}, None for plain text.
"""

import hashlib
import json
from pathlib import Path

from core.errors import UserError
from core.files import read_json, write_text
from core.foreign_files import find_odd

VERSIONS = (1, 2, 3)
SPLITS = ("train", "heldout")
# What a buckets.json holds, as a shape for `find_odd`; the first version had no hash.
BUCKETS = {"score": str, "first": lambda value: value in ("low", "high"), str: (str, int), "buckets": [
    {"name": str, "low": float, "high": float, "documents": int, "tokens": int}]}
# The formats of documents of which not all tokens are learned.
MASKED = ("chat", "preference")


def write_index(path: Path, index: dict) -> None:
    """Write a manifest or buckets.json, which then tells each flipped bit of itself."""
    index.pop("sha256", None)
    body = json.dumps(index, indent=1, ensure_ascii=False).removesuffix("\n}")
    index["sha256"] = hashlib.sha256(body.encode(errors="backslashreplace")).hexdigest()
    write_text(path, f'{body},\n "sha256": "{index["sha256"]}"\n}}\n')


def read_index(path: Path, kind: str, entries_of) -> dict:
    """The JSON object in a file of this format, in which each of entries_of(object) names a file or a folder beside it.
    UserError where it is another or not what was written, and where a name leads out of the folder: the index may be a
    downloaded one."""
    try:
        index = read_json(path, dict)
        if index["format"] != kind or index["version"] not in VERSIONS:
            raise UserError(f"it is {index['format']} {index['version']}")
        body, _, end = path.read_bytes().rpartition(b',\n "sha256": "')
        # A flipped bit makes the first version of the third, which had no hash.
        if (index["version"] > 1 or "sha256" in index) and end != f'{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode():
            raise UserError("it is not what was written")
        names = [entry["name"] for entry in entries_of(index)]
    except (UserError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or of another version; pack the folder again ({error})") from None
    for name in names:
        if any(part in ("", ".", "..") or Path(part).name != part for part in str(name).split("/")):
            raise UserError(f"{path} points outside its folder: {name!r}")
    return index


def list_shards(manifest: dict) -> list[dict]:
    """What a manifest says of each shard, those of the held-out split last."""
    return [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]


def check_buckets(index: dict) -> list[dict]:
    """The score buckets in a buckets.json; ValueError where a value is of a wrong type."""
    if odd := find_odd(index, BUCKETS):
        raise ValueError(odd)
    return index["buckets"]


def check_manifest(manifest: dict) -> list[dict]:
    """`list_shards` of a manifest whose values are of the right types; LookupError, TypeError or ValueError where not.
    Numbers of tokens and ids are int32 in a shard's header, and hashes 32 bytes."""
    def check(record: dict, **limits):
        for key, limit in limits.items():
            value = record[key]
            if type(value) is not (int if limit else str) or (limit and not 0 <= value < limit) or (
                    key.endswith(("sha256", "fingerprint")) and len(bytes.fromhex(value)) != 32):
                raise ValueError(f"{key} is {value!r}")
    if manifest["dtype"] not in ("uint16", "uint32") or type(manifest["bos"]) is not bool:
        raise ValueError(f"dtype is {manifest['dtype']!r} and bos {manifest['bos']!r}")
    tokenizer = manifest["tokenizer"]
    ids = {key: 2**31 for key in ("bos_id", "eos_id") if tokenizer[key] is not None}
    check(tokenizer, fingerprint=None, library=None, vocab_size=2**31, **ids)
    records = manifest.get("records")
    if records is not None:
        check(records, format=None, template=None, learn=None, too_long=2**62)
        if records["format"] not in MASKED or type(manifest["eos"]) is not bool:
            raise ValueError(f"its documents are of the format {records['format']!r}")
    for split in SPLITS:
        check(manifest["splits"][split], tokens=2**62, documents=2**62, bytes=2**62)
    for shard in list_shards(manifest):
        check(shard, name=None, tokens=2**31, documents=2**31, max_id=2**31, bytes=2**62,
              sha256=None, idx_sha256=None, bytes_sha256=None, **({"mask_sha256": None} if records else {}))
    return list_shards(manifest)
