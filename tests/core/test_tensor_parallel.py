"""core/tensor_parallel.py: what a rank gathers and scatters, by hand. That ranks which share matmuls train, score, save
and export as one is in test_layouts.py."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

import lora
from core.tensor_parallel import Gather, is_shared, split_layers
from model import Model, ModelConfig

CONFIG = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 6}


def as_rank(rank, port, folder):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # Two sequences of four tokens, of which each rank has two; the value says sequence, token and rank.
    own = torch.tensor([[[0.0], [1]], [[10], [11]]]) + 2 * rank
    x = own.clone().requires_grad_()
    y = Gather.apply(x, dist.group.WORLD, False)
    # The two ranks make something else of all tokens: the gradient of a token is the sum of 1 and 2 times its number.
    (y * (rank + 1) * torch.arange(4.0).view(1, 4, 1)).sum().backward()
    z = torch.full((2, 4, 1), float(rank + 1)) * torch.arange(4.0).view(1, 4, 1)
    z.requires_grad_()
    scattered = Gather.apply(z, dist.group.WORLD, True)
    (scattered * (10 * rank + torch.arange(2.0).view(1, 2, 1))).sum().backward()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    shapes = {}
    for name, more in (("dense", {}), ("experts", EXPERTS)):
        with torch.device("meta"):
            model = Model(ModelConfig(**CONFIG, **more))
            if name == "dense":
                lora.attach(model, lora.LoraConfig(rank=4), 0)
        split_layers(model, mesh, type("Nothing", (), {"enter": None, "leave": None}))
        shapes[name] = {key: (list(p.to_local().shape), list(p.shape)) for key, p in model.named_parameters()
                        if is_shared(p)}
    torch.save({"gathered": y.detach(), "dx": x.grad, "scattered": scattered.detach(), "dz": z.grad, "shapes": shapes},
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(as_rank, (port, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_gather_and_scatter_by_hand(ranks):
    for rank, found in enumerate(ranks):
        assert found["gathered"][..., 0].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
        assert found["dx"][..., 0].tolist() == [[6 * rank, 6 * rank + 3]] * 2
        # The sum of the ranks' parts is three times the token's number.
        assert found["scattered"][..., 0].tolist() == [[6 * rank, 6 * rank + 3]] * 2
        assert found["dz"][..., 0].tolist() == [[0, 1, 10, 11]] * 2


def test_what_a_rank_holds(ranks):
    dense, experts = ranks[0]["shapes"]["dense"], ranks[0]["shapes"]["experts"]
    adapter = "adapters.default"
    assert dense["layers.0.self_attn.k_proj.weight"] == ([4, 16], [8, 16])
    assert dense["layers.0.self_attn.o_proj.weight"] == ([16, 8], [16, 16])
    assert dense["layers.0.mlp.down_proj.weight"] == ([16, 12], [16, 24])
    assert dense[f"layers.0.mlp.up_proj.{adapter}.B"] == ([12, 4], [24, 4])
    assert dense[f"layers.0.mlp.down_proj.{adapter}.A"] == ([4, 12], [4, 24])
    # Seven layers, and of the two matrices of each adapter one.
    assert len(dense) == 14
    assert experts["layers.0.mlp.experts.gate_proj.weight"] == ([3, 3, 16], [3, 6, 16])
    assert experts["layers.0.mlp.experts.down_proj.weight"] == ([3, 16, 3], [3, 16, 6])
    assert "layers.0.mlp.gate.weight" not in experts
