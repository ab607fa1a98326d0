"""The benchmarks, declared as data: where a task's items come from, its prompt, choices, metric and version.

A task has forms: the columns that a record of a file may have, and how an item is made of it. The first form whose
columns are all there is used, so that one task reads the records of the Hub, the files of its authors and those of
llm-foundry's in-context-learning sets. The prompts are lm-evaluation-harness' (0.4.13), word for word.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
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

    hub: (dataset, configurations, split). examples: the split, or in the name of a file the word, that few-shot
    examples come from; without it they are items of the file that are then not scored. first: examples are the first
    ones and not drawn. fixed: the examples themselves. shots: how many, by default. delimiter stands before an answer,
    description before everything. parts: the subjects that are scored; none: all. cells: what the columns of a .csv
    without a header are. stop, max_new_tokens: where a generated answer ends. rule: which one of measure/answers.py
    judges it; "program": it is a program that has to be run. sampling: how often and how a program is drawn
    (measure/tasks.py's Sampling); None: once, greedily.
    """

    capability: str
    kind: Kind
    forms: tuple[Form, ...]
    metrics: tuple[str, ...] = ("acc", "acc_norm", "acc_bytes")
    hub: tuple[str, str | None, str] | None = None
    examples: str | None = None
    first: bool = False
    fixed: tuple[Item, ...] = ()
    shots: int = 0
    description: str = ""
    delimiter: str = " "
    version: int = 1
    parts: tuple[str, ...] = ()
    cells: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    rule: str = ""
    sampling: object = None


def check_item(task: Task, item: Item):
    """ValueError with what is wrong with an item."""
    texts = (item.context, *item.contexts, *item.choices)
    if odd := next((text for text in texts if not isinstance(text, str)), None):
        raise ValueError(f"a text is {odd!r}")
    if task.kind == "choice" and len(item.choices) < 2:
        raise ValueError(f"it has {len(item.choices)} choices")
    if task.rule != "program" and not 0 <= item.gold < len(item.choices):
        raise ValueError(f"the right choice is number {item.gold}, but its {len(item.choices)} choices are numbered "
                         f"from 0")
    if task.kind in ("choice", "cloze") and not all(item.choices):
        raise ValueError("a choice is empty")


