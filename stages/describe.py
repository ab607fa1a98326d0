"""Say what is about to be run, begin its folder, and say what each step was."""

import sys
import time
from pathlib import Path

import torch

import lora
from core import checkpoint
from core.config import to_toml
from core.devices import peak_bytes
from core.files import write_text
from learn import adaptive, schedules
from model import matmul_flops_per_token
from stages.build import Run
from stages.evaluate import write_plan
from text import mixture

# Dense bf16 per second, from the vendors' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def describe(run: Run):
    """What is about to be run, in a few lines, with the warnings that a user wants before the run and not after it."""
    c, loader, say = run.c, run.loader, run.log.say
    parameters, epochs = run.inner.count_parameters(), loader.epochs(run.steps)
    say(f"model: {parameters / 1e6:.1f}M parameters, {run.config.family}, vocabulary {run.config.vocab_size:,}")
    if c.model.init == "pretrained":
        say(f"base: {run.base}, licence: {run.base.facts['license']}")
        if run.base.facts["chat_template"]:
            say("warning: the base carries a chat template; continuing the pretraining of a chat model costs it its "
                "chat ability, its base model is the better start")
        if c.lora.rank:
            say(f"lora: {lora.trainable_share(run.inner)}")
        say(schedules.hint(parameters, "lora" if c.lora.rank else "full", c.optim))
    for note in (note for method in run.methods for note in method.notes):
        say(note)
    if schedules.warmup_length(run.steps, c.optim) >= run.steps:
        say("warning: the learning rate rises over the whole run; shorten optim.warmup_steps or optim.warmup_ratio")
    for name, shards in loader.shards.items():
        scored = sum(len(ids) for ids, _ in run.heldout.get(name, []))
        say(f"  {name} ({run.sources[name].role}): {shards.tokens:,} tokens, read {epochs[name]:.2f} times; "
            f"{scored:,} held-out tokens scored")
        if not scored:
            say(f"warning: source {name} has no held-out documents, so it is not evaluated")
    for line in mixture.describe_mix(c.data, run.sources) + mixture.judge_epochs(epochs, run.sources)[1]:
        say(line)
    say(f"run: {run.steps:,} steps of {c.train.batch_size} x {c.data.context} = {run.tokens_per_step:,} tokens, "
        f"seed {c.seed}, {c.train.precision}, {run.world.size} x {run.world.device.type}")
    lost = [f"{name} {abs(packing.padded):,} {'padded' if packing.padded > 0 else 'dropped'}"
            for name, packing in loader.packings.items() if packing.padded]
    say(f"packing: {c.data.packing}; positions an epoch without a token: {', '.join(lost) or 'none'}")


def begin(run: Run, start: int):
    """Write the first files of the run folder, unless the run goes on from a checkpoint of its own."""
    c, device = run.c, run.world.device
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
                   tokens_per_step=run.tokens_per_step, total_steps=run.steps, device=str(device),
                   world_size=run.world.size, precision=c.train.precision,
                   sources={name: {"role": run.sources[name].role, "tokens": shards.tokens,
                                   "documents": shards.documents} for name, shards in run.loader.shards.items()},
                   versions={"torch": torch.__version__, "python": sys.version.split()[0]})


def log_step(run: Run, step: int, result: dict, seconds: float):
    """The metrics and console line after `step` steps. result: what train_step returned for the last of them; seconds:
    the mean time of a step since the line before."""
    c, device, tokens = run.c, run.world.device, run.tokens_per_step
    values = {"loss": result["loss"], "lr": result["lr"], "grad_norm": result["grad_norm"], "tokens": step * tokens,
              "tokens_per_second": tokens / seconds, "step_ms": 1000 * seconds, "peak_gb": peak_bytes(device) / 1e9}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    if peak:
        values["mfu"] = matmul_flops_per_token(run.config, c.data.context) * tokens / run.world.size / seconds / peak

    epochs, drawn = run.loader.epochs(step), dict(zip(run.loader.names, run.loader.plan[step].tolist()))
    values["replay_share"] = sum(drawn[name] for name in run.names_of("general")) / sum(drawn.values())
    # The share of domain sequences that this step, the run's number `step` - 1 from 0, was meant to have.
    replay = adaptive.share_in_force(run.decisions, step - 1)
    scheduled = mixture.schedule_at(c.data, (step - 1) / max(1, run.steps - 1), run.steps)[0]
    values["domain_share"] = scheduled if replay is None else 1 - replay
    values |= result["methods"]
    values["sources"] = {name: {"loss": nats / n, "tokens": drawn[name] * c.data.context, "epochs": epochs[name]}
                         for name, (nats, n) in result["sources"].items()}
    run.log.record("train", step, **values)
    run.log.show_step(step, values)


def show_sequences(run: Run, batch):
    """The first two packed sequences of a batch as text, a line per document."""
    for row, tokens in enumerate(batch.tokens[:2]):
        begins = batch.doc_start[row].unique().tolist()
        run.log.say(f"--- a packed sequence of source {run.loader.names[batch.source[row]]}, {len(begins)} documents")
        for begin, end in zip(begins, [*begins[1:], len(tokens)]):
            run.log.say(f"[{begin}:{end}] {run.tokenizer.decode(tokens[begin:end].tolist())!r}")
