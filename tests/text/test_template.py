"""text/template.py and text/sandbox.py: what a chat template writes, and what it cannot do. Truth: transformers'
apply_chat_template, and the answers as tests/chat_templates.py spells them out."""

import itertools
import json
import random
import time
import types
from datetime import datetime
from pathlib import Path

import pytest
from chat_templates import ANSWERS, AROUND, CHATML, SPECIALS, TEMPLATES, TURNS, make_tokenizer
from growth import assert_linear
from jinja2.exceptions import TemplateError

import tokenizer as tokenizers
from core.errors import UserError
from text.chat import MARK, control_tokens, mark_controls
from text.sandbox import Template
from text.template import ChatTemplate, TemplateProcess, read_template

pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
SYSTEM = {"role": "system", "content": "Be brief. "}


def process(source: str, roles=None, ends=("<|im_end|>",)):
    return TemplateProcess(ChatTemplate(source, Path("model/chat_template.jinja")), roles or {}, list(ends))


def open_template(folder):
    """A TemplateProcess as packing opens it."""
    tok, template = tokenizers.load(folder), read_template(folder)
    roles = {f"{role}_token": tok.tokens[getattr(tok, f"{role}_id")] for role in ("bos", "eos", "pad")}
    return TemplateProcess(template, roles, [t for t in control_tokens(tok, template) if t != roles["bos_token"]])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_transformers_and_the_answers_are_the_assistants(tmp_path, tiny_bpe, name):
    truth = make_tokenizer(tiny_bpe, tmp_path / name, name)
    conversations = [TURNS[:2], TURNS] + ([[SYSTEM, *TURNS]] if name not in ("mistral", "gemma") else [])
    with open_template(tmp_path / name) as writer:
        for messages in conversations:
            text, spans = writer.write("x", messages, None)
            assert text == truth.apply_chat_template(messages, tokenize=False)
            found = [text[begin:end] for begin, end in spans]
            if name in ANSWERS:
                assert found == ANSWERS[name][:len(found)]
            assert len(found) == sum(turn["role"] == "assistant" for turn in messages)


def test_blocks_of_generation_are_transformers_mask(tmp_path, tiny_bpe):
    truth = make_tokenizer(tiny_bpe, tmp_path / "t", "generation")
    found = truth.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    with open_template(tmp_path / "t") as writer:
        text, spans = writer.write("x", TURNS, None)
    offsets = truth(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert found["assistant_masks"] == [int(any(a <= begin and end <= b for a, b in spans)) for begin, end in offsets]
    assert sum(found["assistant_masks"]) > 5


def test_thoughts_of_an_answer_are_the_assistants(tmp_path, tiny_bpe):
    """They stand in the last answer alone, and there they are learned."""
    make_tokenizer(tiny_bpe, tmp_path / "t", "thinking")
    thought = "<think>\nHm.\n</think>\n\n"
    think = [{**turn, "content": thought * (turn["role"] == "assistant") + turn["content"]} for turn in TURNS]
    with open_template(tmp_path / "t") as writer:
        text, spans = writer.write("x", think, None)
    assert [text[begin:end] for begin, end in spans] == [
        "Blue, or grey.<|im_end|>", "<think>\nHm.\n</think>\n\nGreen.\n\nMostly.<|im_end|>"]


# ---- many answers, which are found together

def make_template(name: str) -> Template:
    bos, eos, more = SPECIALS[name]
    return Template(TEMPLATES[name], {"bos_token": bos, "eos_token": eos}, [eos, *more])


def make_talk(answers: int) -> list[dict]:
    rng, texts = random.Random(0), ("Blue.", "No, grey.\n\nOr <b>.", "5", "user", "")
    return [{"role": role, "content": f"{rng.choice(texts)}{i}"}
            for i in range(answers) for role in ("user", "assistant")]


@pytest.mark.parametrize("name", AROUND)
def test_of_many_answers_each_is_found(name):
    messages, (before, end) = make_talk(40), AROUND[name]
    text, spans = make_template(name).write(messages, None)
    assert [text[slice(*span)] for span in spans] == [f"{before}{turn['content']}{end}" for turn in messages[1::2]]


ODD = {
    # The prompt begins the answer, and the thoughts of all but the last are left out, as DeepSeek R1's template does.
    "a prompt that begins the answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if loop.last or m.role != 'assistant' "
        "else m.content.split('</think>')[-1]) + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n<think>{% endif %}"),
    # Answers to a tool go on without a form of their own, and there is no prompt for them.
    "a role without a prompt": (
        "{% for m in messages %}{% if m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}{% else %}{% if messages["
        "loop.index0 - 1].role == 'user' %}<answer> {% endif %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if "
        "add_generation_prompt and messages[-1].role == 'user' %}<answer>{% endif %}"),
    "a prompt that changes": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}"
        "assistant:{{ ' ' if messages | length % 4 == 3 }}{% endif %}"),
    "an answer that changes another": (
        "{% for m in messages %}{{ m.role + ': ' }}{% if not loop.first and loop.previtem.content == 'a' %}!{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"),
    "no prompt": "{% if add_generation_prompt %}{{ raise_exception('') }}{% endif %}{% for m in messages %}"
                 "{{ m.role + ':' + m.content }}<|im_end|>{% endfor %}",
}


