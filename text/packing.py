"""Sources -> sequences of T + 1 tokens: which tokens share a sequence. Which sequence comes when is data.py's part.

A sequence is made of pieces, and `Sequences.append` writes one. It has one token more than the context, because inputs
and targets are not yet apart: the objective shifts once. B sequences, T tokens of context, L tokens of a source.
"""

import numpy as np
import torch

from core.errors import UserError
from kernels.cross_entropy import IGNORE
from text.shards import Shards


class Sequences:
    """B sequences that are being filled: tokens, labels and doc_start, int32 [B, length].

    doc_start says, once `finish` has completed it, where in its sequence each position's document begins. A position
    that no piece fills is padding: token 0, label -100, and a document of its own, so that no text attends to it.
    """

    def __init__(self, B: int, length: int):
        self.tokens = np.zeros((B, length), np.int32)
        self.labels = np.full((B, length), IGNORE, np.int32)
        self.doc_start = np.zeros((B, length), np.int32)
        # Where the next piece of each sequence goes.
        self.end = np.zeros(B, np.int64)

    def append(self, row: int, tokens: np.ndarray, labels: np.ndarray, begins: np.ndarray | None = None):
        """Write a piece, tokens and labels [n], behind what sequence `row` has. A document begins with the piece and at
        each of the positions `begins` [k] in it."""
        at = int(self.end[row])
        end = self.end[row] = at + len(tokens)
        self.tokens[row, at:end] = tokens
        self.labels[row, at:end] = labels
        self.doc_start[row, at] = at
        if begins is not None:
            self.doc_start[row, at + begins] = at + begins

    def finish(self, reset_positions: bool = True) -> dict[str, torch.Tensor]:
        """{name: int32} of the sequences that have a piece, and of position_ids, which count from the beginning of each
        document or along the whole sequence."""
        B, length = np.count_nonzero(self.end), self.tokens.shape[1]
        padded = np.flatnonzero(self.end < length)
        self.doc_start[padded, self.end[padded]] = self.end[padded]
        np.maximum.accumulate(self.doc_start, axis=1, out=self.doc_start)
        positions = np.arange(length, dtype=np.int32) - self.doc_start * reset_positions
        arrays = {"tokens": self.tokens, "labels": self.labels, "position_ids": positions, "doc_start": self.doc_start}
        return {name: torch.from_numpy(array[:B]) for name, array in arrays.items()}


