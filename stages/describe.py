"""Say what is about to be run, begin its folder, say what each step was; and in a dry run what the run would take."""

import sys
import time
from pathlib import Path

import torch

import lora
from core import checkpoint
from core.config import to_toml
from core.devices import peak_bytes
from core.files import write_text
from learn import schedules
from model import matmul_flops_per_token
from stages.build import Run
from stages.evaluate import score_heldout, wanted_share, write_plan
from stages.resume import save
from text import mixture

# Dense bf16 per second, from the vendors' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def describe(run: Run):
    """What is about to be run, in a few lines, with the warnings that a user wants before the run and not after it."""
    c, say = run.c, run.log.say
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
    for method in run.methods:
        for note in method.notes:
            say(note)
    if schedules.warmup_length(run.steps, c.optim) >= run.steps:
        say("warning: the learning rate rises over the whole run; shorten optim.warmup_steps or optim.warmup_ratio")
    describe_data(run)
    say(f"run: {run.steps:,} steps of {c.train.batch_size} x {c.data.context} = "
        f"{c.train.batch_size * c.data.context:,} tokens, seed {c.seed}, {c.train.precision}, "
        f"{run.world.size} x {run.world.device.type}")
    lost = [f"{name} {abs(packing.padded):,} {'padded' if packing.padded > 0 else 'dropped'}"
            for name, packing in zip(run.loader.names, run.loader.packings) if packing.padded]
    say(f"packing: {c.data.packing}; positions an epoch without a token: {', '.join(lost) or 'none'}")


def describe_data(run: Run):
    """A line per source: its tokens, how often they are read, and what is scored of it."""
    say, epochs = run.log.say, run.loader.epochs(run.steps)
    for name, shards in zip(run.loader.names, run.loader.shards):
        scored = sum(len(ids) for ids, _ in run.heldout.documents.get(name, []))
        say(f"  {name} ({run.sources[name].role}): {shards.tokens:,} tokens, read {epochs[name]:.2f} times; "
            f"{scored:,} held-out tokens scored")
        if not scored:
            say(f"warning: source {name} has no held-out documents, so it is not evaluated")
    for line in mixture.describe_mix(run.c.data, run.sources) + mixture.judge_epochs(epochs, run.sources)[1]:
        say(line)


def begin(run: Run, start: int):
    """Write the first files of the run folder, unless the run goes on from a checkpoint of its own."""
    c, loader = run.c, run.loader
    run.log.start_at(start)
    if not run.world.main or (start and checkpoint.steps(run.folder / "checkpoints")):
        return
    write_text(run.folder / "config.toml", to_toml(c))
    if start:
        # A branch: what the model knew before is what its trunk measured.
        first = Path(c.train.branch_from).parent.parent / "eval_step_0.json"
        write_text(run.folder / first.name, first.read_text(encoding="utf-8"))
    write_plan(run)
    run.log.record("start", 0, time=time.time(), run=run.folder.name, parameters=run.inner.count_parameters(),
                   trainable_parameters=sum(p.numel() for p in run.inner.parameters() if p.requires_grad),
                   tokens_per_step=c.train.batch_size * c.data.context, total_steps=run.steps,
                   device=str(run.world.device), world_size=run.world.size, precision=c.train.precision,
                   sources={name: {"role": run.sources[name].role, "tokens": shards.tokens,
                                   "documents": shards.documents}
                            for name, shards in zip(loader.names, loader.shards)},
                   versions={"torch": torch.__version__, "python": sys.version.split()[0]})


def log_step(run: Run, step: int, result: dict, seconds: float):
    """The metrics and console line after `step` steps. result: what train_step returned for the last of them; seconds:
    the mean time of a step since the line before."""
    c, device = run.c, run.world.device
    tokens = c.train.batch_size * c.data.context
    values = {"loss": result["loss"], "lr": result["lr"], "grad_norm": result["grad_norm"], "tokens": step * tokens,
              "tokens_per_second": tokens / seconds, "step_ms": 1000 * seconds, "peak_gb": peak_bytes(device) / 1e9}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    if peak:
        values["mfu"] = matmul_flops_per_token(run.config, c.data.context) * tokens / run.world.size / seconds / peak

    epochs, drawn = run.loader.epochs(step), dict(zip(run.loader.names, run.loader.plan[step].tolist()))
    values["replay_share"] = sum(drawn[name] for name in run.names_of("general")) / sum(drawn.values())
    values["domain_share"] = wanted_share(run, step)
    values |= result["methods"]
    values["sources"] = {name: {"loss": nats / n, "tokens": drawn[name] * c.data.context, "epochs": epochs[name]}
                         for name, (nats, n) in result["sources"].items()}
    run.log.record("train", step, **values)
    run.log.show_step(step, values)


# ---- the dry run

def rehearse(run: Run, micro_batches, train_step):
    """Measure the run's first step, an evaluation and a save in `run.folder`, and say what the whole run would take.

    micro_batches(run, step) and train_step(run, step, batches) are the loop's own.
    """
    describe(run)
    batches = micro_batches(run, 0)
    eval_seconds = measure_seconds(score_heldout, run, 0)
    step_seconds = measure_seconds(train_step, run, 0, batches)
    save_seconds = measure_seconds(save, run, 0)
    if not run.world.main:
        return
    hours = (step_seconds * run.steps + eval_seconds * (2 + run.steps // run.c.eval.every)) / 3600
    size = sum(file.stat().st_size for file in (run.folder / "checkpoints").rglob("*") if file.is_file())
    run.log.say(f"dry run: step {step_seconds:.2f} s, evaluation {eval_seconds:.1f} s, save {save_seconds:.1f} s; "
                f"peak memory {peak_bytes(run.world.device) / 1e9:.2f} GB, a checkpoint {size / 1e6:,.0f} MB")
    run.log.say(f"dry run: the whole run takes about {hours:.2f} hours; nothing was kept")
    if run.tokenizer:
        for row in range(min(2, len(batches[0].tokens))):
            show_sequence(run, batches[0], row)


def measure_seconds(function, *arguments) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def show_sequence(run: Run, batch, row: int):
    """A packed sequence as text, a line per document."""
    tokens, begins = batch.tokens[row], batch.doc_start[row].unique().tolist()
    run.log.say(f"--- a packed sequence of source {run.loader.names[batch.source[row]]}, {len(begins)} documents")
    for begin, end in zip(begins, [*begins[1:], len(tokens)]):
        run.log.say(f"[{begin}:{end}] {run.tokenizer.decode(tokens[begin:end].tolist())!r}")
