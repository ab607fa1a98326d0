"""Records of instruction, chat and preference data -> conversations, whatever form they were published in.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}           what an API takes
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}    ShareGPT's
    {"instruction": ..., "input": ..., "output": ...}                                      Alpaca's; input is optional
    {"prompt": ..., "response": ...}                                                       or completion
    {"prompt": ..., "chosen": ..., "rejected": ...}                                        a preference

Prompt, chosen and rejected may be texts or lists of messages; without a prompt, chosen and rejected are conversations
that differ in their last turn. A record's keys say which form it has, and its `system` is a first message.
"""

import reprlib
from typing import NamedTuple

from core.cli import Reading
from core.errors import UserError
from text.corpus import FOUND, read_values
from text.kinds import identify, list_files

# What a file of such records may be.
RECORDS = ("lines", "parquet", "json", "hub")
# The names of roles, as data sets write them, by what templates call them.
ROLES = {"system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool"}
# Alpaca's prompts (Stanford, 2023), in which records are written for a base that has no chat template.
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{0}\n\n### Response:\n")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\n{0}\n\n### Input:\n{1}"
                "\n\n### Response:\n")


class Conversation(NamedTuple):
    # Where its record stands, for messages.
    where: str
    # [{"role": ..., "content": ...}], one of them the assistant's and with text in it.
    messages: list[dict]
    # Descriptions of the functions that the assistant may call, as its template takes them.
    tools: list | None = None

    def write_alpaca(self) -> tuple[str, str]:
        """(prompt, answer) of a conversation of one exchange, in Alpaca's form."""
        (question, answer), extra = self.messages, self.messages[0].get("input")
        form = ALPACA_INPUT if extra else ALPACA
        return form.format(question["content"], extra), answer["content"]


def read_conversations(files: list[str], form: str, plain: bool, reading: Reading | None = None):
    """Yield the conversations of each record of the files: [one] of a chat, [chosen, rejected] of a preference.

    plain: for a base without a template, where a conversation must be one exchange; an Alpaca record's input then
    stays apart from its instruction. UserError with the record's place where a record has no such form, or no answer.
    """
    for path in list_files(files, RECORDS):
        kind = identify(path, lists=True)
        for number, (where, record) in enumerate(read_values(path, reading or Reading(), lists=True), 1):
            # A list in JSON says no places.
            where = f"{path} entry {number}" if kind == "json" else where
            if not isinstance(record, dict):
                raise _refuse(where, f"is {FOUND.get(type(record), 'no record')}, and no object of named fields")
            found = (_read_pair if form == "preference" else _read_chat)(where, record, plain)
            yield [_check(conversation, plain) for conversation in found]


def _read_chat(where: str, record: dict, plain: bool) -> list[Conversation]:
    if "chosen" in record and "rejected" in record:
        raise _refuse(where, "holds a preference, chosen and rejected; pack such records with --format preference")
    answer = next((name for name in ("output", "response", "completion") if record.get(name) is not None), "")
    turns = _read_prompt(where, record, plain)
    if "messages" not in record and "conversations" not in record:
        if not answer:
            raise _refuse(where, f"has no answer under output, response or completion (it has: {', '.join(record)})")
        turns = turns + _read_turns(where, answer, record[answer])
    return [Conversation(where, turns, record.get("tools"))]


def _read_pair(where: str, record: dict, plain: bool) -> list[Conversation]:
    if missing := [name for name in ("chosen", "rejected") if record.get(name) is None]:
        raise _refuse(where, f"has nothing under {missing[0]} (it has: {', '.join(record)}); a preference is a prompt, "
                             f"chosen and rejected")
    has_prompt = any(record.get(name) is not None for name in ("messages", "conversations", "instruction", "prompt"))
    prompt = _read_prompt(where, record, plain) if has_prompt else []
    if not has_prompt and isinstance(record["chosen"], str):
        raise _refuse(where, "has no prompt, and its chosen answer is a text; name the prompt as prompt")
    both = []
    for name in ("chosen", "rejected"):
        turns = _read_turns(where, name, record[name])
        # Some data sets repeat the prompt before each answer.
        both.append(turns if turns[:len(prompt)] == prompt else prompt + turns)
    if both[0][:-1] != both[1][:-1]:
        raise _refuse(where, "has a chosen and a rejected conversation that differ before their last turn")
    if {turns[-1]["role"] for turns in both} != {"assistant"}:
        raise _refuse(where, "has a chosen or a rejected conversation whose last turn is not the assistant's")
    return [Conversation(where, turns, record.get("tools")) for turns in both]


def _read_prompt(where: str, record: dict, plain: bool) -> list[dict]:
    """The messages of a record: all of a chat, else those before the answer."""
    name = next((name for name in ("messages", "conversations", "instruction", "prompt")
                 if record.get(name) is not None), None)
    if name is None:
        raise _refuse(where, f"has none of messages, conversations, instruction and prompt (it has: "
                             f"{', '.join(record)}); give it one of these forms, or pack it with --format text")
    extra = record.get("input") if name == "instruction" else None
    if not isinstance(extra or "", str):
        raise _refuse(where, f"has {FOUND.get(type(extra), 'something else')} under input; make it a text")
    turns = _read_turns(where, name, record[name], role="user")
    if extra:
        turns[-1] |= {"input": extra} if plain else {"content": f"{turns[-1]['content']}\n\n{extra}"}
    if record.get("system"):
        turns = _read_turns(where, "system", record["system"], role="system") + turns
    return turns


def _read_turns(where: str, name: str, value, role: str = "assistant") -> list[dict]:
    """The messages under a key; a text is one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise _refuse(where, f"has {reprlib.repr(value)} under {name}; it must be a text or a list of messages")
    turns = []
    for number, message in enumerate(value, 1):
        at = f"has in message {number} of {name}"
        if not isinstance(message, dict):
            raise _refuse(where, f"{at} {reprlib.repr(message)}, and no object with a role and a content")
        keys = ("from", "value") if "from" in message else ("role", "content")
        if missing := [key for key in keys if key not in message]:
            raise _refuse(where, f"{at} no {missing[0]} (it has: {', '.join(message)})")
        said, content = (message[key] for key in keys)
        if not isinstance(said, str) or said not in ROLES:
            raise _refuse(where, f"{at} the unknown role {reprlib.repr(said)}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise _refuse(where, f"{at} {FOUND.get(type(content), 'something else')} as its content; make it a text "
                                 f"(a call of a tool: as the model is to write it)")
        # What else a message says (a name, its reasoning) is for the template.
        turns.append({**{key: each for key, each in message.items() if key not in (*keys, "input")},
                      "role": ROLES[said], "content": content})
    return turns


def _check(conversation: Conversation, plain: bool) -> Conversation:
    where, messages, tools = conversation
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        raise _refuse(where, "has no answer: no message of the assistant's with text in it")
    if tools is not None and not isinstance(tools, list):
        raise _refuse(where, f"has {FOUND.get(type(tools), 'something else')} under tools; make it a list of objects")
    if plain and [turn["role"] for turn in messages] != ["user", "assistant"]:
        raise _refuse(where, "is a chat, and the model has no chat template to write it in; put the "
                             "chat_template.jinja of the model whose form it shall learn beside its tokenizer, or give "
                             "single prompts with their answers, which get Alpaca's form")
    return conversation


def _refuse(where: str, what: str) -> UserError:
    return UserError(f"{where} {what}")
