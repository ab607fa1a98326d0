"""Benchmarks under a model: items out of a file or a Hub dataset, few-shot prompts, scores with how sure they are.

    items = load_items("arc_easy", TASKS["arc_easy"], "arc_easy.jsonl", limit=200)
    result = score_tasks(model, tokenizer, {"arc_easy": (TASKS["arc_easy"], items)})["arc_easy"]

Scores are lm-evaluation-harness' (0.4.13): acc takes the choice with the largest log-likelihood, acc_norm the largest
per character, acc_bytes per byte of UTF-8. A context and its continuation are encoded together and cut at the length
of the encoded context; blanks at the end of a context go to the continuation; BOS stands before the context where the
model was trained so, and before an empty one always. What is longer than the model's positions is cut on the left.
"""

import json
import math
import random
import re
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from core import hashing
from core.cli import Reading
from core.config import setting
from core.errors import UserError, nearest
from generate import Settings
from measure import harness_tasks, verdict
from measure.answers import RULES
from measure.completions import complete_all
from measure.likelihoods import log_likelihoods
from measure.run_code import pass_at_k
from measure.task_list import MMLU, OWN, OWN_TEXT, TASKS, Form, Item, Task, check_item, cut_pages, spread
from text import corpus, kinds, vocabulary

# Of the normal distribution: the middle 95 %.
Z = 1.959963984540054
EXAMPLES_END = "\n\n"
CAPABILITIES = Literal["reasoning", "knowledge", "math", "coding", "language", "domain"]


@dataclass
class TaskSettings:
    """One task: a benchmark of the list by its name, or a file of the user's own."""
    file: str | None = None
    """the items, a file or a folder, or a task file of lm-evaluation-harness (.yaml); default: the Hub's dataset of the
    benchmark"""
    limit: int | None = setting(None, at_least=1)
    """items at most, spread evenly over the file"""
    shots: int | None = setting(None, at_least=0, at_most=100)
    """examples before each item; default: the task's own number"""
    seed: int = setting(0, at_least=0)
    """draws the examples"""
    capability: CAPABILITIES | None = None
    """what it measures; default: the benchmark's, and of an own file domain"""


@dataclass
class Sampling:
    """How often a model tries each problem whose answer is a program, and how it draws what it writes."""
    samples: int = setting(1, at_least=1, at_most=1000)
    """Programs that a model writes for each problem of humaneval and mbpp."""
    k: list[int] = field(default_factory=lambda: [1])
    """pass@k for each of these: the chance that one of k programs passes, estimated from the samples."""
    temperature: float = setting(0.0, at_least=0, at_most=10)
    """Draw them at this temperature; 0: the likeliest token, so that all samples are the same."""
    top_p: float = setting(1.0, above=0, at_most=1)
    """Draw them from the fewest likeliest tokens that together reach this probability; 1: from all."""

    def __post_init__(self):
        if odd := [k for k in self.k if not 1 <= k <= self.samples]:
            raise UserError(f"--k {odd[0]} is not between 1 and the {self.samples} --samples of a problem")
        if len({*self.k}) < len(self.k) or not self.k:
            raise UserError("--k has no value, or names one twice")
        if self.samples > 1 and not self.temperature:
            raise UserError(f"--samples {self.samples} are all the same at temperature 0; set --temperature 0.8, or "
                            f"0.2 where --k is 1")

    def apply(self, tasks: dict) -> dict:
        """The tasks {name: (task, items)} with those of programs asked in this way."""
        if self == Sampling():
            return tasks
        if not any(task.rule == "program" for task, _ in tasks.values()):
            raise UserError("--samples, --k, --temperature and --top-p are of programs: name humaneval or mbpp among "
                            "--tasks")
        metrics = tuple(f"pass_at_{k}" for k in self.k)
        return {name: (replace(task, metrics=metrics, sampling=self) if task.rule == "program" else task, items)
                for name, (task, items) in tasks.items()}


# ---- items

def open_tasks(wanted: dict[str, TaskSettings]) -> dict[str, tuple[Task, list[Item]]]:
    """{name: (task, its items with their examples)} of {name: settings}; UserError for what is wrong with one."""
    opened = {}
    for name, settings in wanted.items():
        if Path(settings.file or "").suffix in harness_tasks.SUFFIXES:
            task, items = harness_tasks.open_task(name, settings.file, settings.shots, settings.limit, settings.seed)
        else:
            task = find_task(name, settings.file)
            task = replace(task, shots=task.shots if settings.shots is None else settings.shots)
            items = load_items(name, task, settings.file, settings.limit, settings.seed)
        opened[name] = replace(task, capability=settings.capability or task.capability), items
    return opened


