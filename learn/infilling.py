"""A causal model learns to fill in what is missing: spans (T5), spans of seven kinds (UL2), the middle (FIM).

Each document of a sequence is rewritten within itself, so that no span and no middle crosses a document:

    span, ul2    the cat sat on the mat </s>    the <0> sat on <1> </s>  <0> cat <1> the mat <2>    learned behind <0>
    fim          the cat sat on the mat </s>    <PRE> the cat <SUF> the mat <MID> sat on </s>       learned: everything

What is put in takes room, so fewer tokens of text are read (text_length): as many as fit however one document of that
length is rewritten. Where a sequence of several documents takes still more, its last tokens are left out; the measure
`cut` is their share. Shapes: B sequences, T tokens, V vocabulary.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from core.errors import UserError
from data import Batch
from learn.objectives import IGNORE, Causal


@dataclass
class Rewritten(Batch):
    """A batch that also says, for the measures, what became of the text."""

    # int32 [B, T]: which of the objective's `parts` each target belongs to, counted from 1; 0 is none.
    part: torch.Tensor | None = None
    # int64 [B]: how many tokens that could be learned were read, and how many of them found no room.
    read: torch.Tensor | None = None
    cut: torch.Tensor | None = None


class Infilling(Causal):
    """What these objectives share. Each has rewrite(tokens, labels, draws) of a document, and a bound on its length."""

    parts: tuple[str, ...] = ()
    """names of the parts of which the loss is told apart"""
    streams = 4
    """independent random values for each position of the text"""

    def __init__(self, mask_documents: bool, special_ids, z_loss: float = 0.0):
        super().__init__(mask_documents, z_loss)
        self.special = np.array(sorted(special_ids), np.int32)

    @property
    def token_ids(self):
        return [self.special.tolist()]

    @property
    def measures(self) -> tuple[str, ...]:
        return "accuracy", *self.parts, "cut"

    @property
    def text_objective(self):
        return Causal(self.mask_documents)

    def longest(self, n: int) -> int:
        """The most tokens that n tokens of a document become."""
        raise NotImplementedError

    def rewrite(self, tokens: np.ndarray, labels: np.ndarray, draws: np.ndarray) -> tuple:
        """(tokens, labels, part), int32 [m] each, of a document, tokens and labels [n]. draws: float32 [streams, n] in
        [0, 1), the document's own."""
        raise NotImplementedError

    def text_length(self, context: int) -> int:
        fitting = [n for n in range(1, context + 1) if self.longest(n + self.shift) <= context + 1]
        if not fitting:
            raise UserError(f"data.context {context} is too short for what this objective puts into a text; raise it")
        return fitting[-1]

    def corrupt(self, batch, rng):
        B, length = batch.tokens.shape
        draws = np.stack([rng.uniform(stream, length).numpy() for stream in range(self.streams)], axis=1)
        old = {name: getattr(batch, name).numpy() for name in ("tokens", "labels", "position_ids", "doc_start")}
        # Padding is a document of its own, as Sequences.finish makes it.
        made = {name: np.zeros((B, length), np.int32) for name in (*old, "part")}
        made["labels"][:] = IGNORE
        read, cut = np.zeros(B, np.int64), np.zeros(B, np.int64)
        for row in range(B):
            starts, end = np.unique(old["doc_start"][row]).tolist(), 0
            labels = old["labels"][row].copy()
            # A sequence's first token is a target nowhere: it stands at the end of the one before, or nothing does.
            labels[:self.shift] = IGNORE
            read[row] = (labels != IGNORE).sum()
            for a, b in zip(starts, [*starts[1:], length]):
                fitting, n = self.rewrite_to_fit(old["tokens"][row, a:b], labels[a:b], draws[row, :, a:b], length - end)
                here = slice(end, end + len(fitting[0]))
                made["tokens"][row, here], made["labels"][row, here], made["part"][row, here] = fitting
                made["doc_start"][row, end:] = end
                # Positions count from each document or along the sequence, as they did.
                made["position_ids"][row, end:] = np.arange(length - end) + (end if old["position_ids"][row, a] else 0)
                cut[row] += (labels[a + n:b] != IGNORE).sum()
                end = here.stop
            made["doc_start"][row, end:] = end
        tensors = {name: torch.from_numpy(array) for name, array in made.items()}
        made = Rewritten(**vars(batch) | tensors, read=torch.from_numpy(read), cut=torch.from_numpy(cut))
        return replace(super().corrupt(made, rng), part=made.part[:, 1:])

    def rewrite_to_fit(self, tokens, labels, draws, room: int) -> tuple:
        """(what `rewrite` makes of the first n tokens, n): of all of them, or of as many as give at most `room`."""
        n = len(tokens)
        if (labels == IGNORE).all():
            # There is nothing to learn in it, as in padding.
            n = min(n, room)
            return (tokens[:n], labels[:n], np.zeros(n, np.int32)), n
        made = self.rewrite(tokens, labels, draws)
        if len(made[0]) <= room:
            return made, n
        n = max(0, n + room - len(made[0]))
        return self.rewrite_to_fit(tokens[:n], labels[:n], draws[:, :n], room)

    def loss(self, model, batch, want_hits: bool = False):
        loss, count, metrics = super().loss(model, batch, want_hits)
        token_loss, is_target = metrics["token_loss"], batch.labels != IGNORE
        for i, name in enumerate(self.parts, 1):
            here = is_target & (batch.part == i)
            metrics["measures"][name] = (token_loss * here).sum(), here.sum()
        metrics["measures"]["cut"] = batch.cut.sum(), batch.read.sum()
        return loss, count, metrics


