"""Truth: plain Python loops in this file; best fit an item at a time. Laws: every token is a target once per epoch,
under every packing; a document that fits is not cut.
"""

import itertools
import random

import numpy as np
import pytest
from synthetic import counts_of, loader_of, source

import data
from learn.objectives import Masked
from text.mixture import DataConfig
from text.packing import best_fit_decreasing, pack_in_order, pack_sources
from text.shards import Shards

FIELDS = ("tokens", "labels", "position_ids", "doc_start")


@pytest.mark.parametrize(("context", "total"), [(8, 100), (8, 96), (16, 100), (100, 100), (99, 100), (101, 100),
                                                (300, 100), (1, 100), (7, 1)])
@pytest.mark.parametrize("shard_tokens", [10**8, 30])
def test_each_epoch_has_every_token_as_a_target_once(tmp_path, context, total, shard_tokens):
    lengths = [13, 1, 40, 1, 1, 25, 19] if total == 100 else [40, 56] if total == 96 else [1]
    shards = source(tmp_path / "s", lengths, shard_tokens)
    assert shards.tokens == total
    windows = -(-total // context)
    loader = loader_of({"s": shards}, counts_of(*[[windows]] * 4), context, seed=4)
    starts = []
    for epoch in range(4):
        batch = loader.batch(epoch)
        targets = batch.labels[:, 1:]
        assert sorted(targets[targets != -100].tolist()) == list(range(total))
        assert sorted(np.unique(batch.tokens[:, 0]).tolist()) == sorted(batch.tokens[:, 0].tolist())
        starts.append(min(batch.tokens[:, 0].tolist()))
        for row, label in zip(batch.tokens.tolist(), batch.labels.tolist()):
            n = label.index(-100) if -100 in label else len(label)
            assert row[:n] == label[:n] == [(row[0] + i) % total for i in range(n)]
            assert label[n:] == [-100] * (context + 1 - n)
            assert row[n:] == [0] * (context + 1 - n)
    if total > 2 * context > 2:
        assert len(set(starts)) > 1                                  # cut again at another offset


def test_epochs_need_not_end_with_a_step(tmp_path):
    shards = source(tmp_path / "s", [30, 7, 26])                     # 63 tokens, 8 windows of 8
    loader = loader_of({"s": shards}, counts_of(*[[3]] * 13), 8, seed=0)
    seen = np.zeros(63, int)
    for step in range(13):                                           # 39 windows: 4 epochs and 7 windows
        targets = loader.batch(step).labels[:, 1:]
        seen += np.bincount(targets[targets != -100], minlength=63)
        assert seen.max() - seen.min() <= 1 or step % 8 != 7
    assert seen.min() == 4
    assert seen.max() == 5
    assert loader.epochs(8) == {"s": 3.0}


@pytest.mark.parametrize(("context", "total", "windows"), [(8, 100, 12), (100, 100, 1), (300, 100, 1), (50, 100, 2)])
def test_drop_last_leaves_the_short_window_out(tmp_path, context, total, windows):
    shards = source(tmp_path / "s", [60, 40])
    loader = loader_of({"s": shards}, counts_of([windows]), context, seed=0, drop_last=True)
    targets = loader.batch(0).labels[:, 1:]
    targets = targets[targets != -100].tolist()
    assert loader.packings["s"].sequences == windows
    assert len(set(targets)) == len(targets) == min(total, windows * context)


def test_epochs_and_sources_have_orders_of_their_own(tmp_path):
    shards, orders = source(tmp_path / "s", [400]), set()
    for name in ("a", "b"):
        loader = loader_of({name: shards}, counts_of(*[[1]] * 100), 8, seed=0)
        starts = [int(loader.batch(step).tokens[0, 0]) for step in range(100)]
        for epoch in (starts[:50], starts[50:]):
            orders.add(tuple((start - epoch[0]) % 400 for start in epoch))   # whatever the offset of the first cut
    assert len(orders) == 4


def test_a_source_without_tokens_is_refused(tmp_path):
    source(tmp_path / "s", [5])
    with pytest.raises(ValueError, match=r"source law .* no tokens in its heldout split"):
        loader_of({"law": Shards(tmp_path / "s", "heldout")}, counts_of([1]), 8, seed=0)


# ---- packing by documents

def best_fit_by_hand(sizes, capacity) -> list[list[int]]:
    """Best-fit decreasing, an item at a time: the bins, each a list of sizes."""
    bins = []
    for size in sorted(sizes, reverse=True):
        fits = [b for b in bins if sum(b) + size <= capacity]
        if fits:
            max(fits, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_against_an_item_at_a_time(seed):
    rng = random.Random(seed)
    capacity = rng.choice([5, 17, 64])
    sizes = [min(capacity, 1 + int(rng.expovariate(4 / capacity))) for _ in range(rng.choice([1, 40, 300]))]
    bins = best_fit_decreasing(np.array(sizes), capacity)
    found = np.bincount(bins, sizes).astype(int).tolist()             # which of two bins with as much room is open
    assert sorted(found) == sorted(map(sum, best_fit_by_hand(sizes, capacity)))


def test_best_fit_as_its_docstring_says():
    assert best_fit_decreasing(np.array([6, 3, 5, 4, 2]), 10).tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("packing", ["best_fit", "document"])
@pytest.mark.parametrize("shard_tokens", [10**8, 30])
def test_documents_stay_whole_and_each_token_is_a_target_once(tmp_path, packing, shard_tokens):
    rng, T = random.Random(1), 12
    lengths = [1, 2, T, T + 1, T + 2, 2 * T + 1, 2 * T + 2, 40, *(rng.randint(2, 20) for _ in range(60))]
    total, begins = sum(lengths), [1, *(1 + end for end in itertools.accumulate(lengths))]
    shards = source(tmp_path / "s", lengths, shard_tokens, ids=list(range(1, total + 1)))       # 0 is padding
    config = DataConfig(context=T, packing=packing)
    packings = pack_sources({"s": shards}, config)
    rows = packings["s"].sequences
    loader = data.Loader(packings, counts_of([rows], [rows]), config, seed=4)
    for epoch in range(2):
        batch, targets, padded = loader.batch(epoch), [], 0
        for tokens, labels, positions, doc_start in zip(*(getattr(batch, f).tolist() for f in FIELDS)):
            end = tokens.index(0) if 0 in tokens else T + 1
            padded += T + 1 - end
            assert labels[end:] == [-100] * (T + 1 - end)
            assert set(doc_start[end:]) <= {end}
            assert positions == [i - d for i, d in enumerate(doc_start)]
            pieces = [tokens[a:b] for a, b in itertools.pairwise([*sorted(set(doc_start[:end])), end])]
            assert len(pieces) == 1 or packing == "best_fit"
            for piece, at in zip(pieces, sorted(set(doc_start[:end]))):
                document = max(b for b in begins if b <= piece[0])
                n = lengths[begins.index(document)]
                assert piece == list(range(piece[0], piece[-1] + 1))
                assert (piece[0], len(piece)) == (document, n) or (n > T + 1 and (
                    (piece[0] - document) % T == 0 and len(piece) == min(T + 1, document + n - piece[0])))
                assert labels[at:at + len(piece)] == ([-100] if piece[0] != document else [piece[0]]) + piece[1:]
                targets += piece[1:]
        assert sorted(targets) == sorted(set(range(1, total + 1)) - set(begins))
        assert padded == packings["s"].padded
    assert packing == "document" or rows <= -(-(total + 20) // (T + 1)) + 2


def test_a_long_documents_pieces_share_a_token_that_is_a_target_once(tmp_path):
    shards = source(tmp_path / "s", [7, 20])
    loader = loader_of({"s": shards}, counts_of([4]), 8, seed=0, packing="document")
    batch = loader.batch(0)
    rows = sorted(zip(batch.tokens.tolist(), batch.labels.tolist()), key=lambda row: row[0])
    assert [labels for _, labels in rows] == [
        [*range(7), -100, -100], [*range(7, 16)], [-100, *range(16, 24)], [-100, 24, 25, 26, *[-100] * 5]]
    assert [tokens[:4] for tokens, _ in rows] == [[0, 1, 2, 3], [7, 8, 9, 10], [15, 16, 17, 18], [23, 24, 25, 26]]


@pytest.mark.parametrize("packing", ["window", "best_fit", "document"])
@pytest.mark.parametrize("shard_tokens", [10**8, 30])
def test_a_masked_epoch_asks_for_every_token_once(tmp_path, packing, shard_tokens):
    """With a mask ratio of 1 each token of the source is a target: also the last of a full sequence."""
    T = 12
    lengths = [1, 2, T - 1, T, T + 1, T + 2, 2 * T, 2 * T + 1, 40, *(3 * i % 17 + 1 for i in range(40))]
    total = sum(lengths)
    shards = source(tmp_path / "s", lengths, shard_tokens, ids=list(range(1, total + 1)))
    config, objective = DataConfig(context=T, packing=packing), Masked(True, total + 1, [0], total + 2, mask_ratio=1.0)
    packings = pack_sources({"s": shards}, config, objective.shift)
    rows = packings["s"].sequences
    loader = data.Loader(packings, counts_of([rows], [rows]), config, seed=4)
    for epoch in range(2):
        batch = loader.batch(epoch)
        targets = objective.corrupt(batch, batch.rng).labels
        assert sorted(targets[targets != -100].tolist()) == list(range(1, total + 1))
        assert rows * T - total == packings["s"].padded
    if packing == "document":
        assert rows == sum(-(-n // T) for n in lengths)


# ---- segments in their order

def test_segments_in_their_order():
    """Lengths 3, 2, 5, 1, 4 in sequences of T = 5, two at a time: [3 2], [5], [1 4]."""
    segments = [(np.arange(n) + 10 * i, np.arange(n) + 100 * i) for i, n in enumerate((3, 2, 5, 1, 4))]
    batches = [data.Batch(**sequences.finish()) for sequences in pack_in_order(segments, 5, 2)]
    assert [b.tokens.tolist() for b in batches] == [[[0, 1, 2, 10, 11, 0], [20, 21, 22, 23, 24, 0]],
                                                    [[30, 40, 41, 42, 43, 0]]]
    assert batches[1].labels.tolist() == [[300, 400, 401, 402, 403, -100]]
    assert [b.doc_start.tolist() for b in batches] == [[[0, 0, 0, 3, 3, 5], [0, 0, 0, 0, 0, 5]], [[0, 1, 1, 1, 1, 5]]]
    assert list(pack_in_order([], 5, 2)) == []
