"""Two probes of what perplexity does not tell: whether facts went in, and whether in-context learning is alive.

Facts: a number, a name or the reference to a section is cut out of a document, and the model chooses between it and
three of the same kind out of other documents, by the log-likelihood of each behind the text before it. With the text

    An appeal must be filed within 30 days after the order is entered.

the choices behind "An appeal must be filed within" may be 30, 60, 10 and 90. No choice but the right one stands in the
document, and the right one stands in it for the first time, so that it cannot be copied. Wrong choices are of the same
form, about as many documents have them and, where there are any, they are as many tokens: who knows what is common in
such texts, and no more, is at chance. What went in is how items from documents that a run trains on differ from items
from held-out ones.

In context: generated items whose rule stands in a few examples before the question, so that no text can have leaked.
Without replay they can fail long before bits per byte rise: Llama-2-7B fell from 44.7 to 20.1 % at a perplexity that
replay left as it was (arXiv 2506.00288).

    5 8 3 -> 3      5 8 3 -> 8      k r d -> k r d      7 -> odd      d e f -> g
    minimum         maximum         copy                parity        alphabet
"""

import random
import re
import string
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.cli import Reading
from core.config import setting
from core.errors import UserError
from measure.task_list import Item, Task, spread
from measure.tasks import hash_items, score_tasks, wilson
from text import corpus
from text.shards import Shards, check_tokenizer

# ---- facts

CAPITAL = "[A-ZÀ-ÖØ-ÞΑ-ΩА-Я]"
WORD = rf"{CAPITAL}[\w’'-]+"
HAN = "〇零一二三四五六七八九十百千万"
# {kind: what one looks like; its group is the fact}. The first kind that matches at a place counts.
# Marks of lists, (2), are no numbers.
KINDS = {
    "section": re.compile(
        r"(?:§§?\s?|\b(?:[Ss]ections?|[Ss]ec\.|[Aa]rticles?|[Aa]rt\.|Artikel|[Cc]hapter|[Rr]ule)\s)"
        r"(\d+(?:[.:–-]\w+)*(?:\(\w{1,4}\))*)"
        rf"|(第[{HAN}\d]+[条章节款编])|\b(\d+[–-]\d+(?:[.–-]\w+)*(?:\(\w{{1,4}}\))*)"),
    "number": re.compile(rf"(?<![\w(\[.,-])(\d+(?:[.,]\d+)*)(?![\w)\]])|([{HAN}]{{2,}})(?=[年月日天个元岁人倍])"),
    "name": re.compile(rf"\b({WORD}(?:\s(?:(?:of|the|and|de|des|la|du|von|der|van|y)\s){{0,2}}{WORD})+)"),
}
# Characters of the text before a fact that an item has at most, and at least.
MOST, LEAST = 256, 30
WRONG = 3
FACT_PROBES = ("facts_trained", "facts_heldout")
FACTS = Task("domain", "choice", (), metrics=("acc_norm", "acc", "acc_bytes"), delimiter="")


@dataclass(frozen=True)
class Fact:
    """A number, name or reference, the number of its document, and where in that it stands."""
    kind: str
    text: str
    document: int
    start: int

    @property
    def form(self) -> str:
        """What a wrong choice has in common with it beside its kind: of a name how many words, else all but the digits
        of its last number: 16-### for 16-901, #### for 1987."""
        if self.kind == "name":
            return f"{len(self.text.split())} words"
        return re.sub(rf"[\d{HAN}]+(?=[^\d{HAN}]*$)", lambda match: "#" * len(match.group()), self.text)


def find_facts(documents: list[str]) -> list[Fact]:
    """The facts of documents, each where it first stands in its document."""
    found = []
    for number, text in enumerate(documents):
        taken = [False] * len(text)
        for kind, pattern in KINDS.items():
            for match in pattern.finditer(text):
                start, end = match.span(match.lastindex)
                # The first word of a sentence has a capital letter whatever it is.
                begins = kind == "name" and re.search(r"(?:^|[.!?:;\n])[\s\W]*$", text[max(0, start - 8):start])
                if any(taken[start:end]) or begins:
                    continue
                taken[start:end] = [True] * (end - start)
                if text.find(fact := text[start:end]) == start:
                    found.append(Fact(kind, fact, number, start))
    return found


