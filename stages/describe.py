"""Say what is about to be run, and what each step was: before the run, at its beginning, and a line at a time."""

import resource
import sys
import time
from pathlib import Path

import torch

import lora
from core import checkpoint
from core.config import to_toml
from learn import schedules
from model import matmul_flops_per_token
from stages.build import Run
from stages.evaluate import wanted_share, write_plan, write_text
from text import mixture

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}     # dense bf16, vendors' data sheets


def describe(run: Run):
    """What is about to be run, in a few lines, with the warnings a user would want before and not after."""
    c, loader, say = run.c, run.loader, run.log.say
    say(f"model: {run.inner.count_parameters() / 1e6:.1f}M parameters, {run.config.family}, "
        f"vocabulary {run.config.vocab_size:,}")
    if c.model.init == "pretrained":
        say(f"base: {run.base}, licence: {run.base.facts['license']}")
        if run.base.facts["chat_template"]:
            say("warning: the base carries a chat template; continuing the pretraining of a chat model costs it its "
                "chat ability, its base model is the better start")
    if c.lora.rank:
        say(f"lora: {lora.trainable_share(run.inner)}")
    if c.model.init == "pretrained":
        say(schedules.hint(run.inner.count_parameters(), "lora" if c.lora.rank else "full", c.optim))
    for line in (note for method in run.methods for note in method.notes):
        say(line)
    if schedules.warmup_length(run.steps, c.optim) >= run.steps:
        say("warning: the learning rate rises over the whole run; shorten optim.warmup_steps or optim.warmup_ratio")
    for name, shards, epochs in zip(loader.names, loader.shards, loader.epochs(run.steps).values()):
        scored = sum(len(ids) for ids, _ in run.heldout.documents.get(name, []))
        say(f"  {name} ({run.sources[name].role}): {shards.tokens:,} tokens, read {epochs:.2f} times; "
            f"{scored:,} held-out tokens scored")
        if not scored:
            say(f"warning: source {name} has no held-out documents, so it is not evaluated")
    for line in mixture.describe_mix(c.data, run.sources) + mixture.check_epochs(loader.epochs(run.steps), run.sources):
        say(line)
    lost = ", ".join(f"{name} {packing.padded or packing.dropped:,} {'dropped' if packing.dropped else 'padded'}"
                     for name, packing in zip(loader.names, loader.packings) if packing.padded or packing.dropped)
    say(f"run: {run.steps:,} steps of {c.train.batch_size} x {c.data.context} = "
        f"{c.train.batch_size * c.data.context:,} tokens, seed {c.seed}, {c.train.precision}, "
        f"{run.world.size} x {run.world.device.type}")
    say(f"packing: {c.data.packing}; positions an epoch without a token: {lost or 'none'}")


def begin(run: Run, start: int):
    """The first files of a run folder, unless it goes on from a checkpoint of its own."""
    run.log.start_at(start)
    if not run.world.main or (start and checkpoint.steps(run.folder / "checkpoints")):
        return
    c, loader, out = run.c, run.loader, run.folder
    (out / "config.toml").write_text(to_toml(c), encoding="utf-8")
    if start:                                  # a branch: what was known before is what its trunk found
        first = Path(c.train.branch_from).parent.parent / "eval_step_0.json"
        write_text(out / first.name, first.read_text(encoding="utf-8"))
    write_plan(run)
    run.log.record("start", 0, time=time.time(), run=out.name, parameters=run.inner.count_parameters(),
                  trainable_parameters=sum(p.numel() for p in run.inner.parameters() if p.requires_grad),
                  tokens_per_step=c.train.batch_size * c.data.context, total_steps=run.steps,
                  device=str(run.world.device), world_size=run.world.size, precision=c.train.precision,
                  sources={name: {"role": run.sources[name].role, "tokens": s.tokens, "documents": s.documents}
                           for name, s in zip(loader.names, loader.shards)},
                  versions={"torch": torch.__version__, "python": sys.version.split()[0]})


def line_of(run: Run, step: int, done: dict, seconds: float) -> dict:
    """The numbers of a console and metrics line after `step` steps, `seconds` each."""
    c, loader = run.c, run.loader
    tokens = c.train.batch_size * c.data.context
    peak = next((flops for name, flops in PEAK_FLOPS.items() if run.world.device.type == "cuda"
                 and name in torch.cuda.get_device_name(run.world.device)), None)
    flops = matmul_flops_per_token(run.config, c.data.context) * tokens / run.world.size / seconds
    epochs, taken = loader.epochs(step), dict(zip(loader.names, loader.plan[step].tolist()))
    general = sum(n for name, n in taken.items() if run.sources[name].role == "general")
    return {"loss": done["loss"], "lr": done["lr"], "grad_norm": done["grad_norm"], "tokens": step * tokens,
            "tokens_per_second": tokens / seconds, "step_ms": 1000 * seconds, "peak_gb": peak_gb(run.world),
            **({"mfu": flops / peak} if peak else {}), "replay_share": general / sum(taken.values()),
            "domain_share": wanted_share(run, step), **done["methods"],
            "sources": {name: {"loss": nats / n, "tokens": taken[name] * c.data.context, "epochs": epochs[name]}
                        for name, (nats, n) in done["sources"].items()}}


def peak_gb(world) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6            # kilobytes on Linux
