"""Continue the pretraining of a model on a domain corpus, with replay of general text, and say what it was worth.

    python train.py recipes/cpt.toml --model.path DIR --data.sources.domain.path shards/legal --out out/legal
    python train.py recipes/cpt.toml ... --dry-run               one step, one evaluation, one save, and nothing left
    torchrun --nproc-per-node 8 train.py recipes/llama2_7b_cpt.toml

Everything the run leaves is in its folder: config.toml (reruns it), metrics.jsonl, plan.jsonl, eval_step_N.json,
checkpoints/, eval.json, final/ (a Hugging Face folder), report.html. The same command again resumes it, bit for bit.
A feature enters the loop as one call at one of five points: model built, loss computed, before the step, after the
step, once in a while.
"""

import core.threads

import dataclasses
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core import guard, parallel
from core.config import main_guard, parse, refuse_unused
from core.hashing import mix_keys
from core.log import LogConfig
from core.parallel import ParallelConfig
from forget import ForgetConfig
from learn import objectives, schedules
from learn.objectives import ObjectiveConfig
from learn.optim import OptimConfig
from lora import LoraConfig
from stages.build import ModelSection, Run, TrainSection, build
from stages.describe import begin, describe, line_of
from stages.evaluate import EvalSection, ask_methods, draw_samples, evaluate
from stages.finish import finish
from stages.rehearse import rehearse
from stages.resume import resume, save
from text.mixture import DataConfig


@dataclass
class Config:
    out: str = "out/run"
    """run folder"""
    seed: int = 0
    device: str = "auto"
    compile: bool = False
    """torch.compile the model"""
    dry_run: bool = False
    """one step, one evaluation and one save; print what the run would cost, leave nothing"""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    forget: ForgetConfig = field(default_factory=ForgetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must be 0 or more")
        refuse_unused(self.lora, "lora", "rank")
        for name, switch in (("freeze", "schedule"), ("ewc", "strength"), ("lwf", "alpha"), ("adaptive", "policy"),
                             ("merge", "method")):
            refuse_unused(getattr(self.forget, name), f"forget.{name}", switch)


# ---- one step

def micro_batches(run: Run, step: int) -> list:
    """This rank's rows of the step's global batch, corrupted, in micro-batches."""
    share = run.c.train.batch_size // run.world.size
    first, size = run.world.rank * share, run.c.train.micro_batch_size
    rows = (run.loader.batch(step, lo, min(lo + size, first + share)) for lo in range(first, first + share, size))
    return [run.objective.corrupt(batch, batch.rng) for batch in rows]


def train_step(run: Run, step: int, batches: list) -> dict:
    """One update; returns {"loss", "grad_norm", "lr", "sources": {name: (nats, targets)}, "methods": their numbers}.

    The loss is the sum over all targets of the step divided by their count over all ranks, so that accumulation,
    packing and the number of ranks change nothing.
    """
    c, world, scale, names = run.c, run.world, run.scale, run.loader.names
    valid = max(1.0, world.sum([sum((b.labels != objectives.IGNORE).sum().item() for b in batches)])[0])
    torch.manual_seed(int(mix_keys(c.seed, "dropout", step, world.rank)[0] >> 1))     # of adapters; resumes alike
    row_loss, row_tokens = [], []
    for i, batch in enumerate(batches):
        with parallel.accumulate(run.model, last=i == len(batches) - 1):
            batch = batch.to(world.device)
            with run.autocast():
                loss, _, metrics = run.objective.loss(run.model, batch)
                for method in run.methods:
                    loss = method.loss_computed(run.inner, batch, loss, metrics)           # loss computed
                del metrics["hidden"]              # or it would live through the next forward pass
            # ranks average their gradients; times their number, the average is the sum
            (loss * (scale.scale * world.size / valid)).backward()
        row_loss.append(metrics["row_loss"])
        row_tokens.append(metrics["row_tokens"])
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    source = torch.cat([torch.from_numpy(b.source) for b in batches])
    sums[0].index_add_(0, source, torch.cat(row_loss).double().cpu())          # waits for the device
    sums[1].index_add_(0, source, torch.cat(row_tokens).double().cpu())
    sums = torch.tensor(world.sum(sums.flatten().tolist())).view(2, -1).tolist()
    sources = {name: (nats, int(n)) for name, nats, n in zip(names, *sums) if n}
    loss = sum(sums[0]) / valid
    guard.require_finite("loss", loss, step, sources)

    if scale.enabled:
        torch._foreach_mul_([p.grad for p in run.inner.parameters() if p.grad is not None], 1.0 / scale.scale)
    numbers = {}
    for method in run.methods:
        numbers |= method.before_step(step, run.inner)                         # before the step
    parameters = [p for p in run.inner.parameters() if p.grad is not None]
    norm = parallel.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, c.optim.clip or float("inf"))).item()
    if not scale.enabled:
        guard.require_finite("gradient norm", norm, step, sources)
    lr = schedules.learning_rate(step, run.steps, c.optim)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    if scale.update(norm):
        run.optimizer.step()
    for method in run.methods:
        method.after_step(step, run.inner, run.optimizer)                      # after the step
    run.optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": norm, "lr": lr, "sources": sources, "methods": numbers}


# ---- the run

def train(c: Config, world) -> int:
    """The whole run; exit status 0 also where a signal ended it after a save."""
    with guard.run_folder(c.out, world) as folder, guard.StopSignal() as stop, build(c, world, folder) as run:
        describe(run)
        start = resume(run)
        begin(run, start)
        pool = ThreadPoolExecutor(1)
        ahead = pool.submit(micro_batches, run, start) if start < run.steps else None
        seconds, measured = 0.0, 0
        for step in range(start, run.steps):
            # once in a while: evaluate (methods may change the plan)
            if step % c.eval.every == 0:
                ask_methods(run, step, evaluate(run, step))
                if step == 0:
                    draw_samples(run, 0)
            # the step
            clock = time.perf_counter()
            batches = ahead.result()
            ahead = pool.submit(micro_batches, run, step + 1) if step + 1 < run.steps else None
            done = train_step(run, step, batches)
            seconds, measured = seconds + time.perf_counter() - clock, measured + 1
            # once in a while: log
            line = None
            if (step + 1) % c.log.every == 0 or step in (start, run.steps - 1):
                line = line_of(run, step + 1, done, seconds / measured)
                run.log.record("train", step + 1, **line)
                seconds, measured = 0.0, 0
            run.log.show_step(step + 1, line)
            # once in a while: save, and leave when asked to
            asked = stop.on_any_rank(world)
            if (step + 1) % c.train.save_every == 0 or step + 1 == run.steps or asked:
                save(run, step + 1)
            if asked and step + 1 < run.steps:
                run.log.say(f"{stop.received or 'a signal'}: saved at step {step + 1} of {run.steps}; "
                            f"the same command resumes it")
                return 0
        finish(run)
    return 0


def dry_run(c: Config, world) -> int:
    """One step, one evaluation and one save in a folder that is thrown away; prints what the whole run would take."""
    with tempfile.TemporaryDirectory() as folder:
        with build(dataclasses.replace(c, log=LogConfig()), world, Path(folder)) as run:
            rehearse(run, micro_batches, train_step)
    return 0


def main() -> int:
    c = parse(Config, sys.argv[1:], description=__doc__)
    world = parallel.start(c.device)
    try:
        status = (dry_run if c.dry_run else train)(c, world)
        world.barrier()                    # none leaves while another still waits for it
        return status
    finally:
        parallel.stop()


if __name__ == "__main__":
    sys.exit(main_guard(main))