class Packing:
    """A source cut into sequences as config.packing (mixture.DataConfig) says, the same number of them in every epoch.

    shift: how far a target stands behind its input: 1 where the next token is predicted, 0 where a token itself is
    (masked). A document of more than T + shift tokens is cut into pieces of T + shift at a stride of T, so that each
    token, with a shift of 1 but for a document's first, is a target exactly once per epoch. With T = 8, one of 20
    tokens becomes 0..8, 8..16 and 16..19, or 0..7, 8..15 and 16..19.

    window: the source is one document of L + shift tokens, which with a shift ends with its first token again. It
    begins at another place in every epoch. Only its last piece is short; with drop_last it is left out. Otherwise the
    sequences are the same in every epoch. About 40 bytes of memory per document.

    text_length: T, where the objective puts more into a sequence than text; the rest of the context is then padding.

    A source with a loss mask, conversations, is packed as best_fit also where the rest is in windows, which would part
    most answers from their prompts. A piece in which nothing is learned is left out, so each sequence has a target.

    A preference source is packed by pairs, chosen and rejected whole in one sequence: best_fit, or with `document` a
    pair in each. A pair of more than T + shift tokens is left out.
    `kind` is how the source is packed, in words.
    """

    def __init__(self, shards: Shards, config, shift: int = 1, text_length: int | None = None):
        self.context, self.pairs_left_out, self.pieces_left_out, self.kind = config.context, 0, 0, config.packing
        self.room, self.cut, self.torn = (text_length or config.context) + shift, 0, 0
        if shards.format == "preference":
            self._pack_pairs(shards, config, shift)
            return
        if shards.mask_maps is not None and config.packing == "window":
            self.kind = "best_fit"
        self.shards, self.is_circle = shards, self.kind == "window"
        T, L = text_length or config.context, shards.tokens
        ends = np.array([L + shift]) if self.is_circle else shards.document_ends()
        lengths = np.diff(ends, prepend=0)
        drop = config.drop_last and self.is_circle
        parts = np.maximum(1, (lengths - shift) // T if drop else -(-(lengths - shift) // T))
        part = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        begin = np.repeat(ends - lengths, parts) + part * T
        length = np.minimum(np.repeat(lengths, parts) - part * T, T + shift)
        if shards.mask_maps is not None:
            kept = self._find_learned(begin, length, ends, lengths, shift)
            part, begin, length = part[kept], begin[kept], length[kept]
        sequence = best_fit_decreasing(length, T + shift) if self.kind == "best_fit" else np.arange(len(length))
        self._lay_out(sequence, begin, length, (part > 0) & (shift and not self.is_circle))
        # Positions of an epoch without a token; below 0, the tokens that drop_last leaves out.
        self.padded = self.sequences * T - L if self.is_circle else self.sequences * (T + shift) - int(length.sum())

    def _find_learned(self, begin, length, ends, lengths, shift: int) -> np.ndarray:
        """Which pieces have something to learn, bool [pieces]. begin, length: theirs; ends, lengths: the documents'."""
        long = np.flatnonzero(lengths > self.room)
        # What stands behind the first piece of a conversation does not see where that begins.
        answers = count_answers(self.shards, np.append(begin + shift, ends[long] - lengths[long] + self.room),
                                np.append(begin + length, ends[long]))
        kept = answers[:len(begin)] > 0
        self.cut, self.torn, self.pieces_left_out = len(long), int(answers[len(begin):].sum()), int((~kept).sum())
        return kept

    def describe_loss(self, name: str) -> list[str]:
        """What the context is too short for, in lines for the user; name: the source's."""
        longer = f"of source {name} are longer than data.context {self.context}"
        if self.pairs_left_out:
            return [f"{self.pairs_left_out:,} pairs {longer}, and left out"]
        if not self.cut or self.shards.manifest["records"]["learn"] == "all":
            return []
        return [f"{self.cut:,} of {self.shards.documents:,} conversations {longer}: {self.torn:,} answers stand "
                f"without their whole prompt, and {self.pieces_left_out:,} pieces without an answer are left out; "
                f"raise it, or pack with --max-tokens {self.room}"]

    def _pack_pairs(self, shards: Shards, config, shift: int):
        self.shards, self.is_circle, room = shards, False, config.context + shift
        ends = shards.document_ends()
        lengths = np.diff(ends, prepend=0)
        if len(lengths) % 2:
            raise UserError(f"{shards.folder} holds {len(lengths)} documents, and those of preferences come in pairs; "
                            f"pack it again")
        sizes = lengths.reshape(-1, 2).sum(1)
        kept = sizes <= room
        self.pairs_left_out = int((~kept).sum())
        alone = config.packing == "document" or not kept.any()
        self.kind = "a pair in each sequence" if config.packing == "document" else "best_fit of whole pairs"
        sequence = np.arange(kept.sum()) if alone else best_fit_decreasing(sizes[kept], room)
        length = lengths[kept.repeat(2)]
        self._lay_out(sequence.repeat(2), (ends - lengths)[kept.repeat(2)], length, np.zeros(len(length), bool))
        self.padded = self.sequences * room - int(length.sum())

    def _lay_out(self, sequence: np.ndarray, begin: np.ndarray, length: np.ndarray, was_target: np.ndarray):
        """Put pieces into the sequences of these numbers; the pieces of one keep their order."""
        order = np.argsort(sequence, kind="stable")
        # [pieces, 3], sequence after sequence; sequence n has the pieces from first[n] to before first[n + 1]
        self.table = np.stack([begin, length, was_target], axis=1)[order]
        self.first = np.cumsum([0, *np.bincount(sequence)])
        self.sequences = len(self.first) - 1

    def pieces(self, number: int, key: int) -> list[list[int]]:
        """[where in the source it begins, its tokens, whether its first token is a target in another piece] of each
        piece of sequence `number` in the epoch that `key` stands for."""
        offset = key % self.shards.tokens if self.is_circle else 0
        return (self.table[self.first[number]:self.first[number + 1]] + [offset, 0, 0]).tolist()

    def read(self, number: int, sequences: Sequences, row: int, key: int = 0):
        """Fill `row` of `sequences` with sequence `number`, in the epoch that `key` stands for."""
        for begin, length, was_target in self.pieces(number, key):
            tokens, begins = self.shards.read(begin, length)
            learned = self.shards.read_mask(begin, length)
            labels = tokens if learned is None else np.where(learned, tokens.astype(np.int32), IGNORE)
            sequences.append(row, tokens, labels, begins)
            if was_target:
                sequences.labels[row, sequences.end[row] - length] = IGNORE


def count_answers(shards: Shards, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """int64 [n]: how many answers, runs of learned tokens, there are in the tokens from begin [n] to before end [n] of
    a source with a mask, each range within a document. Each shard's mask is read once, a byte of memory per token."""
    found = np.zeros(len(begin), np.int64)
    for mask, tokens, first in zip(shards.mask_maps, shards.token_maps, shards.first_token):
        own = np.flatnonzero((first <= begin) & (begin < end) & (end <= first + len(tokens)))
        learned, low, high = np.unpackbits(mask, count=len(tokens)), begin[own] - first, end[own] - first
        starts = np.flatnonzero(learned[1:] > learned[:-1]) + 1
        found[own] = starts.searchsorted(high) - starts.searchsorted(low, "right") + learned[low]
    return found


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [n]: the bin of each size [n], the largest placed first, each in the fullest bin that has room for it.

    Capacity 10, sizes 6 3 5 4 2. In falling order: 6 opens bin 0 (room 4), 5 opens bin 1 (room 5), 4 fits both and
    fills bin 0, the fuller one; 3 and 2 fill bin 1. The answer is 0 1 1 0 1.

    This cuts no document that would fit (Ding et al. 2024, arXiv 2404.10830). Equal sizes are placed together,
    so the work grows with the distinct pairs of size and room, not with n (Krell et al. 2021, arXiv 2107.02027).
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    # The bins by the room that they have left, and how many these are. At first all are empty.
    bins_with = [*([] for _ in range(capacity)), [np.arange(len(sizes))]]
    count = np.append(np.zeros(capacity, np.int64), len(sizes))
    for items in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1) if len(sizes) else ():
        size = int(sizes[items[0]])
        while len(items):
            room = size + int((count[size:] > 0).argmax())
            # The many bins that are still empty are one array, which is not copied.
            those = np.concatenate(bins_with[room]) if room < capacity else bins_with[room][0]
            # A bin that takes one of the items is then the fullest with room, so it takes as many as it can hold.
            each = room // size
            filled, rest = divmod(min(len(items), len(those) * each), each)
            taken = filled * each + rest
            bins[items[:taken]] = np.repeat(those[:filled + 1], each)[:taken]
            bins_with[room], count[room] = [], 0
            for left, moved in ((room - each * size, those[:filled]), (room, those[filled + bool(rest):]),
                                (room - rest * size, those[filled:filled + bool(rest)])):
                bins_with[left].append(moved)
                count[left] += len(moved)
            items = items[taken:]
    return bins


def pack_sources(sources: dict[str, Shards], config, shift: int = 1, text_length: int | None = None
                 ) -> dict[str, Packing]:
    """Cut each source into sequences for an objective of this `shift` and `text_length`. The plan comes
    after it: it must know how many `sequences` one pass has."""
    for name, shards in sources.items():
        if not shards.tokens:
            raise UserError(f"source {name} ({shards.folder}) has no tokens in its {shards.split} split")
    packings = {name: Packing(shards, config, shift, text_length) for name, shards in sources.items()}
    for name, packing in packings.items():
        if not packing.sequences and not packing.pairs_left_out:
            where = f"{name} ({packing.shards.folder}) has nothing to learn in its {packing.shards.split} split"
            raise UserError(f"source {where}: none of its tokens is a target; pack it again")
        if not packing.sequences:
            raise UserError(f"each of the {packing.pairs_left_out:,} pairs of source {name} is longer than "
                            f"data.context {config.context}, and must stand whole in one sequence; raise it")
    return packings


def pack_in_order(segments, context: int, B: int):
    """Yield Sequences [B, T + 1] to score, the last perhaps not full, of segments (tokens [n], labels [n]), n <= T.

    A segment that does not fit beside the one before it begins a sequence. The last position of each stays padding.
    """
    sequences, row = Sequences(B, context + 1), 0
    for tokens, labels in segments:
        if sequences.end[row] + len(tokens) > context:
            row += 1
            if row == B:
                yield sequences
                sequences, row = Sequences(B, context + 1), 0
        sequences.append(row, tokens, labels)
    if sequences.end[0]:
        yield sequences
