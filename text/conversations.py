"""Records of instruction, chat and preference data -> conversations, whatever form they were published in.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}           what an API takes
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}    ShareGPT's
    {"instruction": ..., "input": ..., "output": ...}                                      Alpaca's; input is optional,
                                                                                           context means the same
    {"prompt": ..., "response": ...}                                                       or completion
    {"prompt": ..., "chosen": ..., "rejected": ...}                                        a preference

Prompt, chosen and rejected may be texts or lists of messages; without a prompt, or where they hold a user's turn,
chosen and rejected are conversations that differ in their last turn. A record's keys say which form it has (a null is
none), and its `system` is a first message.
"""

import reprlib
from typing import NamedTuple

from core.cli import Reading
from core.errors import UserError
from text.corpus import FOUND, read_values
from text.kinds import identify, list_files
from text.sandbox import CALLS

# What a file of such records may be.
RECORDS = ("lines", "parquet", "json", "hub")
# The names of roles, as data sets write them, by what templates call them.
ROLES = {"system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "tool": "tool", "observation": "tool"}
# The keys of whole chats, and of prompts too, in the order in which they are taken.
CHATS = ("messages", "conversations")
PROMPTS = (*CHATS, "instruction", "prompt")
# Alpaca's prompts (Stanford, 2023), in which records are written for a base that has no chat template.
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{0}\n\n### Response:\n")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n### Instruction:\n{0}\n\n### Input:\n{1}"
                "\n\n### Response:\n")


class Conversation(NamedTuple):
    # Where its record stands, for messages.
    where: str
    # [{"role": ..., "content": ...}], one of them the assistant's and with text in it, or a call of a tool; beside a
    # call the content may be None.
    messages: list[dict]
    # Descriptions of the functions that the assistant may call, as its template takes them.
    tools: list | None = None

    def key(self, last: bool) -> str:
        """What says whether it is held out: the same for every template and on every day; without the last answer of
        several to one prompt."""
        said = [(turn["role"], "\n\n".join((turn["content"] or "", turn.get("input", ""))).strip())
                for turn in self.messages]
        return "\n\n".join(f"{role}\n{text}" for role, text in said[:None if last else -1])

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
    name, prompt = _find(record, PROMPTS), _find(record, ("instruction", "prompt"))
    if not _is_answered(record, name) and _find(record, ("chosen",)) and _find(record, ("rejected",)):
        raise _refuse(where, "holds a preference, chosen and rejected; pack such records with --format preference")
    turns = _read_prompt(where, record, name, plain)
    if name == prompt:
        answer = _find(record, ("output", "response", "completion"))
        if not answer:
            raise _refuse(where, f"has no answer under output, response or completion (it has: {', '.join(record)})")
        turns = turns + _read_turns(where, answer, record[answer])
    return [Conversation(where, turns, record.get("tools"))]


def _read_pair(where: str, record: dict, plain: bool) -> list[Conversation]:
    if missing := [name for name in ("chosen", "rejected") if record.get(name) is None]:
        raise _refuse(where, f"has nothing under {missing[0]} (it has: {', '.join(record)}); a preference is a prompt, "
                             f"chosen and rejected")
    # Some data sets have the chosen conversation as messages too.
    name = _find(record, [name for name in PROMPTS if not _is_answered(record, name)])
    prompt = _read_prompt(where, record, name, plain) if name else []
    if not name and isinstance(record["chosen"], str):
        raise _refuse(where, "has no prompt, and its chosen answer is a text; name the prompt as prompt")
    both = []
    for half in ("chosen", "rejected"):
        turns = _read_turns(where, half, record[half])
        if turns[-1]["role"] != "assistant":
            raise _refuse(where, "has a chosen or a rejected conversation whose last turn is not the assistant's")
        both.append(_join(where, half, prompt, turns))
    if both[0][:-1] != both[1][:-1]:
        raise _refuse(where, "has a chosen and a rejected conversation that differ before their last turn")
    return [Conversation(where, turns, record.get("tools")) for turns in both]