def make_fact_items(documents: list[str], tokenizer, seed: int, n: int) -> list[Item]:
    """At most `n` items of the facts of documents, spread over them, with wrong choices from the others. A function of
    its arguments alone. An item's part is the kind of its fact."""
    draw, facts, classes = random.Random(seed), find_facts(documents), defaultdict(list)
    # How many documents have it.
    counts = Counter((fact.kind, fact.text) for fact in facts)
    texts = sorted({text for _, text in counts})
    lengths = dict(zip(texts, map(len, tokenizer.encode_batch(texts))))
    # Up to a factor of two as common: 1, 2 to 3, 4 to 7, ...
    class_of = {fact: (fact.kind, fact.form, counts[fact.kind, fact.text].bit_length()) for fact in facts}
    for fact in facts:
        if fact.text not in classes[class_of[fact]]:
            classes[class_of[fact]].append(fact.text)
    by_document = defaultdict(list)
    for fact in facts:
        if fact.start >= LEAST:
            by_document[fact.document].append(fact)
    queues = [draw.sample(own, len(own)) for own in by_document.values()]
    draw.shuffle(queues)
    items = []
    # One of each document, then a second one of each that has two, and so on.
    while queues and len(items) < n:
        for queue in queues:
            fact = queue.pop()
            others = classes[class_of[fact]]
            if len(items) < n and (item := make_item(fact, documents[fact.document], others, lengths, draw)):
                items.append(item)
        queues = [queue for queue in queues if queue]
    return items


def make_item(fact: Fact, text: str, others: list[str], lengths: dict[str, int], draw) -> Item | None:
    """The item of a fact; None where there are too few wrong choices that do not stand in its text."""
    wrong = [other for other in others if other not in text]
    same = [other for other in wrong if lengths[other] == lengths[fact.text]]
    if len(wrong) < WRONG:
        return None
    choices = [fact.text, *draw.sample(same if len(same) >= WRONG else wrong, WRONG)]
    draw.shuffle(choices)
    context = text[max(0, fact.start - MOST):fact.start]
    if fact.start > MOST:
        # Half a word would be other tokens than those of the text.
        context = re.sub(r"^\S{0,30}\s+", "", context, count=1)
    return Item(context, tuple(choices), choices.index(fact.text), part=fact.kind)


# ---- in context

SHOTS = 5
# Letters to choose from, without the rare ones, which small vocabularies spell with more tokens than the others.
LETTERS = "abcdefghklmnoprstuwy"
IN_CONTEXT = Task("reasoning", "choice", (), shots=SHOTS)


def draw_digits(draw, pick) -> tuple[str, str, list[str]]:
    digits = draw.sample("123456789", 3)
    return " ".join(digits), pick(digits), digits


def draw_copy(draw) -> tuple[str, str, list[str]]:
    letters = draw.sample(LETTERS, 3)
    a, b, c = letters
    # All have the same letters, so that no letter's frequency tells.
    return " ".join(letters), " ".join(letters), [f"{a} {b} {c}", f"{b} {c} {a}", f"{c} {a} {b}", f"{c} {b} {a}"]


def draw_parity(draw) -> tuple[str, str, list[str]]:
    number = draw.randrange(1, 100)
    return str(number), ("even", "odd")[number % 2], ["even", "odd"]


def draw_alphabet(draw) -> tuple[str, str, list[str]]:
    answer = draw.choice(LETTERS[3:])
    end = string.ascii_lowercase.index(answer)
    shown = string.ascii_lowercase[end - 3:end]
    return " ".join(shown), answer, [answer, *draw.sample(sorted({*LETTERS} - {*shown, answer}), 3)]


# {kind: what draws a question, its answer and the choices}
RULES = {
    "minimum": lambda draw: draw_digits(draw, min),
    "maximum": lambda draw: draw_digits(draw, max),
    "copy": draw_copy,
    "parity": draw_parity,
    "alphabet": draw_alphabet,
}


def make_context_items(seed: int, n: int) -> dict[str, list[Item]]:
    """{"in_context.KIND": n items} of each kind, with SHOTS examples that ask for other things than the item does."""
    items = {}
    for kind, rule in RULES.items():
        draw, own = random.Random(f"{seed}/{kind}"), []
        while len(own) < n:
            drawn = {}
            while len(drawn) < SHOTS + 1:
                question, answer, choices = rule(draw)
                drawn[question] = answer, choices
            *examples, (question, (answer, choices)) = drawn.items()
            shown = "".join(f"{asked} -> {right}\n" for asked, (right, _) in examples)
            choices = draw.sample(choices, len(choices))
            own.append(Item(f"{shown}{question} ->", tuple(choices), choices.index(answer)))
        items[f"in_context.{kind}"] = own
    return items


# ---- both

@dataclass
class ProbeSettings:
    facts: int = setting(0, at_least=0, at_most=10**5)
    """items of facts of the domain's documents that the run trains on, and as many of held-out ones; 0: none"""
    in_context: int = setting(0, at_least=0, at_most=10**5)
    """generated items of each kind, minimum, maximum, copy, parity and alphabet, with examples before; 0: none"""


