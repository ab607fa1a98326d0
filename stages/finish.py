"""The end of a run: the last evaluation, the merge with the base, the export, eval.json and the report."""

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
from core.files import read_json, write_json
from learn.peft_files import save_adapter
from measure import verdict
from stages.build import Run
from stages.evaluate import draw_samples, score_heldout

REPORT = Path(__file__).parent.parent / "report.py"


def finish(run: Run):
    """Evaluate what the run leaves, export it, merge it with the base where that is set, and report."""
    with contextlib.ExitStack() as stack:
        for method in run.methods:
            stack.enter_context(method.exported(run.inner))                                 # exported
        after = score_heldout(run, run.steps)
        draw_samples(run, run.steps)
        # Only rank 0 is sure to see the folder.
        first = read_json(run.folder / "eval_step_0.json") if run.world.main else {"texts": {}, "protocol": {}}
        if run.c.forget.merge.method == "none":
            table = evaluation.format_table(first["texts"], after)
            protocol = json.dumps(first["protocol"])
            export(run, run.folder / "final", f"{table}\n\nHeld-out documents; protocol: {protocol}")
        else:
            after = merge_with_base(run)
    if run.world.main:
        write_results(run, first, after)


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
        save_adapter(run.inner, adapter, run.base.name, weights)
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

    def score(model, folder):
        return run.heldout.score(model.eval(), parallel.World(0, 1, run.world.device))

    # A run that died before its eval.json may have left one.
    shutil.rmtree(out / "final", ignore_errors=True)
    found = forget.merge_best(run.base, out / "trained", out / "final", score, run.names_of("general"), c.forget.merge,
                              device=run.world.device, say=run.log.say)
    write_json(out / "merge.json", found)
    return next(row["texts"] for row in found["rows"] if row["alpha"] == found["alpha"])


def write_results(run: Run, first: dict, after: dict):
    """eval.json, which says that the run is finished, the table and verdict for the user, and report.html.

    first: the evaluation before the first step; after: the scores of what the run leaves.
    """
    out, before = run.folder, first["texts"]
    comparison = verdict.compare(before, after, run.names_of("general")) if run.objective.causal else {}
    write_json(out / "eval.json", {"protocol": first["protocol"], "before": before, "after": after, **comparison})
    run.log.say(evaluation.format_table(before, after))
    if comparison:
        run.log.say(verdict.describe(comparison))
    run.log.close()
    made = subprocess.run([sys.executable, REPORT, out], capture_output=True, text=True)
    report = f"report: {out}/report.html" if made.returncode == 0 else f"no report: {made.stderr.strip()}"
    print(f"model: {out}/final   {report}", flush=True)
