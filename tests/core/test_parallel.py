"""parallel.py: ranks, strategies and micro-batches change nothing but the order of sums.

The truth is one process with the whole batch in one piece. Two forked ranks (gloo) go through every case; this file is
also what each of them runs. What all layouts do for 20 steps is in test_layouts.py. Tolerance: in fp32 only the order
in which gradients and losses are added differs, a few units of 2^-24 = 6e-8, which steps of AdamW magnify; 1e-5
relative leaves room for five steps and none for a factor. AdamW does not see the scale of gradients, so that their
norms are compared too. Adapters and what keeps the base's knowledge go through the same: every number they log, what
they leave, and checkpoints that move.
"""

import copy
import functools
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import fork_ranks, found_by, go_through, make_lab_in, pass_on, run_once, steps_of
from runs import lines, one, same_checkpoint, settings, trace
from safetensors.torch import load_file

import hf
import train
from core import checkpoint, parallel
from core.tensor_parallel import measure_norm
from model import Model, ModelConfig
from stages import evaluate
from stages.build import build

pytestmark = pytest.mark.usefixtures("quick")
STEPS, BATCH = 5, 8
CASES = list(itertools.product(("ddp", "fsdp"), (True, False), (1, 2, 4)))        # strategy, tied head, micro-batch

METHODS = {
    "lora": ["--lora.rank", 4, "--lora.ranks", "q_proj=1",             # one row: the second of two ranks holds none
             "--train.micro-batch-size", 1],
    "dora": ["--lora.rank", 4, "--lora.dora", "--lora.rslora", "--lora.b-lr-ratio", 4],
    "lora_full": ["--lora.rank", 4, "--lora.embeddings", "full", "--model.activation-checkpointing"],
    "lora_rows": ["--lora.rank", 4, "--lora.embeddings", "rows", "--lora.embedding-rows", "7,290:"],
    "lora_lwf": ["--lora.rank", 4, "--forget.lwf.alpha", 0.5, "--forget.ema.decay", 0.9, "--eval.sample-tokens", 3],
    "qlora": ["--lora.rank", 4, "--lora.base", "nf4"],
    "ewc": ["--forget.ewc.strength", 1, "--forget.ewc.samples", 12],
    "lwf": ["--forget.lwf.alpha", 0.5, "--forget.lwf.tokens", "all"],
    "replay": ["--forget.lwf.alpha", 0.5, "--forget.lwf.tokens", "replay", "--train.micro-batch-size", 1,
               "--forget.adaptive.policy", "budget", "--forget.adaptive.epsilon", 1e-6, "--eval.every", 1],
    "freeze": ["--forget.freeze.schedule", "progressive", "--forget.freeze.thaw-ratio", 0.75,
               "--train.micro-batch-size", 1],
    "selective": ["--objective.name", "selective"],
    "electra": ["--objective.name", "electra", "--objective.mask-token-id", 0],
    "mixture": ["--objective.name", "mixture", "--objective.weights.causal", 1, "--objective.weights.masked", 1,
                "--objective.mask-token-id", 0, "--train.micro-batch-size", 1],
    "experts": ["--train.micro-batch-size", 1],
    "muon": ["--optim.name", "muon", "--forget.ema.decay", 0.9],
    "everything": ["--forget.freeze.schedule", "progressive", "--forget.ewc.strength", 1, "--forget.ewc.samples", 12,
                   "--forget.ewc.fisher", "true", "--forget.lwf.alpha", 0.3, "--forget.adaptive.policy", "budget",
                   "--forget.ema.decay", 0.8, "--forget.merge.method", "slerp", "--forget.merge.alphas", 0.5, 1,
                   "--eval.every", 1],
}
PAIRS = [pair for pair in itertools.product(METHODS, ("ddp", "fsdp")) if pair != ("electra", "fsdp")]
# What two ranks have written is compared with what one rank wrote, and of these one rank goes on from it too.
BACK = ["lora_lwf", "qlora", "replay", "everything"]


@functools.cache
def parse(lab, steps, *words):
    """Of a command line, which takes as long to read as ten steps of these models."""
    return settings(lab, "unused", *words, steps=steps)


def laid_out(lab, out, strategy, *words, steps):
    c = copy.deepcopy(parse(lab, steps, *words))
    c.out, c.parallel.strategy = str(out), strategy
    return c


