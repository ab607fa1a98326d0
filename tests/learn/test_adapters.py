"""Layers with adapters against laws: recomputed blocks and shards change nothing, bf16 computes what fp32 does, dropout
is on the adapter's input alone, several adapters on one base are each what they are alone."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapter_models import adapted, close, logits, loss_of, stir, tokens, train_some, trained
from safetensors.torch import load_file

import hf
import kernels
import lora
from core import parallel, sharding
from data import Batch
from learn import adapters, objectives
from learn.adapters import activate
from learn.peft_files import load_adapter, peft_state, save_adapter
from lora import LoraConfig
from model import Model

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]


def test_several_adapters_on_one_base(tiny_model, tmp_path):
    x, alone = tokens(), {}
    settings = {"one": LoraConfig(rank=2), "two": LoraConfig(rank=5, rslora=True, targets=["up_proj", "down_proj"]),
                "three": LoraConfig(rank=1, dora=True, embeddings="rows", embedding_rows="3")}
    for seed, (name, config) in enumerate(settings.items()):
        model = adapted(tiny_model, config, seed)
        stir(model.parameters(), seed)
        alone[name] = logits(model, x).detach()
        save_adapter(model, tmp_path / name, "base")
    model = tiny_model()
    for name in settings:
        load_adapter(model, tmp_path / name, name)
    for name in ("two", "three", "one", "three"):
        activate(model, name)
        assert torch.equal(logits(model, x), alone[name])
        assert all(f".adapters.{name}." in n for n in trained(model))
        assert peft_state(model).keys() == load_file(tmp_path / name / "adapter_model.safetensors").keys()
    activate(model, None)
    assert torch.equal(logits(model, x), logits(tiny_model(), x))
    with pytest.raises(ValueError, match=r"no adapter 'four'; it has one, three, two"):
        activate(model, "four")
    with pytest.raises(ValueError, match=r"has an adapter 'two' already"):
        load_adapter(model, tmp_path / "one", "two")
    with pytest.raises(ValueError, match=r"cannot be called 'a\.b'"):
        load_adapter(model, tmp_path / "one", "a.b")


def test_a_is_drawn_as_nn_linear_draws_and_from_the_seed_and_its_name_alone(tiny_model):
    whole, other = (adapted(tiny_model, LoraConfig(rank=64), seed) for seed in (7, 8))
    one = adapted(tiny_model, LoraConfig(rank=64, targets=["v_proj"]), 7)
    name = "layers.1.self_attn.v_proj.adapters.default.A"
    a = whole.get_parameter(name)
    assert torch.equal(a, one.get_parameter(name))
    assert not torch.equal(a, other.get_parameter(name))
    assert not torch.equal(a, whole.get_parameter(name.replace("1", "2")))
    for p in (a, whole.get_parameter(name.replace("self_attn.v_proj", "mlp.down_proj"))):
        bound, n = 1 / math.sqrt(p.shape[1]), p.numel()          # kaiming_uniform_ with a = sqrt(5)
        assert p.abs().max() <= bound
        assert p.abs().max() > bound * (1 - 20 / n)
        assert abs(p.mean()) < 5 * bound / math.sqrt(3 * n)
        assert abs(p.var() * 3 / bound**2 - 1) < 5 / math.sqrt(n)
    assert not any(p.any() for n, p in whole.named_parameters() if n.endswith(".B"))


@pytest.mark.parametrize("changes", [
    {}, {"dora": True}, {"dropout": 0.3}, {"dropout": 0.3, "dora": True, "base": "nf4"}, {"base": "int8"},
    {"embeddings": "rows", "embedding_rows": "3:9"}], ids=str)
def test_recomputed_blocks_give_the_same_gradients(tiny_model, changes):
    """Dropout's masks too: they are drawn again from the same state."""
    found = []
    for recompute in (False, True):
        model, x = adapted(tiny_model, LoraConfig(rank=4, **changes)), tokens()
        stir(model.parameters())
        model.train().checkpoint_blocks = recompute
        torch.manual_seed(5)
        loss_of(logits(model, x), x).backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
def test_dropout_is_on_the_adapters_input_alone(base):
    """The mask of a seed, by hand; none of it in eval mode."""
    layer = torch.nn.Sequential(torch.nn.Linear(40, 6))
    lora.attach(layer, LoraConfig(rank=4, alpha=8, dropout=0.4, base=base), 0)
    stir(layer.parameters())
    x, a, b = torch.randn(50, 40), layer[0].adapter.A, layer[0].adapter.B
    weight, bias = layer[0].base_weight(), layer[0].bias
    torch.manual_seed(9)
    found = layer.train()(x)
    torch.manual_seed(9)
    kept = (torch.empty_like(x).bernoulli_(0.6)) / 0.6
    assert close(found, x @ weight.T + bias + 2 * (x * kept) @ a.T @ b.T)
    assert close(layer.eval()(x), x @ weight.T + bias + 2 * x @ a.T @ b.T)


