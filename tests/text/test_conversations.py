"""text/conversations.py: what each published form of a record means, and one line for what is none. Truth: the forms as
their data sets document them, written out by hand."""

import json

import pytest

from core.errors import UserError
from text.conversations import read_conversations

USER, ANSWER = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}
OTHER = {"role": "assistant", "content": "A dog."}
SYSTEM = {"role": "system", "content": "Be brief."}


def human(text):
    return {"from": "human", "value": text}


def read_one(tmp_path, record, form, plain, name="data.jsonl"):
    (tmp_path / name).write_text(json.dumps([record]) if name.endswith(".json") else json.dumps(record) + "\n")
    (found,) = read_conversations([str(tmp_path / name)], form, plain)
    return found


def read(tmp_path, record, form="chat", plain=False, name="data.jsonl"):
    return [conversation.messages for conversation in read_one(tmp_path, record, form, plain, name)]


CHATS = [
    ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    ({"conversations": [human("Name a colour."), {"from": "gpt", "value": "Blue."}]}, [USER, ANSWER]),
    ({"conversations": [USER, ANSWER], "system": "Be brief."}, [SYSTEM, USER, ANSWER]),
    ({"instruction": "Name a colour.", "output": "Blue."}, [USER, ANSWER]),
    ({"instruction": "Name a colour.", "input": "", "output": "Blue."}, [USER, ANSWER]),
    ({"instruction": "Name it.", "input": "the sky", "output": "Blue."},
     [{"role": "user", "content": "Name it.\n\nthe sky"}, ANSWER]),
    ({"prompt": "Name a colour.", "response": "Blue."}, [USER, ANSWER]),
    ({"prompt": "Name a colour.", "completion": "Blue.", "system": None}, [USER, ANSWER]),
    ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
    ({"messages": None, "prompt": "Name a colour.", "response": "Blue."}, [USER, ANSWER]),
    ({"instruction": "Name it.", "context": "the sky", "response": "Blue."},
     [{"role": "user", "content": "Name it.\n\nthe sky"}, ANSWER]),
    ({"prompt": "Name it.", "input": "the sky", "response": "Blue.", "history": []},
     [{"role": "user", "content": "Name it.\n\nthe sky"}, ANSWER]),
    ({"messages": [{**USER, "weight": 0}, {**ANSWER, "weight": 1}]},
     [{**USER, "weight": 0}, {**ANSWER, "weight": 1}]),
    ({"prompt": "Name a colour.", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
     [USER, ANSWER]),
    ({"messages": [{**USER, "name": "Ann"}, ANSWER]}, [{**USER, "name": "Ann"}, ANSWER]),
]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


def test_a_call_of_a_tool_may_have_no_text(tmp_path):
    tool = {"role": "tool", "content": "5"}
    for messages in ([USER, CALL], [USER, CALL, tool, ANSWER]):
        (conversation,) = read_one(tmp_path, {"messages": messages}, "chat", False)
        assert conversation.messages == messages
        assert conversation.key(True).startswith("user\nName a colour.\n\nassistant\n")
    assert read(tmp_path, {"prompt": [USER, CALL, tool], "chosen": [ANSWER], "rejected": [OTHER]}, "preference") == [
        [USER, CALL, tool, ANSWER], [USER, CALL, tool, OTHER]]


@pytest.mark.parametrize(("record", "messages"), CHATS)
def test_a_record_of_each_form_is_a_conversation(tmp_path, record, messages):
    assert read(tmp_path, record) == [messages]
    assert read(tmp_path, record, name="data.json") == [messages]


PREFERENCES = [
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "A dog."},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    {"prompt": [USER], "chosen": ANSWER, "rejected": OTHER},
    {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": "Name a colour.", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": "Name a colour. ", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": "Name a colour.", "messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"messages": [USER, ANSWER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": OTHER},
    {"conversations": [human("Name a colour.")], "chosen": {"from": "gpt", "value": "Blue."},
     "rejected": {"from": "gpt", "value": "A dog."}},
    {"instruction": "Name a colour.", "chosen": "Blue.", "rejected": "A dog."},
]


@pytest.mark.parametrize("record", PREFERENCES)
def test_a_preference_of_each_form_is_two_conversations(tmp_path, record):
    assert read(tmp_path, record, "preference") == [[USER, ANSWER], [USER, OTHER]]


@pytest.mark.parametrize("record", [
    {"prompt": "Name a colour.", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]},
    {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": "A dog."}])
def test_a_whole_conversation_holds_its_prompt_once(tmp_path, record):
    assert read(tmp_path, record, "preference") == [[SYSTEM, USER, ANSWER], [SYSTEM, USER, OTHER]]


def test_alpacas_prompts(tmp_path):
    """As github.com/tatsu-lab/stanford_alpaca, train.py has them."""
    (tmp_path / "a.jsonl").write_text('{"instruction": "Name {it}.", "input": "sky", "output": "Blue."}\n'
                                      '{"prompt": "Name it.", "response": "Blue."}\n'
                                      '{"instruction": "Name {it}.", "context": "sky", "response": "Blue."}\n')
    (with_input,), (without,), (dolly,) = read_conversations([str(tmp_path / "a.jsonl")], "chat", plain=True)
    assert with_input.write_alpaca() == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nName {it}.\n\n### Input:\nsky\n\n"
        "### Response:\n", "Blue.")
    assert dolly.write_alpaca() == with_input.write_alpaca()
    assert without.write_alpaca() == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName it.\n\n### Response:\n", "Blue.")


def test_the_key_of_a_conversation_is_what_was_said(tmp_path):
    """Of one exchange the same in every form, with and without a template; of a preference it is the prompt's."""
    records = [{"instruction": "Name it.", "input": "the sky", "output": "Blue."},
               {"messages": [{"role": "user", "content": "Name it.\n\nthe sky "}, {**ANSWER, "name": "Ann"}]},
               {"prompt": "Name it.\n\nthe sky", "chosen": "Blue.", "rejected": "A dog."},
               {"prompt": "Name it.\n\nthe sky", "response": "Red."}]
    keys = [conversation.key(last) for record in records[:2] for plain in (True, False) for last in (True, False)
            for conversation in read_one(tmp_path, record, "chat", plain)]
    pair = [conversation.key(False) for conversation in read_one(tmp_path, records[2], "preference", False)]
    assert keys == 4 * ["user\nName it.\n\nthe sky\n\nassistant\nBlue.", "user\nName it.\n\nthe sky"]
    assert pair == 2 * keys[1:2]
    assert read_one(tmp_path, records[3], "chat", False)[0].key(True) not in keys


WRONG = [
    ([], "is a list, and no object"),
    ({"text": "law"}, r"has none of messages, conversations, instruction and prompt \(it has: text\)"),
    ({"prompt": "law"}, r"has no answer under output, response or completion \(it has: prompt\)"),
    ({"prompt": 5, "response": "x"}, "has 5 under prompt; it must be a text or a list of messages"),
    ({"prompt": "x", "response": ["y"]}, "has in message 1 of response 'y', and no object"),
    ({"messages": []}, r"has \[\] under messages"),
    ({"messages": "x"}, "has no answer: no message of the assistant's"),
    ({"messages": [USER]}, "has no answer"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "has no answer"),
    ({"messages": [USER, {"role": "assistant"}]}, r"has in message 2 of messages no content \(it has: role\)"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2 of messages null as its content"),
    ({"messages": [USER, {**CALL, "tool_calls": []}]}, "message 2 of messages null as its content"),
    ({"messages": [{**CALL, "role": "user"}, ANSWER]}, "message 1 of messages null as its content"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]}, "a list as its content"),
    ({"messages": [{"role": "bot", "content": "x"}, ANSWER]}, "in message 1 of messages the unknown role 'bot'; known"),
    ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "unknown role"),
    ({"conversations": [human("x"), {"from": "gpt"}]}, "no value"),
    ({"instruction": "x", "input": 5, "output": "y"}, "has a number under input"),
    ({"prompt": "x", "context": ["y"], "response": "z"}, "has a list under context; make it a text"),
    ({"instruction": "x", "history": [["a", "b"]], "output": "y"}, "has earlier turns under history"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "in message 2 of messages weight 0, and all answers"),
    ({"messages": [USER, {**ANSWER, "train": False}]}, "in message 2 of messages train False, and all answers"),
    ({"messages": None, "prompt": "law"}, "has no answer under output"),
    ({"messages": [USER], "chosen": "y", "rejected": "z"}, "pack such records with --format preference"),
    ({"messages": [USER, ANSWER], "tools": "x"}, "has a string under tools"),
    ({"prompt": "x", "chosen": "y", "rejected": "z"}, "pack such records with --format preference"),
]


@pytest.mark.parametrize(("record", "match"), WRONG)
def test_a_record_that_is_none_is_refused_with_its_place(tmp_path, record, match):
    with pytest.raises(UserError, match=match) as refused:
        read(tmp_path, record)
    assert str(refused.value).startswith(f"{tmp_path}/data.jsonl line 1 ")
    assert "\n" not in str(refused.value)


WRONG_PAIRS = [
    ({"prompt": "x", "chosen": "y"}, r"has nothing under rejected \(it has: prompt, chosen\)"),
    ({"chosen": "y", "rejected": "z"}, "has no prompt"),
    ({"prompt": "x", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "under chosen, and not with the turns of"),
    ({"prompt": "x", "chosen": "y", "rejected": [USER, OTHER]}, "under rejected, and not with the turns of its prompt"),
    ({"chosen": [SYSTEM, USER, ANSWER], "rejected": [USER, OTHER]}, "differ before their last turn"),
    ({"prompt": [USER], "chosen": [ANSWER, USER], "rejected": [ANSWER, {**USER, "content": "?"}]}, "last turn is not"),
    ({"prompt": "x", "chosen": "y", "rejected": ""}, "has no answer"),
]


@pytest.mark.parametrize(("record", "match"), WRONG_PAIRS)
def test_a_preference_that_is_none_is_refused_with_its_place(tmp_path, record, match):
    with pytest.raises(UserError, match=match):
        read(tmp_path, record, "preference")


def test_the_place_in_a_list_of_json(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": [USER, ANSWER]}, {"messages": [USER]}]))
    with pytest.raises(UserError, match=r"a\.json entry 2 has no answer"):
        list(read_conversations([str(tmp_path / "a.json")], "chat", False))


@pytest.mark.parametrize("messages", [[USER, ANSWER, USER, ANSWER], [SYSTEM, USER, ANSWER], [ANSWER],
                                      [USER, {**ANSWER, "function_call": {"name": "f"}}]])
def test_a_base_without_a_template_takes_no_chats(tmp_path, messages):
    with pytest.raises(UserError, match=r"is a chat, and the model has no chat template.*chat_template\.jinja"):
        read(tmp_path, {"messages": messages}, plain=True)