def case(lab, strategy, tied, micro):
    return laid_out(lab, "unused", strategy, "--model.tie-word-embeddings", str(tied), "--train.batch-size", BATCH,
                    "--train.micro-batch-size", micro, "--optim.clip", 0, steps=STEPS)


def plain(lab, out, strategy):
    return laid_out(lab, out, strategy, steps=6)


def eight_bit(lab, out, strategy):
    return laid_out(lab, out, strategy, "--optim.name", "adamw_8bit", "--train.precision", "bf16", steps=6)


def method(folder, name, out, strategy="ddp", after=None):
    """Four steps on a base that knows the general source, with a checkpoint half-way; or those after the half of the
    run `after`."""
    base = folder / {"lora_rows": "untied", "experts": "experts"}.get(name, "tied") / "final"
    c = laid_out(folder / "lab", folder / "methods" / f"{name}_{out}", strategy, "--model.init", "pretrained",
                 "--model.path", base, "--train.save-every", 2, *METHODS[name], steps=4)
    c.train.branch_from = after and str(folder / "methods" / f"{name}_{after}" / "checkpoints/step_00000002")
    return c


def half(folder, strategy):
    """Of bf16."""
    c = method(folder, "dora", "unused", strategy)
    c.train.precision, c.lora.embeddings, c.train.steps = "bf16", "full", STEPS
    return c


def compiled(folder, is_compiled):
    c = laid_out(folder / "lab", "unused", "fsdp" if is_compiled else "ddp", "--optim.clip", 0, "--optim.lr", 1e-3,
                 steps=3)
    c.compile = is_compiled
    return c


# Rules that end a run of 12 steps early: at the one rate general text is lost at once, at the other nothing is gained.
ENDS = {"stop-forgetting": (0.05, "--optim.lr", 1e-2), "stop-gain": (0.9, "--optim.lr", 1e-8, "--optim.min-lr", 0)}


def ended(folder, rule, out, strategy="ddp"):
    return laid_out(folder / "lab", out, strategy, "--model.init", "pretrained", "--model.path", folder / "tied/final",
                    f"--eval.{rule}", *ENDS[rule], "--eval.every", 2, "--eval.stop-after", 2, "--data.schedule",
                    "static", "--data.domain-share", 1, steps=12)


def measure(c, world):
    """Compiled blocks are compiled by a backend that does so in seconds; and the number of graphs."""
    compile_block, graphs = torch.nn.Module.compile, torch._dynamo.utils.counters["stats"]
    torch.nn.Module.compile = lambda module: compile_block(module, backend="aot_eager")
    try:
        return steps_of(c, world, c.train.steps) | {"graphs": graphs["unique_graphs"]}
    finally:
        torch.nn.Module.compile = compile_block


# ---- what the processes do, in this order

def make_bases(rank: int, folder: Path):
    """Two processes."""
    tied, lab = rank == 0, folder / "lab"
    train.train(laid_out(lab, folder / ("tied" if tied else "untied"), "ddp", "--model.tie-word-embeddings", str(tied),
                         "--data.domain-share", 0, "--data.schedule", "static", steps=20), one())
    # Fewer tokens than a step has for each of these experts: some get none on a rank.
    config = ModelConfig(300, 32, 64, 2, 4, 2, num_experts=12, num_experts_per_tok=2, moe_intermediate_size=24,
                         norm_topk_prob=True, dense_layers=[1], qk_norm=True, family="qwen3_moe")
    experts = Model(config)
    experts.initialise(0)
    if rank == 0:
        hf.save(experts, folder / "experts/final", tokenizer=lab / "tok")


def go_alone(rank: int, folder: Path):
    """Two processes, which share what one rank does before two go on from it."""
    lab = folder / "lab"
    if rank == 0:
        for strategy in ("ddp", "fsdp"):
            stop_after(plain(lab, folder / f"{strategy}_one_two", strategy), one(), 3)
    else:
        train.train(plain(lab, folder / "reference", "ddp"), one())
        train.train(eight_bit(lab, folder / "8bit", "ddp"), one())
    for name in list(METHODS)[rank::2]:
        train.train(method(folder, name, "one"), one())
    rule = list(ENDS)[rank]
    train.train(ended(folder, rule, folder / f"ended_{rule}_one"), one())


