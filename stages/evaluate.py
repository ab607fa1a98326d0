"""Score the held-out text once in a while, let the methods answer, and draw samples before and after."""

import json
from dataclasses import dataclass, field

import eval as evaluation
from learn import adaptive
from stages.build import Run
from text import mixture


@dataclass
class EvalSection:
    every: int = 500
    """steps between evaluations; there is always one before the first step and one after the last"""
    tokens: int = 200_000
    """held-out tokens scored of each source"""
    prompts: list[str] = field(default_factory=list)
    """texts the model continues before and after; default: the beginnings of held-out documents"""
    sample_tokens: int = 64

    def __post_init__(self):
        for name in ("every", "tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"eval.{name} is {getattr(self, name)}, but must be above 0")


def evaluate(run: Run, step: int) -> dict:
    """{source: {"role", "bits_per_byte", ...}} of the held-out documents: eval_step_N.json and a line in
    metrics.jsonl."""
    result, protocol = run.heldout.score(run.inner, run.world), run.heldout.protocol()
    run.log.record("eval", step, sources=result, protocol=protocol)
    unit = "bits_per_byte" if run.objective.causal else "accuracy"
    run.log.say(f"eval at step {step}: " + ", ".join(f"{name} {numbers[unit]:.4f}" for name, numbers in result.items())
                + f" ({unit.replace('_', ' ')})")
    if run.world.main:
        write_json(run.folder / f"eval_step_{step}.json", {"step": step, "texts": result, "protocol": protocol})
    return result


def draw_samples(run: Run, step: int):
    """Continuations of the run's prompts, before and after."""
    c = run.c
    if not run.objective.causal or run.tokenizer is None or not c.eval.sample_tokens:
        return
    prompts = c.eval.prompts or [run.tokenizer.decode(ids[:12].tolist()) for documents in run.heldout.documents.values()
                                 for ids, _ in documents[:2]]
    run.log.record("samples", step, samples=evaluation.continue_prompts(run.inner, run.tokenizer, prompts,
                                                                        c.eval.sample_tokens, c.seed))


# ---- what the methods make of it

def ask_methods(run: Run, step: int, result: dict):
    """Show an evaluation to the methods, and do what they decide."""
    for method in run.methods:
        decision = method.evaluated(step, result)                              # evaluated
        if decision:
            apply_decision(run, decision)
            run.log.record("replay", step, **{k: v for k, v in decision.items() if k != "step"})
            run.log.say(f"replay at step {step}: {decision['reason']}; share "
                        f"{'as scheduled' if decision['replay_share'] is None else decision['replay_share']}")
            try:
                mixture.check_epochs(run.loader.epochs(run.steps), run.sources)
            except ValueError as error:                                        # known before the run, not in it
                run.log.say(f"warning: {error}")
            if run.world.main:
                write_plan(run)


def apply_decision(run: Run, decision: dict):
    """Let a decision of adaptive replay hold from the next step on; the batch of this one has been read."""
    before = adaptive.share_in_force(run.decisions)
    run.decisions.append(decision)
    if decision["replay_share"] not in (None, before):
        run.loader.plan = mixture.replan(run.loader.plan, decision["step"] + 1, run.c.data, run.sources,
                                           1 - decision["replay_share"])


def wanted_share(run: Run, step: int) -> float:
    """Share of domain sequences that step `step` (from 1) was to have."""
    replay = adaptive.share_in_force(run.decisions, step - 1)
    if replay is not None:
        return 1 - replay
    return mixture.share_at(run.c.data, (step - 1) / max(1, run.steps - 1), run.steps)


def write_plan(run: Run):
    """plan.jsonl: what was planned before the run, and each decision; with the settings it is the order of the data."""
    plan = {"step": 0, "steps": run.steps, "schedule": run.c.data.schedule, "domain_share": run.c.data.domain_share,
            "sequences": dict(zip(run.loader.names, run.planned[-1].tolist()))}
    write_text(run.folder / "plan.jsonl", "".join(json.dumps(line) + "\n" for line in [plan, *run.decisions]))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path, text: str):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
