"""Save a run's state, and go on from it: the same run resumed bit for bit or rewound, or a branch of another."""

import dataclasses
import json
import reprlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import data
from core import checkpoint, hashing, sharding
from core.config import is_on
from core.errors import Diverged, UserError
from core.files import write_json
from core.foreign_files import find_odd
from learn import schedules
from stages.build import Run
from stages.evaluate import apply_decision, export_dtype, write_plan
from text.shards import SPLITS

# Settings of the objective that stand in every checkpoint, whatever their values.
LONG_KNOWN = ("name", "mask_ratio", "mask_token_id")
# What only the sizes of a model with experts have in a checkpoint.
OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "dense_layers")


def identity(run: Run, step: int) -> dict:
    """What must be equal for a run resumed at `step` to be the same; ranks, micro-batch and logging may change.

    Of the plan and the learning rates only the past counts. A schedule whose past does not depend on the run's length
    (static mix; infinite, constant or wsd rates) can therefore be prolonged, or annealed from any of its checkpoints.
    """
    c = run.c
    # Of conversations also which of the tokens are learned.
    tokens = {name: [record[key] for split in SPLITS for record in shards.manifest["splits"][split]["shards"]
                     for key in ("sha256", "mask_sha256") if key in record]
              for name, shards in run.loader.shards.items()}
    for name, each in run.loader.packings.items():
        # Conversations are packed in another way since their second version, where that cuts fewer or leaves some out.
        if run.loader.shards[name].format == "chat" and (each.pieces_left_out or each.kind != c.data.packing):
            tokens[name].append("packed by 2")
    rates = [schedules.learning_rate(s, run.steps, c.optim) for s in range(step)]
    optimizer = {key: value for key, value in dataclasses.asdict(c.optim).items()
                 if key not in schedules.SCHEDULE_FIELDS}
    # Without what is as it is by default, so that checkpoints from before there was such a setting go on.
    objective = {key: getattr(c.objective, key) for key in LONG_KNOWN} | run.objective_settings
    model = {key: value for key, value in dataclasses.asdict(run.config).items()
             if run.config.num_experts or key not in OF_EXPERTS}
    methods = {name: dataclasses.asdict(section) for name, section in vars(c.forget).items() if is_on(section)}
    known = {
        # A masked run's sequences are cut in another way since its second version, and masked by their place in the
        # data since its third.
        "order_version": data.ORDER_VERSION + 2 * (not run.objective.causal), "seed": c.seed, "context": c.data.context,
        "batch_size": c.train.batch_size, "precision": c.train.precision, "mask_documents": c.data.mask_documents,
        "reset_positions": c.data.reset_positions, "drop_last": c.data.drop_last, "packing": c.data.packing,
        "eval_tokens": c.eval.tokens,
        # Where adaptive replay is on, evaluations decide the order of the data.
        "eval_every": c.eval.every if c.forget.adaptive.policy != "none" else None,
        "mix": hashing.short_digest(run.planned[:step + 1].tobytes()),
        "stages_of": run.steps if c.forget.freeze.schedule != "none" else None,
        "rates": hashing.short_digest(repr(rates).encode()),
        "base": run.base_fingerprint, "lora": dataclasses.asdict(c.lora) if is_on(c.lora) else {}, "forget": methods,
        "tokens": hashing.short_digest(json.dumps(tokens).encode()),
        "optim": optimizer, "objective": objective, "model": model,
    }
    # As it comes back from a checkpoint: tuples as lists.
    return json.loads(json.dumps(known))


class Saver:
    """Writes the checkpoints of a run while its training goes on. `error`: why the last one that was waited for failed,
    on every rank, or None."""

    def __init__(self, run: Run):
        self.run, self.folder, self.world = run, run.folder / "checkpoints", run.world.apart()
        self.pool, self.pending, self.error = ThreadPoolExecutor(1), None, None
        # The steps whose files this process has hashed.
        self.verified = set()
        run.world.has_failed = self.has_failed

    def save(self, step: int):
        """Copy the state after `step` steps, and begin to write it. A failure is a warning, and the training goes on;
        what is not finite is refused. A collective."""
        run = self.run
        run.world.enter(f"the save at step {step}")
        self.wait()
        tensors = state_tensors(run)
        tensors |= {f"state/{name}": tensor.detach() for name, tensor in
                    sharding.optimizer_state(run.inner, run.optimizer, torch.Tensor.detach).items()}
        refuse_not_finite(run, tensors, f"the weights or the optimizer's state after step {step} were not saved, they "
                          f"hold", "lower --optim.lr; the same command goes on from the newest checkpoint")
        state = describe_state(run, step) if run.world.main else {}
        self.pending = step, self.pool.submit(self._write, step, checkpoint.Shards(tensors, run.world), state,
                                              kept_beside(run))
        run.saved = step

    def _write(self, step: int, shards: checkpoint.Shards, state: dict, also: list[list[int]]) -> str | None:
        """In the background; returns why it failed. What is no failure of a disk is a bug, and raised by `wait`."""
        path = checkpoint.path_of(self.folder, step)
        try:
            # The steps that a checkpoint holds are not done again, so what was logged of them may not be lost either.
            checkpoint.run_on_all(self.world, self.run.log.sync)
            checkpoint.write(path, shards, state, self.world)
            self.verified.add(step)
            checkpoint.run_on_all(self.world, lambda: self.world.main and checkpoint.prune(
                self.folder, step, self.run.c.train.keep, also, self.verified))
        except (OSError, UserError) as error:
            return f"checkpoint {error}, and the same command goes on from the newest there is"
        return None

    def has_failed(self) -> bool:
        """Whether this rank knows by now that the save which was begun has failed."""
        future = self.pending and self.pending[1]
        return bool(future and future.done() and (future.exception() or future.result()))

    def wait(self):
        """Return when the save that was begun has ended, and say that it has, or why it failed."""
        if self.pending:
            (step, future), self.pending = self.pending, None
            self.error = future.result()
            if self.error:
                self.run.log.say(f"warning: {self.error}")
            else:
                self.run.log.record("event", step, message="checkpoint saved")

    def finish(self):
        """Wait; UserError where the last save failed."""
        self.wait()
        if self.error:
            raise UserError(self.error)

    def close(self):
        self.pool.shutdown()


