"""The end of a run: last evaluation, merge with the base, export, eval.json and the report."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import eval as evaluation
import forget
import hf
import lora
from core import parallel
from learn.peft_files import save_adapter
from measure import verdict
from stages.build import Run
from stages.evaluate import draw_samples, evaluate, write_json

REPORT = Path(__file__).parent.parent / "report.py"


def finish(run: Run):
    """Evaluate what the run leaves, export it, and report."""
    with contextlib.ExitStack() as stack:
        for method in run.methods:
            stack.enter_context(method.exported(run.inner))                    # exported
        after = evaluate(run, run.steps)
        draw_samples(run, run.steps)
        if run.c.forget.merge.method != "none":
            after = merge_with_base(run)
        write_results(run, after)


def export(run: Run, folder: Path, card: str):
    """A Hugging Face folder; beside it the adapter in PEFT's format, where one was trained."""
    c, weights = run.c, parallel.model_state(run.inner)
    if not run.world.main:
        return
    if c.lora.rank:                                # onto the base as it is on disk, whatever it was rounded to here
        adapter = folder.with_name("adapter")
        save_adapter(run.inner, adapter, run.base.name, weights)
        lora.merge_folders(run.base, adapter, folder, card=card, tokenizer=c.model.tokenizer or None)
        return
    hf.save(run.inner, folder, base=run.base, state=weights, tokenizer=c.model.tokenizer or None,
            scratch=c.model.init == "scratch", card=card)


def merge_with_base(run: Run) -> dict:
    """final/ between the base and the run's own result, which goes to trained/; the evaluation of what was chosen."""
    c, out = run.c, run.folder
    export(run, out / "trained", "The result of a run before it was merged with its base.")
    if not run.world.main:
        return {}

    def score(model, folder):
        return run.heldout.score(model.eval(), parallel.World(0, 1, run.world.device))

    shutil.rmtree(out / "final", ignore_errors=True)       # of a run that died before its eval.json
    found = forget.merge_best(run.base, out / "trained", out / "final", score,
                             run.names_of("general"), c.forget.merge, device=run.world.device, say=run.log.say)
    write_json(out / "merge.json", found)
    return next(row["texts"] for row in found["rows"] if row["alpha"] == found["alpha"])


def write_results(run: Run, after: dict):
    """eval.json, the Hugging Face folder with its card, and the report."""
    out = run.folder
    first = json.loads((out / "eval_step_0.json").read_text(encoding="utf-8"))
    before, protocol = first["texts"], first["protocol"]
    comparison = verdict.compare(before, after, run.names_of("general")) if run.objective.causal else {}
    table = evaluation.format_table(before, after)
    if run.c.forget.merge.method == "none":        # a merge has written it, and only rank 0 would see the folder
        export(run, out / "final", f"{table}\n\nHeld-out documents; protocol: {json.dumps(protocol)}")
    if not run.world.main:
        return
    write_json(out / "eval.json", {"protocol": protocol, "before": before, "after": after, **comparison})
    run.log.say(table)
    if comparison:
        run.log.say(verdict.describe(comparison))
    run.log.close()
    made = subprocess.run([sys.executable, REPORT, out], capture_output=True, text=True)
    print(f"model: {out}/final   " + (f"report: {out}/report.html" if made.returncode == 0
                                      else f"no report: {made.stderr.strip()}"), flush=True)
