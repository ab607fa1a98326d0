"""Whether an answer that a model wrote is the right one: what of it counts, and what is let pass.

The rules are lm-evaluation-harness' (0.4.13) for the tasks triviaqa, gsm8k and minerva_math, the last without its
symbolic comparison: there two answers are equal where they are written alike once both are normalised, which also
makes one of \\frac12, 1/2 and 0.5.
"""

import functools
import itertools
import re
import string

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
NOTHING_OF = {"punctuation": NO_PUNCTUATION, "numbers": str.maketrans("", "", string.digits)}
# What exact_match of lm-evaluation-harness may ignore.
IGNORED = ("case", "punctuation", "numbers")
FINAL_ANSWER = re.compile(r"Final Answer: The final answer is(.*?). I hope it is correct.")
# Of GSM8K: the number behind ####, and any number.
STRICT, FLEXIBLE = re.compile(r"#### (\-?[0-9\.\,]+)"), re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

# What Lewkowycz et al. (2022), appendix D.1, replace in an answer and take out of it.
SUBSTITUTIONS = [("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"),
                 (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}")]
UNITS = ["square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "sue", "points",
         "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
         "childrentickets", "multiples"]
REMOVED = ["\\ldots", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}",
           r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', "\\dots"]


def judge_trivia(completion: str, accepted: tuple[str, ...]) -> dict[str, bool]:
    """Whether it is one of the accepted answers, whatever its case and punctuation."""
    given = completion.lstrip().lower().translate(NO_PUNCTUATION)
    return {"exact_match": any(given == answer.lower().translate(NO_PUNCTUATION) for answer in accepted)}


def judge_exact(completion: str, accepted: tuple[str, ...], ignored: tuple[str, ...] = ()) -> dict[str, bool]:
    """Whether it is one of the accepted answers to the letter, but for what is `ignored`."""
    def plain(text):
        for what in ignored:
            text = text.lower() if what == "case" else text.translate(NOTHING_OF[what])
        return text
    return {"exact_match": plain(completion) in map(plain, accepted)}


def judge_gsm8k(completion: str, accepted: tuple[str, ...]) -> dict[str, bool]:
    """exact_match by the number behind ####, flexible_match by the last number of the completion."""
    def plain(text):
        return re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", re.sub(r",|\$", "", text))).lower()
    strict = STRICT.findall(completion)
    flexible = [a or b for a, b in FLEXIBLE.findall(completion)]
    right = plain(accepted[0])
    return {"exact_match": bool(strict) and plain(strict[0].strip()) == right,
            "flexible_match": bool(flexible) and plain(flexible[-1].strip()) == right}


def judge_math(completion: str, accepted: tuple[str, ...]) -> dict[str, bool]:
    """exact_match: whether the sentence with the final answer, as the examples have it, says what the solution, which
    is `accepted`, has in its last box; flexible_match: without such a sentence the completion's last box counts."""
    sentence, boxed = FINAL_ANSWER.search(completion + "I hope it is correct."), find_boxed(accepted[0])
    given = sentence[1].strip() if sentence else find_boxed(completion)
    is_right = None not in (given, boxed) and simplify(normalise(given)) == simplify(normalise(boxed))
    return {"exact_match": is_right and sentence is not None, "flexible_match": is_right}


def find_boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...} or \fbox{...} of a solution; None where there is none."""
    start = text.rfind("\\boxed")
    if start < 0 and (start := text.rfind("\\fbox")) < 0:
        return None
    if text[start:].startswith("\\boxed "):
        return text[start + len("\\boxed "):].split("$")[0]
    depth, first = 0, None
    for i in range(start, len(text)):
        if text[i] == "{":
            first, depth = (i + 1 if first is None else first), depth + 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[first:i]
    return None


def normalise(answer: str) -> str:
    """A final answer in LaTeX without units, dollars, spaces and the like."""
    answer = answer.split("=")[-1]
    # Units go while spaces still part them from what is no unit; "\\left" keeps its "ft".
    for unit in UNITS:
        answer = re.sub(rf"(?<!\\)\b{unit}\b", "", answer)
    for before, after in SUBSTITUTIONS:
        answer = answer.replace(before, after)
    # Then those that stand without a space, but not within a command.
    pieces = re.split(r"(\\[a-zA-Z]+)", answer)
    for unit in UNITS:
        pieces[::2] = [piece.replace(unit, "") for piece in pieces[::2]]
    answer = "".join(pieces)
    for removed in REMOVED:
        answer = answer.replace(removed, "")
    answer = re.sub(r"(.*?)(\$)(.*?)(\$)(.*)", "$\\3$", answer)
    for command in ("text", "textbf", "overline"):
        answer = re.sub(rf"(\\{command}\{{)(.*?)(\}})", "\\2", answer)
    answer = re.sub(r"(\\boxed\{)(.*)(\})", "\\2", answer)
    # \fracab is \frac{a}{b}, \sqrt[3]a is \sqrt[3]{a} and \sqrta is \sqrt{a}.
    answer = re.sub(r"(frac)([^{])(.)", "frac{\\2}{\\3}", answer)
    answer = re.sub(r"(sqrt)(\[[^\]]*\])(\w)", "\\1\\2{\\3}", answer)
    answer = re.sub(r"(sqrt)(?!\[)([^{])", "sqrt{\\2}", answer).replace("$", "")
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer


def simplify(answer: str) -> str:
    """Ways to write one value that its normal form still tells apart: dfrac, left and right, 0.5, 1/2."""
    for before, after in (("tfrac", "frac"), ("dfrac", "frac"), ("\\left", ""), ("\\right", ""), ("\\%", ""),
                          ("\\!", "")):
        answer = answer.replace(before, after)
    answer = re.sub(r"^(-?)\.", r"\g<1>0.", answer)
    answer = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", answer)
    return "\\frac{1}{2}" if answer == "0.5" else answer


RULES = {"trivia": judge_trivia, "gsm8k": judge_gsm8k, "math": judge_math,
         # "exact", "exact case", "exact case punctuation", ...
         **{" ".join(("exact", *some)): functools.partial(judge_exact, ignored=some)
            for n in range(len(IGNORED) + 1) for some in itertools.combinations(IGNORED, n)}}
