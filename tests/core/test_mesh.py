"""core/mesh.py: which ranks share what, by hand. No rank is started: torch's fake groups exchange nothing."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.mesh import find_sharers, forget_ranks, lay_ranks
from core.parallel import ParallelConfig, World


@pytest.fixture
def as_rank_5():
    dist.init_process_group("fake", rank=5, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()
    forget_ranks()


def ranks_of(mesh) -> list[int]:
    return dist.get_process_group_ranks(mesh.get_group())


def test_sequences_and_matmuls(as_rank_5):
    mesh = lay_ranks("cpu", 8, ParallelConfig("fsdp", context=2, tensor=2))
    assert mesh.mesh_dim_names == ("shard", "tensor")
    found = {"matmuls": mesh["tensor"], "sequences": find_sharers(mesh, 2), "weights": mesh["shard"]}
    assert {what: ranks_of(each) for what, each in found.items()} == {
        "matmuls": [4, 5], "sequences": [5, 7], "weights": [1, 3, 5, 7]}


def test_copies_and_parts_of_the_layers(as_rank_5):
    mesh = lay_ranks("cpu", 8, ParallelConfig("fsdp", replicas=2, context=4))
    assert [ranks_of(each) for each in (mesh["replicate"], mesh["shard"], find_sharers(mesh, 4))] == [
        [1, 5], [4, 5, 6, 7], [4, 5, 6, 7]]
    mesh = lay_ranks("cpu", 8, ParallelConfig("fsdp", pipeline=2, context=2))
    assert [ranks_of(each) for each in (mesh["pipe"], mesh["shard"], find_sharers(mesh, 2))] == [
        [1, 5], [4, 5, 6, 7], [4, 5]]
    # Groups of ranks are made once.
    assert mesh is lay_ranks("cpu", 8, ParallelConfig("fsdp", pipeline=2, context=2))


@pytest.mark.parametrize(("layout", "keys"), [
    # One process and ranks with sequences of their own drop by their share of the batch.
    ({}, [0, 1, 2, 3, 4, 5, 6, 7]), ({"experts": 4}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ({"replicas": 2, "tensor": 4}, [0, 0, 0, 0, 1, 1, 1, 1]),
    # Parts of a sequence, and of the layers, have tokens or blocks of their own.
    ({"context": 4}, [0, 1, 2, 3, 4, 5, 6, 7]), ({"pipeline": 4}, [0, 1, 2, 3, 4, 5, 6, 7]),
    ({"pipeline": 2, "context": 2, "tensor": 2}, [0, 0, 1, 1, 2, 2, 3, 3])])
def test_ranks_drop_alike_that_share_matmuls_and_no_others(layout, keys):
    found, shares = [], []
    for rank in range(8):
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        world = World(rank, 8, torch.device("cpu"))
        world.share_sequences(ParallelConfig("fsdp", **layout))
        found.append(world.dropout_key)
        shares.append(world.share[0])
        dist.destroy_process_group()
        forget_ranks()
    assert found == keys
    assert layout.keys() & {"context", "pipeline"} or found == shares