def spread(items: list, limit: int | None) -> list:
    """At most `limit` of them, from all over the list."""
    return [items[i * len(items) // limit] for i in range(limit)] if limit and limit < len(items) else items


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


# ---- what the records of one task need

def hellaswag_text(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def hellaswag_context(r: dict) -> str:
    return hellaswag_text(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}")


def find_blank(record: dict) -> int:
    """Where the blank of a sentence of WinoGrande is."""
    return record["sentence"].index("_")


def mmlu_context(r: dict) -> str:
    choices = r["choices"] if "choices" in r else [r[name] for name in "ABCD"]
    return r["question"].strip() + "".join(f"\n{name}. {choice}" for name, choice in zip("ABCD", choices)) + "\nAnswer:"


def casehold_form(context: str, endings) -> Form:
    """The citing text up to the place of the holding, and the five holdings; what follows that place is not seen."""
    return Form(f"{context} label", lambda r: r[context].partition("<HOLDING>")[0], endings, lambda r: int(r["label"]))


def detokenise(page: str) -> str:
    """The text of a page of WikiText, whose words and marks stand apart, as lm-evaluation-harness restores it."""
    text = page.replace("s '", "s'")
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for pattern, into in ((r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
                          (r"{\s*([^}]*?)\s*}", r"{\1}"), (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
                          (r"'\s*([^']*?)\s*'", r"'\1'")):
        text = re.sub(pattern, into, text)
    for apart, joined in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"),
                          ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(apart, joined)
    return text


def cut_pages(text: str) -> list[str]:
    """The articles of a file of WikiText, each with its heading of the first level, `= Title =`, as
    EleutherAI/wikitext_document_level cuts them."""
    pages, lines = [], []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [page for page in (*pages, "\n".join(lines)) if page.strip()]


def math_item(problem: str, solution: str) -> Item:
    return Item(f"Problem:\n{problem}\n\nSolution:", (), answer=solution)


def mbpp_context(r: dict) -> str:
    tests = "\n".join(r["test_list"][:3])
    return (f"You are an expert Python programmer, and here is your task: {r['text']} Your code should pass these "
            f"tests:\n\n{tests}\n[BEGIN]\n")


# The examples of Lewkowycz et al. (2022), appendix D.2.
MATH_EXAMPLES = (
    math_item("Find the domain of the expression  $\\frac{\\sqrt{x-2}}{\\sqrt{5-x}}$.",
              "The expressions inside each square root must be non-negative. Therefore, $x-2 \\ge 0$, so $x\\ge2$, and "
              "$5 - x \\ge 0$, so $x \\le 5$. Also, the denominator cannot be equal to zero, so $5-x>0$, which gives "
              "$x<5$. Therefore, the domain of the expression is $\\boxed{[2,5)}$.\nFinal Answer: The final answer is "
              "$[2,5)$. I hope it is correct."),
    math_item("If $\\det \\mathbf{A} = 2$ and $\\det \\mathbf{B} = 12,$ then find $\\det (\\mathbf{A} \\mathbf{B}).$",
              "We have that $\\det (\\mathbf{A} \\mathbf{B}) = (\\det \\mathbf{A})(\\det \\mathbf{B}) = (2)(12) = "
              "\\boxed{24}.$\nFinal Answer: The final answer is $24$. I hope it is correct."),
    math_item("Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights instead, how many "
              "times must Terrell lift them in order to lift the same total weight?",
              "If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\\cdot 12\\cdot20=480$ pounds of "
              "weight.  If he lifts two 15-pound weights instead for $n$ times, he will lift a total of "
              "$2\\cdot15\\cdot n=30n$ pounds of weight.  Equating this to 480 pounds, we can solve for $n$:\n"
              "\\begin{align*}\n30n&=480\\\\\n\\Rightarrow\\qquad n&=480/30=\\boxed{16}\n\\end{align*}\nFinal Answer: "
              "The final answer is $16$. I hope it is correct."),
    math_item("If the system of equations\n\n\\begin{align*}\n6x-4y&=a,\\\\\n6y-9x &=b.\n\\end{align*}has a solution "
              "$(x, y)$ where $x$ and $y$ are both nonzero,\nfind $\\frac{a}{b},$ assuming $b$ is nonzero.",
              "If we multiply the first equation by $-\\frac{3}{2}$, we obtain\n\n$$6y-9x=-\\frac{3}{2}a.$$Since we "
              "also know that $6y-9x=b$, we have\n\n$$-\\frac{3}{2}a=b\\Rightarrow\\frac{a}{b}=\\boxed{-\\frac{2}{3}}."
              "$$\nFinal Answer: The final answer is $-\\frac{2}{3}$. I hope it is correct."))

# Items 2, 3 and 4 of MBPP, as in Austin et al. (2021).
MBPP_EXAMPLES = tuple(Item(mbpp_context({"text": text, "test_list": tests}), (), answer=code + "\n[DONE]")
                      for text, code, tests in (
    ("Write a function to find the similar elements from the given two tuple lists.",
     "def similar_elements(test_tup1, test_tup2):\r\n  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
     ["assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",
      "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",
      "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)"]),
    ("Write a python function to identify non-prime numbers.",
     "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n    for i in range(2,int(math.sqrt(n)) + 1):\r\n"
     "        if n % i == 0:\r\n            result = True\r\n    return result",
     ["assert is_not_prime(2) == False", "assert is_not_prime(10) == True", "assert is_not_prime(35) == True"]),
    ("Write a function to find the largest integers from a given list of numbers using heap queue algorithm.",
     "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n  largest_nums = hq.nlargest(n, nums)\r\n"
     "  return largest_nums",
     ["assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],3)==[85, 75, 65] ",
      "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],2)==[85, 75] ",
      "assert heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],5)==[85, 75, 65, 58, 35]"])))


# ---- tasks

NORMALISED = ("acc_norm", "acc", "acc_bytes")
ARC = Form("question choices answerKey", "Question: {question}\nAnswer:", lambda r: r["choices"]["text"],
           lambda r: list(r["choices"]["label"]).index(r["answerKey"]))
MMLU = Task("knowledge", "choice", tuple(
    Form(columns, mmlu_context, ("A", "B", "C", "D"), lambda r: letter(r["answer"]), part=lambda r: r["subject"])
    for columns in ("question choices answer subject", "question A B C D answer subject")), ("acc",),
    ("cais/mmlu", "all", "test"), "dev", first=True, cells=("question", "A", "B", "C", "D", "answer"),
    description="The following are multiple choice questions (with answers) about {part}.\n\n")
# The subjects of Med-PaLM's medical questions (Singhal et al., 2022), and those of law.
MEDICINE = ("anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics",
            "professional_medicine")
LAW = ("international_law", "jurisprudence", "professional_law")

TASKS = {
    "arc_easy": Task("reasoning", "choice", (ARC, FOUNDRY), NORMALISED, ("allenai/ai2_arc", "ARC-Easy", "test"),
                     "train"),
    "arc_challenge": Task("reasoning", "choice", (ARC, FOUNDRY), NORMALISED,
                          ("allenai/ai2_arc", "ARC-Challenge", "test"), "train"),
    "hellaswag": Task("reasoning", "choice", (
        Form("activity_label ctx_a ctx_b endings label", hellaswag_context,
             lambda r: map(hellaswag_text, r["endings"]), lambda r: int(r["label"])),),
        NORMALISED, ("Rowan/hellaswag", None, "validation"), "train"),
    "winogrande": Task("reasoning", "choice", (
        Form("sentence option1 option2 answer", "", lambda r: (r["sentence"][find_blank(r) + 1:].strip(),) * 2,
             lambda r: int(r["answer"]) - 1,
             lambda r: [r["sentence"][:find_blank(r)] + r[option] for option in ("option1", "option2")]), OPTIONS),
        ("acc",), ("allenai/winogrande", "winogrande_xl", "validation"), "train"),
    "piqa": Task("reasoning", "choice", (
        Form("goal sol1 sol2 label", "Question: {goal}\nAnswer:", lambda r: (r["sol1"], r["sol2"]),
             lambda r: int(r["label"])), FOUNDRY), NORMALISED, ("baber/piqa", None, "validation"), "train"),
    "boolq": Task("reasoning", "choice", (
        Form("passage question label", "{passage}\nQuestion: {question}?\nAnswer:", ("no", "yes"),
             lambda r: int(r["label"])), FOUNDRY), ("acc",), ("aps/super_glue", "boolq", "validation"), "train"),
    "mmlu": MMLU,
    "mmlu_medicine": replace(MMLU, parts=MEDICINE),
    "mmlu_law": replace(MMLU, parts=LAW),
    "triviaqa": Task("knowledge", "generate", (
        Form("context answer aliases", "{context}", lambda r: (r["answer"], *r["aliases"])),
        Form("question answer", "Question: {question}?\nAnswer:", lambda r: r["answer"]["aliases"])),
        ("exact_match",), ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"), "train",
        stop=("\n", ".", ","), max_new_tokens=32, rule="trivia"),
    "gsm8k": Task("math", "generate", (
        Form("question answer", "Question: {question}\nAnswer:", lambda r: (r["answer"],), answer="{answer}"),),
        ("exact_match", "flexible_match"), ("openai/gsm8k", "main", "test"), "train", shots=5,
        stop=("Question:", "</s>", "<|im_end|>"), rule="gsm8k", version=3),
    "math": Task("math", "generate", (
        Form("problem solution", "Problem:\n{problem}\n\nSolution:", lambda r: (r["solution"],),
             part=lambda r: r.get("type") or r.get("subject") or ""),),
        ("exact_match", "flexible_match"), ("EleutherAI/hendrycks_math", "algebra counting_and_probability geometry "
                           "intermediate_algebra number_theory prealgebra precalculus", "test"),
        fixed=MATH_EXAMPLES, shots=4, stop=("Problem:",), rule="math", version=2),
    "humaneval": Task("coding", "generate", (Form("task_id prompt test entry_point", "{prompt}"),), ("pass_at_1",),
                      ("openai/openai_humaneval", None, "test"), delimiter="", max_new_tokens=1024, rule="program",
                      stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"), version=2),
    "mbpp": Task("coding", "generate", (Form("task_id text test_list", mbpp_context),), ("pass_at_1",),
                 ("google-research-datasets/mbpp", "full", "test"), fixed=MBPP_EXAMPLES, shots=3, delimiter="",
                 stop=("[DONE]",), rule="program"),
    "lambada": Task("language", "cloze", (
        Form("context continuation", "{context}", lambda r: (r["continuation"],)),
        Form("text", lambda r: r["text"].rpartition(" ")[0], lambda r: (r["text"].rpartition(" ")[2],))),
        ("acc", "perplexity"), ("EleutherAI/lambada_openai", "default", "test")),
    "wikitext": Task("language", "rolling", tuple(
        Form(column, "", lambda r, column=column: (detokenise(r[column]),)) for column in ("page", "text")),
        ("bits_per_byte", "byte_perplexity", "word_perplexity"),
        ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"), version=2),
    "pubmedqa": Task("domain", "choice", (
        Form("CONTEXTS QUESTION final_decision",
             lambda r: "Abstract: {}\nQuestion: {}\nAnswer:".format("\n".join(r["CONTEXTS"]), r["QUESTION"]),
             ("yes", "no", "maybe"), lambda r: ("yes", "no", "maybe").index(r["final_decision"])),
        Form("context continuation", "{context}", ("yes", "no", "maybe"),
             lambda r: ("yes", "no", "maybe").index(r["continuation"].strip()))),
        ("acc",), ("bigbio/pubmed_qa", "pubmed_qa_labeled_fold0_source", "test"), "train"),
    "casehold": Task("domain", "choice", (
        casehold_form("citing_prompt", lambda r: [r[f"holding_{i}"] for i in range(5)]),
        casehold_form("context", lambda r: r["endings"])),
        NORMALISED, ("casehold/casehold", "all", "test"), "train", delimiter=""),
}