def go_on(folder: Path, world):
    """Two ranks: whole runs, uninterrupted, and begun or ended on one rank."""
    lab = folder / "lab"
    for strategy in ("ddp", "fsdp"):
        train.train(plain(lab, folder / f"{strategy}_two", strategy), world)
        stop_after(plain(lab, folder / f"{strategy}_two_one", strategy), world, 3)
        train.train(plain(lab, folder / f"{strategy}_one_two", strategy), world)
    train.train(laid_out(lab, folder / "bf16", "fsdp", "--train.precision", "bf16", steps=6), world)
    for rule, strategy in itertools.product(ENDS, ("ddp", "fsdp")):     # each rank has to leave the loop at one step
        out = folder / f"ended_{rule}_{strategy}"
        train.train(ended(folder, rule, out, strategy), world)
        Path(f"{out}_rank{world.rank}").write_text(str(world.gather(1)))
    for strategy in ("ddp", "fsdp"):
        stop_after(eight_bit(lab, folder / f"{strategy}_8bit", strategy), world, 3)
    for strategy in ("ddp", "fsdp"):                   # a state from one rank, or from the other strategy
        pass_on(method(folder, "muon", f"{strategy}_passed", strategy, "one"), world)
        other = eight_bit(lab, folder / f"{strategy}_8bit_passed", strategy)
        there = {"ddp": "fsdp", "fsdp": "ddp"}[strategy]
        other.train.branch_from = str(folder / f"{there}_8bit/checkpoints/step_00000003")
        pass_on(other, world)
    for name, strategy in PAIRS:
        train.train(method(folder, name, f"{strategy}_two", strategy), world)
        train.train(method(folder, name, f"{strategy}_one_two", strategy, "one"), world)


def go_back(rank: int, folder: Path):
    """Two processes, which share what one rank does from where two ranks came to."""
    lab, strategy = folder / "lab", ("ddp", "fsdp")[rank]
    train.train(plain(lab, folder / f"{strategy}_two_one", "ddp"), one())
    for name in BACK:
        train.train(method(folder, name, f"{strategy}_two_one", after=f"{strategy}_two"), one())
    c = eight_bit(lab, folder / f"{strategy}_8bit_alone", "ddp")
    c.train.branch_from = str(folder / f"{strategy}_8bit/checkpoints/step_00000003")
    pass_on(c, one())
    train.train(eight_bit(lab, folder / f"{strategy}_8bit", "ddp"), one())


def stop_after(c, world, steps: int):
    """Leave a run as a signal after `steps` steps does."""
    real = train.train_step

    def step(run, number, batches):
        if number == steps - 1:
            os.kill(os.getpid(), 15)
        return real(run, number, batches)
    train.train_step = step
    try:
        train.train(c, world)
    finally:
        train.train_step = real


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_once(tmp_path_factory, __file__)


@pytest.fixture(scope="module")
def found(ranks):
    return found_by(ranks)


@pytest.fixture(scope="module")
def truth(lab):
    torch.set_num_threads(1)
    world = parallel.World(0, 1, torch.device("cpu"))
    return {tied: steps_of(case(lab, "ddp", tied, BATCH), world, STEPS) for tied in (True, False)}


def close(mine, theirs, rel=1e-5):
    assert mine.keys() == theirs.keys()
    for key in theirs:
        assert mine[key] == pytest.approx(theirs[key], rel=rel), key


@pytest.mark.slow
@pytest.mark.parametrize("key", CASES, ids=str)
def test_two_ranks_are_one(found, truth, key):
    one = truth[key[1]]
    first, second = found[str(key)]
    assert first["rows"] | second["rows"] == one["rows"]                   # exactly the same tokens, each row once
    assert len(first["rows"]) == len(second["rows"]) == STEPS * BATCH // 2
    assert not first["rows"].keys() & second["rows"].keys()
    for name in ("loss", "norm"):
        assert first[name] == second[name]
        assert first[name] == pytest.approx(one[name], rel=1e-5)
    assert one["norm"][0] > 0.1
    for mine, theirs in zip(first["sources"], one["sources"]):
        close({k: v[0] for k, v in mine.items()}, {k: v[0] for k, v in theirs.items()})
        assert {k: v[1] for k, v in mine.items()} == {k: v[1] for k, v in theirs.items()}
    close(first["weights"], one["weights"], 1e-4)         # where a gradient is nearly 0, AdamW's step is a coin's toss
    close(first["moments"], one["moments"], 1e-4)
    assert all("exp_avg" in k or k.endswith("/step") for k in one["moments"])


