"""Task files of lm-evaluation-harness (0.4.13, YAML) under our runner, where prompts are templates and items are files.

    task, items = open_task("mine", "my_tasks/mine.yaml")          # eval.py --tasks mine=my_tasks/mine.yaml

Prompts, examples and metrics are the harness' own, so that the scores are. A file may be a stranger's: templates are
filled in text/sandbox.py's process, and what would run code (`!function`), or is more than this file knows, is refused
by its name; `python -m measure.lm_eval` hands such a file to the harness itself.
"""

import functools
import random
from dataclasses import replace
from pathlib import Path

import yaml

from core.cli import Reading
from core.errors import UserError
from core.foreign_files import find_odd, read_own
from measure.answers import IGNORED
from measure.task_list import Item, Task, check_item, spread
from text import corpus
from text.kinds import name_faults
from text.template import SandboxProcess

SUFFIXES = (".yaml", ".yml")
# Bytes of a file; the longest of the harness' own has 62,570.
MOST_BYTES = 1 << 20
# The harness' seed of the examples.
SEED = 1234
PROMPTS = ("description", "doc_to_text", "doc_to_choice", "doc_to_target")
# {output_type: (kind of our task, {metric: how the harness makes one number of it})}
OUTPUTS = {"multiple_choice": ("choice", {"acc": "mean", "acc_norm": "mean", "acc_bytes": "mean"}),
           "loglikelihood": ("cloze", {"perplexity": "perplexity", "acc": "mean"}),
           "loglikelihood_rolling": ("rolling", {"word_perplexity": "weighted_perplexity", "byte_perplexity":
                                                 "weighted_perplexity", "bits_per_byte": "bits_per_byte"}),
           "generate_until": ("generate", {"exact_match": "mean"})}
FILES = (str, [str])
# What each key may hold; one that is not here is refused.
KEYS = {"task": str, "task_alias": str, "tag": (str, [str]), "dataset_path": lambda value: value in (
            "json", "csv", "parquet"),
        "dataset_kwargs": lambda value: isinstance(value, dict) and not find_odd(value, {"data_files": (
            str, [str], {str: FILES})}),
        "training_split": str, "validation_split": str, "test_split": str, "fewshot_split": str,
        "fewshot_config": lambda value: isinstance(value, dict) and all(
            isinstance(each, str) if name == "split" else name == "sampler" and each in ("default", "first_n")
            for name, each in value.items()),
        "doc_to_text": str, "doc_to_choice": (str, [str], {str: str}), "doc_to_target": (str, int),
        "output_type": lambda value: value in tuple(OUTPUTS), "num_fewshot": lambda value: value in range(101),
        "target_delimiter": str, "fewshot_delimiter": str, "description": str, "metric_list": list,
        "generation_kwargs": lambda value: isinstance(value, dict) and all(
            name in GENERATION and not find_odd(each, GENERATION[name]) for name, each in value.items()),
        "filter_list": lambda value: isinstance(value, list) and all(
            isinstance(each, dict) and each.get("filter") == [{"function": "take_first"}] for each in value),
        "repeats": lambda value: value == 1, "should_decontaminate": lambda value: value is False, "metadata": dict}
GENERATION = {"until": FILES, "max_gen_toks": lambda value: value in range(1, 1 << 20), "do_sample": lambda value:
              value is False, "temperature": lambda value: value == 0}


# ---- the file

class Tagged:
    """What a tag says that is not plain YAML's, as `!function utils.f`."""

    def __init__(self, loader, node):
        self.shown = f"{node.tag} {node.value}" if isinstance(node, yaml.ScalarNode) else node.tag

    def __repr__(self):
        return self.shown


class Loader(yaml.SafeLoader):
    yaml_constructors = {**yaml.SafeLoader.yaml_constructors, None: Tagged}                         # noqa: RUF012

    def compose_node(self, parent, index):
        # A few of them, each of the last one twice, are more values than any memory holds.
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"the alias *{self.peek_event().anchor} stands in it; write what it stands for")
        return super().compose_node(parent, index)


