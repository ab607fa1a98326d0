"""Full tensors and sharded ones; over several ranks they are tested with the layouts."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from core import sharding


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_finite_is_named_and_what_is_large_is_not(kind):
    large = torch.full((7, 5), torch.finfo(kind).max, dtype=kind)
    tensors = {"codes": torch.zeros(3, dtype=torch.int8), "none": torch.empty(0, dtype=kind), "large": large,
               "both": torch.tensor(1.0), "last": torch.ones(40, dtype=kind)}
    assert not large.sum().isfinite()
    assert sharding.find_not_finite(tensors) is None
    assert sharding.find_not_finite({}) is None
    for value in (float("nan"), float("inf"), float("-inf")):
        for at in (0, 17, 39):
            spoilt = tensors["last"].clone()
            spoilt[at] = value
            assert sharding.find_not_finite(tensors | {"last": spoilt}) == "last"
    # An infinity and its opposite in one tensor do not cancel.
    assert sharding.find_not_finite({"a": torch.tensor([float("inf"), 1, float("-inf")], dtype=kind)}) == "a"


def test_state_survives_a_round_trip_tied_and_untied(tiny_model):
    for tied in (True, False):
        a, b = tiny_model(0, tie_word_embeddings=tied), tiny_model(1, tie_word_embeddings=tied)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (a, b)]
        for model, optimizer in zip((a, b), optimizers):
            model.head(model(torch.arange(9)[None])).logsumexp(-1).sum().backward()
            optimizer.step()
        sharding.load_model_state(b, sharding.model_state(a))
        sharding.load_optimizer_state(b, optimizers[1], sharding.optimizer_state(a, optimizers[0]))
        assert ("head.weight" in sharding.model_state(a)) != tied
        assert (b.head.weight is b.embed_tokens.weight) == tied
        for p, q in zip(a.parameters(), b.parameters()):
            assert torch.equal(p, q)
            assert all(torch.equal(v, optimizers[1].state[q][k]) for k, v in optimizers[0].state[p].items())


class Copies(TorchDispatchMode):
    """How many elements this rank has copied to another device, each time."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self.counts.append(sharding.local(args[0]).numel())
        return function(*args, **kwargs or {})


def test_a_full_tensor_sends_its_shard_alone_to_where_shards_are_kept():
    """The CPU computes, and the meta device stands for the host's memory, in which shards are kept."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    mesh, full = init_device_mesh("cpu", (4,)), torch.arange(24.0).view(8, 3)
    kept = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
    assert torch.equal(sharding.distribute_like(full, kept).to_local(), full[2:4])
    kept = kept.to("meta")
    with Copies() as copies:
        found = sharding.distribute_like(full, kept)
    dist.destroy_process_group()
    assert found.device.type == "meta"
    assert copies.counts == [6]
