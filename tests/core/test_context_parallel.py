"""core/context_parallel.py: what each rank holds after an exchange, by hand, and there and back.

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
from core.context_parallel import Exchange, SharedAttention, SharedSequences
from data import Batch


def as_rank(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    q = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, 8, 1, 6, dtype=torch.float64)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7], [0, 0, 2, 2, 2, 2, 6, 6]], dtype=torch.int32)
    own = slice(4 * rank, 4 * rank + 4)
    mine = [x[:, own].clone().requires_grad_() for x in (q, k, v)]
    sequences = SharedSequences(dist.group.WORLD, rank, 2)
    attention = SharedAttention(kernels.attention, sequences)
    given = torch.arange(32.0).view(1, 8, 4, 1)[:, own]
    heads = Exchange.apply(given, dist.group.WORLD, False)
    with sequences.shared():
        y = attention(*mine, True, 3, starts[:, own])
    y.square().sum().backward()
    alone = attention(q, k, v, True, 3, starts)
    torch.save({"heads": heads, "back": Exchange.apply(heads, dist.group.WORLD, True), "given": given, "y": y.detach(),
                "grads": [x.grad for x in mine], "alone": alone}, f"{folder}/{rank}.pt")
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

    torch.manual_seed(0)
    q = torch.randn(2, 8, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 8, 1, 6, dtype=torch.float64)
    inputs = [q, k.requires_grad_(), v.requires_grad_()]
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7], [0, 0, 2, 2, 2, 2, 6, 6]], dtype=torch.int32)
    y = kernels.attention(*inputs, True, 3, starts)
    y.square().sum().backward()
    torch.testing.assert_close(torch.cat([rank["y"] for rank in ranks], 1), y.detach(), rtol=0, atol=1e-12)
    for i, x in enumerate(inputs):
        torch.testing.assert_close(torch.cat([rank["grads"][i] for rank in ranks], 1), x.grad, rtol=0, atol=1e-12)
    # Outside `shared` a rank attends over what it has alone.
    torch.testing.assert_close(ranks[0]["alone"], y.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_cuts_its_tokens(rank):
    rows = torch.arange(12).view(2, 6)
    batch = Batch(rows, rows + 100, rows + 200, rows + 300, source=np.array([4, 5]))
    mine = SharedSequences(None, rank, 2).cut(batch)
    assert mine.tokens.tolist() == rows[:, 3 * rank:3 * rank + 3].tolist()
    assert mine.doc_start.tolist() == (rows + 300)[:, 3 * rank:3 * rank + 3].tolist()
    assert mine.source is batch.source
