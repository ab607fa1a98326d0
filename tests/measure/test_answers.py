"""What counts as the right answer. Truth: lm-evaluation-harness' own filters, metric and normalisation."""

import ast
import itertools
import random
import re
from pathlib import Path

import pytest

from measure import answers

lm_eval = pytest.importorskip("lm_eval", reason="the truth is lm-evaluation-harness")

COMPLETIONS = [
    " He has 3 * 6 = <<3*6=18>>18 eggs.\n#### 18", "#### 18.", " #### $1,018", "#### -18", "####18", "18",
    "The answer is 18, I think", "", "no number", "#### 18\n\nQuestion: two and 20?\n#### 22", "a - b = -18",
    "#### 018",
    "#### ...", "#### 18,", "It is 1,018.", "18 of 5.", "so -", "$18.00", " so 1.8 or 18 eggs."]
GOLD = ["She has 9.\n#### 18", "#### 1,018", "1 + 2\n#### -18", "#### 5"]
LATEX = [
    r"[2,5)", r"\frac{2}{3}", r"-\frac23", r"\frac ab", r"\sqrt2", r"\sqrt{2}", r"\sqrt[3]8", "10,000", "0,1", "1,2,3",
    "$x = 5$", "5 cm", r"2\pi cm", r"\text{five} dollars", r"30^\circ", r"30^{\circ}", r"\boxed{24}", r"\$18", "an odd",
    r"x \in [-2,7]", r"\text{(A)}", r"90 square\text{ inches}", r"\left(\frac{1}{2}, 3\right)", r"3\ \text{and}\ 4", "",
    r"\mathrm{th}", "12 hours", r"\dots", "5!\\!", "{,}", r"\overline{AB}", r"\textbf{x}", "12 students", "km5", "1,00",
    r"y=3x=4", r"\text{}^2", "a", "6\\text{ m}", "1000000"]
WANTED = ("normalize_final_answer", "last_boxed_only_string", "remove_boxed")


def read_functions(name: str) -> dict:
    """The functions and tables of a file of tasks, which itself imports packages that nothing here needs."""
    tree = ast.parse((Path(lm_eval.__file__).parent / "tasks" / name).read_text())
    tree.body = [node for node in tree.body if (isinstance(node, ast.Assign) and "logging" not in ast.unparse(node))
                 or (isinstance(node, ast.FunctionDef) and node.name in WANTED)]
    found = {"re": re}
    exec(compile(tree, name, "exec"), found)
    return found


def test_numbers_of_gsm8k():
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter
    ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
    filters = {"exact_match": RegexFilter(r"#### (\-?[0-9\.\,]+)"),
               "flexible_match": RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)}
    seen = set()
    for completion, gold in itertools.product(COMPLETIONS, GOLD):
        truth = {}
        for metric, find in filters.items():
            extracted = find.apply([[completion]], [{}])[0]
            truth[metric] = bool(exact_match_hf_evaluate(extracted, [gold], ignored, ignore_case=True)["exact_match"])
        assert answers.judge_gsm8k(completion, (gold,)) == truth, (completion, gold)
        seen.add(tuple(truth.values()))
    assert len(seen) == 4


def test_names_of_triviaqa():
    from lm_eval.api.metrics import exact_match_hf_evaluate
    accepted = ("Sinclair Lewis", "U.S.", "Grace's", "naïve")
    for completion in (" Sinclair Lewis", "sinclair lewis", "Lewis", "US", " u.s", "graces", "NAÏVE", "",
                       "Sinclair Lewis "):
        truth = exact_match_hf_evaluate([completion.lstrip()] * 4, list(accepted), ignore_case=True,
                                        ignore_punctuation=True)
        assert answers.judge_trivia(completion, accepted) == {"exact_match": truth["exact_match"] > 0}, completion


@pytest.mark.parametrize("ignored", [(), ("case",), ("case", "punctuation"), ("numbers",),
                                     ("case", "punctuation", "numbers")])
def test_exact_answers(ignored):
    from lm_eval.api.metrics import exact_match_hf_evaluate
    accepted = ["The lien, 2", "a story"]
    for completion in ("The lien, 2", "the lien, 2", "The lien 2", "THE LIEN", "The lien, ", " a story", "A story!"):
        truth = exact_match_hf_evaluate([completion] * 2, accepted, **{f"ignore_{what}": True for what in ignored})
        found = answers.RULES[" ".join(("exact", *ignored))](completion, tuple(accepted))
        assert found == {"exact_match": truth["exact_match"] > 0}, completion


def test_answers_of_math_are_normalised():
    theirs = read_functions("minerva_math/utils.py")
    rng = random.Random(0)
    mixed = ["".join(rng.choices(LATEX, k=2)) for _ in range(300)]
    mixed += [f"3{expression}" for expression in theirs["REMOVED_EXPRESSIONS"]]
    for text in LATEX + mixed + [f"{a} {b}" for a, b in itertools.product(LATEX, LATEX)]:
        assert answers.normalise(text) == theirs["normalize_final_answer"](text), text


def test_boxes_of_math():
    theirs = read_functions("minerva_math/utils.py")
    for text in (r"so $\boxed{24}.$", r"\boxed{\frac{1}{2}} or \boxed{x^{2}}", r"\fbox{3}", r"is $\boxed 5$.",
                 r"\boxed{2", "none"):
        box = theirs["last_boxed_only_string"](text)
        inside = None if box is None else theirs["remove_boxed"](box.replace("\\fbox", "\\boxed"))
        assert answers.find_boxed(text) == inside, text


FINAL = "Final Answer: The final answer is $%s$. I hope it is correct."


@pytest.mark.parametrize(("completion", "strict", "flexible"), [
    (r" It is $\boxed{\frac12}$." "\n" + FINAL % r"\frac{1}{2}", True, True), (FINAL % "0.5", True, True),
    (r"So $\boxed{1/2}$", False, True), (FINAL % ".5", True, True), (r"\boxed{\dfrac{1}{2}}", False, True),
    ("0.5", False, False), (FINAL % "2", False, False), (r"\boxed{-\frac{1}{2}}", False, False),
    (r"So $\boxed{1/2}$. " + FINAL % "2", False, False)])
def test_a_half(completion, strict, flexible):
    """Worked by hand: the box of the solution holds a half."""
    assert answers.judge_math(completion, (r"thus \boxed{\frac{1}{2}}.",)) == {
        "exact_match": strict, "flexible_match": flexible}