def count_spans(n: int, density: float, mean: float) -> tuple[int, int]:
    """(noise tokens, spans) among n >= 2 tokens, as T5 counts them: at least one of each, and a token kept."""
    noise = min(max(round(n * density), 1), n - 1)
    return noise, min(max(round(noise / mean), 1), n - noise)


def cut_randomly(total: int, parts: int, draws: np.ndarray) -> np.ndarray:
    """int64 [parts] lengths of at least 1 that sum to `total`; every such composition is equally likely."""
    cuts = np.sort(np.argsort(draws[:total - 1], kind="stable")[:parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


class Span(Infilling):
    """T5's span corruption (arXiv 1910.10683) for a decoder: the text with a sentinel for each span, then every span
    behind its sentinel, and a last sentinel that says it is all.

    The budget is exact: of a document's n ordinary tokens round(n * density) are noise, in round(noise / mean) spans.
    The lengths of the spans and of the text between are two random compositions (T5's random_spans_noise_mask: it
    begins with text and ends with noise, so that a document with one span lacks its end). Special tokens and what the
    source masks are never noise; a span that meets one is parted there.

    Of the document only the spans are learned and the sentinels behind them. In the first part a target would be a
    token that follows a hole, which teaches that text has holes; and the first sentinel of the second part is given by
    whoever asks for the spans.
    """

    def __init__(self, mask_documents: bool, special_ids, sentinels: list[int], density: float = 0.15,
                 mean: float = 3.0, z_loss: float = 0.0):
        super().__init__(mask_documents, {*special_ids, *sentinels}, z_loss)
        self.sentinels, self.density, self.mean = np.array(sentinels, np.int32), density, mean

    @property
    def token_ids(self):
        return [*super().token_ids, self.sentinels.tolist()]

    @property
    def shift(self) -> int:
        # A span's token is a target itself: sequences of text need no token in common.
        return 0

    def settings(self) -> list[tuple[float, float]]:
        """(density, mean length) of each way of choosing spans."""
        return [(self.density, self.mean)]

    def longest(self, n: int) -> int:
        spans = max(count_spans(n, *setting)[1] for setting in self.settings()) if n > 1 else 1
        return n + 2 * spans + 1

    def text_length(self, context: int) -> int:
        n = super().text_length(context)
        needed = max(count_spans(n, *setting)[1] for setting in self.settings()) + 1 if n > 1 else 2
        if needed > len(self.sentinels):
            raise UserError(f"a document of {n} tokens needs {needed} sentinels, and the vocabulary has "
                            f"{len(self.sentinels)}; add more: python tokenizer.py add --model DIR --for span "
                            f"--sentinels {needed} --out DIR2, or lower data.context")
        return n

    def choose(self, n: int, draws: np.ndarray) -> tuple[np.ndarray, int]:
        """(bool [n], which of the document's n ordinary tokens are noise; the number of the part they belong to)."""
        return self.choose_spans(n, self.density, self.mean, draws), 0

    def choose_spans(self, n: int, density: float, mean: float, draws: np.ndarray) -> np.ndarray:
        noise, spans = count_spans(n, density, mean)
        lengths = np.stack([cut_randomly(n - noise, spans, draws[0]), cut_randomly(noise, spans, draws[1])], axis=1)
        return np.repeat(np.arange(2 * spans) % 2 == 1, lengths.ravel())

    def rewrite(self, tokens, labels, draws):
        ordinary = np.flatnonzero((labels != IGNORE) & ~np.isin(tokens, self.special))
        if len(ordinary) < 2:
            return tokens, np.full_like(labels, IGNORE), np.zeros_like(labels)
        noise, (chosen, part) = np.zeros(len(tokens), bool), self.choose(len(ordinary), draws)
        noise[ordinary] = chosen
        begins = noise & ~np.concatenate([[False], noise[:-1]])
        # The number of the span of each noise token. What special tokens part may give more spans than have sentinels.
        number = np.maximum(np.cumsum(begins) - 1, 0)
        noise, begins = (mask & (number < len(self.sentinels) - 1) for mask in (noise, begins))
        last, kept = number[noise][-1] + 1, ~noise | begins
        first_part = self.mark(np.where(begins, self.sentinels[np.minimum(number, last)], tokens)[kept], part)
        at = np.append(np.flatnonzero(begins[noise]), noise.sum())
        made = np.concatenate([first_part, np.insert(tokens[noise], at, self.sentinels[:last + 1])])
        # Behind the first sentinel of the second part, everything is learned.
        targets = np.where(np.arange(len(made)) > len(first_part), made, IGNORE)
        return made, targets, np.full(len(made), part)

    def mark(self, text: np.ndarray, part: int) -> np.ndarray:
        """The kept text, marked with the way in which its spans were chosen."""
        return text


class UL2(Span):
    """UL2's mixture of denoisers (arXiv 2205.05131, table 1), each document under one of the seven: R, T5's own short
    spans; X, many or long spans; S, the end of the text, whose length is uniform with the mean of a quarter of it.
    Where the vocabulary has tokens for the modes, the document's mode stands before its text."""

    parts = ("r", "s", "x")
    denoisers = ((1, 0.15, 3), (1, 0.15, 8), (2, None, None), (3, 0.5, 3), (3, 0.5, 8), (3, 0.15, 64), (3, 0.5, 64))
    """part, density and mean length of each"""

    def __init__(self, mask_documents: bool, special_ids, sentinels: list[int], modes: list[int] | None = None,
                 z_loss: float = 0.0):
        super().__init__(mask_documents, {*special_ids, *(modes or [])}, sentinels, z_loss=z_loss)
        self.modes = modes

    @property
    def token_ids(self):
        return [*super().token_ids, self.modes]

    def settings(self):
        return [(density, mean) for _, density, mean in self.denoisers if density]

    def longest(self, n):
        return super().longest(n) + bool(self.modes)

    def choose(self, n, draws):
        part, density, mean = self.denoisers[int(draws[2, 0] * len(self.denoisers))]
        if density:
            return self.choose_spans(n, density, mean, draws), part
        return np.arange(n) >= n - 1 - int(draws[3, 0] * (n // 2)), part

    def mark(self, text, part):
        first = np.argmin(np.isin(text, self.special))
        return np.insert(text, first, self.modes[part - 1]) if self.modes else text


class FillInTheMiddle(Infilling):
    """Of a share `rate` of the documents the middle moves to the end, so that it is predicted from both sides (Bavarian
    et al., arXiv 2207.14255): prefix, suffix, middle (PSM), or in a share `spm_share` of them suffix, prefix, middle
    (SPM, joined as the paper's variant that is used with PSM). Everything is learned, as in the paper.

        PSM    <PRE> the cat <SUF> the mat <MID> sat on        SPM    <PRE> <SUF> the mat <MID> the cat sat on

    The two cuts are uniform over the borders of tokens, not of characters as in the paper: the middle of a token that a
    cursor stands in is no case that was trained. Special tokens at a document's ends (BOS, EOS) stay there.
    """

    parts = ("middle", "left_to_right")

    def __init__(self, mask_documents: bool, special_ids, tokens: list[int], rate: float = 0.5, spm_share: float = 0.5,
                 z_loss: float = 0.0):
        """tokens: the ids that stand before prefix, suffix and middle."""
        super().__init__(mask_documents, {*special_ids, *tokens}, z_loss)
        self.tokens, self.rate, self.spm_share = tokens, rate, spm_share

    @property
    def token_ids(self):
        return [*super().token_ids, self.tokens]

    def longest(self, n):
        return n + 3

    def rewrite(self, tokens, labels, draws):
        ordinary = np.flatnonzero(~np.isin(tokens, self.special))
        if draws[0, 0] >= self.rate or not len(ordinary):
            return tokens, labels, np.full(len(tokens), 2, np.int32)
        begin, end = ordinary[0], ordinary[-1] + 1
        first, second = sorted(begin + int(draws[stream, 0] * (end - begin + 1)) for stream in (1, 2))
        arrays = tokens, labels, np.repeat([0, 1, 0], [first, second - first, len(tokens) - second]).astype(np.int32)
        cuts = [begin, first, second, end]
        before, prefix, middle, suffix, behind = zip(*(np.split(array, cuts) for array in arrays))
        prefix_mark, suffix_mark, middle_mark = (([i], [i], [0]) for i in self.tokens)
        if draws[3, 0] < self.spm_share:
            order = before, prefix_mark, suffix_mark, suffix, middle_mark, prefix, middle, behind
        else:
            order = before, prefix_mark, prefix, suffix_mark, suffix, middle_mark, middle, behind
        return tuple(map(np.concatenate, zip(*order)))
