"""moe.py against transformers' blocks and losses, gradients among them, and against laws and a hand-worked case.

Logits of whole models, packed and with windows, are compared in test_model.py, and files in test_hf.py.
"""

import pytest
import torch
from runs import lines, settings

import hf
import lora
import moe
import train
from core.parallel import World
from kernels.nf4 import LEVELS
from model import Model, ModelConfig, matmul_flops_per_token

CASES = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
         "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16,
                       "norm_topk_prob": False}}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_case_by_hand():
    weights, chosen = moe.choose_experts(torch.tensor([[0.5, 0.2, 0.3]]).log(), 2, normalised=True)
    assert chosen.tolist() == [[0, 2]]
    assert weights.tolist() == [pytest.approx([0.5 / 0.8, 0.3 / 0.8])]
    assert moe.choose_experts(torch.tensor([[0.5, 0.2, 0.3]]).log(), 2, normalised=False)[0].tolist() == [
        pytest.approx([0.5, 0.3])]
    # Experts 2, 0, 2, 1, 2 of five assignments: expert 0 ends at 1, expert 1 at 2, expert 2 at 5, and 3 has none.
    assert moe.find_ends(torch.tensor([[2], [0], [2], [1], [2]]), 4).tolist() == [1, 2, 5, 5]


@pytest.mark.parametrize("family", CASES)
def test_gradients_equal_transformers(hf_model, family):
    """Of every parameter; transformers keeps the gate's and the up projection's matrices in one tensor."""
    theirs, folder = hf_model(family, **CASES[family])
    ours = hf.load(folder)
    tokens = torch.randint(0, 97, (2, 19), generator=torch.Generator().manual_seed(1))
    ours.head(ours(tokens)).square().mean().backward()
    theirs(tokens).logits.square().mean().backward()
    truth = {}
    for name, parameter in theirs.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), parameter.grad.chunk(2, 1)):
                truth[name.removeprefix("model.").replace("gate_up_proj", f"{part}.weight")] = half
        else:
            ours_name = name.removeprefix("model.").removeprefix("lm_") + (".weight" if "experts." in name else "")
            truth[ours_name] = parameter.grad
    assert truth.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert truth[name].abs().max() > 0, name
        assert (parameter.grad - truth[name]).abs().max() < 1e-4 * max(1, truth[name].abs().max()), name


