"""A model's chat template, or the prompts of a task file, run in a process of their own: they are a stranger's program,
and may neither do anything but compute text nor compute for long. text/template.py starts this process and speaks with
it, a line of JSON each way.

Jinja's sandbox keeps a template from Python's insides, as it does in transformers. What it does not keep it from is
endless loops and strings that fill the memory, in a single step of C that no other thread could end: so the kernel
counts this process's time and memory, and ends it. Nothing here is of ours but this file and core/confine.py, and no
file can be opened.
"""

import ast
import collections
import contextlib
import itertools
import json
import re
import signal
import sys
from datetime import datetime

import jinja2
import jinja2.debug
import jinja2.ext
import jinja2.sandbox

from core.confine import limit_resources

# Seconds of computing for one conversation, and bytes of memory. Known templates take a thousandth of the one, and a
# tenth of the other.
SECONDS, MEMORY = 5, 1 << 29
# How many times as long as its conversation a text may be, and characters that it may have in any case.
MOST_GROWTH, FREE_LENGTH = 100, 1 << 20
# Stands within a control token's letters where these are plain text (text/chat.py), and as JSON of ASCII alone writes
# it: behind an even number of backslashes, of which each two are one of the text's.
MARK, ESCAPED_MARK = "\ufdd0", re.compile(r"(?<!\\)((?:\\\\)*)\\ufdd0")
# Stands in the place of an answer to find where it goes; no character, as Unicode says (23.7).
PROBE = "\ufdd1"
# Up to so many answers of a conversation are found one by one, which takes two renderings each.
FEW_ANSWERS = 6
# Where a message has the calls of tools that the assistant makes.
CALLS = ("tool_calls", "function_call")


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, with which a template tells what the assistant wrote."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller):
        text, written = caller(), self.environment.written
        begin = sum(map(len, written.parts))
        written.spans.append((begin, begin + len(text)))
        return text


class Written:
    """The parts of a text that is being written, and which of it are the assistant's: [(begin, end)]."""

    def __init__(self):
        self.parts, self.spans = [], []


class Names(jinja2.utils.Namespace):
    """namespace(...), whose names begin with no underscore."""

    def __init__(*arguments, **named):
        self, *others = arguments
        values = dict(*others, **named)
        for name in values:
            Names.refuse(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name, value):
        Names.refuse(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def refuse(name):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja's sandbox with the filters and globals that transformers gives to chat templates, and without a loader."""
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        # A mark is ours and no letter of the text: it stays one, so that what it parts is no control token.
        return ESCAPED_MARK.sub(rf"\1{MARK}", text) if ensure_ascii else text

    # All conversations of a pack are of one day.
    now = datetime.now()
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "namespace": Names,
                            "strftime_now": now.strftime}
    environment.written = Written()
    return environment