def state_tensors(run: Run) -> dict[str, torch.Tensor]:
    """{name in a checkpoint: tensor} of the weights and of the methods' states, as they are laid out now."""
    weights = sharding.model_state(run.inner, run.trained, torch.Tensor.detach)
    return {f"model/{name}": tensor for name, tensor in weights.items()} | {
        f"state/{method.name}:{name}": tensor for method in run.methods for name, tensor in method.state()[0].items()}


def refuse_not_finite(run: Run, tensors: dict, what: str, remedy: str):
    """Diverged on every rank where any rank's share of a tensor holds a NaN or an infinity. A collective."""
    if name := next(filter(None, run.world.gather(sharding.find_not_finite(tensors))), None):
        raise Diverged(f"{what} NaN or infinity (first in {name}); {remedy}")


def describe_state(run: Run, step: int) -> dict:
    """What a checkpoint holds beside tensors; what can change while it is written is copied."""
    base = run.base.pinned if run.base else ""
    state = {"step": step, "identity": identity(run, step),
             "loss_scale": {"scale": run.scale.scale, "good_steps": run.scale.good_steps}, "guard": run.guard.state(),
             "methods": {method.name: method.state()[1] for method in run.methods}, "decisions": run.decisions,
             "evaluations": run.evaluations, "base": base, "optim": dataclasses.asdict(run.c.optim),
             "tokenizer": str(Path(run.c.model.tokenizer).absolute()) if run.c.model.tokenizer else base,
             "dtype": str(export_dtype(run)).removeprefix("torch.")}
    return json.loads(json.dumps(state))


def kept_beside(run: Run) -> list[list[int]]:
    """Lists of steps that have a checkpoint. The first of each that verifies is kept beside the last ones: with
    train.keep_best the one whose domain text was scored best, and the one that the guard would rewind to."""
    bits = {}
    for step in checkpoint.steps(run.folder / "checkpoints") if run.c.train.keep_best and run.world.main else ():
        scores = run.evaluations.get(f"eval_step_{step}.json", {}).get("texts", {})
        found = [scores.get(name, {}).get("bits_per_byte") for name in run.names_of("domain")]
        if domain := [value for value in found if value is not None]:
            bits[step] = sum(domain) / len(domain)
    back = checkpoint.in_order(run.folder / "checkpoints", run.c.train.save_every) if run.guard.may_rewind else []
    return [sorted(bits, key=bits.get), back]


def resume(run: Run) -> int:
    """Load the checkpoint to go on from, if there is one; returns the number of steps already done."""
    run.saver = Saver(run)
    found = find_checkpoint(run)
    if found is None:
        return 0
    state = restore(run, found)
    run.guard.load_state(state["guard"])
    for method in run.methods:
        # Its tensors have been read in place.
        method.load_state(method.state()[0], state["methods"][method.name])
    for decision in state["decisions"]:
        apply_decision(run, decision)
    run.done = state["step"]
    run.saved = run.done if found.parent == run.saver.folder else 0
    restore_files(run, state)
    run.log.say(f"resumed from {found} at step {state['step']}")
    run.log.record("resume", state["step"])
    return state["step"]


def rewind(run: Run, why: str) -> str:
    """Undo the steps since the newest checkpoint that verifies, in all that they have moved, and go on behind them.
    Returns `why`, the fault of the step, and where the run is now. A collective.

    Which checkpoint that is must not depend on where the run was stopped meanwhile: of those there are, one that
    belongs to every run of these settings. What is about the data goes on with them: evaluations, the decisions made
    from them, and the methods' values, which are their memory of both. No sequence is read twice.
    """
    run.world.enter(f"the rewind after step {run.done + 1}")
    run.saver.wait()
    try:
        found = checkpoint.newest(run.saver.folder, run.log.say, run.world, run.c.train.save_every)
    except UserError:
        found = None
    if not found:
        run.guard.stop = f"{why}, and no checkpoint verifies that the run could be rewound to; lower --optim.lr"
        return why
    state = restore(run, found)
    why += f", and the run was rewound to step {state['step']}"
    run.guard.rewind(state["guard"], why)
    run.log.record("rewind", run.done + 1, to=state["step"])
    return why