@pytest.mark.parametrize("counted", [None, [True] * 5 + [False] * 3])
def test_balance_equals_transformers(counted):
    reference = pytest.importorskip("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    logits = [draw(8, 4, seed=i) for i in range(3)]
    mask = None if counted is None else torch.tensor(counted)
    theirs = reference(tuple(logits), 4, 2, None if mask is None else mask[None].long())
    assert moe.balance_loss(logits, 2, mask).item() == pytest.approx(float(theirs), rel=1e-5)
    truth = torch.stack(logits).double().logsumexp(-1).square()[:, slice(None) if mask is None else mask].mean()
    assert moe.z_loss(logits, mask).item() == pytest.approx(truth.item(), rel=1e-5)


def test_balance_is_k_where_even_and_e_where_one_has_all():
    even = torch.eye(4).repeat(3, 1) * 50
    assert moe.balance_loss([even], 1).item() == pytest.approx(1)
    assert moe.balance_loss([torch.tensor([[50.0, 0, 0, 0]] * 7)], 1).item() == pytest.approx(4)
    logits = torch.randn(6, 4, requires_grad=True)
    nothing = moe.balance_loss([logits], 2, torch.zeros(6, dtype=torch.bool)) + moe.z_loss(
        [logits], torch.zeros(6, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad.tolist() == [[0.0] * 4] * 6


def test_a_token_does_not_depend_on_the_others():
    """No capacity: whatever else is in the batch, a token's result has the same value."""
    config = ModelConfig(97, 32, 64, 1, 4, 2, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
    layer = moe.SparseMLP(config)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=i) * 0.3)
        x = draw(3, 7, 32, seed=9)
        together = layer(x)
        assert (layer(x[1:2, 3:4]) - together[1:2, 3:4]).abs().max() < 1e-5
        assert together.abs().max() > 0.1


def test_arithmetic_counts_the_experts_of_a_token():
    dense = ModelConfig(97, 32, 48, 2, 4, 2)
    sparse = ModelConfig(97, 32, 64, 2, 4, 2, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
    # Two experts of width 24 are one MLP of width 48; the router comes on top.
    assert matmul_flops_per_token(sparse, 16) - matmul_flops_per_token(dense, 16) == 6 * 2 * 5 * 32


def make_base(lab, folder):
    config = ModelConfig(300, 32, 64, 2, 4, 2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                         norm_topk_prob=True, family="mixtral")
    model = Model(config)
    model.initialise(0)
    hf.save(model, folder, tokenizer=lab / "tok")
    return folder


@pytest.mark.parametrize("words", [["--router.balance", 0.01, "--router.z", 0.001,
                                    "--model.activation-checkpointing"], ["--lora.rank", 4]], ids=["full", "lora"])
def test_a_run_trains_it_and_exports_what_transformers_reads(lab, tmp_path, quick, words):
    transformers = pytest.importorskip("transformers", minversion="5")
    base = make_base(lab, tmp_path / "base")
    c = settings(lab, tmp_path / "run", "--model.init", "pretrained", "--model.path", base, *words, steps=6)
    train.train(c, World(0, 1, torch.device("cpu")))
    logged = lines(tmp_path / "run", "train")
    assert logged[-1]["loss"] < logged[0]["loss"]
    before, after = hf.load(base), hf.load(tmp_path / "run/final")
    moved = {name for (name, a), b in zip(before.named_parameters(), after.parameters()) if not torch.equal(a, b)}
    if "--lora.rank" in words:
        # Adapters stand on all linear layers, those of the experts among them; the router stays as it is.
        assert moved == {name for name, _ in before.named_parameters() if name.endswith("_proj.weight")}
        assert sum(".experts." in name for name in moved) == 2 * 3
    else:
        assert moved == {name for name, _ in before.named_parameters()}
        assert all(line["router_balance"] >= 2 - 1e-3 and line["router_z"] > 0 for line in logged)
    tokens = torch.randint(0, 300, (1, 21), generator=torch.Generator().manual_seed(2))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/final").eval()
    assert type(theirs).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        assert (theirs(tokens).logits - after.eval().head(after(tokens))).abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "double"), [("nf4", False), ("nf4", True), ("int4", True), ("int8", True)])
def test_experts_in_few_bits(lab, tmp_path, kind, double):
    """Logits and gradients of the adapters against the dequantised weights in float64; NF4's levels by brute force."""
    folder = make_base(lab, tmp_path / "base")
    config = lora.LoraConfig(rank=4, base=kind, double_quant=double)
    ours, truth = hf.load(folder), hf.load(folder, dtype=torch.float64)
    weight = ours.layers[0].mlp.experts.up_proj.weight.detach().clone()
    lora.attach(ours, config, seed=0)
    lora.attach(truth, lora.LoraConfig(rank=4), seed=0)
    layers = dict(lora.adapters.adapted_layers(truth))
    kept = dict(ours.named_parameters())
    with torch.no_grad():
        for path, layer in lora.adapters.adapted_layers(ours):
            assert layer.quantised is not None, path
            layers[path].weight.copy_(layer.quantised.dequantise(torch.float64))
        for i, (name, p) in enumerate(truth.named_parameters()):
            if ".adapters." in name:
                p.copy_(draw(*p.shape, seed=i) * 0.1)
                kept[name].copy_(p)
    experts = ours.layers[0].mlp.experts.up_proj
    assert not any(".experts." in name and name.endswith(".weight") for name in kept)
    assert sum(tensor.nbytes for tensor in experts.quantised.state_dict().values()) < 1.3 * weight.numel() + 2000
    if kind == "nf4" and not double:
        blocks, levels = weight.flatten().view(-1, 64), torch.tensor(LEVELS)
        largest = blocks.abs().amax(1, keepdim=True)
        nearest = ((blocks / largest).unsqueeze(-1) - levels).abs().argmin(-1)
        assert torch.equal(experts.quantised.dequantise(), (levels[nearest] * largest).view_as(weight))
    tokens = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(2))
    for model in (ours, truth):
        model.scores = model.head(model(tokens))
        model.scores.square().mean().backward()
    assert (ours.scores - truth.scores).abs().max() < 1e-5 * truth.scores.abs().max()
    compared = [(p.grad, kept[name].grad) for name, p in truth.named_parameters() if p.grad is not None]
    assert len(compared) == 2 * 2 * 7
    for true, mine in compared:
        assert 0 < (mine - true).abs().max() + true.abs().max() < 1e9
        assert (mine - true).abs().max() <= 1e-4 * true.abs().max()
