"""core/context_parallel.py: what each rank holds after an exchange, by hand, and there and back; attention of two
ranks against that of one, by either exchange; what they send.

That ranks which share sequences train as one, with documents, LwF, EWC and activation checkpointing, is in
test_layouts.py.
"""

import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import kernels
from core.context_parallel import (
    Exchange,
    Gather,
    SharedAttention,
    SharedSequences,
    exchanges_keys,
    join_pieces,
    part_pieces,
)
from data import Batch

# {case: causal, window}
MASKS = {"causal": (True, None), "window": (True, 3), "both_ways": (False, None), "window_both_ways": (False, 3)}
# Of two ranks the tokens: the first and last two of eight, and those between.
OWN = [0, 1, 6, 7], [2, 3, 4, 5]


def sequence():
    torch.manual_seed(0)
    q = torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 8, 1, 6, dtype=torch.float64)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7], [0, 0, 2, 2, 2, 2, 6, 6]], dtype=torch.int32)
    return (q, k.requires_grad_(), v.requires_grad_()), starts


def attend(attention, inputs, starts, mask) -> list:
    """The output and the gradients."""
    y = attention(*inputs, *MASKS[mask], starts)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


def as_rank(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    (q, k, v), starts = sequence()
    mine = [x.detach()[:, OWN[rank]].requires_grad_() for x in (q, k, v)]
    sequences = SharedSequences(dist.group.WORLD, rank, 2)
    given = torch.arange(32.0).view(1, 8, 4, 1)[:, OWN[rank]]
    found = {"heads": (heads := Exchange.apply(given, dist.group.WORLD, False)), "given": given,
             "back": Exchange.apply(heads, dist.group.WORLD, True), "keys": Gather.apply(given, dist.group.WORLD)}
    for exchange in ("heads", "keys"):
        attention = SharedAttention(kernels.attention, sequences, exchange == "keys")
        with sequences.shared():
            for mask in MASKS:
                found[exchange, mask, "documents"] = attend(attention, mine, starts, mask)
                found[exchange, mask, "one"] = attend(attention, mine, None, mask)
        found[exchange, "alone"] = attention(q, k, v, True, 3, starts).detach()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_attend_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(as_rank, (port, str(tmp_path)), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    # Token t of head h is 4 t + h: the first rank gets heads 0 and 1 of all eight tokens.
    assert ranks[0]["heads"][0, :, :, 0].tolist() == [[4 * t, 4 * t + 1] for t in range(8)]
    assert ranks[1]["heads"][0, :, :, 0].tolist() == [[4 * t + 2, 4 * t + 3] for t in range(8)]
    assert all(torch.equal(rank["back"], rank["given"]) for rank in ranks)
    assert all(rank["keys"].flatten().tolist() == list(range(32)) for rank in ranks)

    inputs, starts = sequence()
    for exchange in ("heads", "keys"):
        for mask in MASKS:
            for documents, given in (("documents", starts), ("one", None)):
                for i, true in enumerate(attend(kernels.attention, inputs, given, mask)):
                    for rank, own in zip(ranks, OWN):
                        torch.testing.assert_close(rank[exchange, mask, documents][i], true[:, own], rtol=0, atol=1e-12)
        # Outside `shared` a rank attends over what it has alone.
        alone = attend(kernels.attention, inputs, starts, "window")[0]
        torch.testing.assert_close(ranks[0][exchange, "alone"], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_cuts_its_tokens(rank):
    rows = torch.arange(16).view(2, 8)
    batch = Batch(rows, rows + 100, rows + 200, rows + 300, source=np.array([4, 5]))
    mine = SharedSequences(None, rank, 2).cut(batch)
    assert mine.tokens.tolist() == rows[:, OWN[rank]].tolist()
    assert mine.position_ids.tolist() == (rows + 200)[:, OWN[rank]].tolist()
    assert torch.equal(mine.doc_start, rows + 300)
    assert mine.source is batch.source


def test_pieces():
    x = torch.arange(12).view(1, 12)
    parts = part_pieces(x, 3)
    assert parts[:, 0].tolist() == [[0, 1], [10, 11], [2, 3], [8, 9], [4, 5], [6, 7]]
    assert torch.equal(join_pieces(parts), x)


@pytest.mark.parametrize(("C", "H", "K", "keys"), [
    # The elements that each rank sends, in T d (C - 1) / C^2: keys 32 and heads 80, 64 and 80, 128 and 80.
    (2, 32, 8, True), (4, 32, 8, True), (8, 32, 8, False),
    # As many key-value heads as heads: 64 each, and then 128 and 64.
    (2, 32, 32, False), (4, 32, 32, False),
    # Heads do not fit.
    (2, 9, 3, True), (8, 4, 2, True), (6, 24, 4, True)])
def test_what_is_less_to_send(C, H, K, keys):
    assert exchanges_keys("auto", C, H, K) is keys
    assert exchanges_keys("keys", C, H, K)
    assert not exchanges_keys("heads", C, H, K)