def _join(where: str, half: str, prompt: list[dict], turns: list[dict]) -> list[dict]:
    """The conversation of a prompt and what stands under chosen or rejected: an answer, or with a user's turn in it
    the whole conversation, in which the prompt must stand. Blanks around a text make no other prompt."""
    if not any(turn["role"] == "user" for turn in turns):
        return prompt + turns
    instructs = [bool(part) and part[0]["role"] in ("system", "developer") for part in (prompt, turns)]
    system = prompt[:1] if instructs == [True, False] else []
    asked, said = ([(turn["role"], (turn["content"] or "").strip()) for turn in part]
                   for part in (prompt[len(system):], turns))
    if not any(said[i:i + len(asked)] == asked for i in range(len(said) - len(asked) + 1)):
        raise _refuse(where, f"has a whole conversation under {half}, and not with the turns of its prompt in it; make "
                             f"{half} the answer alone, or the prompt the one that it has")
    return system + turns


def _find(record: dict, names) -> str | None:
    """The first of these names under which a record has something."""
    return next((name for name in names if record.get(name) is not None), None)


def _is_answered(record: dict, name: str | None) -> bool:
    """Whether a record has under `name` a conversation that the assistant ends."""
    last = record[name][-1:] if name in CHATS and isinstance(record.get(name), list) else ()
    return any(isinstance(turn, dict) and ROLES.get(str(turn.get("from", turn.get("role")))) == "assistant"
               for turn in last)


def _read_prompt(where: str, record: dict, name: str | None, plain: bool) -> list[dict]:
    """The messages of a record under `name`, with its system turn: all of a chat, else those before the answer."""
    if name is None:
        raise _refuse(where, f"has none of messages, conversations, instruction and prompt (it has: "
                             f"{', '.join(record)}); give it one of these forms, or pack it with --format text")
    turns = _read_turns(where, name, record[name], role="user")
    if name not in CHATS:
        if record.get("history"):
            raise _refuse(where, "has earlier turns under history, which are not read; put all turns under messages")
        # Dolly calls it context.
        extras = {key: record[key] for key in ("input", "context") if record.get(key)}
        for key, extra in extras.items():
            if not isinstance(extra, str):
                raise _refuse(where, f"has {FOUND.get(type(extra), 'something else')} under {key}; make it a text")
        extra = "\n\n".join(extras.values())
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
        # What calls a tool needs to say nothing, and is then written with null by those who publish conversations.
        if not isinstance(content, str) and not (content is None and calls_tool(ROLES[said], message)):
            raise _refuse(where, f"{at} {FOUND.get(type(content), 'something else')} as its content; make it a text "
                                 f"(a call of a tool: as the model is to write it)")
        if ROLES[said] == "assistant" and (message.get("weight") not in (None, 1) or message.get("train") is False):
            field = "train" if message.get("train") is False else "weight"
            raise _refuse(where, f"{at} {field} {reprlib.repr(message[field])}, and all answers of a conversation are "
                                 f"learned alike; end it before that message, or remove the field")
        # What else a message says (a name, its reasoning) is for the template.
        turns.append({**{key: each for key, each in message.items() if key not in (*keys, "input")},
                      "role": ROLES[said], "content": content})
    return turns


def _check(conversation: Conversation, plain: bool) -> Conversation:
    where, messages, tools = conversation
    if not any(turn["role"] == "assistant" and ((turn["content"] or "").strip() or calls_tool("assistant", turn))
               for turn in messages):
        raise _refuse(where, "has no answer: no message of the assistant's with text in it")
    if tools is not None and not isinstance(tools, list):
        raise _refuse(where, f"has {FOUND.get(type(tools), 'something else')} under tools; make it a list of objects")
    if plain and (tools or [turn["role"] for turn in messages] != ["user", "assistant"]
                  or any(map(messages[1].get, CALLS))):
        raise _refuse(where, "is a chat, and the model has no chat template to write it in; put the "
                             "chat_template.jinja of the model whose form it shall learn beside its tokenizer, or give "
                             "single prompts with their answers, which get Alpaca's form")
    return conversation


def calls_tool(role: str, message: dict) -> bool:
    return role == "assistant" and any(map(message.get, CALLS))


def _refuse(where: str, what: str) -> UserError:
    return UserError(f"{where} {what}")
