"""Which documents are held out, and whether a source trains on what another holds out.

A document is held out by the hash of its normal form, so that copies which differ in line ends, or in how a letter with
an accent is written, never stand on both sides. A text that is in its normal form has the hash of its bytes.
"""

import hashlib
import unicodedata

import numpy as np

from core.errors import UserError

# Of a source's held-out documents, the share that other sources may train on before a run is refused.
MOST_LEAKED = 0.1


def normalise(text: str) -> str:
    """NFC, line ends as "\\n", none of them around the text."""
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").strip("\r\n")


def is_held_out(text: bytes, share: float) -> bool:
    """Whether the hash of a document's text puts it into the held-out `share`."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % 10000 < round(10000 * share)


def find_leaks(heldout: dict, sources: dict, decode) -> dict[tuple[str, str], int]:
    """{(source, another): how many documents held out in the one are trained on in the other}, of equal normal forms.

    heldout: {source: [(ids, text bytes, ...)]}. sources: {source: Shards of what is trained on}. decode: ids -> text.
    Only documents that are within 2 tokens and 2 bytes of a held-out one are read.
    """
    texts, near = {}, set()
    for name, documents in heldout.items():
        for i, (ids, nbytes, *_) in enumerate(documents):
            texts.setdefault(normalise(decode(ids)), []).append((name, i))
            near |= {(nbytes + b << 32) + len(ids) + t for b in range(-2, 3) for t in range(-2, 3)}
    near, found = np.array(sorted(near), np.int64), {}
    for other, shards in sources.items():
        around = shards.manifest["bos"] + shards.manifest.get("eos", True)
        lengths = np.diff(shards.document_ends(), prepend=0) - around
        nbytes = np.concatenate([np.zeros(0, np.int64), *(part.astype(np.int64) for part in shards.byte_maps)])
        for index in np.flatnonzero(np.isin((nbytes << 32) + lengths, near)).tolist():
            for name, i in texts.get(normalise(decode(shards.text_document(index)[0])), ()):
                if name != other:
                    found.setdefault((name, other), set()).add(i)
    return {pair: len(which) for pair, which in found.items()}


def judge_leaks(leaks: dict[tuple[str, str], int], heldout: dict) -> list[str]:
    """A warning for each pair of `find_leaks`; UserError where so much leaks that a score would mean nothing."""
    lines = []
    for (name, other), count in leaks.items():
        line = (f"{count} of the {len(heldout[name])} documents held out in source {name} are trained on in source "
                f"{other}, so its score is better than it should be; pack both again with the same --heldout")
        if count > MOST_LEAKED * len(heldout[name]):
            raise UserError(line)
        lines.append(f"warning: {line}")
    return lines