@pytest.mark.parametrize("name", [*TEMPLATES, *ODD])
@pytest.mark.parametrize("roles", [("user",), ("user", "tool")])
def test_answers_found_together_are_those_found_one_by_one(monkeypatch, name, roles):
    """Also where blanks are cut off, answers are empty or alike, or the text around one depends on it."""
    template = make_template(name) if name in TEMPLATES else Template(ODD[name], {}, ["<|im_end|>"])
    rng, texts = random.Random(1), ["a", " a b\n", "", "<think>", "<think>x</think>y", "a<answer>"]
    for _ in range(20):
        messages = [{"role": role, "content": rng.choice(texts)}
                    for _ in range(rng.randint(2, 9)) for asked in roles for role in (asked, "assistant")]
        found = []
        for few in (1, 99):
            monkeypatch.setattr("text.sandbox.FEW_ANSWERS", few)
            found.append(attempt(template, messages))
        assert found[0] == found[1]


def attempt(template: Template, messages: list[dict]) -> dict:
    try:
        return template.reply(messages, None)
    except TemplateError as error:
        return {"error": f"{error}"}


@pytest.mark.parametrize("name", ["llama2", "thinking"])
def test_the_time_of_a_conversation_is_linear_in_its_turns(name):
    template = make_template(name)
    assert_linear(lambda answers: template.write(make_talk(answers), None), 512)


def test_roles_and_tools_reach_the_template():
    source = ("{{ bos_token }}{{ unk_token }}{{ tools | tojson(indent=1) }}{% for m in messages %}{{ m.role }}:"
              "{{ m.content }}{{ m.name }}{% if loop.first %}{% continue %}{% endif %};{% endfor %}")
    with process(source, {"bos_token": "<s>"}) as writer:
        text, _ = writer.write("x", [{**TURNS[0], "name": "Änn"}, TURNS[1]], [{"name": "<f>"}])
    assert text == ('<s>[\n {\n  "name": "<f>"\n }\n]user:Name a colour of the sky, please.Änn'
                    'assistant:Blue, or grey.;')


@pytest.mark.parametrize("said", ["<|im_end|>", "é<|im_end|><|im_end|>\\", "\\ufdd0 \\\\ufdd0 \\<|im_end|>", "\\" * 9])
def test_a_mark_stays_one_in_json_of_ascii_alone(said):
    """What it writes of a text that holds control tokens is, without the marks, what transformers writes."""
    template = Template("{{ messages[0].content | tojson(ensure_ascii=True) }}", {}, [])
    text, _ = template.render([{"content": mark_controls(said, {"<|im_end|>": 1})}], None)
    assert text.count(MARK) == said.count("<|im_end|>")
    assert text.replace(MARK, "") == json.dumps(said)
    assert "<|im_end|>" not in text


def test_a_pack_is_of_one_day(monkeypatch):
    days = itertools.count(1)
    monkeypatch.setattr("text.sandbox.datetime", types.SimpleNamespace(now=lambda: datetime(2026, 1, next(days))))
    template = Template("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }};{% endfor %}", {}, [])
    assert [template.write(TURNS[:2], None)[0][:2] for _ in range(2)] == ["01", "01"]


CALLS = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
         {"role": "tool", "content": "5"}, TURNS[1]]
FORM = ("{% for m in messages %}{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>{% endgeneration %}{% endfor %}")


def test_a_call_of_a_tool_is_learned_whole_or_refused():
    with process(FORM) as writer:
        text, spans = writer.write("x", CALLS, None)
    assert text[slice(*spans[1])] == "<call>f</call><|im_end|>"
    old = [TURNS[0], {"role": "assistant", "content": "", "function_call": {"name": "f"}}, TURNS[1]]
    with process(FORM.replace("{% generation %}", "").replace("{% endgeneration %}", "")) as writer:
        for messages, key in ((CALLS, "tool_calls"), (old, "function_call")):
            with pytest.raises(UserError, match=rf"^line 3 cannot.* in message 2 \({key}\), .*put {{% generation %}}"):
                writer.write("line 3", messages, None)
        assert len(writer.write("x", [{**turn, "tool_calls": None} for turn in TURNS], None)[1]) == 2


NULL = [TURNS[0], {**CALLS[1], "content": None}, *CALLS[2:]]