@pytest.mark.slow
def test_blocks_are_compiled_under_fsdp(found):
    """Losses and norms of blocks that are not. (Here attention looks at where documents begin, which parts graphs.)"""
    for each in found["compiled"]:
        assert each["loss"] == pytest.approx(found["plain"][0]["loss"], rel=5e-6)
        assert each["norm"] == pytest.approx(found["plain"][0]["norm"], rel=5e-6)
        assert each["graphs"] > found["plain"][0]["graphs"] == 0


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_accumulation_on_one_rank_changes_nothing(lab, truth, micro):
    mine = steps_of(case(lab, "ddp", True, micro), parallel.World(0, 1, torch.device("cpu")), STEPS)
    assert mine["rows"] == truth[True]["rows"]
    assert mine["loss"] == pytest.approx(truth[True]["loss"], rel=1e-5)
    assert mine["norm"] == pytest.approx(truth[True]["norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_checkpoints_move_between_one_and_two_ranks(ranks, strategy):
    reference = ranks / "reference"
    whole = checkpoint.load(checkpoint.path_of(reference / "checkpoints", 6))
    for name in ("two", "two_one", "one_two"):
        out = ranks / f"{strategy}_{name}"
        assert [r["step"] for r in lines(out, "resume")] == ([] if name == "two" else [3])
        for step, numbers in trace(reference).items():
            assert trace(out)[step][:3] == pytest.approx(numbers[:3], rel=1e-5)
        weights, moments, state = checkpoint.load(checkpoint.path_of(out / "checkpoints", 6))
        assert weights.keys() == whole[0].keys()
        assert moments.keys() == whole[1].keys()
        for key, value in weights.items():
            torch.testing.assert_close(value, whole[0][key], rtol=1e-3, atol=1e-5, msg=key)
        assert state["identity"] == whole[2]["identity"]
        assert (out / "eval.json").exists()
        score, true = (json.loads((x / "eval.json").read_text())["after"] for x in (out, reference))
        for source in true:                                                  # shared by two ranks, the same numbers
            close({k: v for k, v in score[source].items() if k != "role"},
                  {k: v for k, v in true[source].items() if k != "role"})
    with pytest.raises(AssertionError):
        same_checkpoint(reference, ranks / "bf16", 6)                        # the comparison can tell runs apart


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "strategy"), itertools.product(ENDS, ("ddp", "fsdp")))
def test_a_rule_ends_a_run_on_each_rank_where_it_ends_on_one(ranks, rule, strategy):
    """Law: the step, the reason and what is left are those of one process; both ranks came out of the run and met."""
    truth, mine = ranks / f"ended_{rule}_one", ranks / f"ended_{rule}_{strategy}"
    result, true = (json.loads((out / "eval.json").read_text()) for out in (mine, truth))
    assert true["ended"]["setting"] == f"eval.{rule.replace('-', '_')}"
    assert result["ended"]["step"] == true["ended"]["step"] < 12
    assert result["ended"]["value"] == pytest.approx(true["ended"]["value"], rel=1e-3, abs=0.05)
    assert len(lines(mine, "ended")) == 1
    assert list(told(mine)) == list(told(truth))
    step = true["ended"]["step"]
    for key, value in checkpoint.load(checkpoint.path_of(truth / "checkpoints", step))[0].items():
        torch.testing.assert_close(checkpoint.load(checkpoint.path_of(mine / "checkpoints", step))[0][key], value,
                                   rtol=1e-3, atol=1e-5, msg=key)
    assert {Path(f"{mine}_rank{rank}").read_text() for rank in (0, 1)} == {"[1, 1]"}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_state_is_the_same_in_every_bit_on_other_ranks(ranks, strategy):
    """Weights, moments (8 bits too) and the average of the weights: written on one rank and read on two, written by DDP
    and read by FSDP, and the other way round."""
    there = {"ddp": "fsdp", "fsdp": "ddp"}[strategy]
    methods = ranks / "methods"
    same_checkpoint(methods / f"muon_{strategy}_passed", methods / "muon_one", 2)
    same_checkpoint(ranks / f"{strategy}_8bit_passed", ranks / f"{there}_8bit", 3)
    same_checkpoint(ranks / f"{strategy}_8bit_alone", ranks / f"{strategy}_8bit", 3)
    shards = {name: len(list((ranks / name / "checkpoints/step_00000003").glob("*.safetensors")))
              for name in (f"{strategy}_8bit", f"{strategy}_8bit_alone")}
    assert list(shards.values()) == [2, 1]


