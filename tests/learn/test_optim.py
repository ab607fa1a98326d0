"""Truth: AdamW written out in float64 (arXiv 1711.05101, algorithm 2), torch.optim.Muon, the singular value
decomposition, and one process where there are two."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import parallel, sharding
from learn.optim import LossScale, OptimConfig, make_optimizer, orthogonalise
from learn.schedules import learning_rate


def test_norms_and_biases_have_no_decay(tiny_model):
    model = tiny_model()
    model.extra = torch.nn.Linear(3, 3, bias=True)
    frozen = model.extra.weight.requires_grad_(False)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.7, eps=1e-5, lr=2e-3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter is frozen:
            assert id(parameter) not in decay
        else:
            plain = "norm" in name or name.endswith("bias")
            assert decay.pop(id(parameter)) == (0.0 if plain else 0.3), name
    assert not decay
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.7), 1e-5)


def test_a_model_of_vectors_alone_has_one_group():
    norm = torch.nn.LayerNorm(4)
    assert [g["weight_decay"] for g in make_optimizer(norm, OptimConfig()).param_groups] == [0.0]


def test_adamw_written_out():
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)
    config = OptimConfig(lr=0.01, min_lr=0.001, warmup_ratio=0.4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    optimizer = make_optimizer(model, config)
    truth = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    mean, square = ({n: torch.zeros_like(p) for n, p in truth.items()} for _ in range(2))
    for step in range(5):
        rate = learning_rate(step, 5, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            truth[name] *= 1 - rate * (0.1 if name == "weight" else 0.0)
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.95 * square[name] + 0.05 * g * g
            unbiased = mean[name] / (1 - 0.9 ** (step + 1)), square[name] / (1 - 0.95 ** (step + 1))
            truth[name] -= rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), truth[name], rtol=1e-5, atol=1e-6)


def step_all(optimizer, model, lr, gradients):
    set_rates(optimizer, lr)
    for p, g in zip(model.parameters(), gradients):
        p.grad = g.clone().to(p.dtype)
    optimizer.step()


def test_moments_from_steps_at_rate_0_are_adams_and_the_first_real_step_uses_them():
    """Truth: three steps of zero and one of 0.01, of AdamW written out in float64."""
    torch.manual_seed(0)
    model, config = torch.nn.Linear(5, 4), OptimConfig(weight_decay=0.1, moment_warmup=3, warmup_steps=1, lr=0.01)
    gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]
    before, without = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = make_optimizer(model, config)
    for step in range(3):
        step_all(optimizer, model, learning_rate(step, 10, config), gradients[step])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters())), "a weight has moved"
    means, squares = [], []
    for i, p in enumerate(model.parameters()):
        g = torch.stack([each[i].double() for each in gradients])
        # The newest gradient has the weight 1 - beta.
        means.append(sum(0.1 * 0.9 ** (2 - k) * g[k] for k in range(3)))
        squares.append(sum(0.05 * 0.95 ** (2 - k) * g[k] ** 2 for k in range(3)))
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), means[-1], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), squares[-1], rtol=1e-5, atol=1e-7)
        assert optimizer.state[p]["step"] == 3
    assert learning_rate(3, 10, config) == 0.01
    step_all(optimizer, model, 0.01, gradients[3])
    step_all(make_optimizer(without, config), without, 0.01, gradients[3])
    nets = (net.parameters() for net in (model, without, before))
    for p, cold, w, mean, square, g in zip(*nets, means, squares, gradients[3]):
        w, g = w.detach().double() * (1 - 0.01 * 0.1 * (w.ndim > 1)), g.double()
        mean, square = (0.9 * mean + 0.1 * g) / (1 - 0.9 ** 4), (0.95 * square + 0.05 * g ** 2) / (1 - 0.95 ** 4)
        torch.testing.assert_close(p.detach().double(), w - 0.01 * mean / (square.sqrt() + 1e-8), rtol=1e-5, atol=1e-7)
        # Without moments of its own Adam's first step has one size, whatever the gradient.
        torch.testing.assert_close(cold.detach().double(), w - 0.01 * g.sign(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("adamw", torch.float32), ("muon", torch.float32),
                                             ("adamw_8bit", torch.float32), ("adamw_8bit", torch.bfloat16)])
def test_steps_at_rate_0_move_no_weight_of_any_optimizer(tiny_model, name, dtype):
    torch.manual_seed(0)
    model = tiny_model().to(dtype)
    before = copy.deepcopy(model)
    optimizer = make_optimizer(model, OptimConfig(name=name, weight_decay=0.5))
    for _ in range(3):
        step_all(optimizer, model, 0.0, [torch.randn_like(p) for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters()))
    # What bf16 rounds away (ecc) is nothing, of weights that have not moved.
    assert all(value.any() for p in model.parameters() for name, value in optimizer.state[p].items()
               if value.dim() and name != "ecc"), "no moments"


def set_rates(optimizer, lr):
    """The loop's line."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def test_groups_of_every_kind(tiny_model):
    model = tiny_model(tie_word_embeddings=False)
    config = OptimConfig(name="muon", lr=1e-3, weight_decay=0.3, embedding_lr_scale=0.5)
    scales = {"layers.1.input_layernorm.weight": 4.0, "layers.2.mlp.up_proj.weight": 2.0}
    optimizer = make_optimizer(model, config, scales)
    special = {"embed_tokens.weight": 0.5, "head.weight": 0.5, **scales}
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    for name, p in model.named_parameters():
        group, matrix = found.pop(id(p)), p.ndim == 2
        scale = special.get(name, 1.0)
        wanted = (name.startswith("layers.") and matrix, 0.3 if matrix else 0.0, scale, 1e-3 * scale)
        assert (group["muon"], group["weight_decay"], group["lr_scale"], group["lr"]) == wanted, name
    assert not found