class Template:
    """write(messages, tools) -> (text, [(begin, end)]): a conversation, and what of it the assistant is to learn.

    roles: {"bos_token": "<s>", ...}. ends: the tokens of which one ends an answer.
    """

    def __init__(self, source: str, roles: dict[str, str], ends: list[str]):
        self.environment, self.roles = make_environment(), roles
        self.template = self.environment.from_string(source)
        self.marks_answers = bool(re.search(r"\{\%-?\s*generation\s*-?\%\}", source))
        longest_first = sorted(ends, key=len, reverse=True)
        self.end = re.compile(r"\s*(?:" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def render(self, messages: list[dict], tools, add_generation_prompt: bool = False) -> tuple[str, list]:
        written = self.environment.written = Written()
        for part in self.template.generate(messages=messages, tools=tools, documents=None,
                                           add_generation_prompt=add_generation_prompt, **self.roles):
            written.parts.append(part)
        return "".join(written.parts), written.spans

    def reply(self, messages: list[dict], tools) -> dict:
        text, spans = self.write(messages, tools)
        return {"text": text, "spans": spans}

    def write(self, messages: list[dict], tools) -> tuple[str, list]:
        for number, message in enumerate(messages, 1):
            if not self.marks_answers and (call := next(filter(message.get, CALLS), None)):
                raise jinja2.exceptions.TemplateError(
                    f"the assistant calls a tool in message {number} ({call}), and how much of what the template "
                    f"writes of that is learned is not known; put {{% generation %}} around the answer in it, or "
                    f"the call into the content as the model is to write it")
        self.check_nulls(messages, tools)
        text, spans = self.render(messages, tools)
        check_growth(len(text), sum(len(message["content"] or "") for message in messages), "conversation")
        if not self.marks_answers:
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            # The last one is apart: of its thoughts, for example, some templates write more.
            spans = self.find_together(text, messages, tools, answers[:-1]) if len(answers) > FEW_ANSWERS else []
            spans += [self.find_answer(text, messages, tools, i) for i in answers[len(spans):]]
        return text, spans

    def check_nulls(self, messages: list[dict], tools) -> None:
        """TemplateError where a message has null as its content, and the template writes that as None or fails."""
        number = next((i for i, message in enumerate(messages, 1) if message["content"] is None), None)
        if number is None:
            return
        filled, _ = self.render([{**message, "content": message["content"] or ""} for message in messages], tools)
        with contextlib.suppress(TypeError, jinja2.exceptions.UndefinedError):
            if self.render(messages, tools)[0].count("None") <= filled.count("None"):
                return
        raise jinja2.exceptions.TemplateError(
            f"it takes no null for a text, and message {number} has null as its content; make that an empty text")

    def probe(self, messages: list[dict], tools, answers: list[int]) -> list[str]:
        """The parts of the text around these answers."""
        probed = list(messages)
        for i in answers:
            probed[i] = {**messages[i], "content": PROBE}
        text, _ = self.render(probed, tools)
        return text.split(PROBE)

    def write_prompt(self, messages: list[dict], tools) -> str | None:
        """What the assistant goes on from behind these messages; None where the template writes no such text."""
        with contextlib.suppress(Exception):
            return self.render(messages, tools, add_generation_prompt=True)[0] if messages else None

    def end_answer(self, text: str, end: int) -> int:
        ended = self.end.match(text, end)
        return ended.end() if ended else end

    def find_answer(self, text: str, messages: list[dict], tools, i: int) -> tuple[int, int]:
        """Where in `text` the answer that message i is stands: from behind the prompt for it to the token that ends it.

        With another answer in its place, the text before it and the text behind it must stay what they are. The answer
        begins where the template, asked for a prompt to generate from, ends: a blank before an answer, which Llama 2's
        writes, is the model's to write, as it belongs to the first word's token.
        """
        parts = self.probe(messages, tools, [i])
        if len(parts) != 2:
            raise jinja2.exceptions.TemplateError(
                f"it writes the answer in message {i + 1} {len(parts) - 1} times, and what of it is learned is not "
                f"known; put {{% generation %}} around the answer in the template")
        before, after = parts
        prompt = self.write_prompt(messages[:i], tools)
        begin = next((len(start) for start in (prompt, before) if start is not None and text.startswith(start)), None)
        end = len(text) - len(after)
        if begin is None or not text.endswith(after) or begin > end:
            raise jinja2.exceptions.TemplateError(
                f"its text around message {i + 1} depends on what that answer says, so where it begins and ends is not "
                f"known; put {{% generation %}} around the answer in the template")
        return begin, self.end_answer(text, end)

    def find_together(self, text: str, messages: list[dict], tools, answers: list[int]) -> list[tuple[int, int]]:
        """What `find_answer` finds of each of these, in time that is linear in the messages; [] where the template is
        less regular than that takes: where an answer changes what stands elsewhere, or where the first two answers
        behind a role and the last are not at the same distance from their prompts, which is taken to be that of all.

        With all answers replaced, the template writes what stands around them; with every other one, the rest stand
        between what is known then. Example, o being a PROBE: "1o2o3", "1o2b3" and "1a2o3", and the text is "1a2b3".
        """
        around = self.probe(messages, tools, answers)
        halves = [self.probe(messages, tools, answers[k::2]) for k in (0, 1)]
        if any(len(parts) != len(probed) + 1
               for parts, probed in zip((around, *halves), (answers, answers[::2], answers[1::2]))):
            return []
        pieces = around[:1]
        for k, (before, after) in enumerate(itertools.pairwise(around)):
            part = halves[1 - k % 2][(k + 1) // 2]
            answer = part[len(before):len(part) - len(after)]
            if part != before + answer + after:
                return []
            pieces += [answer, after]
        if "".join(pieces) != text:
            return []
        places = list(itertools.accumulate(map(len, pieces)))
        begins, ends = places[:-1:2], places[1::2]
        by_role = collections.defaultdict(list)
        for i, begin, end in zip(answers, begins, ends):
            by_role[messages[i - 1]["role"] if i else None].append((i, begin, end))
        spans = []
        for found in by_role.values():
            gaps = {self.find_gap(text, begin, messages[:i], tools) for i, begin, _ in {*found[:2], found[-1]}}
            if len(gaps) > 1:
                return []
            (gap, started), = gaps
            for _, begin, end in found:
                if not text.endswith(gap, 0, begin):
                    return []
                begin += len(started) * text.startswith(started, begin) - len(gap)
                spans.append((begin, self.end_answer(text, end)))
        return sorted(spans) if all(begin <= end for begin, end in spans) else []

    def find_gap(self, text: str, begin: int, messages: list[dict], tools) -> tuple[str, str]:
        """Of the answer that stands at `begin` in the text: what the template writes between the prompt for it and it,
        and what of an answer, such as <think>, the prompt begins already."""
        prompt = self.write_prompt(messages, tools)
        if prompt is None:
            return "", ""
        if text.startswith(prompt, 0, begin):
            return text[len(prompt):begin], ""
        return "", prompt[begin:] if prompt.startswith(text[:begin]) else ""


def regex_replace(string, pattern, repl, count=0):
    return re.sub(pattern, repl, string, count=count)


class Prompts:
    """reply(record) -> {"texts": {name: text}, "lists": {name: list}}: the prompts of a task file of
    lm-evaluation-harness, filled with a record as it fills them, and those that write a list of texts as Python does.
    """

    def __init__(self, prompts: dict[str, str]):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined,
                                                                   keep_trailing_newline=True)
        environment.filters["regex_replace"] = regex_replace
        self.templates = {}
        for name, source in prompts.items():
            with name_prompt(name):
                self.templates[name] = environment.from_string(source)

    def reply(self, record: dict) -> dict:
        texts, lists = {}, {}
        for name, template in self.templates.items():
            with name_prompt(name):
                texts[name] = template.render(record)
        check_growth(sum(map(len, texts.values())), len(json.dumps(record)), "record")
        for name, text in texts.items():
            with contextlib.suppress(SyntaxError, ValueError):
                found = ast.literal_eval(text.strip()) if text.lstrip().startswith("[") else None
                if isinstance(found, list) and all(isinstance(each, str) for each in found):
                    lists[name] = found
        return {"texts": texts, "lists": lists}


@contextlib.contextmanager
def name_prompt(name: str):
    try:
        yield
    except (jinja2.exceptions.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise jinja2.exceptions.TemplateError(f"{name}: {error or type(error).__name__}") from None


def check_growth(length: int, asked: int, what: str) -> None:
    if length > FREE_LENGTH + MOST_GROWTH * asked:
        raise jinja2.exceptions.TemplateError(f"it makes {length:,} characters of one {what}")


def answer(function, line: str) -> dict:
    """What function(**the object in a line of JSON) returns, within SECONDS; {"error": why} where it fails."""
    # The signal ends the process, whatever that does: also within one step of Python.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        return function(**json.loads(line))
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MB of memory"}
    except Exception as error:
        # Whatever Python raises in what a template asks of it.
        return {"error": " ".join(f"{error}".split())[:300] or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def serve() -> None:
    """Make a Template, or Prompts, of the first line of the input, and reply to each further one by it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    templates = []

    def make(**given) -> dict:
        templates.append((Prompts if "prompts" in given else Template)(**given))
        return {}

    def reply(**question) -> dict:
        return templates[0].reply(**question)
    # Jinja imports some of its parts where they are first needed, and under the limits no file is opened.
    for source in ("{{ none.name.name }}", "{{ [{}] | tojson }}{{ strftime_now('%d %b %Y') }}"):
        answer(lambda source: Template(source, {}, []).write([], None), json.dumps({"source": source}))
    limit_resources(MEMORY)
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(answer(reply if templates else make, line)), flush=True)
