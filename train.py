"""Continue the pretraining of a model on a domain corpus, with replay of general text, and say what it was worth.

    python train.py recipes/cpt.toml --model.path DIR --data.sources.domain.path shards/legal --out out/legal
    python train.py recipes/cpt.toml ... --dry-run               one step, one evaluation, one save, and nothing is kept
    torchrun --nproc-per-node 8 train.py recipes/llama2_7b_cpt.toml

A run leaves everything in its folder: config.toml (which reruns it), metrics.jsonl, plan.jsonl, eval_step_N.json,
checkpoints/, eval.json, final/ (a Hugging Face folder), report.html. A signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) stops
it after a save, with exit status 128 + its number. The same command again resumes it, bit for bit.

This file is the loop. What it is made of stands in stages/, and how a batch is made and scored in data.py and
learn/objectives.py. A feature enters the loop as one call at one of six points: model built, loss computed, before the
step, after the step, evaluated, exported (learn/method.py).
"""

import core.threads

import dataclasses
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from core import cli, devices, files, hashing, parallel
from core.config import refuse_unused, setting
from core.errors import Diverged
from core.guard import GuardConfig
from core.log import LogConfig
from core.parallel import ParallelConfig
from core.passes import both_passes
from core.run_folder import run_folder
from core.signals import Stopped, raise_stops
from data import Batch
from forget import ForgetConfig
from learn import schedules
from learn.choose_objective import ObjectiveConfig
from learn.objectives import sum_step
from learn.optim import OptimConfig
from learn.router import RouterConfig
from lora import LoraConfig
from stages.build import PARTS, ModelSection, Run, TrainSection, build
from stages.evaluate import EvalSection, ExportSection, begin, describe, evaluate, finish, log_step, score_heldout
from stages.refuse import refuse_combinations
from stages.resume import Saver, resume, rewind
from text.mixture import DataConfig