def test_a_rate_for_no_parameter_is_refused():
    with pytest.raises(AssertionError, match=r"\{'lora_B'\}, and no parameter"):
        make_optimizer(torch.nn.Linear(2, 2), OptimConfig(), {"weight": 1.0, "lora_B": 16.0})


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_scaled_group_is_an_optimizer_of_its_own(name):
    """Truth: two optimizers at two rates."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(32, 32), "b": torch.nn.Linear(32, 32)})
    other = copy.deepcopy(net)
    config = OptimConfig(name=name)
    both = make_optimizer(net, config, {"b.weight": 0.25, "b.bias": 0.25})
    apart = [make_optimizer(other[key], config) for key in "ab"]
    for lr in (1e-2, 3e-2, 1e-3):
        set_rates(both, lr)
        for optimizer, scale in zip(apart, (1, 0.25)):
            set_rates(optimizer, lr * scale)
        for p, q in zip(net.parameters(), other.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (both, *apart):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))


class Net(torch.nn.Module):
    """Embedding, blocks, norm and head; rows that two ranks cannot share evenly."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(),
                                                              torch.nn.Linear(9, 6)) for _ in range(2))
        self.norm, self.head = torch.nn.LayerNorm(6), torch.nn.Linear(6, 11, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))

    def shard_plan(self):
        return list(self.blocks)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def train(net, optimizer, steps):
    """Steps first..last-1 on tokens of their own."""
    for step in steps:
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        set_rates(optimizer, 1e-2 / (step + 1))
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_a_frozen_parameter_does_not_move_and_holds_nothing(name):
    """Frozen after the optimizer was made; thawed, it learns as if it had been new; frozen again, it can forget."""
    net = make_net().float()
    optimizer = make_optimizer(net, OptimConfig(name=name, weight_decay=0.9))
    frozen = [net.embed.weight, *net.blocks[0].parameters()]
    before = [p.detach().clone() for p in frozen]
    for p in frozen:
        p.requires_grad_(False)
    train(net, optimizer, range(3))
    assert all(torch.equal(p, old) for p, old in zip(frozen, before))
    assert not any(p in optimizer.state for p in frozen)
    assert not any(name.startswith(("embed", "blocks.0")) for name in sharding.optimizer_state(net, optimizer))
    assert all(optimizer.state[p] for p in net.parameters() if p.requires_grad)

    for p in frozen:
        p.requires_grad_(True)
    truth = copy.deepcopy(net)
    fresh = make_optimizer(truth, OptimConfig(name=name, weight_decay=0.9))
    train(net, optimizer, [3])
    train(truth, fresh, [3])
    moved = dict(truth.named_parameters())
    for key, p in net.named_parameters():
        if any(p is q for q in frozen):
            assert torch.equal(p, moved[key]), key                   # the first step of an optimizer's life
            assert not torch.equal(p, before[[p is q for q in frozen].index(True)])

    for p in frozen:                                                 # again, and its state is given back
        p.requires_grad_(False)
        p.grad = None
        optimizer.state.pop(p, None)
    before = [p.detach().clone() for p in frozen]
    train(net, optimizer, range(4, 6))
    assert all(torch.equal(p, old) for p, old in zip(frozen, before))
    assert not any(p in optimizer.state for p in frozen)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_muon_is_torchs(decay):
    """The same bits as torch.optim.Muon for the blocks' matrices and torch's fused AdamW for the rest."""
    net, other = make_net().float(), make_net().float()
    config = OptimConfig(name="muon", weight_decay=decay)
    mine = make_optimizer(net, config)
    matrices = [p for p in other.blocks.parameters() if p.ndim == 2]
    rest = [p for p in other.parameters() if not any(p is q for q in matrices)]
    groups = [{"params": [p for p in rest if p.ndim == 2], "weight_decay": decay},
              {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}]
    truth = [torch.optim.Muon(matrices, lr=1.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
             torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    both = type("Both", (), {"param_groups": [g | {"lr_scale": 1.0} for o in truth for g in o.param_groups]})
    for step in range(5):
        train(net, mine, [step])
        for p, q in zip(net.parameters(), other.parameters()):
            q.grad = p.grad.clone()
        set_rates(both, 1e-2 / (step + 1))
        for optimizer in truth:
            for group in optimizer.param_groups:
                group["lr"] = both.param_groups[0]["lr"]
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
    assert {tuple(mine.state[p]) for p in net.blocks.parameters() if p.ndim == 2} == {("momentum",)}


def test_a_model_of_matrices_alone_and_one_of_vectors():
    for net in (torch.nn.Linear(4, 3, bias=False), torch.nn.LayerNorm(4)):
        optimizer = make_optimizer(net, OptimConfig(name="muon", lr=1e-2))
        before = [p.detach().clone() for p in net.parameters()]
        net(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before))


@pytest.mark.parametrize("shape", [(40, 40), (64, 24), (24, 64), (1, 7), (7, 1), (1, 1)])
def test_orthogonalised_singular_values(shape):
    """Truth: the SVD. Directions stay, values of 0.002 of the norm and more come between 0.68 and 1.21."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(-2, 0, len(vh), dtype=torch.float64) * 7
    s[0] = max(s[0], 0.002 * s.norm())
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 0.05)):
        matrix = ((u * s) @ vh).to(dtype)
        before = matrix.clone()
        out = orthogonalise(matrix)
        assert torch.equal(matrix, before)
        assert out.dtype == dtype
        inner = u.T @ out.double() @ vh.T
        torch.testing.assert_close(inner, inner.diag().diag(), rtol=0, atol=atol)
        torch.testing.assert_close(u @ inner @ vh, out.double(), rtol=0, atol=atol)      # and nothing beside them
        assert 0.68 - atol <= inner.diag().min() <= inner.diag().max() <= 1.21 + atol


def test_nothing_to_orthogonalise_is_nothing():
    assert torch.equal(orthogonalise(torch.zeros(5, 3)), torch.zeros(5, 3))


def test_muons_updates_are_as_large_as_adamws():
    """Moonlight's point: 0.2 to 0.4 of the rate, root mean square, at any shape of matrix."""
    torch.manual_seed(0)
    for shape in ((32, 32), (96, 32), (32, 256)):
        net = torch.nn.ParameterList([torch.randn(shape)])
        optimizer = make_optimizer(net, OptimConfig(name="muon", lr=1e-2, weight_decay=0.0))
        before, net[0].grad = net[0].detach().clone(), torch.randn(shape) * 1e-3
        optimizer.step()
        assert (net[0] - before).square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.2)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_an_optimizer_goes_on_from_its_state_bit_for_bit(name):
    nets = [make_net().float() for _ in range(2)]
    first, second = (make_optimizer(net, OptimConfig(name=name)) for net in nets)
    train(nets[0], first, range(3))
    sharding.load_model_state(nets[1], copy.deepcopy(sharding.model_state(nets[0])))
    sharding.load_optimizer_state(nets[1], second, copy.deepcopy(sharding.optimizer_state(nets[0], first)))
    for net, optimizer in zip(nets, (first, second)):
        train(net, optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters()))
    states = [sharding.optimizer_state(net, optimizer) for net, optimizer in zip(nets, (first, second))]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def as_rank(folder: Path):
    """What each of two ranks does: three steps of Muon on shares of a net, its state to files, two steps more."""
    torch.set_num_threads(1)
    world = parallel.start("cpu")
    net = parallel.shard(make_net(), world)
    optimizer = make_optimizer(net, OptimConfig(name="muon"))
    for part, steps in (("three", range(3)), ("five", range(3, 5))):
        train(net, optimizer, steps)
        weights, moments = sharding.model_state(net), sharding.optimizer_state(net, optimizer)
        if world.main:
            save_file({**weights, **{f"state/{key}": x for key, x in moments.items()}}, folder / f"{part}.safetensors")
    world.barrier()
    parallel.stop()


