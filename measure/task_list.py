"""The benchmarks, declared as data: where a task's items come from, its prompt, choices, metric and version.

A task has forms: the columns that a record of a file may have, and how an item is made of it. The first form whose
columns are all there is used, so that one task reads the records of the Hub, the files of its authors and those of
llm-foundry's in-context-learning sets. The prompts are lm-evaluation-harness' (0.4.13), word for word.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["choice", "cloze", "rolling", "generate"]


@dataclass(frozen=True)
class Item:
    """One question of a task.

    context: what stands before an answer, the examples included. choices: the answers to choose from (choice), the one
    continuation (cloze), the text to score (rolling), the accepted answers (generate). gold: which choice is right.
    contexts: of each choice, where they differ. answer: what stands behind the context where the item is an example;
    default: the right choice. part: the subject, whose score is told apart. record: what a judge needs to know.
    """

    context: str
    choices: tuple[str, ...]
    gold: int = 0
    contexts: tuple[str, ...] = ()
    answer: str | None = None
    part: str = ""
    record: dict | None = None


@dataclass(frozen=True)
class Form:
    """How a record becomes an item where it has these `columns`. Each of the rest is the value itself, a function of
    the record, or, for a text, a template with the record's columns."""

    columns: str
    context: str | Callable = ""
    choices: tuple | Callable = ()
    gold: int | Callable = 0
    contexts: tuple | Callable = ()
    answer: str | Callable | None = None
    part: str | Callable = ""

    def make_item(self, record: dict) -> Item:
        def value(rule):
            return rule(record) if callable(rule) else rule.format_map(record) if isinstance(rule, str) else rule
        return Item(value(self.context), tuple(value(self.choices)), value(self.gold), tuple(value(self.contexts)),
                    value(self.answer), value(self.part), record)


@dataclass(frozen=True)
class Task:
    """A benchmark. metrics: what is measured, the headline first.

    hub: (dataset, configuration, split). examples: the split, or in the name of a file the word, that few-shot examples
    come from; without it they are items of the file that are then not scored. first: examples are the first ones and
    not drawn. shots: how many, by default. delimiter stands before an answer; description before everything.
    """

    capability: str
    kind: Kind
    forms: tuple[Form, ...]
    metrics: tuple[str, ...] = ("acc", "acc_norm", "acc_bytes")
    hub: tuple[str, str | None, str] | None = None
    examples: str | None = None
    first: bool = False
    shots: int = 0
    description: str = ""
    delimiter: str = " "
    version: int = 1
    parts: tuple[str, ...] = ()


def letter(value) -> int:
    """The index of a choice that is given as an index or as one of A to Z."""
    return ord(value.strip()) - ord("A") if isinstance(value, str) and not value.strip().isdigit() else int(value)


# ---- forms that several tasks, and users' own files, have

def ask(record: dict) -> str:
    """The query of an item of llm-foundry's, as lm-evaluation-harness words it."""
    return record["query"].removeprefix("Passage: ").rstrip() + "\nAnswer:"


FOUNDRY = Form("query choices gold", ask, lambda r: r["choices"], lambda r: letter(r["gold"]))
OPTIONS = Form("context_options continuation gold", "", lambda r: [r["continuation"]] * len(r["context_options"]),
               lambda r: letter(r["gold"]), lambda r: r["context_options"])
# A user's own file: the prompt stands in it as it is to be asked.
OWN_CHOICE = tuple(
    Form(f"{question} choices {gold}", f"{{{question}}}", lambda r: r["choices"],
         lambda r, gold=gold: r["choices"].index(r[gold]) if r[gold] in r["choices"] else letter(r[gold]))
    for question in ("query", "question", "context", "prompt") for gold in ("gold", "label", "answer"))
OWN_CLOZE = (Form("context continuation", "{context}", lambda r: (r["continuation"],)),)

OWN = Task("domain", "choice", (OPTIONS, *OWN_CHOICE))
OWN_TEXT = Task("domain", "cloze", OWN_CLOZE, ("acc", "perplexity"))


# ---- tasks

def hellaswag_text(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag_context(r: dict) -> str:
    return hellaswag_text(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}")


def gap(record: dict) -> int:
    """Where the blank of a sentence of WinoGrande is."""
    return record["sentence"].index("_")


ARC = Form("question choices answerKey", "Question: {question}\nAnswer:", lambda r: r["choices"]["text"],
           lambda r: list(r["choices"]["label"]).index(r["answerKey"]))

TASKS = {
    "arc_easy": Task("reasoning", "choice", (ARC, FOUNDRY), ("acc_norm", "acc", "acc_bytes"),
                     ("allenai/ai2_arc", "ARC-Easy", "test"), "train"),
    "arc_challenge": Task("reasoning", "choice", (ARC, FOUNDRY), ("acc_norm", "acc", "acc_bytes"),
                          ("allenai/ai2_arc", "ARC-Challenge", "test"), "train"),
    "hellaswag": Task("reasoning", "choice", (
        Form("activity_label ctx_a ctx_b endings label", hellaswag_context,
             lambda r: map(hellaswag_text, r["endings"]), lambda r: int(r["label"])),),
        ("acc_norm", "acc", "acc_bytes"), ("Rowan/hellaswag", None, "validation"), "train"),
    "winogrande": Task("reasoning", "choice", (
        Form("sentence option1 option2 answer", "", lambda r: (r["sentence"][gap(r) + 1:].strip(),) * 2,
             lambda r: int(r["answer"]) - 1,
             lambda r: [r["sentence"][:gap(r)] + r[option] for option in ("option1", "option2")]), OPTIONS),
        ("acc",), ("allenai/winogrande", "winogrande_xl", "validation"), "train"),
    "piqa": Task("reasoning", "choice", (
        Form("goal sol1 sol2 label", "Question: {goal}\nAnswer:", lambda r: (r["sol1"], r["sol2"]),
             lambda r: int(r["label"])), FOUNDRY),
        ("acc_norm", "acc", "acc_bytes"), ("baber/piqa", None, "validation"), "train"),
    "boolq": Task("reasoning", "choice", (
        Form("passage question label", "{passage}\nQuestion: {question}?\nAnswer:", ("no", "yes"),
             lambda r: int(r["label"])), FOUNDRY),
        ("acc",), ("aps/super_glue", "boolq", "validation"), "train"),
}
