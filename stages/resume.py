"""Save a run's state, and go on from it: the same run resumed bit for bit, or a branch of another."""

import dataclasses
import json
from pathlib import Path

import data
from core import checkpoint, parallel
from core.hashing import short_digest
from learn import schedules
from stages.build import Run
from stages.evaluate import apply_decision
from text.shards import SPLITS


def identity(run: Run, step: int) -> dict:
    """What must be the same for a run resumed at `step` to be the same run; the rest (ranks, micro-batch, logging) may
    change. Of the plan and the learning rates only the past counts, so that a schedule whose past does not depend on
    the run's length (static mix; infinite, constant or wsd) can be prolonged, or annealed from any of its checkpoints.
    """
    c, loader = run.c, run.loader

    tokens = {name: [record["sha256"] for split in SPLITS for record in s.manifest["splits"][split]["shards"]]
              for name, s in zip(loader.names, loader.shards)}
    return json.loads(json.dumps({
        "seed": c.seed, "order_version": data.ORDER_VERSION, "context": c.data.context,
        "batch_size": c.train.batch_size, "precision": c.train.precision, "mask_documents": c.data.mask_documents,
        "reset_positions": c.data.reset_positions, "drop_last": c.data.drop_last, "packing": c.data.packing,
        "eval_tokens": c.eval.tokens,
        "eval_every": c.eval.every if c.forget.adaptive.policy != "none" else None,       # then it decides the order
        "mix": short_digest(run.planned[:step + 1].tobytes()),
        "stages_of": run.steps if c.forget.freeze.schedule != "none" else None,
        "rates": short_digest(repr([schedules.learning_rate(s, run.steps, c.optim) for s in range(step)]).encode()),
        "base": run.base_fingerprint, "lora": dataclasses.asdict(c.lora), "forget": dataclasses.asdict(c.forget),
        "tokens": short_digest(json.dumps(tokens).encode()),
        "optim": {k: v for k, v in dataclasses.asdict(c.optim).items() if k not in schedules.SCHEDULE_FIELDS},
        "objective": dataclasses.asdict(c.objective),
        "model": dataclasses.asdict(run.config),
    }))


def save(run: Run, step: int):
    """Write the checkpoint of the run after `step` steps."""
    weights, moments = parallel.model_state(run.inner, run.trained), parallel.optimizer_state(run.inner, run.optimizer)
    numbers = {}
    for method in run.methods:
        tensors, numbers[method.name] = method.state()
        moments |= {f"{method.name}:{name}": tensor for name, tensor in tensors.items()}
    if run.world.main:
        base = run.base.pinned if run.base else ""
        state = {"identity": identity(run, step), "loss_scale": run.scale.state_dict(), "methods": numbers,
                 "decisions": run.decisions, "base": base, "optim": dataclasses.asdict(run.c.optim),
                 "tokenizer": run.c.model.tokenizer or base}
        checkpoint.save(run.folder / "checkpoints", step, weights, moments, state, run.c.train.keep)
    run.log.record("event", step, message="checkpoint saved")
    run.world.barrier()


def resume(run: Run) -> int:
    """Load the newest checkpoint that verifies, if there is one; returns the step to go on from. A run without any
    begins at train.branch_from, if that is set."""
    out = run.folder
    found = run.world.broadcast(checkpoint.newest(out / "checkpoints", run.log.say) if run.world.main else None)
    if found is None and run.c.train.branch_from:
        found = Path(run.c.train.branch_from)
        checkpoint.verify(found)
        if not (found.parent.parent / "eval_step_0.json").is_file():
            raise ValueError(f"{found} is in no run folder with an eval_step_0.json, which says what was known before; "
                             f"leave the checkpoint where its run wrote it")
    if found is None:
        return 0
    weights, moments, state = checkpoint.load(found)
    step, now = state["step"], identity(run, state["step"])
    if step > run.steps:
        raise ValueError(f"{found} is at step {step}, and the run is to end at {run.steps}; lengthen it")
    optim_now = dataclasses.asdict(run.c.optim)
    why = {"mix": f"the sequences of the first {step} steps are others (data.*, or the run's length)",
           "rates": f"the learning rates of the first {step} steps are others (" + (", ".join(
               f"optim.{k} was {was} and is {optim_now[k]}" for k, was in state["optim"].items() if optim_now[k] != was)
               or "the run's length") + ")"}
    differ = [why.get(key, f"{key} was {state['identity'].get(key)} and is {value}") for key, value in now.items()
              if state["identity"].get(key) != value]
    if differ:
        what, other = (out, "another --out to start anew") if found.parent.parent == out else (found, "no branch")
        raise ValueError(f"{what} holds another run: {'; '.join(differ)}; use the same settings to resume it, or "
                         f"{other}")
    parallel.load_model_state(run.inner, weights, run.trained)
    parallel.load_optimizer_state(run.inner, run.optimizer, moments)
    run.scale.load_state_dict(state["loss_scale"])
    for method in run.methods:
        mine = {name.removeprefix(f"{method.name}:"): tensor for name, tensor in moments.items()
                if name.startswith(f"{method.name}:")}
        method.load_state(mine, state["methods"][method.name])
    for decision in state["decisions"]:
        apply_decision(run, decision)
    run.log.say(f"resumed from {found} at step {step}")
    run.log.record("resume", step)
    return step
