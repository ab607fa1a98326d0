"""Once in a while: score the held-out text, let the methods answer, and draw samples before and after."""

import json
from dataclasses import dataclass, field

import eval as evaluation
from core.config import setting
from core.files import write_json, write_text
from learn import adaptive
from stages.build import Run
from text import mixture


@dataclass
class EvalSection:
    every: int = setting(500, above=0)
    """steps between evaluations; there is always one before the first step and one after the last"""
    tokens: int = setting(200_000, above=0)
    """held-out tokens scored of each source"""
    prompts: list[str] = field(default_factory=list)
    """texts that the model continues before and after; default: the beginnings of held-out documents"""
    sample_tokens: int = setting(64, at_least=0)
    """tokens of each continuation; 0: none"""


def evaluate(run: Run, step: int):
    """The evaluation before `step`: scores, the methods' decisions, and before the first step samples."""
    ask_methods(run, step, score_heldout(run, step))
    if step == 0:
        draw_samples(run, step)


def score_heldout(run: Run, step: int) -> dict:
    """{source: {"role", "bits_per_byte", ...}} of the held-out documents; also in eval_step_N.json and metrics.jsonl"""
    scores, protocol = run.heldout.score(run.inner, run.world), run.heldout.protocol()
    run.log.record("eval", step, sources=scores, protocol=protocol)
    unit = "bits_per_byte" if run.objective.causal else "accuracy"
    shown = ", ".join(f"{name} {score[unit]:.4f}" for name, score in scores.items())
    run.log.say(f"eval at step {step}: {shown} ({unit.replace('_', ' ')})")
    if run.world.main:
        write_json(run.folder / f"eval_step_{step}.json", {"step": step, "texts": scores, "protocol": protocol})
    return scores


def draw_samples(run: Run, step: int):
    """Continue the run's prompts, so that a reader of the report sees what changed."""
    c = run.c
    if not run.objective.causal or run.tokenizer is None or not c.eval.sample_tokens:
        return
    prompts = c.eval.prompts or [run.tokenizer.decode(ids[:12].tolist()) for documents in run.heldout.documents.values()
                                 for ids, _ in documents[:2]]
    samples = evaluation.continue_prompts(run.inner, run.tokenizer, prompts, c.eval.sample_tokens, c.seed)
    run.log.record("samples", step, samples=samples)


# ---- what the methods decide

def ask_methods(run: Run, step: int, scores: dict):
    """Show the scores to the methods, and apply what they decide about the plan."""
    for method in run.methods:
        decision = method.evaluated(step, scores)                                           # evaluated
        if not decision:
            continue
        apply_decision(run, decision)
        share = "as scheduled" if decision["replay_share"] is None else decision["replay_share"]
        run.log.record("replay", step, **{key: value for key, value in decision.items() if key != "step"})
        run.log.say(f"replay at step {step}: {decision['reason']}; share {share}")
        # A plan that reads a source too often is refused before a run. Within a run it is better to go on.
        for refusal in mixture.judge_epochs(run.loader.epochs(run.steps), run.sources)[0][:1]:
            run.log.say(f"warning: {refusal}")
        if run.world.main:
            write_plan(run)


def apply_decision(run: Run, decision: dict):
    """Let a decision of adaptive replay hold from the step after the next one: the next one's batch has been read."""
    before = adaptive.share_in_force(run.decisions)
    run.decisions.append(decision)
    if decision["replay_share"] not in (None, before):
        run.loader.plan = mixture.replan(run.loader.plan, decision["step"] + 1, run.c.data, run.sources,
                                         1 - decision["replay_share"])


def wanted_share(run: Run, step: int) -> float:
    """The share of domain sequences that step `step` (from 1) was meant to have."""
    replay = adaptive.share_in_force(run.decisions, step - 1)
    if replay is not None:
        return 1 - replay
    return mixture.share_at(run.c.data, (step - 1) / max(1, run.steps - 1), run.steps)


def write_plan(run: Run):
    """plan.jsonl: the plan before the run, and each decision since. With the settings it is the order of the data."""
    plan = {"step": 0, "steps": run.steps, "schedule": run.c.data.schedule, "domain_share": run.c.data.domain_share,
            "sequences": dict(zip(run.loader.names, run.planned[-1].tolist()))}
    write_text(run.folder / "plan.jsonl", "".join(json.dumps(line) + "\n" for line in [plan, *run.decisions]))