def find_task(name: str, file: str | None) -> Task:
    """The benchmark `name`, or, of a file of the user's own, the kind of task that its first record makes it."""
    if name in TASKS:
        return TASKS[name]
    if name.startswith("mmlu_"):
        return replace(MMLU, parts=(name.removeprefix("mmlu_"),))
    if not file:
        raise UserError(f"unknown task {name}{nearest(name, TASKS)} (there are {', '.join(TASKS)}, mmlu_SUBJECT; a "
                        f"task of your own needs a file: {name}=FILE.jsonl)")
    for _, record in read_records(name, file):
        for task in (OWN, OWN_TEXT):
            if any(has_columns(form, record) for form in task.forms):
                return task
        raise refuse_columns(name, file, record, (*OWN.forms[:2], *OWN_TEXT.forms))
    raise UserError(f"task {name}: {file} holds no items")


def load_items(name: str, task: Task, file: str | None = None, limit: int | None = None, seed: int = 0) -> list[Item]:
    """The items of a task, at most `limit` of them spread evenly over the file, with `task.shots` examples before each.

    All items of a part have the same examples, so that a model computes them once.
    """
    items, chosen = read_items(name, task, file), {}
    if task.shots and task.fixed:
        chosen = dict.fromkeys((item.part for item in items), choose_examples(name, replace(task, first=True),
                                                                             task.fixed, seed))
    elif task.shots:
        pool, is_apart = read_examples(name, task, file, items)
        for part in dict.fromkeys(item.part for item in items):
            chosen[part] = choose_examples(name, task, [item for item in pool if item.part == part], seed)
        if not is_apart:
            used = {id(item) for examples in chosen.values() for item in examples}
            items = [item for item in items if id(item) not in used]
            if not items:
                raise UserError(f"task {name}: {file or task.hub[0]} has no items beside its {task.shots} examples")
    return [add_examples(task, item, chosen.get(item.part, ())) for item in spread(items, limit)]


def add_examples(task: Task, item: Item, examples) -> Item:
    """The item with description and examples before its context."""
    before = task.description.format(part=item.part.replace("_", " "))
    for example in examples:
        context = example.contexts[example.gold] if example.contexts else example.context
        answer = example.choices[example.gold] if example.answer is None else example.answer
        before += context + task.delimiter + answer + EXAMPLES_END
    return replace(item, context=before + item.context, contexts=tuple(before + each for each in item.contexts))


def choose_examples(name: str, task: Task, pool: list[Item], seed: int) -> list[Item]:
    if len(pool) < task.shots:
        raise UserError(f"task {name}: {task.shots} examples are wanted, but there are {len(pool)}; lower shots")
    return pool[:task.shots] if task.first else random.Random(seed).sample(pool, task.shots)


def read_examples(name: str, task: Task, file: str | None, items: list[Item]) -> tuple[list[Item], bool]:
    """(items to choose examples from, whether they are others than those to score): of the split or the file beside
    this one that has them, else of the task's own items."""
    if not file or Path(file).is_dir():
        return (read_items(name, task, file, task.examples), True) if task.examples else (items, False)
    path = Path(file)
    for word in ("test", "validation", "val"):
        # Of MMLU both the folder and the file say which split it is: test/anatomy_test.csv, dev/anatomy_dev.csv.
        beside = path.with_name(path.name.replace(word, task.examples or "train"))
        for other in (beside, beside.parent.with_name(task.examples or "train") / beside.name):
            if beside.name != path.name and other.is_file():
                return read_items(name, task, str(other)), True
    return items, False


def read_items(name: str, task: Task, file: str | None, split: str | None = None) -> list[Item]:
    items = []
    for where, record in read_records(name, file, task, split):
        form = next((form for form in task.forms if has_columns(form, record)), None)
        if form is None:
            raise refuse_columns(name, file or task.hub[0], record, task.forms)
        try:
            item = form.make_item(record)
            check_item(task, item)
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"task {name}: {where} makes no item ({error}); correct it, or leave it out") from None
        if not task.parts or item.part in task.parts:
            items.append(item)
    if not items:
        of = f" of {', '.join(task.parts)}" if task.parts else ""
        raise UserError(f"task {name}: {file or task.hub[0]} holds no items{of}")
    return items