def restore(run: Run, found: Path) -> dict:
    """Make the weights, the optimizer's and the methods' tensors and the loss scale those of the checkpoint `found`,
    which has been verified; returns its state. A collective."""
    state = checkpoint.read_state(found)
    refuse_other_run(run, found, state)
    refuse_odd_state(run, found, state)
    stored, tensors = checkpoint.Stored(found), state_tensors(run)
    # What has come since is not in the checkpoint, and the rest need not be there twice.
    run.optimizer.state.clear()
    moments = make_moments(run, stored, found)
    wanted = tensors | {f"state/{name}": tensor for name, tensor in moments.items()}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in wanted.items()}
    # Of a model in parts each rank holds some.
    held = dict(pair for part in run.world.gather([*shapes.items()]) for pair in part) if run.world.pipe else shapes
    if odd := sorted(name for name, _ in held.items() ^ stored.known.items()):
        raise UserError(f"{found} does not hold the tensors of this run, among them {odd[0]}; it was made by another "
                        f"version")
    stored.read_into(wanted)
    refuse_not_finite(run, wanted, f"{found} holds", "remove it, and the run goes on from the one before")
    sharding.load_optimizer_state(run.inner, run.optimizer, moments)
    run.scale.scale, run.scale.good_steps = (state["loss_scale"][name] for name in ("scale", "good_steps"))
    return state


def make_moments(run: Run, stored: checkpoint.Stored, found: Path) -> dict[str, torch.Tensor]:
    """{"parameter name/state name": tensor to read into} of the optimizer's states in a checkpoint."""
    parameters, moments = dict(run.inner.named_parameters()), {}
    for name, (shape, dtype) in stored.known.items():
        part, _, key = name.partition("/")
        if part == "state" and (p := parameters.get(key.rpartition("/")[0])) is not None:
            moments[key] = sharding.make_empty_like(shape, dtype, p)
    return moments


def restore_files(run: Run, state: dict):
    """Make what stands beside the checkpoints as it was, whatever a disk has done to it: the evaluations up to there,
    for a branch those of its trunk, and the plan."""
    run.evaluations = state["evaluations"]
    if run.world.main:
        for name, value in run.evaluations.items():
            write_json(run.folder / name, value)
        write_plan(run)


def find_checkpoint(run: Run) -> Path | None:
    """The run's newest checkpoint that verifies; without one, that of train.branch_from; None: begin at step 0."""
    found = checkpoint.newest(run.folder / "checkpoints", run.log.say, run.world)
    if found is not None or not run.c.train.branch_from:
        return found
    branch = Path(run.c.train.branch_from)
    checkpoint.verify(branch, run.world)
    return branch


def refuse_other_run(run: Run, found: Path, state: dict):
    """UserError with what differs, where the checkpoint `found` is not of this run up to its step."""
    step, was = state["step"], state["identity"]
    own = found.parent.parent == run.folder
    if own and found != checkpoint.path_of(found.parent, step):
        # By its name it would be the newest again and again.
        raise UserError(f"{found} holds step {step}, so it has been renamed; give it back its name, or move it away")
    if step > run.steps:
        raise UserError(f"{found} is at step {step}, and the run is to end at {run.steps}; lengthen it")
    now, optim_now = identity(run, step), dataclasses.asdict(run.c.optim)
    changed = [f"optim.{key} was {reprlib.repr(state['optim'][key])} and is {value}" for key, value in optim_now.items()
               if state["optim"].get(key, value) != value]
    why = ", ".join(changed) or "the run's length"
    reasons = {"mix": f"the sequences of the first {step} steps are others (data.*, or the run's length)",
               "rates": f"the learning rates of the first {step} steps are others ({why})"}
    differ = [reasons.get(key, f"{key} was {reprlib.repr(was.get(key))} and is {value}") for key, value in now.items()
              if was.get(key) != value]
    if not differ:
        return
    what, remedy = (run.folder, "another --out to start anew") if own else (found, "no branch")
    raise UserError(f"{what} holds another run: {'; '.join(differ)}; use the same settings to resume it, or {remedy}")


def refuse_odd_state(run: Run, found: Path, state: dict):
    """UserError where a state, whose values have the right types, is not one that this run could have written."""
    unit = "bits_per_byte" if run.objective.text_objective.causal else "accuracy"
    scores = {"texts": {str: {unit: float, str: lambda _: True}}, str: lambda _: True}
    odd = find_odd(state["methods"], {method.name: method.shape for method in run.methods}, "methods") or find_odd(
        state["evaluations"], {str: scores} | ({"eval_step_0.json": scores} if state["step"] else {}), "evaluations")
    steps, every = [decision["step"] for decision in state["decisions"]], run.c.eval.every
    if steps != sorted({step for step in steps if step <= state["step"] and step % every == 0}):
        odd = "decisions that no evaluation made"
    if odd:
        raise UserError(f"{found}/{checkpoint.STATE} has {odd}; it was made by another version")
