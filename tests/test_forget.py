"""Truths: refusals in one line. Law: two ranks are one."""

import contextlib
import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES, large_weights
from retention import ONE, UnreadText, forward, methods, some_batch, toy
from runs import ENV

from core import cli, config, parallel, sharding
from core.errors import UserError
from forget import AdaptiveConfig, EMAConfig, EWCConfig, ForgetConfig, FreezeConfig, LwFConfig, MergeConfig
from learn.method import take_sequences
from model import Model, ModelConfig

# ---- settings

@dataclass
class Recipe:
    forget: ForgetConfig = dataclasses.field(default_factory=ForgetConfig)


def test_a_command_line_turns_methods_on(tmp_path):
    words = ["--forget.ewc.strength", "0.1", "--forget.ewc.fisher", "true", "--forget.lwf.alpha", "0.5",
             "--forget.freeze.schedule", "stages", "--forget.freeze.stages", "0 layers.3 norm", "0.5 layers norm head",
             "--forget.adaptive.policy", "budget", "--forget.ema.decay", "0.9", "--forget.merge.method", "slerp"]
    c = cli.parse(Recipe, words, recipe=True)
    assert c.forget.ewc == EWCConfig(0.1, "true", 1000)
    assert c.forget.freeze.parse_stages() == [(0.0, ["layers.3", "norm"]), (0.5, ["layers", "norm", "head"])]
    (tmp_path / "again.toml").write_text(config.to_toml(c))
    assert cli.parse(Recipe, [str(tmp_path / "again.toml")], recipe=True) == c
    made = methods(**{f.name: getattr(c.forget, f.name) for f in dataclasses.fields(c.forget)})
    assert [m.name for m in made] == ["freeze", "ewc", "lwf", "adaptive", "ema"]
    assert methods() == [], "every method is off unless it is asked for"


@pytest.mark.parametrize(("make", "says"), [
    (lambda: FreezeConfig("stages"), "at least one"),
    (lambda: FreezeConfig("top", stages=["0 head"]), "goes with"),
    (lambda: FreezeConfig("stages", stages=["0.1 head"]), "begin at 0.1"),
    (lambda: FreezeConfig("stages", stages=["0 head", "0.5 norm", "0.5 head"]), "must begin at 0, rise"),
    (lambda: FreezeConfig("stages", stages=["0 head", "1 norm"]), "below 1"),
    (lambda: FreezeConfig("stages", stages=["head 0"]), "'head 0'"),
    (lambda: FreezeConfig("stages", stages=["0 head", ""]), "''.*must begin with the share"),
    (lambda: FreezeConfig(blocks=-1), "blocks is -1"),
    (lambda: FreezeConfig(thaw_ratio=0), "thaw_ratio is 0"),
    (lambda: EWCConfig(-1), "strength is -1"),
    (lambda: EWCConfig(samples=0), "samples is 0"),
    (lambda: LwFConfig(1.5), "alpha is 1.5"),
    (lambda: LwFConfig(0.5, 0), "temperature is 0"),
    (lambda: AdaptiveConfig("budget", epsilon=0), "epsilon is 0"),
    (lambda: AdaptiveConfig("budget", start=0.7), "start 0.7"),
    (lambda: AdaptiveConfig("budget", smoothing=0), "smoothing is 0"),
    (lambda: EMAConfig(1.0), "decay is 1.0"),
    (lambda: MergeConfig("linear", [0.5, 1.1]), "alphas is 1.1"),
    (lambda: MergeConfig("ties", density=0), "density is 0"),
    (lambda: MergeConfig(alphas=[]), "alphas is empty"),
])
def test_wrong_settings(make, says):
    with pytest.raises(UserError, match=says) as error:
        config.check_limits(make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("settings", "alternative"), [
    ({"ewc": EWCConfig(0.1), "adapters": True}, "lwf.alpha"),
    ({"freeze": FreezeConfig("top"), "adapters": True}, "fewer modules"),
    ({"ewc": EWCConfig(0.1), "general_text": None}, "fisher l2sp"),
    ({"lwf": LwFConfig(0.5, tokens="replay"), "general_sources": frozenset()}, "tokens all"),
    ({"adaptive": AdaptiveConfig("budget"), "general_sources": frozenset()}, "lwf.alpha"),
    ({"merge": MergeConfig("linear"), "pretrained": False}, "init pretrained"),
    ({"lwf": LwFConfig(0.5, tokens="all"), "pretrained": False}, "forget.lwf keeps what a base .*init pretrained"),
    ({"ewc": EWCConfig(0.1, "l2sp"), "pretrained": False}, "forget.ewc keeps what a base knows"),
    ({"adaptive": AdaptiveConfig("budget"), "pretrained": False}, "forget.adaptive keeps what a base knows"),
])
def test_combinations_without_sense_name_another(settings, alternative):
    with pytest.raises(ValueError, match=alternative) as error:
        methods(**settings, built=toy())
    assert "\n" not in str(error.value)