def read_records(name: str, file: str | None, task: Task | None = None, split: str | None = None):
    """Yield (where it stands, record) of a task's file, of the files of a folder (in its folder of the split's name, or
    in test/, if there is one), or of its dataset on the Hub. A row of a .csv becomes a record by the names of
    `task.cells` or of its header; what the name of its file says is its subject."""
    if not file:
        dataset, configs, own = task.hub
        for config in (configs or "").split() or [None]:
            yield from corpus.read_values(f"hf://{dataset}", Reading(config=config, split=split or own))
        return
    path = Path(file)
    inner = path / (split or "test")
    paths = sorted((inner if inner.is_dir() else path).glob("*.*")) if path.is_dir() else [path]
    if file.startswith("hf://"):
        paths = [file]
    elif not paths or not paths[0].is_file():
        raise UserError(f"task {name}: {file} " + ("holds no files" if path.exists() else "does not exist"))
    for path in paths:
        header, is_table = task and task.cells, kinds.identify(str(path), True) in ("csv", "tsv")
        has_pages = task is TASKS["wikitext"]
        for where, record in corpus.read_values(str(path), Reading(documents="file"), lists=True):
            if is_table and not header:
                header = record
            elif is_table:
                if len(record) != len(header):
                    raise UserError(f"task {name}: {where} has a row of {len(record)} cells instead of {len(header)}")
                subject = re.sub("_(test|dev|val)$", "", path.stem)
                yield where, {"subject": subject, **dict(zip(header, record))}
            elif has_pages and isinstance(record, dict) and set(record) == {"text"}:
                yield from ((where, {"page": page}) for page in cut_pages(record["text"]))
            else:
                yield where, record


def has_columns(form: Form, record) -> bool:
    return isinstance(record, dict) and set(form.columns.split()) <= record.keys()


def refuse_columns(name: str, file: str, record, forms) -> UserError:
    found = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
    known = " or ".join(form.columns.replace(" ", ", ") for form in forms)
    return UserError(f"task {name}: {file} has the columns {found}, but needs {known}")


# ---- requests

