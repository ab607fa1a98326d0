"""What a run asks its model at each evaluation beside reading held-out text: the tasks and the probes that are set."""

from dataclasses import dataclass, field

import numpy as np

import data
from core.errors import UserError
from measure import retention
from measure.probes import FACT_PROBES, open_probes, score_probes
from measure.tasks import format_tasks, open_tasks, score_tasks

# Steps of the run from whose batches documents are taken for the fact probe.
STEPS = 64
# What scores say of each document or item.
ITEMS = ("nats_by_document", "hits", "nats_by_item", "sizes_by_item")


@dataclass
class Questions:
    """{name: (task, its items)} of each, the same on every rank and in a resumed run."""
    tasks: dict = field(default_factory=dict)
    probes: dict = field(default_factory=dict)
    # Lines for the user to read before the run.
    notes: list = field(default_factory=list)

    def ask(self, model, tokenizer, world, autocast) -> dict[str, dict]:
        """{"tasks": {name: result}, "probes": {name: result}}, without what there is none of. world: the ranks that
        share the work; None: this rank alone does it."""
        found = {}
        for kind, score in (("tasks", score_tasks), ("probes", score_probes)):
            if asked := getattr(self, kind):
                found[kind] = score(model, tokenizer, asked, world=world, autocast=autocast)
        return found


def open_questions(run) -> Questions:
    """What eval.tasks and eval.probes ask for. run: with its sources, its plan and what it scores; it needs no model.
    UserError where a file is missing or odd, or where the model cannot be asked."""
    c = run.c.eval
    if not (c.tasks or c.probes.facts or c.probes.in_context):
        return Questions()
    if not run.objective.text_objective.causal or run.tokenizer is None:
        raise UserError("eval.tasks and eval.probes ask models that continue a text and have a tokenizer; leave them "
                        "out for this one")
    trained, heldout = (read_trained(run), read_heldout(run)) if c.probes.facts else ([], [])
    probes = open_probes(c.probes, run.tokenizer, trained, heldout, run.c.seed)
    asked = {name: len(items) for name, (_, items) in probes.items()}
    notes = [f"warning: {name} has {asked.get(name, 0)} items, and eval.probes.facts asks for {c.probes.facts}: those "
             f"documents have few numbers, names and references that can be told apart"
             for name in FACT_PROBES if asked.get(name, 0) < c.probes.facts]
    tasks = open_tasks(c.tasks)
    if programs := [name for name, (task, _) in tasks.items() if task.rule == "program"]:
        raise UserError(f"eval.tasks.{programs[0]} runs programs that the model writes, which a training does not; ask "
                        f"for it after the run, with eval.py")
    return Questions(tasks, probes, notes)


def sources_of_facts(run) -> list[str]:
    """The sources of the domain whose records are texts."""
    return [name for name in run.names_of("domain") if run.loader.shards[name].format == "text"]


def decode(run, ids: np.ndarray) -> str:
    """The text of a document's tokens, without those that stand around documents."""
    around = [token for token in (run.tokenizer.bos_id, run.tokenizer.eos_id) if token is not None]
    return run.tokenizer.decode(ids[~np.isin(ids, around)].tolist())


def read_heldout(run) -> list[str]:
    """The held-out documents of the domain, in pieces of a context."""
    T = run.c.data.context
    return [decode(run, ids[start:start + T]) for name in sources_of_facts(run)
            for ids, *_ in run.heldout.get(name, ()) for start in range(0, len(ids), T)]


def read_trained(run) -> list[str]:
    """Documents of the domain, or what a sequence has of each, out of batches spread over the run, but for those that
    read a source again. What adaptive replay decides later changes how much of a source is read, and not in which
    order."""
    loader = data.Loader(run.loader.packings, run.planned, run.c.data, run.c.seed)
    columns = [loader.names.index(name) for name in sources_of_facts(run)]
    once = [step for step in range(run.steps) if any(
        run.planned[step + 1, i] <= loader.packings[loader.names[i]].sequences and
        run.planned[step + 1, i] > run.planned[step, i] for i in columns)]
    texts = []
    for step in sorted({once[i] for i in np.linspace(0, len(once) - 1, STEPS).astype(int)} if once else ()):
        B = int((run.planned[step + 1] - run.planned[step]).sum())
        # Of a large batch its first sequences, which are in no order.
        batch = loader.batch(step, 0, min(B, max(8, run.c.eval.probes.facts // 8)))
        for row in np.flatnonzero(np.isin(batch.source, columns)):
            tokens, starts = batch.tokens[row].numpy(), batch.doc_start[row].unique().tolist()
            texts += [decode(run, tokens[start:end]) for start, end in zip(starts, [*starts[1:], len(tokens)])]
    return [text for text in texts if text]


def without_items(found: dict) -> dict:
    """{name: scores} without the values of each document or item, which are too long for a line of metrics.jsonl."""
    return {name: {key: value for key, value in scores.items() if key not in ITEMS} for name, scores in found.items()}


def compare_answers(before: dict, after: dict) -> tuple[dict, list[str]]:
    """({"tasks", "probes": {"before", "after", "change"}, "capabilities": {name: row}}, Markdown tables) of what
    Questions.ask found, or of evaluations that hold it. The change of tasks and the rows of capabilities are
    `retention.compare`'s, that of probes the difference of the values."""
    found, tables = {}, []
    for kind in ("tasks", "probes"):
        if kind in after:
            was, now = before.get(kind, {}), after[kind]
            found[kind] = {"before": was, "after": now, "change": {
                name: now[name]["value"] - was[name]["value"] for name in now if name in was}}
            tables.append(format_tasks(was, now))
    if "tasks" in after:
        kept = retention.compare(before.get("tasks"), after["tasks"])
        found["tasks"]["change"], found["capabilities"] = kept["change"], kept["capabilities"]
        tables.append(retention.format_capabilities(kept["capabilities"], kept["change"]))
    return found, tables