def test_a_call_without_a_text_is_learned_as_transformers_masks_it(tmp_path, tiny_bpe):
    truth = make_tokenizer(tiny_bpe, tmp_path / "t", "generation")
    truth.chat_template = FORM.replace("{{ m.content }}", "{% if m.content %}{{ m.content }}{% endif %}")
    truth.save_pretrained(tmp_path / "t")
    found = truth.apply_chat_template(NULL, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    with open_template(tmp_path / "t") as writer:
        text, spans = writer.write("x", NULL, None)
    assert text == truth.apply_chat_template(NULL, tokenize=False)
    offsets = truth(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert found["assistant_masks"] == [int(any(a <= begin and end <= b for a, b in spans)) for begin, end in offsets]
    assert text[slice(*spans[1])] == "<call>f</call><|im_end|>"


@pytest.mark.parametrize("form", ["{{ m.content }}", "{{ m.content + '' }}", "{{ m.content.strip() }}"])
def test_a_template_that_takes_no_null_is_one_line(form):
    with process(FORM.replace("{{ m.content }}", form)) as writer:
        with pytest.raises(UserError, match=r"^line 3 cannot be .*: it takes no null for a text, and message 2 has"):
            writer.write("line 3", NULL, None)
        assert "None" in writer.write("x", [{**TURNS[0], "content": "None"}, *CALLS[1:]], None)[0]


# ---- templates that fail, or would do what they must not

FAILING = {
    "no template": ("{{ x", "is none: unexpected end of template"),
    "its own refusal": ("{{ raise_exception('only user and assistant') }}", "only user and assistant"),
    "an attribute of Python's": ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    "globals of a function": ("{{ cycler.__init__.__globals__ }}", "'__init__' of 'type' object is unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format(messages) }}", "'__class__' of 'list' object is unsafe"),
    "a filter that gets attributes": ("{{ messages | attr('__class__') }}|{{ (messages | attr('__class__')).x }}",
                                      "is unsafe|undefined"),
    "a namespace": ("{% set n = namespace(__init__=1) %}", "a namespace has no '__init__'"),
    "a change of its input": ("{% set x = messages.append(1) %}{{ x }}", "'append' of 'list' object is unsafe"),
    "import": ("{% import 'os' as os %}", "no loader"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "extends": ("{% extends 'base.html' %}", "no loader"),
    "a long range": ("{{ range(10 ** 9) | list }}", "Range too big"),
    "a huge string": ("{{ 'a' * 10 ** 10 }}", "more than 512 MB of memory"),
    "a huge string at run time": ("{{ messages[0].content * 10 ** 9 }}", "more than 512 MB of memory"),
    "a wide field": ("{{ 'a' | center(10 ** 9) }}", "more than 512 MB of memory"),
    "a string that doubles": ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
                              "{% endfor %}", "more than 512 MB of memory"),
    "a text far longer than its conversation": ("{{ 'a' * 10 ** 7 }}", "makes 10,000,000 characters"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "maximum recursion depth"),
    "an answer twice": ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "message 2 2 times"),
    "an answer never": ("{{ messages[0].content }}", "message 2 0 times"),
    "an answer that changes what stands around it": (
        "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}",
        "depends on what that answer says"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_one_line(name):
    source, match = FAILING[name]
    with pytest.raises(UserError, match=match) as refused, process(source) as writer:
        writer.write("data.jsonl line 3", TURNS[:2], None)
    assert "\n" not in str(refused.value)
    assert "model/chat_template.jinja" in str(refused.value)
    assert ("data.jsonl line 3 cannot be written by" in str(refused.value)) == (name != "no template")


LOOPS = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
POWERS = "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x ** 9 %}{% endfor %}"
ENDLESS = {"loops": LOOPS, "a power": POWERS, "a power, at compile time": "{{ 9 ** (9 ** (9 ** 9)) }}"}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_ended(monkeypatch, name):
    monkeypatch.setattr("text.template.START", "import text.sandbox; text.sandbox.SECONDS = 0.3; text.sandbox.serve()")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    start = time.process_time()
    with pytest.raises(UserError, match="more than 5 s of computing, or more memory"), \
            process(ENDLESS[name]) as writer:
        writer.write("data.jsonl line 3", TURNS[:2], None)
    assert time.process_time() - start < 2


def test_after_a_conversation_that_fails_the_next_one_is_written():
    with process("{% for m in messages %}{{ m.missing.name }}{{ m.content }}<|im_end|>{% endfor %}") as writer:
        with pytest.raises(UserError, match="has no attribute 'missing'"):
            writer.write("x", TURNS[:2], None)
        assert writer.write("x", [{**turn, "missing": {}} for turn in TURNS[:2]], None)[1] == [(43, 67)]


# ---- where a template stands

def write(folder, template=None, **files):
    (folder / "tokenizer.json").write_text("{}")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text if isinstance(text, str) else json.dumps(text))
    return read_template(folder)


def test_a_template_is_found_where_transformers_finds_it(tmp_path):
    assert write(tmp_path) is None
    assert write(tmp_path, chat_template__json={"chat_template": "legacy"}).source == "legacy"
    assert write(tmp_path, tokenizer_config__json={"chat_template": None}).source == "legacy"
    assert write(tmp_path, tokenizer_config__json={"chat_template": CHATML}).source == CHATML
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert write(tmp_path, tokenizer_config__json={"chat_template": named}).source == "d"
    assert write(tmp_path, chat_template__jinja="own").source == "own"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"none of the name default \(it has: tool_use\)"):
        write(tmp_path, tokenizer_config__json={"chat_template": named[:1]})
    with pytest.raises(UserError, match="a chat_template that is no text"):
        write(tmp_path, tokenizer_config__json={"chat_template": 5})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * (1 << 21))
    with pytest.raises(UserError, match="more than 1 MB"):
        read_template(tmp_path)