@pytest.mark.usefixtures("forked")
def test_muon_on_two_ranks_is_muon_on_one(tmp_path):
    """FSDP2 over uneven rows, in float64 but for the reduction of gradients (fp32); and one rank continues two."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           __file__, tmp_path], capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    net = make_net()
    optimizer = make_optimizer(net, OptimConfig(name="muon"))
    for part, steps in (("three", range(3)), ("five", range(3, 5))):
        train(net, optimizer, steps)
        found = load_file(tmp_path / f"{part}.safetensors")
        state = sharding.optimizer_state(net, optimizer)
        truth = {**sharding.model_state(net), **{f"state/{key}": x for key, x in state.items()}}
        assert found.keys() == truth.keys()
        for key in truth:
            torch.testing.assert_close(found[key], truth[key], rtol=1e-5, atol=1e-6, msg=f"{part}: {key} differs")
        if part == "three":                                          # from here on from the two ranks' files
            sharding.load_model_state(net, {key: x for key, x in found.items() if not key.startswith("state/")})
            sharding.load_optimizer_state(net, optimizer, {key.removeprefix("state/"): x for key, x in found.items()
                                                           if key.startswith("state/")})


def test_8_bit_adamw_stays_near_the_exact_one():
    """Truth: torch's AdamW in float64 on a least-squares problem; matrices in 8 bits, the bias and odd widths not."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Tanh(), torch.nn.Linear(48, 7))
    exact = copy.deepcopy(model).double()
    config = OptimConfig(name="adamw_8bit", lr=3e-3, min_lr=0.0, weight_decay=0.01)
    optimizers = make_optimizer(model, config), make_optimizer(exact, dataclasses.replace(config, name="adamw"))
    x, y = torch.randn(256, 64), torch.randn(256, 7)
    for _ in range(60):
        for net, optimizer in zip((model, exact), optimizers):
            dtype = next(net.parameters()).dtype
            loss = (net(x.to(dtype)) - y.to(dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (net(x.double()) - y).square().mean() < 0.7 * y.square().mean()
    # the loss falls by some 2 % a step here: as far along, within two or three steps
    assert (model(x) - y).square().mean().item() == pytest.approx(loss.item(), rel=0.06)
    kinds = {p.shape: optimizers[0].kind(p) for p in model.parameters()}
    assert kinds == {(48, 64): "int8", (48,): "fp32", (7, 48): "fp32", (7,): "fp32"}
    state = optimizers[0].state[model[0].weight]
    assert (state["step"].item(), state["m"].dtype, state["v"].dtype) == (60, torch.int8, torch.uint8)


def eight_bit(*shapes, dtype=torch.bfloat16, **settings):
    """Random parameters and their optimizer."""
    torch.manual_seed(0)
    net = torch.nn.ParameterList(torch.randn(shape).to(dtype) for shape in shapes)
    return list(net), make_optimizer(net, OptimConfig(name="adamw_8bit", lr=1e-2, **settings))


def test_8_bit_adamw_decays_matrices_only():
    (matrix, vector), optimizer = eight_bit((8, 32), (32,), dtype=torch.float32, weight_decay=0.5)
    before = [p.detach().clone() for p in (matrix, vector)]
    for p in (matrix, vector):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), before[0] * (1 - 1e-2 * 0.5))
    assert torch.equal(vector, before[1])