def read_config(name: str, path: Path) -> dict:
    """The settings in a task file, those left out that are null; UserError where one is not for us."""
    try:
        # SafeLoader's values, and fewer.
        config = yaml.load(read_own(path, MOST_BYTES).decode(), Loader)
    except UserError:
        raise
    except Exception as error:
        # PyYAML raises what it likes.
        raise UserError(f"task {name}: {path} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(config, dict):
        raise UserError(f"task {name}: {path} holds a {type(config).__name__}, not the settings of a task")
    config = {key: value for key, value in config.items() if value is not None}
    for key, value in config.items():
        if not isinstance(key, str) or key not in KEYS:
            raise refuse(name, path, f"has the key {key!r}")
        if odd := find_odd(value, KEYS[key], key):
            raise refuse(name, path, f"has {odd}")
    needed = ["dataset_path", "dataset_kwargs", "doc_to_target"]
    kind, _ = OUTPUTS[config.setdefault("output_type", "generate_until")]
    needed += ["doc_to_text"] * (kind != "rolling") + ["doc_to_choice"] * (kind == "choice")
    if lacking := next((key for key in needed if key not in config), None):
        raise UserError(f"task {name}: {path} has no {lacking}; add it")
    return {"target_delimiter": " ", "fewshot_delimiter": "\n\n", "description": ""} | config


def refuse(name: str, path: Path, what: str) -> UserError:
    return UserError(f"task {name}: {path} {what}, which is not run here; lm-evaluation-harness runs it: python -m "
                     f"measure.lm_eval --tasks TASK --include {path.parent}")


def read_metrics(name: str, path: Path, config: dict) -> tuple[tuple[str, ...], str]:
    """(the metrics, the rule of measure/answers.py by which an answer is exact)."""
    _, known = OUTPUTS[config["output_type"]]
    ignored = set()
    for entry in config.get("metric_list", ()):
        metric = entry.get("metric") if isinstance(entry, dict) else entry
        if not isinstance(metric, str) or metric not in known:
            raise refuse(name, path, f"has the metric {metric!r} for {config['output_type']}")
        for key, value in entry.items():
            may = {"metric": (metric,), "aggregation": (known[metric],), "higher_is_better": (known[metric] == "mean",)}
            if metric == "exact_match":
                may |= {f"ignore_{what}": (False, True) for what in IGNORED}
            if key not in may or value not in may[key]:
                raise refuse(name, path, f"has {key} {value!r} of the metric {metric}")
            ignored |= {key} if value is True else set()
    metrics = tuple(entry["metric"] for entry in config.get("metric_list", ())) or tuple(known)
    return metrics, " ".join(("exact", *(what for what in IGNORED if f"ignore_{what}" in ignored)))


def read_split(name: str, path: Path, config: dict, split: str) -> list[tuple[str, dict]]:
    """[(where it stands, record)] of a split: of files beside the task file, or where the command runs."""
    files = config["dataset_kwargs"]["data_files"]
    # Files without the name of a split are "train", as datasets has it.
    files = (files if isinstance(files, dict) else {"train": files}).get(split)
    if files is None:
        raise UserError(f"task {name}: {path} names the split {split}, but no files of it under data_files")
    found = []
    for file in [files] if isinstance(files, str) else files:
        data = next((each for each in (path.parent / file, Path(file)) if each.is_file()), None)
        if data is None:
            raise UserError(f"task {name}: {path.parent / file}, which {path} names, does not exist")
        if config["dataset_path"] == "csv":
            from pandas import read_csv
            with name_faults(str(data), "is not a readable .csv; make or fetch it again"):
                rows = read_csv(data, compression=None).to_dict("records")
            # A cell that is empty is NaN, which is not itself.
            found += [(f"{data} row {i}", {str(key): None if cell != cell else cell for key, cell in row.items()})
                      for i, row in enumerate(rows, 1)]
        else:
            found += corpus.read_values(str(data), Reading(documents="file"), lists=True)
    if odd := next((where for where, record in found if not isinstance(record, dict)), None):
        raise UserError(f"task {name}: {odd} is no record with columns")
    if not found:
        raise UserError(f"task {name}: the split {split} of {path} holds no items")
    columns = dict.fromkeys(key for _, record in found for key in record)
    return [(where, columns | record) for where, record in found]


# ---- the items

def open_task(name: str, file: str, shots: int | None = None, limit: int | None = None, seed: int = 0) -> tuple[
        Task, list[Item]]:
    """The task in a file, and its items with their examples, at most `limit` of them spread over the scored split.

    Examples are drawn anew for each item, as the harness draws them; seed: 0 is its own.
    """
    path = Path(file)
    config = read_config(name, path)
    kind, _ = OUTPUTS[config["output_type"]]
    metrics, rule = read_metrics(name, path, config)
    asked, version = config.get("generation_kwargs", {}), config.get("metadata", {}).get("version", 1)
    stop = asked.get("until", config["fewshot_delimiter"])
    task = Task("domain", kind, (), metrics, shots=config.get("num_fewshot", 0) if shots is None else shots, rule=rule,
                delimiter=config["target_delimiter"] if kind == "choice" else "", version=version,
                stop=tuple(filter(None, [stop] if isinstance(stop, str) else stop)),
                max_new_tokens=asked.get("max_gen_toks", 256))
    if not (scored := config.get("test_split") or config.get("validation_split")):
        raise UserError(f"task {name}: {path} has neither test_split nor validation_split; add one")
    records = read_split(name, path, config, scored)
    few = config.get("fewshot_config", {})
    drawn_from = few.get("split") or config.get("fewshot_split")
    source = drawn_from or config.get("training_split") or config.get("validation_split") or scored
    pool = read_split(name, path, config, source) if task.shots and source != scored else records
    # An item is not its own example, nor, where the harness takes care of that, is one that is equal to it.
    apart, rng, items = scored == source or drawn_from == config.get("test_split"), random.Random(SEED + seed), []
    sources = {key: config[key] for key in PROMPTS
               if isinstance(config.get(key), str) and config[key] not in records[0][1]}
    with SandboxProcess(f"task {name}: the prompts of {path} are none", {"prompts": sources}) as process:
        make = functools.partial(make_item, name, path, task, config, process)
        example = functools.lru_cache(lambda i: make(*pool[i]))
        for where, record in spread(records, limit):
            chosen = choose(name, task, pool, rng, few.get("sampler"), record if apart else None)
            description, item = make(where, record)
            before = description + "".join(each.context + config["target_delimiter"] + each.answer +
                                           config["fewshot_delimiter"] for _, each in map(example, chosen))
            items.append(replace(item, context=before + item.context, answer=None))
    return task, items


def choose(name: str, task: Task, pool: list, rng: random.Random, sampler: str | None, own: dict | None) -> list[int]:
    """Which of the pool are the examples of one item. own: the record that is not to be among them."""
    def others(numbers):
        return [i for i in numbers if own is None or pool[i][1] != own]
    left = others(range(len(pool)))
    if len(left) < task.shots:
        raise UserError(f"task {name}: {task.shots} examples are wanted, but there are {len(left)}; lower shots")
    if not task.shots or sampler == "first_n":
        return left[:task.shots]
    chosen = others(rng.sample(range(len(pool)), task.shots + (own is not None)))[:task.shots]
    return chosen if len(chosen) == task.shots else rng.sample(left, task.shots)


def make_item(name: str, path: Path, task: Task, config: dict, process: SandboxProcess, where: str,
              record: dict) -> tuple[str, Item]:
    """(the description, the item without description and examples, with its answer) of a record."""
    try:
        reply = process.ask(f"task {name}: {where} does not fit {path}", {"record": record})
        description, text, choices, target = (read_prompt(key, config, reply, record) for key in PROMPTS)
        if find_odd(choices, (None, [str])):
            raise ValueError(f"doc_to_choice is {choices!r}, no list of texts")
        is_number = isinstance(target, int) and choices is not None
        if task.kind == "choice":
            gold = int(target) if is_number else choices.index(target) if target in choices else -1
            item = Item(text, tuple(choices), gold)
        else:
            target = choices[target] if is_number else target
            if task.kind != "generate" and not isinstance(target, str):
                raise ValueError(f"doc_to_target is {target!r}, no text")
            accepted = target if isinstance(target, list) else [str(target)]
            item = Item(text or "", tuple(accepted), record={"text": target} if task.kind == "rolling" else None)
        check_item(task, item)
        if not (answer := item.choices[item.gold]):
            raise ValueError("doc_to_target is empty")
        return description, replace(item, answer=answer)
    except UserError:
        raise
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(f"task {name}: {where} makes no item of {path} ({error}); correct it or leave it out") from None


def read_prompt(key: str, config: dict, reply: dict, record: dict):
    """What one of PROMPTS is for a record: what a column holds, or what a template writes, which may be the number of a
    choice or a list as Python writes them."""
    value = config.get(key)
    if not isinstance(value, str):
        return list(value.values()) if isinstance(value, dict) else value
    if key not in reply["texts"]:
        return record[value]
    text = reply["texts"][key]
    if key in ("doc_to_text", "doc_to_target") and "doc_to_choice" in config and text.isdecimal():
        return int(text)
    is_list = key == "doc_to_choice" or (key == "doc_to_target" and text == text.strip())
    return reply["lists"].get(key, text) if is_list else text