def encode_pairs(tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """[(ids of the context, ids of the continuation)] of texts, cut as lm-evaluation-harness does."""
    moved = []
    for context, continuation in pairs:
        stripped = context.rstrip()
        moved.append((stripped, context[len(stripped):] + continuation) if stripped else ("", context + continuation))
    bos = [tokenizer.bos_id] * tokenizer.add_bos
    prefix = vocabulary.token_before_document(tokenizer)
    contexts = list(dict.fromkeys(context for context, _ in moved))
    known = dict(zip(contexts, (ids.tolist() for ids in tokenizer.encode_batch(contexts))))
    encoded = []
    for (context, _), ids in zip(moved, tokenizer.encode_batch([a + b for a, b in moved])):
        ids = ids.tolist()
        if context:
            length = len(known[context])
            encoded.append((bos + known[context], ids[length:]))
        else:
            encoded.append(([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:]))
    return encoded


def make_requests(tokenizer, name: str, task: Task, items: list[Item], longest: int | None = None) -> list[list[tuple]]:
    """The requests of each item: one for each of its choices."""
    pairs = [[(context, task.delimiter + choice) for context, choice in zip(
        item.contexts or [item.context] * len(item.choices), item.choices)] for item in items]
    encoded = iter(encode_pairs(tokenizer, [pair for own in pairs for pair in own]))
    requests = [[next(encoded) for _ in own] for own in pairs]
    for item, own in zip(items, requests):
        if empty := [choice for choice, (_, ids) in zip(item.choices, own) if not ids]:
            raise UserError(f"task {name}: the tokenizer makes no token of the choice {empty[0]!r}; leave out its item")
    return requests


def make_windows(tokenizer, name: str, task: Task, items: list[Item], longest: int) -> list[list[tuple]]:
    """The requests of each text: windows of `longest` tokens, each token predicted once, the first behind the token
    before a document and the last with as much context as there is room for."""
    prefix, requests = vocabulary.token_before_document(tokenizer), []
    for item, ids in zip(items, tokenizer.encode_batch([item.choices[0] for item in items])):
        ids = ids.tolist()
        if not ids:
            raise UserError(f"task {name}: the tokenizer makes no token of the text {item.choices[0][:40]!r}; leave it "
                            f"out")
        windows = [([prefix], ids[:longest])]
        for start in range(longest, len(ids), longest):
            end = min(start + longest, len(ids))
            windows.append((ids[end - longest - 1:start], ids[start:end]))
        requests.append(windows)
    return requests


# ---- scores

def score_tasks(model, tokenizer, tasks: dict[str, tuple[Task, list[Item]]], context: int | None = None, world=None,
                batch_size: int = 32, autocast=None, judge=None, eos_ids=None, bars: bool = False) -> dict[str, dict]:
    """{name: result} of {name: (task, items)}; with a world, the ranks share the work and all return the same.

    A result: each metric; "metric", "value", "direction" and "interval" of the headline, at 95 %; "chance", "n",
    "capability", "version", "shots", "hits" (a character an item, of the headline), "items_hash", "cut" and "protocol";
    where log-likelihoods are the headline "nats_by_item", and "sizes_by_item", by which their sum is divided.
    judge: (records, completions) -> whether each program that the model wrote is right. eos_ids: what ends one.
    bars: show the progress of each task on a terminal.
    """
    longest = min(model.config.max_position_embeddings, context or 2**62)
    results = {}
    for name, (task, items) in tasks.items():
        if task.rule == "program" and judge is None:
            raise UserError(f"task {name} runs programs that the model writes, which is off here; leave it out")
        if task.kind == "generate":
            how = task.sampling or Sampling()
            settings = Settings(max_new_tokens=task.max_new_tokens, temperature=how.temperature, top_p=how.top_p)
            prompts = [item.context for item in items for _ in range(how.samples)]
            completions, cut = complete_all(model, tokenizer, prompts, task.stop, settings, longest, batch_size, world,
                                            eos_ids, name if bars else None)
            scores, n = score_completions(task, items, completions, judge), len(prompts)
            first = tokenizer.encode(items[0].context, bos=tokenizer.add_bos)
        else:
            make = make_windows if task.kind == "rolling" else make_requests
            requests = make(tokenizer, name, task, items, longest)
            answers, cut = log_likelihoods(model, requests, [item.part for item in items], longest, batch_size, world,
                                           autocast, name if bars else None)
            score = {"choice": score_choices, "cloze": score_clozes, "rolling": score_texts}[task.kind]
            scores, n, first = score(items, answers), sum(map(len, requests)), [*requests[0][0][0], *requests[0][0][1]]
        if cut:
            print(f"warning: task {name}: {cut} of {n} requests are longer than the {longest} tokens of the context "
                  f"and were cut on the left", file=sys.stderr)
        results[name] = summarise(task, items, scores) | {"cut": cut, "protocol": {
            "bos": bool(tokenizer.add_bos), "prefix_token_id": vocabulary.token_before_document(tokenizer),
            "first_ids": first[:8], "context": longest, "batch_size": batch_size,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}}
    return results


def score_choices(items: list[Item], answers: list) -> dict[str, list]:
    """{metric: hit of each item}."""
    measures = {"acc": lambda choice: 1, "acc_norm": len, "acc_bytes": lambda choice: len(corpus.utf8(choice))}
    hits = {}
    for metric, measure in measures.items():
        # argmax takes the first of equal ones, as lm-evaluation-harness does.
        hits[metric] = [int(np.argmax([nats / measure(choice) for choice, (nats, _) in zip(item.choices, own)])
                            == item.gold) for item, own in zip(items, answers)]
    return hits


def score_clozes(items: list[Item], answers: list) -> dict[str, list]:
    """{"acc": whether greedy decoding gives the continuation, "nats": of it} of each item."""
    return {"acc": [int(is_greedy) for [(_, is_greedy)] in answers], "nats": [-nats for [(nats, _)] in answers],
            "sizes": {"perplexity": [1] * len(items)}}


def score_texts(items: list[Item], answers: list) -> dict[str, list]:
    """{"nats": of each text, "sizes": {metric: what they are divided by}}: words and bytes of the text as it stood in
    the file, as lm-evaluation-harness counts those of WikiText."""
    texts = [item.record.get("page", item.record.get("text")) for item in items]
    nbytes = [len(corpus.utf8(text)) for text in texts]
    return {"nats": [-math.fsum(nats for nats, _ in own) for own in answers],
            "sizes": {"word_perplexity": [len(re.split(r"\s+", text)) for text in texts], "byte_perplexity": nbytes,
                      "bits_per_byte": [size * math.log(2) for size in nbytes]}}


def score_completions(task: Task, items: list[Item], completions: list[str], judge) -> dict[str, list]:
    """{metric: hit of each item}; where an item has several samples pass@k of each, and under "passed" how many did."""
    if task.rule == "program":
        how = task.sampling or Sampling()
        passed = judge([item.record for item in items for _ in range(how.samples)], completions)
        counts = [sum(map(bool, passed[i:i + how.samples])) for i in range(0, len(passed), how.samples)]
        if how.samples == 1:
            return {task.metrics[0]: counts}
        return {"passed": counts} | {metric: [pass_at_k(how.samples, count, k) for count in counts]
                                     for metric, k in zip(task.metrics, how.k)}
    judged = [RULES[task.rule](text, item.choices) for item, text in zip(items, completions)]
    return {metric: [int(each[metric]) for each in judged] for metric in task.metrics}


def summarise(task: Task, items: list[Item], scores: dict) -> dict:
    """The result of a task, of {metric: hit of each item} and, of log-likelihoods, their "nats" and "sizes"."""
    headline, n = task.metrics[0], len(items)
    values = {metric: sum(scores[metric]) / n for metric in task.metrics if metric in scores}
    for metric, sizes in scores.get("sizes", {}).items():
        values[metric] = of_nats(metric, math.fsum(scores["nats"]) / sum(sizes))
    is_share, are_hits = headline in scores, headline in scores and "passed" not in scores
    chance = sum(1 / len(item.choices) for item in items) / n if task.kind == "choice" else 0.0
    if are_hits:
        interval = wilson(sum(scores[headline]), n)
    else:
        interval = redraw(scores[headline], [1] * n) if is_share else redraw(scores["nats"], scores["sizes"][headline])
    if interval and not is_share:
        interval = [of_nats(headline, bound) for bound in interval]
    result = {**values, "value": values[headline], "direction": "up" if is_share else "down", "chance": chance,
              "interval": interval, "capability": task.capability, **identify(task, items),
              "hits": "".join(map(str, scores[headline])) if are_hits else ""}
    if "passed" in scores:
        result["passed"] = scores["passed"]
    if "nats" in scores:
        result["nats_by_item"] = [round(nats, 4) for nats in scores["nats"]]
        if not is_share:
            # What they are divided by for the headline, so that its change can be drawn anew too.
            result["sizes_by_item"] = [round(size, 4) for size in scores["sizes"][headline]]
    parts = dict.fromkeys(item.part for item in items)
    if len(parts) > 1:
        result["parts"] = {part: mean_of_part(part, items, scores[headline]) for part in parts}
    return result


def of_nats(metric: str, per_unit: float) -> float:
    """A metric of log-likelihoods, of what they are on average."""
    return per_unit if metric == "bits_per_byte" else math.exp(min(per_unit, 700))


def redraw(nats: list[float], sizes: list) -> list[float] | None:
    """[low, high] at 95 % of sum(nats) / sum(sizes) by drawing the items anew; None where they are too few."""
    if len(nats) < verdict.FEWEST:
        return None
    drawn = np.random.default_rng(0).integers(len(nats), size=(verdict.DRAWS, len(nats)))
    return verdict.middle(np.array(nats)[drawn].sum(1) / np.array(sizes)[drawn].sum(1))


def mean_of_part(part: str, items: list[Item], hits: list[int]) -> dict:
    own = [hit for item, hit in zip(items, hits) if item.part == part]
    return {"value": sum(own) / len(own), "n": len(own), "interval": wilson(sum(own), len(own))}


def wilson(hits: int, n: int) -> list[float]:
    """[low, high] at 95 % of a share of hits (Wilson, 1927), which stays within 0 and 1."""
    share, spread = hits / n, Z * Z / n
    middle, half = share + spread / 2, Z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return [max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))]