def test_8_bit_adamw_counts_the_steps_of_each_parameter():
    """One that gets gradients late begins at its first step, and the others go on."""
    (late, early), optimizer = eight_bit((4, 32), (4, 32), dtype=torch.float32, weight_decay=0.0)
    for _ in range(5):
        early.grad = torch.ones_like(early)
        optimizer.step()
    late.grad, before = torch.ones_like(late), [p.detach().clone() for p in (late, early)]
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (late, early)] == [1, 6]
    for p, old in zip((late, early), before):                     # a constant gradient moves each by the rate
        torch.testing.assert_close(old - p.detach(), torch.full_like(old, 1e-2), rtol=0.02, atol=0)


def test_8_bit_adamw_goes_on_from_its_codes():
    (p,), optimizer = eight_bit((8, 32))
    (q,), other = eight_bit((8, 32))
    for t in range(4):
        p.grad = torch.randn(8, 32, generator=torch.Generator().manual_seed(t)).bfloat16()
        if t == 2:
            state = copy.deepcopy(sharding.optimizer_state(torch.nn.ParameterList([p]), optimizer))
            sharding.load_optimizer_state(torch.nn.ParameterList([q]), other, state)
            q.data.copy_(p)
        optimizer.step()
        if t >= 2:
            q.grad = p.grad.clone()
            other.step()
    assert torch.equal(p, q)
    assert all(torch.equal(optimizer.state[p][name], other.state[q][name]) for name in optimizer.state[p])


def test_loss_scale():
    scale = LossScale(enabled=True)
    assert scale.scale == 65536
    for wrong in (float("inf"), float("nan")):
        assert scale.update(wrong) is False
    assert scale.scale == 16384
    assert all(scale.update(1.0) for _ in range(1999))
    assert scale.scale == 16384
    other = LossScale(enabled=True)
    vars(other).update(vars(scale))
    for both in (scale, other):
        assert both.update(1.0)
        assert both.scale == 32768
        assert all(both.update(1.0) for _ in range(1999))
        assert both.update(float("inf")) is False                    # so near, and from the beginning
        assert both.scale == 16384
        assert all(both.update(1.0) for _ in range(1999))
        assert both.scale == 16384
    assert vars(scale) == vars(other) == {"enabled": True, "scale": 16384, "good_steps": 1999}


def test_no_loss_scale():
    scale = LossScale(enabled=False)
    assert [scale.update(norm) for norm in (1.0, float("nan"), float("inf"))] == [True, False, False]
    assert all(scale.update(1.0) for _ in range(2001))
    assert scale.scale == 1.0


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