def test_what_can_be_combined_is():
    assert len(methods(ewc=EWCConfig(0.1, "l2sp"), general_sources=frozenset(), general_text=None)) == 1
    assert len(methods(lwf=LwFConfig(0.5, tokens="all"), general_sources=frozenset(), adapters=True)) == 1
    assert len(methods(freeze=FreezeConfig("top"), ema=EMAConfig(0.9), pretrained=False)) == 2


# ---- two ranks

def two_rank_run(world, sharded: bool, folder: Path) -> dict:
    """Three steps with every method on; rank 0's rows are the domain's, so that it has nothing to replay."""
    torch.set_num_threads(1)

    def build():
        model = large_weights(Model(ModelConfig(**SIZES)))
        return parallel.shard(model, world) if sharded else model
    model = build()
    frozen = build().requires_grad_(False)
    made = methods(steps=3, world=world, sharded=sharded, folder=folder,
                   freeze=FreezeConfig("stages", stages=["0 layers.2 head norm", "0.5 layers head"]),
                   ewc=EWCConfig(0.5, "true", 3), lwf=LwFConfig(0.5, tokens="replay"), ema=EMAConfig(0.5),
                   general_text=[some_batch(9, rows=3, length=8, vocabulary=97)],
                   base=(lambda _: contextlib.nullcontext(frozen)) if sharded else None)
    for method in made:
        method.model_built(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    numbers = []
    for step in range(3):
        batch = some_batch(step, rows=4, length=8, vocabulary=97, ignored=False)
        batch.source[:] = [0, 0, 1, 1]
        share = 4 // world.size
        mine = take_sequences(batch, slice(world.rank * share, (world.rank + 1) * share))
        hidden = forward(model, mine)
        logits = hidden @ model.head.weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), mine.labels.flatten(), reduction="sum")
        for method in made:
            loss = method.loss_computed(model, mine, loss, {"hidden": hidden})
        (loss * world.size / batch.labels.numel()).backward()
        numbers.append({k: v for method in made for k, v in method.before_step(step, model).items()})
        optimizer.step()
        for method in made:
            method.after_step(step, model, optimizer)
        optimizer.zero_grad(set_to_none=True)
    ewc, ema = made[1], made[3]
    _, again = methods(steps=3, built=build(), world=world, sharded=sharded, freeze=made[0].config, ewc=ewc.config,
                       folder=folder, general_text=UnreadText())
    for name, value in again.fisher.items():
        assert torch.equal(sharding.full_tensor(value), sharding.full_tensor(ewc.fisher[name]))
    def full(tensors):
        return {name: sharding.full_tensor(value).clone() for name, value in tensors.items()}
    tensors = {"weights": sharding.model_state(model), "ema": full(ema.state()[0]), "fisher": full(ewc.fisher)}
    ema.load_state(tensors["ema"], {})
    assert all(torch.equal(value, tensors["ema"][name]) for name, value in full(ema.state()[0]).items())
    held = sorted(name for name, p in model.named_parameters() if p in optimizer.state)
    return {"numbers": numbers, "tensors": tensors, "held": held}


def as_rank(folder: Path):
    world = parallel.start("cpu")
    torch.save(two_rank_run(world, True, folder), folder / f"rank{world.rank}.pt")
    parallel.stop()


@pytest.mark.usefixtures("forked")
def test_two_ranks_that_share_a_model_are_one(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           __file__, str(tmp_path)], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    before = torch.get_num_threads()
    truth = two_rank_run(ONE, False, tmp_path / "one")
    torch.set_num_threads(before)
    for rank in (0, 1):
        mine = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for ours, theirs in zip(mine["numbers"], truth["numbers"]):
            assert ours == pytest.approx(theirs, rel=1e-4)
        assert mine["held"] == truth["held"]
        for kind, tensors in truth["tensors"].items():
            assert mine["tensors"][kind].keys() == tensors.keys()
            for name, value in tensors.items():
                torch.testing.assert_close(mine["tensors"][kind][name], value, rtol=1e-3, atol=1e-6,
                                           msg=lambda text, kind=kind, name=name: f"{kind} {name}: {text}")
    assert truth["numbers"][2]["lwf_kl"] > 0 < truth["numbers"][2]["ewc_penalty"]


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