def identify(task: Task, items: list[Item]) -> dict:
    """What has to be the same where two results compare."""
    sampling = {"sampling": asdict(task.sampling)} if task.sampling else {}
    return {"metric": task.metrics[0], "n": len(items), "version": task.version, "shots": task.shots,
            "items_hash": hash_items(items)} | sampling


def hash_items(items: list[Item]) -> str:
    """16 hex digits that are equal where the same questions were asked in the same way."""
    asked = [[item.context, item.contexts, item.choices, item.gold] for item in items]
    return hashing.short_digest(json.dumps(asked).encode())


def format_tasks(before: dict | None, after: dict) -> str:
    """Markdown table of the results {name: result}: the headline before and after with its interval, and chance; of
    programs that were drawn several times, each pass@k."""
    lines = ["| task | metric | before | after | 95 % | chance | items |", "|---|---|---|---|---|---|---|"]
    for name, now in after.items():
        was, shown = (before or {}).get(name, {}), " ".join(name.split()).replace("|", "\\|")
        for metric in [key for key in now if key.startswith("pass_at_")] if "passed" in now else [now["metric"]]:
            is_headline = metric == now["metric"]
            value = was.get("value") if is_headline else was.get(metric)
            interval = "{:.4f} to {:.4f}".format(*now["interval"]) if is_headline and now["interval"] else ""
            lines.append(f"| {shown} | {metric.replace('_', ' ')} | {'' if value is None else f'{value:.4f}'} | "
                         f"{now['value'] if is_headline else now[metric]:.4f} | {interval} | {now['chance']:.3g} | "
                         f"{now['n']:,} |")
    return "\n".join(lines)
