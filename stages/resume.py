"""Save a run's state, and go on from it: the same run resumed bit for bit, or a branch of another."""

import dataclasses
import json
from pathlib import Path

import data
from core import checkpoint, hashing, parallel
from core.errors import UserError
from learn import schedules
from stages.build import Run
from stages.evaluate import apply_decision, export_dtype
from text.shards import SPLITS


def identity(run: Run, step: int) -> dict:
    """What must be equal for a run resumed at `step` to be the same; ranks, micro-batch and logging may change.

    Of the plan and the learning rates only the past counts. A schedule whose past does not depend on the run's length
    (static mix; infinite, constant or wsd rates) can therefore be prolonged, or annealed from any of its checkpoints.
    """
    c = run.c
    tokens = {name: [record["sha256"] for split in SPLITS for record in shards.manifest["splits"][split]["shards"]]
              for name, shards in run.loader.shards.items()}
    rates = [schedules.learning_rate(s, run.steps, c.optim) for s in range(step)]
    optimizer = {key: value for key, value in dataclasses.asdict(c.optim).items()
                 if key not in schedules.SCHEDULE_FIELDS}
    # Without z_loss where it is off, so that checkpoints from before there was one go on.
    objective = {key: value for key, value in dataclasses.asdict(c.objective).items() if key != "z_loss" or value}
    known = {
        # A masked run's sequences are cut in another way since its second version.
        "order_version": data.ORDER_VERSION + (not run.objective.causal), "seed": c.seed, "context": c.data.context,
        "batch_size": c.train.batch_size, "precision": c.train.precision, "mask_documents": c.data.mask_documents,
        "reset_positions": c.data.reset_positions, "drop_last": c.data.drop_last, "packing": c.data.packing,
        "eval_tokens": c.eval.tokens,
        # Where adaptive replay is on, evaluations decide the order of the data.
        "eval_every": c.eval.every if c.forget.adaptive.policy != "none" else None,
        "mix": hashing.short_digest(run.planned[:step + 1].tobytes()),
        "stages_of": run.steps if c.forget.freeze.schedule != "none" else None,
        "rates": hashing.short_digest(repr(rates).encode()),
        "base": run.base_fingerprint, "lora": dataclasses.asdict(c.lora), "forget": dataclasses.asdict(c.forget),
        "tokens": hashing.short_digest(json.dumps(tokens).encode()),
        "optim": optimizer, "objective": objective, "model": dataclasses.asdict(run.config),
    }
    # As it comes back from a checkpoint: tuples as lists.
    return json.loads(json.dumps(known))


def save(run: Run, step: int):
    """Write the checkpoint of the run after `step` steps; a state that is not finite is a UserError. A collective."""
    weights, moments = parallel.model_state(run.inner, run.trained), parallel.optimizer_state(run.inner, run.optimizer)
    values = {}
    for method in run.methods:
        tensors, values[method.name] = method.state()
        moments |= {f"{method.name}:{name}": tensor for name, tensor in tensors.items()}
    refuse_not_finite(run, weights | moments, f"the weights or the optimizer's state after step {step} were not saved, "
                      f"they hold", "lower --optim.lr; the same command goes on from the newest checkpoint")
    if run.world.main:
        base = run.base.pinned if run.base else ""
        loss_scale = {"scale": run.scale.scale, "good_steps": run.scale.good_steps}
        state = {"identity": identity(run, step), "loss_scale": loss_scale, "guard": run.guard.state(),
                 "methods": values,
                 "decisions": run.decisions, "base": base, "optim": dataclasses.asdict(run.c.optim),
                 "tokenizer": str(Path(run.c.model.tokenizer).absolute()) if run.c.model.tokenizer else base,
                 "dtype": str(export_dtype(run)).removeprefix("torch.")}
        checkpoint.save(run.folder / "checkpoints", step, weights, moments, state, run.c.train.keep)
    run.saved = step
    run.log.record("event", step, message="checkpoint saved")
    run.world.barrier()


def refuse_not_finite(run: Run, tensors: dict, what: str, remedy: str):
    """UserError on every rank where any rank's share of a tensor holds a NaN or an infinity. A collective."""
    if name := next(filter(None, run.world.gather(parallel.find_not_finite(tensors))), None):
        raise UserError(f"{what} NaN or infinity (first in {name}); {remedy}")


def resume(run: Run) -> int:
    """Load the checkpoint to go on from, if there is one; returns the number of steps already done."""
    found = find_checkpoint(run)
    if found is None:
        return 0
    weights, moments, state = checkpoint.load(found)
    refuse_other_run(run, found, state)
    refuse_not_finite(run, weights | moments, f"{found} holds", "remove it, and the run goes on from the one before")
    parallel.load_model_state(run.inner, weights, run.trained)
    parallel.load_optimizer_state(run.inner, run.optimizer, moments)
    vars(run.scale).update(state["loss_scale"])
    if "guard" in state:
        # Checkpoints from before there was one go on.
        run.guard.load_state(state["guard"])
    for method in run.methods:
        prefix = f"{method.name}:"
        own = {name.removeprefix(prefix): tensor for name, tensor in moments.items() if name.startswith(prefix)}
        method.load_state(own, state["methods"][method.name])
    for decision in state["decisions"]:
        apply_decision(run, decision)
    run.done = run.saved = state["step"]
    run.log.say(f"resumed from {found} at step {state['step']}")
    run.log.record("resume", state["step"])
    return state["step"]


def find_checkpoint(run: Run) -> Path | None:
    """The run's newest checkpoint that verifies; without one, that of train.branch_from; None: begin at step 0."""
    own = run.folder / "checkpoints"
    found = run.world.broadcast(checkpoint.newest(own, run.log.say) if run.world.main else None)
    if found is not None or not run.c.train.branch_from:
        return found
    branch = Path(run.c.train.branch_from)
    checkpoint.verify(branch)
    if not (branch.parent.parent / "eval_step_0.json").is_file():
        raise UserError(f"{branch} is in no run folder with an eval_step_0.json, which says what was known before; "
                        f"leave the checkpoint where its run wrote it")
    return branch


def refuse_other_run(run: Run, found: Path, state: dict):
    """UserError with what differs, where the checkpoint `found` is not of this run up to its step."""
    step, was, now = state["step"], state["identity"], identity(run, state["step"])
    if step > run.steps:
        raise UserError(f"{found} is at step {step}, and the run is to end at {run.steps}; lengthen it")
    optim_now = dataclasses.asdict(run.c.optim)
    changed = [f"optim.{key} was {value} and is {optim_now[key]}" for key, value in state["optim"].items()
               if optim_now[key] != value]
    why = ", ".join(changed) or "the run's length"
    reasons = {"mix": f"the sequences of the first {step} steps are others (data.*, or the run's length)",
               "rates": f"the learning rates of the first {step} steps are others ({why})"}
    differ = [reasons.get(key, f"{key} was {was.get(key)} and is {value}") for key, value in now.items()
              if was.get(key) != value]
    if not differ:
        return
    own = found.parent.parent == run.folder
    what, remedy = (run.folder, "another --out to start anew") if own else (found, "no branch")
    raise UserError(f"{what} holds another run: {'; '.join(differ)}; use the same settings to resume it, or {remedy}")