@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
@pytest.mark.parametrize("dora", [False, True])
def test_bf16_computes_what_fp32_does(tiny_model, base, dora):
    """Autocast over a bf16 base, and a model that is bf16 throughout; adapters and their gradients stay fp32."""
    config = LoraConfig(rank=4, base=base, dora=dora)
    x, found = tokens(), []
    for mode in ("fp32", "autocast", "bf16"):
        def build(mode=mode):
            rounded = tiny_model().bfloat16()
            return rounded if mode == "bf16" else rounded.float()
        model = adapted(build, config)
        if mode == "autocast" and base == "plain":
            for layer in model.layers:
                layer.bfloat16()
            for p in trained(model).values():
                p.data = p.data.float()
        stir(model.parameters())
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            scores = logits(model, x)
        loss_of(scores.float(), x).backward()
        found.append((scores.float(), {name: p.grad for name, p in trained(model).items()}))
    for scores, gradients in found[1:]:
        assert (scores - found[0][0]).norm() < 10 * 2.0**-8 * found[0][0].norm()       # ten roundings deep
        for name, gradient in gradients.items():
            assert gradient.dtype == torch.float32
            assert F.cosine_similarity(gradient.flatten(), found[0][1][name].flatten(), 0) > 0.98, name


def test_a_row_of_zeros_has_a_magnitude_of_zero():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    layer[0].weight.data[1] = 0
    lora.attach(layer, LoraConfig(rank=2, dora=True), 0)
    y = layer(torch.randn(3, 8))
    y.sum().backward()
    assert not y[:, 1].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


def test_projections_of_one_input_are_one_call(tiny_model, monkeypatch):
    calls = []

    def counted(x, weights, *rest):
        calls.append(len(weights))
        return kernels.lora_linear(x, weights, *rest)
    monkeypatch.setattr(adapters, "lora_linear", counted)
    with torch.no_grad():
        logits(adapted(tiny_model, LoraConfig(rank=2)), tokens())
        assert calls == [3, 1, 2, 1] * 3                     # q/k/v, o, gate/up, down
        calls.clear()
        logits(adapted(tiny_model, LoraConfig(rank=2, targets=["q_proj", "v_proj"])), tokens())
        assert calls == [2] * 3


def test_the_causal_objective_trains_all_of_it(tiny_model):
    """Through objectives.py, which reads head.weight: the same gradients as from logits."""
    x = tokens(length=21)
    found = []
    for through in (True, False):
        model = adapted(tiny_model, LoraConfig(rank=2, embeddings="rows", embedding_rows="3:40"))
        stir(model.parameters())
        if through:
            batch = Batch(tokens=x[:, :-1], labels=x[:, 1:], position_ids=torch.arange(20).expand(2, 20),
                          doc_start=torch.zeros(2, 20, dtype=torch.int32), source=np.zeros(2, np.int64), rng=None)
            loss, n, _ = objectives.Causal(False).loss(model, batch)
            (loss / n).backward()
        else:
            loss_of(logits(model, x[:, :]), x).backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert all(close(found[0][name], found[1][name]) for name in found[0])


# ---- two ranks

FSDP = {"dora": {"dora": True}, "rows": {"embeddings": "rows", "embedding_rows": "3:9,90:"},
        "full": {"embeddings": "full"}}


def as_rank(folder: Path):
    """One of two FSDP2 ranks: built on the meta device, sharded, then filled and drawn; two steps, and its files."""
    world = parallel.start("cpu")
    for base in ("tied", "untied"):
        full = {name: p.detach() for name, p in hf.load(folder / base).named_parameters()}
        for kind, changes in FSDP.items():
            config = LoraConfig(rank=3, **changes)
            with torch.device("meta"):
                model = Model(hf.open_base(folder / base).config)
                lora.attach(model, config, 4)
            parallel.shard(model, world)
            model.to_empty(device="cpu")
            model.tie()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name in full:
                        p.copy_(sharding.distribute_like(full[name], p))
            lora.initialise(model, 4, sharding.distribute_like)
            train_some(model, tokens(), 2)
            gathered = sharding.model_state(model)
            if world.main:
                save_adapter(model, folder / f"{base}_{kind}", "base", gathered)
            world.barrier()
    parallel.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_shards_are_one_model(tiny_model, tmp_path):
    for base in ("tied", "untied"):
        hf.save(tiny_model(tie_word_embeddings=base == "tied"), tmp_path / base)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           __file__, tmp_path], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                               "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for base in ("tied", "untied"):
        for kind, changes in FSDP.items():
            config = LoraConfig(rank=3, **changes)
            model = adapted(lambda base=base: hf.load(tmp_path / base), config, 4)
            train_some(model, tokens(), 2)
            theirs, ours = load_file(tmp_path / f"{base}_{kind}/adapter_model.safetensors"), peft_state(model)
            assert theirs.keys() == ours.keys()
            for key in ours:
                assert close(theirs[key], ours[key], 1e-4), key


if __name__ == "__main__":
    torch.set_num_threads(1)
    as_rank(Path(sys.argv[1]))
