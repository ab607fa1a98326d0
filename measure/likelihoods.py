"""Log-likelihoods of continuations under a model, by which multiple-choice and cloze items are scored.

A question is a list of requests, one for each choice: (ids of the context, ids of the continuation). What requests have
in common is computed once and kept as keys and values: first the beginning that all questions of a part share (few-shot
examples), then the context that the choices of one question share. Contexts of one length go through the model side by
side; continuations are padded on the right, where no token sees the padding. So a result does not depend on the batch
size, but for the rounding of matmuls of other shapes.

Shapes: B sequences, T tokens, D model width, V vocabulary.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from core import parallel
from core.sharding import device_of
from model import BY_LENGTH, KVCache

# A beginning of fewer tokens than so costs less to compute again than to copy.
FEWEST_SHARED = 8
# Values of logits that are made at a time: 256 MB in fp32.
MOST_LOGITS = 1 << 26


@dataclass
class Row:
    """One input sequence of the model and the requests that it answers.

    ids: all but the last id of context and continuation. targets: {(question, choice): ids of the continuation}, each
    of which is predicted at the last of the positions. Choices of one token share a row.
    """

    ids: tuple[int, ...]
    targets: dict[tuple[int, int], tuple[int, ...]]

    @property
    def own(self) -> int:
        """How many of the last positions a target is read from."""
        return max(map(len, self.targets.values()))


@dataclass
class Job:
    """What one rank computes at a time: rows behind contexts of one length. Without contexts the rows are behind the
    head alone. places: which of the contexts is that of each row."""

    contexts: list[tuple[int, ...]]
    rows: list[Row]
    places: list[int]

    def count_forwards(self, B: int) -> int:
        return bool(self.contexts) + math.ceil(len(self.rows) / B)


def shared_length(sequences: list[tuple[int, ...]]) -> int:
    """The length of the longest beginning that all sequences have in common."""
    # In the order of tuples, the first and the last differ where any two do.
    first, last = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def make_rows(questions: list, longest: int) -> tuple[list[list[Row]], int]:
    """([rows of each question], requests that were cut on the left because they have more than `longest` + 1 ids)."""
    rows, cut = [], 0
    for q, requests in enumerate(questions):
        own: dict[tuple, Row] = {}
        for c, (context, continuation) in enumerate(requests):
            ids = (*context, *continuation)
            cut += len(ids) > longest + 1
            # The last id is predicted, and is no input.
            inputs = ids[-(longest + 1):][:-1]
            own.setdefault(inputs, Row(inputs, {})).targets[q, c] = tuple(continuation)[-len(inputs):]
        rows.append([*own.values()])
    return rows, cut


def plan_jobs(rows: list[list[Row]], B: int, by_length: bool) -> tuple[tuple[int, ...], list[Job]]:
    """(ids that all of the questions begin with, jobs) of the rows of each question of one part.

    by_length: the model's rotations depend on the length of the sequence, so only rows of one length share a pass.
    """
    every = [row for question in rows for row in question]
    head, apart, together = 0, [], {}
    if len(every) > 1 and not by_length:
        head = min(shared_length([row.ids for row in every]), *(len(row.ids) - row.own for row in every))
        head *= head >= FEWEST_SHARED
    for question in rows:
        shared = 0
        if len(question) > 1 and not by_length:
            # The logits of a continuation's first token come from the last token before it, which every row keeps.
            shared = min(shared_length([row.ids for row in question]), *(len(row.ids) - row.own for row in question))
        if shared - head >= FEWEST_SHARED:
            together.setdefault(shared, []).append(question)
        else:
            apart += question
    jobs = []
    for shared, questions in sorted(together.items()):
        while questions:
            some = [questions.pop()]
            while questions and sum(map(len, some)) + len(questions[-1]) <= B:
                some.append(questions.pop())
            jobs.append(Job([question[0].ids[head:shared] for question in some], [*itertools.chain(*some)],
                            [i for i, question in enumerate(some) for _ in question]))
    apart.sort(key=lambda row: len(row.ids))
    for _, rows_of_length in itertools.groupby(apart, key=lambda row: len(row.ids) if by_length else 0):
        jobs += [Job([], [*some], []) for some in batched(rows_of_length, B)]
    return every[0].ids[:head], jobs


def batched(values, size: int):
    """Lists of `size` of the values, the last of which may be shorter."""
    values = iter(values)
    while some := [*itertools.islice(values, size)]:
        yield some


class Scorer:
    """Runs jobs on one rank. autocast: () -> the context of a forward pass."""

    def __init__(self, model, B: int, autocast=None):
        self.model, self.B, self.autocast = model, B, autocast
        self.device, self.forwards = device_of(model), 0
        self.head, self.found = None, {}

    def compute(self, tokens, cache: KVCache | None = None):
        """Lists of ids of one length, or padded -> hidden [B, T, D]."""
        tokens, self.forwards = torch.tensor(tokens, device=self.device), self.forwards + 1
        with self.autocast() if self.autocast else torch.autocast(self.device.type, enabled=False):
            return self.model(tokens, cache=cache)

    def logits(self, hidden):
        with self.autocast() if self.autocast else torch.autocast(self.device.type, enabled=False):
            return self.model.head(hidden).float()

    def begin(self, head: tuple[int, ...]):
        """Compute what the questions to come begin with."""
        self.head = None
        if head:
            self.head = KVCache(len(head))
            self.compute([head], self.head)

    def run(self, job: Job):
        before, width = self.head, len(job.contexts[0]) if job.contexts else 0
        if width:
            before = widen(self.head, [0] * len(job.contexts), width) if self.head else KVCache(width)
            self.compute(job.contexts, before)
        past = before.length if before else 0
        # Sorted by length, so that rows of one pass need little padding.
        order = sorted(range(len(job.rows)), key=lambda i: len(job.rows[i].ids))
        for some in batched(order, self.B):
            ids = [job.rows[i].ids[past:] for i in some]
            T = max(map(len, ids))
            cache = widen(before, [job.places[i] if width else 0 for i in some], T) if before else None
            hidden = self.compute([row + (0,) * (T - len(row)) for row in ids], cache)
            self.read(hidden, [(i, len(row.ids) - past, row) for i, row in enumerate(job.rows[i] for i in some)])

    def read(self, hidden, rows: list):
        """Find (sum of log-probabilities, whether all are the likeliest) of each target of rows in hidden [B, T, D];
        rows: (place among the B, length, row)."""
        picked, positions, tokens, targets, n = [], [], [], [], 0
        for i, length, row in rows:
            picked.append(hidden[i, length - row.own:length])
            n += row.own
            for key, ids in row.targets.items():
                positions += range(n - len(ids), n)
                tokens += ids
                targets.append((key, len(ids)))
        picked = torch.cat(picked)                                                      # [n, D]
        positions, tokens = (torch.tensor(x, device=self.device) for x in (positions, tokens))
        nats, is_best = torch.zeros(len(tokens), dtype=torch.float64), torch.zeros(len(tokens), dtype=torch.bool)
        step = max(1, MOST_LOGITS // self.model.config.vocab_size)
        for start in range(0, n, step):
            log_probs = self.logits(picked[start:start + step]).log_softmax(-1)         # [step, V]
            here = (positions >= start) & (positions < start + step)
            at, wanted = positions[here] - start, tokens[here]
            nats[here.cpu()] = log_probs[at, wanted].double().cpu()
            is_best[here.cpu()] = (log_probs.argmax(-1)[at] == wanted).cpu()
        nats, is_best = nats.tolist(), is_best.tolist()
        for key, length in targets:
            self.found[key] = math.fsum(nats[:length]), all(is_best[:length])
            del nats[:length], is_best[:length]

    def pad(self, forwards: int):
        """Make as many forward passes as the other ranks, because FSDP gathers the weights in each."""
        for _ in range(forwards):
            self.logits(self.compute([[0]]))


def widen(cache: KVCache, rows: list[int], room: int) -> KVCache:
    """A copy of the given rows of a cache, with room for so many tokens more."""
    new = KVCache(cache.length + room)
    new.length = cache.length
    for layer, pair in cache.layers.items():
        new.layers[layer] = [x.new_empty(len(rows), new.capacity, *x.shape[2:]) for x in pair]
        for store, x in zip(new.layers[layer], pair):
            store[:, :cache.length] = x[rows, :cache.length]
    return new


@torch.no_grad()
def log_likelihoods(model, questions: list, parts: list | None = None, longest: int | None = None, B: int = 32,
                    world=None, autocast=None, bar: str | None = None) -> tuple[list[list[tuple[float, bool]]], int]:
    """([[(log-likelihood of the continuation in nats, whether greedy decoding gives it)]], requests cut on the left).

    questions: [[(ids of the context, ids of the continuation)]], no continuation empty. parts: questions of one part
    share a beginning. longest: tokens that the model sees at most; default its positions. With a world, the ranks
    share the work and all return the same. bar: the name of a progress bar on a terminal; None: without.
    """
    longest = longest or model.config.max_position_embeddings
    world, mode = world or parallel.World(0, 1, device_of(model)), model.training
    team, teams = world.team
    rows, cut = make_rows(questions, longest)
    groups: dict = {}
    for question, part in zip(rows, parts or itertools.repeat("")):
        # A question that was cut does not begin as the others do.
        is_cut = any(len(row.ids) == longest for row in question)
        groups.setdefault((part, is_cut), []).append(question)
    scorer, by_length = Scorer(model, B, autocast), model.config.rope_scaling.get("rope_type") in BY_LENGTH
    plans = [plan_jobs(group, B, by_length) for group in groups.values()]
    shown = tqdm(total=sum(len(jobs) for _, jobs in plans), desc=bar, disable=None if bar and world.main else True)
    model.eval()
    for head, jobs in plans:
        scorer.begin(head)
        for together in batched(jobs, teams):
            world.barrier()
            world.check()
            if team < len(together):
                scorer.run(together[team])
            done = together[team].count_forwards(B) if team < len(together) else 0
            scorer.pad(max(job.count_forwards(B) for job in together) - done)
            shown.update(len(together))
    shown.close()
    model.train(mode)
    found = {key: value for part in world.gather(scorer.found) for key, value in part.items()}
    return [[found[q, c] for c in range(len(requests))] for q, requests in enumerate(questions)], cut