@dataclass
class Config:
    out: str = "out/run"
    """run folder"""
    seed: int = setting(0, at_least=0)
    """what all randomness of the run comes from"""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda or cuda:N"""
    compile: bool = False
    """torch.compile the model"""
    dry_run: bool = False
    """one step, one evaluation and one save; print what the run would cost, keep nothing"""
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    forget: ForgetConfig = field(default_factory=ForgetConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainSection = field(default_factory=TrainSection)
    guard: GuardConfig = field(default_factory=GuardConfig)
    eval: EvalSection = field(default_factory=EvalSection)
    export: ExportSection = field(default_factory=ExportSection)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        refuse_unused(self.lora, "lora")
        refuse_unused(self.router, "router")
        for name, section in vars(self.forget).items():
            refuse_unused(section, f"forget.{name}")


def micro_batches(run: Run, step: int) -> list[Batch]:
    """This rank's share of the step's global batch, corrupted, in micro-batches of at most train.micro_batch_size."""
    part, parts = run.world.share
    share, size = run.c.train.batch_size // parts, run.c.train.micro_batch_size
    batches = [run.loader.batch(step, begin, min(begin + size, (part + 1) * share))
               for begin in range(part * share, (part + 1) * share, size)]
    return [run.world.cut(run.objective.corrupt(batch, batch.rng)) for batch in batches]


def score(run: Run, batch: Batch, hidden=None) -> tuple[torch.Tensor, dict]:
    """(loss that the backward pass begins from, metrics) of a micro-batch. hidden: its hidden states, where a pipeline
    has computed them; None: they are computed."""
    with run.autocast():
        loss, _, metrics = run.objective.loss(run.model, batch) if hidden is None else \
            run.objective.loss_of(hidden, run.inner, batch)
        for method in run.methods:
            loss = method.loss_computed(run.inner, batch, loss, metrics)                    # loss computed
    # The hidden states must not live through the next forward pass.
    del metrics["hidden"]
    return loss, metrics


def train_step(run: Run, step: int, batches: list[Batch]) -> dict:
    """One update; returns {"loss", "grad_norm", "lr", "sources": {name: (nats, targets)}, "measured": {name: mean},
    "methods": {name: value}, "fault": why the update was not made, or None}.

    The loss is summed over all targets of the step and divided by their number on all ranks, so that gradient
    accumulation, packing and the number of ranks change nothing.
    """
    c, world, scale, logged = run.c, run.world, run.scale, {}
    targets = max(1.0, world.sum([sum(map(run.objective.count, batches))])[0])
    # Dropout in adapters is a function of the step and the rank, so that a resumed run draws the same.
    torch.manual_seed(int(hashing.mix_keys(c.seed, "dropout", step, world.dropout_key)[0] >> 1))
    # DDP and FSDP average gradients over ranks. We want their sum, so the loss is scaled by their number.
    scored = both_passes(run.model, world, batches, partial(score, run), scale.scale * world.averaged / targets)
    scale.unscale_(run.inner)
    for method in run.methods:
        logged |= method.before_step(step, run.inner)                                       # before the step
    norm = parallel.clip_gradients(run.inner, c.optim.clip)
    # The one point of a step at which the CPU waits for the device.
    sources, measured, norm = sum_step(run.objective, run.loader.names, scored, norm, world)
    loss = sum(nats for nats, _ in sources.values()) / targets
    lr = schedules.set_learning_rate(run.optimizer, step, run.steps, c.optim)
    fault = None if scale.overflowed(loss, norm) else run.guard.judge(step, loss, norm, sources)
    moved = scale.update(norm) and not fault
    if moved:
        run.optimizer.step()
    elif run.guard.goes_back:
        fault = rewind(run, fault)
    for method in run.methods:
        method.after_step(step, run.inner, run.optimizer, moved)                            # after the step
    run.optimizer.zero_grad(set_to_none=True)
    run.done = step + 1
    return {"loss": loss, "grad_norm": norm, "lr": lr, "sources": sources, "measured": measured,
            "methods": logged, "fault": fault}


def train(c: Config, world) -> int:
    """The whole run; the exit status: 0, or 128 + the number of the signal that ended it after a save."""
    # Before the loop there is nothing to save, and after it everything is saved: there a signal ends the run at once.
    with raise_stops(), run_folder(c.out, world, PARTS) as folder, build(c, world, folder) as run, \
            ThreadPoolExecutor(1) as pool:
        describe(run)
        start = resume(run)
        begin(run, start)
        ahead = pool.submit(micro_batches, run, start) if start < run.steps else None
        seconds, measured = 0.0, 0
        with world.note_stops():
            try:
                for step in range(start, run.steps):
                    # once in a while: evaluate (methods may change the plan, and rules of eval.stop_* end the run)
                    if step % c.eval.every == 0 and evaluate(run, step):
                        break

                    # the step; the batches of the next one are read meanwhile
                    clock = time.perf_counter()
                    batches = ahead.result()
                    ahead = pool.submit(micro_batches, run, step + 1) if step + 1 < run.steps else None
                    world.enter(f"step {step + 1}", is_step=True)
                    result = train_step(run, step, batches)
                    seconds, measured = seconds + time.perf_counter() - clock, measured + 1

                    # once in a while: log
                    if (step + 1) % c.log.every == 0 or step in (start, run.steps - 1) or result["fault"]:
                        log_step(run, step + 1, result, seconds / measured)
                        seconds, measured = 0.0, 0
                    else:
                        run.log.show_step(step + 1)

                    # once in a while: save; and leave when asked to, all ranks after the same step
                    if (step + 1) % c.train.save_every == 0 or step + 1 == run.steps:
                        run.saver.save(step + 1)
                    run.check()
            except Stopped as stop:
                return leave(run, stop)
        finish(run)
    return 0


def leave(run: Run, stop: Stopped) -> int:
    """Save what is not saved yet, and return the exit status; Diverged where the steps themselves are the reason."""
    if run.saved != run.done:
        run.saver.save(run.done)
    run.saver.finish()
    where = f"saved at step {run.done} of {run.steps}"
    if stop.status < 128:
        raise Diverged(f"{stop.why}; {where}, and the same command goes on from there")
    run.log.say(f"{stop.why}: {where}; the same command resumes it")
    return stop.status


def dry_run(c: Config, world) -> int:
    """One evaluation, one step and one save in a folder that is thrown away; says what the whole run would take."""
    with tempfile.TemporaryDirectory() as folder, \
            build(dataclasses.replace(c, log=LogConfig(), objective=dataclasses.replace(c.objective, precompute=False)),
                  world, Path(folder)) as run:
        describe(run)
        batches, seconds, run.saver = micro_batches(run, 0), [], Saver(run)
        for function in (lambda: score_heldout(run, 0), lambda: train_step(run, 0, batches),
                         lambda: (run.saver.save(0), run.saver.finish())):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        evaluation, step, saving = seconds
        hours = (step * run.steps + evaluation * (2 + run.steps // c.eval.every)) / 3600
        size = sum(file.stat().st_size for file in Path(folder, "checkpoints").rglob("*") if file.is_file())
        run.log.say(f"dry run: step {step:.2f} s, evaluation {evaluation:.1f} s, save {saving:.1f} s; "
                    f"peak memory {devices.peak_bytes(world.device) / 1e9:.2f} GB, a checkpoint {size / 1e6:,.0f} MB")
        run.log.say(f"dry run: the whole run takes about {hours:.2f} hours; nothing was kept")
        if run.tokenizer:
            # As they are before ranks share them.
            batch = run.loader.batch(0, 0, 2)
            show_sequences(run, run.objective.corrupt(batch, batch.rng))
    return 0


def show_sequences(run: Run, batch):
    """The packed sequences of a batch as text, a line per document."""
    for row, tokens in enumerate(batch.tokens):
        starts = batch.doc_start[row].unique().tolist()
        run.log.say(f"--- a packed sequence of source {run.loader.names[batch.source[row]]}, {len(starts)} documents")
        for start, end in zip(starts, [*starts[1:], len(tokens)]):
            run.log.say(f"[{start}:{end}] {run.tokenizer.decode(tokens[start:end].tolist())!r}")


def run_command(c: Config) -> int | dict:
    """What the command line asks for, on this process's rank: the exit status, or the contents of eval.json."""
    with parallel.said_once():
        refuse_combinations(c, parallel.count_ranks())
    with parallel.together(c.device, c.parallel) as world:
        status = (dry_run if c.dry_run else train)(c, world)
    results = Path(c.out, "eval.json")
    return files.read_json(results) if world.main and not c.dry_run and results.exists() else status


def main() -> int:
    return cli.run("train.py", __doc__, (Config, run_command), recipe=True)


if __name__ == "__main__":
    sys.exit(main())