def open_probes(settings: ProbeSettings, tokenizer, trained: list[str], heldout: list[str], seed: int) -> dict:
    """{name: (task, items)} of the probes that are asked for and have items; trained, heldout: texts."""
    found = {}
    if settings.facts:
        for name, texts in zip(FACT_PROBES, (trained, heldout)):
            # Both sides alike: a string that was trained on would be the likelier one in a held-out document.
            found[name] = FACTS, make_fact_items(texts, tokenizer, seed, settings.facts)
    if settings.in_context:
        found |= {name: (IN_CONTEXT, items) for name, items in make_context_items(seed, settings.in_context).items()}
    return {name: (task, items) for name, (task, items) in found.items() if items}


def score_probes(model, tokenizer, probes: dict, **options) -> dict[str, dict]:
    """{name: result} as measure/tasks.py's score_tasks has them, and "in_context", which is all of its kinds as one."""
    found = score_tasks(model, tokenizer, probes, **options)
    kinds = {name: result for name, result in found.items() if name.startswith("in_context.")}
    if kinds:
        items = [item for name in kinds for item in probes[name][1]]
        first, hits = next(iter(kinds.values())), "".join(result["hits"] for result in kinds.values())
        mean = hits.count("1") / len(hits)
        found["in_context"] = {**first, "acc": mean, "value": mean, "n": len(hits), "hits": hits,
                               "interval": wilson(hits.count("1"), len(hits)), "items_hash": hash_items(items),
                               "chance": sum(result["chance"] for result in kinds.values()) / len(kinds)}
        for metric in ("acc_norm", "acc_bytes"):
            found["in_context"][metric] = sum(result[metric] for result in kinds.values()) / len(kinds)
    return found


# ---- of a model outside a run

# Documents that are read for each item of a fact, spread over those that there are.
DOCUMENTS = 20


@dataclass(kw_only=True)
class ProbeOptions:
    probes: list[Literal["facts", "in_context"]] = field(default_factory=list)
    """facts: whether numbers, names and references of documents went in; in_context: whether in-context learning is
    alive."""
    trained: list[str] = field(default_factory=list)
    """Of facts, documents that a model was trained on: files, folders, patterns, @LIST or a packed folder."""
    heldout: list[str] = field(default_factory=list)
    """Of facts, documents of the same kind that it was not trained on; of a packed folder, its held-out ones."""
    probe_items: int = setting(100, at_least=1, at_most=10**5)
    """Items of each probe, and of each kind in context, at most."""

    def check(self):
        files = self.trained or self.heldout
        if "facts" in self.probes and not files:
            raise UserError("--probes facts asks for facts of documents: name them with --trained, --heldout or both")
        if files and "facts" not in self.probes:
            raise UserError("--trained and --heldout are documents of --probes facts, which is not asked for")


class Probing:
    """Probes of several models, which are all asked the items that the tokenizer of the first one makes."""

    def __init__(self, options: ProbeOptions, reading: Reading):
        options.check()
        self.options, self.reading, self.probes = options, reading, {}

    def score(self, model, tokenizer, **how) -> dict[str, dict]:
        """{name: result} as `score_probes` has them; nothing where no probe is asked for."""
        options, n = self.options, self.options.probe_items
        if not options.probes:
            return {}
        if not self.probes:
            facts, in_context = (n if name in options.probes else 0 for name in ("facts", "in_context"))
            V = model.config.vocab_size
            trained, heldout = (read_texts(getattr(options, split), split, n, tokenizer, V, self.reading)
                                for split in ("trained", "heldout"))
            self.probes = open_probes(ProbeSettings(facts, in_context), tokenizer, trained, heldout, seed=0)
            for name, texts in zip(FACT_PROBES, (trained, heldout)):
                if texts and name not in self.probes:
                    raise UserError(f"the documents of --{name.partition('_')[2]} hold no facts that can be told "
                                    f"apart: numbers, names and references of one form in several of them; name more, "
                                    f"or leave out --probes facts")
        return score_probes(model, tokenizer, self.probes, **how)


def read_texts(files: list[str], split: str, n: int, tokenizer, V: int, reading: Reading) -> list[str]:
    """Documents for `n` items out of files, and out of packed folders those of the split."""
    texts, plain = [], []
    for file in files:
        if not (Path(file) / "manifest.json").is_file():
            plain.append(file)
            continue
        shards = Shards(file, "train" if split == "trained" else split)
        check_tokenizer(file, shards, tokenizer, V)
        some = spread(range(shards.documents), DOCUMENTS * n)
        texts += [tokenizer.decode(shards.text_document(i)[0].tolist()) for i in some]
    texts += spread([text for text in corpus.read_documents(plain, reading) if text], DOCUMENTS * n) if plain else []
    return texts