@pytest.mark.slow
def test_the_exported_model_is_the_last_checkpoint_in_full_precision(ranks):
    """An evaluation comes just before, and leaves FSDP's outer weights gathered in bf16."""
    weights = checkpoint.load(checkpoint.path_of(ranks / "bf16/checkpoints", 6))[0]
    model = hf.load(ranks / "bf16/final")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), name
    losses = [r["loss"] for r in lines(ranks / "bf16", "train")]
    assert losses[-1] < losses[0]


def flat(value, path="") -> dict:
    """{path: what is there} of dicts and lists in each other."""
    value = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}/{key}").items()}


def same(mine: dict, true: dict, rel: float):
    """Numbers within rel, differences of nearly equal ones within 1e-7, all else equal."""
    assert mine.keys() == true.keys()
    for key, value in true.items():
        number = isinstance(value, (int, float))
        assert mine[key] == (pytest.approx(value, rel=rel, abs=1e-7) if number else value), key


def told(out) -> dict:
    """{step: every number that it logged and that is a function of the step}"""
    times = ("time", "tokens_per_second", "step_ms", "peak_gb", "ranks")
    return {r["step"]: flat({k: v for k, v in r.items() if k not in times}) for r in lines(out, "train")}


def left(out) -> tuple[dict, dict, list]:
    """What a run leaves: ({tensor: value}, {file or path in one: bytes or number}, decisions on replay)."""
    weights, moments, state = checkpoint.load(checkpoint.path_of(out / "checkpoints", 4))
    tensors, rest = {**weights, **moments}, {}
    for file in [*(out / "final").iterdir(), *(out / "adapter").glob("*")]:
        if file.suffix == ".safetensors":
            tensors |= {f"{file.parent.name}/{key}": value for key, value in load_file(file).items()}
        elif file.name != "README.md":                                       # which has rounded numbers
            rest[f"{file.parent.name}/{file.name}"] = file.read_bytes()
    rest |= flat({key: state[key] for key in ("identity", "loss_scale", "methods", "base")})
    rest |= flat(json.loads((out / "eval.json").read_text()))
    return tensors, rest, [(d["step"], d["source"], d["replay_share"]) for d in state["decisions"]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_a_method_on_two_ranks_is_the_method_on_one(ranks, name, strategy):
    """Four steps on two ranks; two steps on one rank and two there; and, of some methods, the other way round. Muon
    makes its matrices orthogonal in bf16, where the last bit of a gradient can decide on 2^-8 of an element."""
    out = ranks / "methods"
    truth, (tensors, rest, decisions) = told(out / f"{name}_one"), left(out / f"{name}_one")
    rel = 5e-3 if name == "muon" else 1e-5
    for way, steps in {"two": [1, 2, 3, 4], "one_two": [3, 4], **({"two_one": [3, 4]} if name in BACK else {})}.items():
        mine = out / f"{name}_{strategy}_{way}"
        assert list(told(mine)) == steps
        for step, numbers in told(mine).items():
            same(numbers, truth[step], rel)
        my_tensors, my_rest, my_decisions = left(mine)
        assert my_tensors.keys() == tensors.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(my_tensors[key], value, rtol=1e-3, atol=rel, msg=f"{way} {key}")
        # With shards or modules of an objective the model in memory may be scored, and the result says so.
        scored = my_rest.pop("/model/after")
        assert scored == "final/" or strategy == "fsdp" or name == "electra"
        expected = {key: value for key, value in rest.items() if key != "/model/after"}
        if (name, strategy) == ("qlora", "fsdp"):
            # Two ranks score the base in few bits with the adapter, and one the base and final/: other scores.
            my_rest, expected = ({key: value for key, value in each.items() if not key.startswith("/")}
                                 for each in (my_rest, expected))
        same(my_rest, expected, rel)
        assert my_decisions == decisions
    assert len(decisions) == (3 if name in ("replay", "everything") else 0)
    if decisions:
        assert decisions[-1][2] > decisions[0][2]                            # it did act
    if name in ("freeze", "everything"):
        assert truth[1]["/trainable_parameters"] < truth[4]["/trainable_parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_on_a_base_in_bf16_are_one_ranks(found, strategy):
    """The base in bf16, the adapters in fp32, sharded or not: where FSDP gathered adapters in bf16, the first loss
    would be off by 1e-4 already. A matmul of other rows may be rounded to bf16 the other way, so that later steps
    differ by more."""
    mine, true = found[f"half_{strategy}"][0], found["half"][0]
    for name in ("loss", "norm"):
        assert mine[name][0] == pytest.approx(true[name][0], rel=1e-5)
        assert mine[name][:3] == pytest.approx(true[name][:3], rel=1e-3)
    assert mine["loss"][1] != pytest.approx(mine["loss"][0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_is_scored_after_a_merge_is_the_merged_model(ranks, strategy):
    out, run = ranks / "methods" / f"everything_{strategy}_two", build(method(ranks, "freeze", "scored"), one())
    result = json.loads((out / "eval.json").read_text())
    assert result["model"]["after"] == "final/"
    for text, scores in evaluate.score(run, hf.load(out / "final"), None)[0].items():
        assert result["after"][text]["bits_per_byte"] == pytest.approx(scores["bits_per_byte"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_8_bit_states_are_sharded_and_go_on_elsewhere(ranks, strategy):
    """Three steps on two ranks, three on one: what one rank alone does, within what bf16 gradients allow."""
    alone, moved = ranks / "8bit", ranks / f"{strategy}_8bit"
    half = checkpoint.load(checkpoint.path_of(moved / "checkpoints", 3))[1]
    states = [checkpoint.load(checkpoint.path_of(folder / "checkpoints", 6))[1] for folder in (alone, moved)]
    shapes = [{k: (v.shape, v.dtype) for k, v in state.items()} for state in states]
    assert shapes[0] == shapes[1]
    assert all(v.shape == states[0][k].shape for k, v in half.items())
    for step, numbers in trace(alone).items():
        assert trace(moved)[step][:2] == pytest.approx(numbers[:2], rel=0.02)


def test_one_process_needs_no_group():
    world = parallel.World(0, 1, torch.device("cpu"))
    assert world.main
    assert world.sum([1, 2.5, True]) == [1.0, 2.5, 1.0]
    assert world.broadcast({"a": Path("b")}) == {"a": Path("b")}
    world.barrier()
    parallel.stop()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_of_gradients_is_not_rounded_to_their_type(kind):
    """Truth: float64."""
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(50, dtype=kind)) for _ in range(20)])
    for seed, p in enumerate(model):
        p.grad = (1e4 * torch.randn(50, generator=torch.Generator().manual_seed(seed))).to(kind)
    true = torch.cat([p.grad.double() for p in model]).norm().item()
    assert parallel.clip_gradients(model, 100.0).item() == pytest.approx(true, rel=1e-6)
    clipped = torch.cat([p.grad.double() for p in model]).norm().item()
    assert clipped == pytest.approx(100, rel=1e-5 if kind == torch.float32 else 2e-3)


def test_a_rank_without_gradients_sums_where_its_parameters_are():
    norm = measure_norm([], 1, False, torch.device("meta"))
    assert norm.device.type == "meta"
    assert norm.shape == ()


def test_sums_are_exact_in_float64():
    assert parallel.World(0, 1, torch.device("cpu")).sum([2**40 + 1])[0] == 2**40 + 1


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Read once, for all processes.
    parsed = {str(key): (2, case(folder / "lab", *key)) for key in CASES} | {"compiled": (2, compiled(folder, True))}
    parsed |= {f"half_{strategy}": (2, half(folder, strategy)) for strategy in ("ddp", "fsdp")}
    parsed |= {"half": (1, half(folder, "ddp")), "plain": (1, compiled(folder, False))}
    for name in METHODS:
        method(folder, name, "one")
    fork_ranks(make_lab_in, 1, folder)
    for function in (make_bases, go_alone):
        fork_ranks(function, 2, folder)
    go_through(folder, parsed, measure, go_on)
    fork_ranks(go_back, 2, folder)
