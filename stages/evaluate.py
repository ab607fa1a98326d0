"""What a run is worth: score the held-out text once in a while and let the methods answer; in the end also export the
model, merge it with its base, and write eval.json and the report."""

import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import eval as evaluation
import forget
import hf
import lora
from core import parallel
from core.cli import run_command
from core.config import setting
from core.devices import pick_dtype
from core.errors import UserError
from core.files import read_json, write_json, write_text
from learn import adaptive
from measure import verdict
from stages.build import Run
from text import mixture
from text.vocabulary import token_before_document


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
    """The evaluation before `step`: scores, the methods' decisions about the plan, before the first step samples."""
    scores = score_heldout(run, step)
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
    if step == 0:
        draw_samples(run, step)


def score(run: Run, model, world) -> tuple[dict, dict]:
    """({source: {"role", "bits_per_byte", ...}}, protocol) of the held-out documents under any model, computed as the
    run computes; the ranks of `world` share the batches."""
    c, prefix = run.c, token_before_document(run.tokenizer) if run.tokenizer else 0
    scores = {name: {"role": run.sources[name].role,
                     **evaluation.score(model, run.objective, documents, prefix, c.data.context, world,
                                        c.train.micro_batch_size, run.autocast)}
              for name, documents in run.heldout.items()}
    return scores, evaluation.protocol(prefix, c.data.context, pick_dtype(c.train.precision))


def score_heldout(run: Run, step: int) -> dict:
    """{source: {"role", "bits_per_byte", ...}} of the held-out documents; also in eval_step_N.json and metrics.jsonl"""
    scores, protocol = score(run, run.inner, run.world)
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
    prompts = c.eval.prompts or [run.tokenizer.decode(ids[:12].tolist()) for documents in run.heldout.values()
                                 for ids, _ in documents[:2]]
    samples = evaluation.continue_prompts(run.inner, run.tokenizer, prompts, c.eval.sample_tokens, c.seed)
    run.log.record("samples", step, samples=samples)


def apply_decision(run: Run, decision: dict):
    """Let a decision of adaptive replay hold from the step after the next one: the next one's batch has been read."""
    before = adaptive.share_in_force(run.decisions)
    run.decisions.append(decision)
    if decision["replay_share"] not in (None, before):
        run.loader.plan = mixture.replan(run.loader.plan, decision["step"] + 1, run.c.data, run.sources,
                                         1 - decision["replay_share"])


def write_plan(run: Run):
    """plan.jsonl: the plan before the run, and each decision since. With the settings it is the order of the data."""
    plan = {"step": 0, "steps": run.steps, "schedule": run.c.data.schedule, "domain_share": run.c.data.domain_share,
            "sequences": dict(zip(run.loader.names, run.planned[-1].tolist()))}
    write_text(run.folder / "plan.jsonl", "".join(json.dumps(line) + "\n" for line in [plan, *run.decisions]))


# ---- the end of a run

def finish(run: Run):
    """Evaluate what the run leaves, export it, merge it with the base where that is set, and report. eval.json says
    that the run is finished."""
    c, out, say = run.c, run.folder, run.log.say
    with contextlib.ExitStack() as stack:
        for method in run.methods:
            stack.enter_context(method.exported(run.inner))                                 # exported
        after = score_heldout(run, run.steps)
        draw_samples(run, run.steps)
        # Only rank 0 is sure to see the folder.
        first = read_json(out / "eval_step_0.json") if run.world.main else {"texts": {}, "protocol": {}}
        before, protocol = first["texts"], first["protocol"]
        if c.forget.merge.method == "none":
            table = evaluation.format_table(before, after)
            export(run, out / "final", f"{table}\n\nHeld-out documents; protocol: {json.dumps(protocol)}")
        else:
            after = merge_with_base(run)
    if not run.world.main:
        return
    comparison = verdict.compare(before, after, run.names_of("general")) if run.objective.causal else {}
    write_json(out / "eval.json", {"protocol": protocol, "before": before, "after": after, **comparison})
    say(evaluation.format_table(before, after))
    if comparison:
        say(verdict.describe(comparison))
    run.log.close()
    try:
        run_command("report.py", out)
        report = f"report: {out}/report.html"
    except UserError as error:
        report = f"no report: {error}"
    print(f"model: {out}/final   {report}", flush=True)


def export(run: Run, folder: Path, card: str):
    """Write the trained model as a Hugging Face folder; with adapters, these as a PEFT folder beside it.

    card: Markdown for the model card. A collective, because ranks may hold shares of the weights.
    """
    c, weights = run.c, parallel.model_state(run.inner)
    if not run.world.main:
        return
    own_tokenizer = c.model.tokenizer or None
    if c.lora.rank:
        # Adapters are added to the base as it is on disk, not as it was rounded or quantised for this run.
        adapter = folder.with_name("adapter")
        lora.save_adapter(run.inner, adapter, run.base.name, weights)
        lora.merge_folders(run.base, adapter, folder, card=card, tokenizer=own_tokenizer)
    else:
        hf.save(run.inner, folder, base=run.base, state=weights, tokenizer=own_tokenizer,
                scratch=c.model.init == "scratch", card=card)


def merge_with_base(run: Run) -> dict:
    """Write the run's own result to trained/ and the best mean of it and the base to final/; returns the scores of
    final/ on rank 0, which alone does the work."""
    c, out = run.c, run.folder
    export(run, out / "trained", "The result of a run before it was merged with its base.")
    if not run.world.main:
        return {}

    def score_alone(model, folder):
        return score(run, model.eval(), parallel.World(0, 1, run.world.device))[0]

    # A run that died before its eval.json may have left one.
    shutil.rmtree(out / "final", ignore_errors=True)
    found = forget.merge_best(run.base, out / "trained", out / "final", score_alone, run.names_of("general"),
                              c.forget.merge, device=run.world.device, say=run.log.say)
    write_json(out / "merge.json", found)
    return next(row["texts"] for row in found["rows"] if row["alpha"] == found["alpha"])
