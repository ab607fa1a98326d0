"""Settings files with values of every wrong type: a line that names file and field, or the same as the right one, and
never another exception. Truth: the values written out below, and the readers of the files themselves."""

import json

import pytest

import generate
import hf
import lora
import tokenizer
from core.errors import UserError
from core.settings_files import ANY, FILES, read_settings
from learn import peft_files

ODD = (3, -1, 2.5, "97", "", "x", "true", True, [], [1], ["a"], [None], {}, {"foo": 1}, {"content": 1},
       {"content": "<s>"}, [[1]], {"1": {"content": "<s>"}}, {"a": [1]}, None, float("nan"), float("inf"), 10**400)


@pytest.mark.parametrize(("file", "field", "value", "typed"), [
    ("config.json", "rope_theta", "10000.0", 10000.0),
    ("config.json", "rope_theta", 10000, 10000.0),
    ("config.json", "vocab_size", "512", 512),
    ("config.json", "vocab_size", 512.0, 512),
    ("config.json", "tie_word_embeddings", "True", True),
    ("config.json", "tie_word_embeddings", 0, False),
    ("config.json", "eos_token_id", "2", 2),
    ("config.json", "eos_token_id", ["2", 3.0], [2, 3]),
    ("config.json", "rope_scaling", {"factor": "8", "theirs": [1]}, {"factor": 8.0, "theirs": [1]}),
    ("config.json", "rope_scaling", {"factor": None}, {"factor": None}),
    ("config.json", "head_dim", None, None),
    ("config.json", "theirs", {"a": [1]}, {"a": [1]}),
    ("tokenizer_config.json", "eos_token", {"content": "</s>", "lstrip": False}, "</s>"),
    ("tokenizer_config.json", "additional_special_tokens", ["a", {"content": "b"}], ["a", "b"]),
    ("tokenizer_config.json", "added_tokens_decoder", {"7": {"content": "a", "special": "true", "lstrip": False}},
     {"7": {"content": "a", "special": True, "lstrip": False}}),
    ("added_tokens.json", "<a>", "300", 300),
])
def test_fields_are_typed(tmp_path, file, field, value, typed):
    (tmp_path / file).write_text(json.dumps({field: value}))
    assert repr(read_settings(tmp_path / file)) == repr({field: typed})


@pytest.mark.parametrize(("file", "field", "value", "wanted"), [
    ("config.json", "rope_theta", [1], "a number"),
    ("config.json", "vocab_size", 2.5, "a whole number"),
    ("config.json", "hidden_size", True, "a whole number"),
    ("config.json", "max_position_embeddings", float("inf"), "a whole number"),
    ("config.json", "attention_bias", "perhaps", "true or false"),
    ("config.json", "model_type", ["llama"], "text"),
    ("config.json", "rope_scaling", "yarn", "an object with factor, "),
    ("config.json", "eos_token_id", "</s>", "a whole number at least -1 and below 4,194,304 or a list, each entry a"),
    ("config.json", "vocab_size", 10**12, "a whole number at least 1 and at most 4,194,304"),
    ("config.json", "rope_theta", float("nan"), "a number above 1 and at most 1e\\+15"),
    ("config.json", "rope_theta", 0, "a number above 1"),
    ("config.json", "num_hidden_layers", 10**5, "a whole number at least 1 and at most 1,000"),
    ("adapter_config.json", "lora_alpha", float("inf"), "a number above 0"),
    ("adapter_config.json", "r", 1.5, "a whole number at least 1"),
    ("added_tokens.json", "<x>", 10**9, "a whole number at least 0"),
    ("tokenizer_config.json", "eos_token", {"foo": 1}, "a token or an object with its content"),
    ("tokenizer_config.json", "added_tokens_decoder", [1], "an object, each value an object with content"),
    ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "a"}}, "an object, each value"),
    ("tokenizer_config.json", "added_tokens_decoder", {"1": {}}, "an object, each value"),
    ("vocab.json", "a", None, "a whole number"),
])
def test_what_cannot_be_meant_is_named(tmp_path, file, field, value, wanted):
    (tmp_path / file).write_text(json.dumps({field: value}))
    with pytest.raises(UserError, match=f"^{tmp_path}/{file} has {field} .*, but it must be {wanted}"):
        read_settings(tmp_path / file)


def test_a_part_that_cannot_be_meant_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"rope_scaling": {"type": "yarn", "factor": [2]}}))
    with pytest.raises(UserError, match=r"has in rope_scaling factor \[2\], but it must be a number above 0"):
        read_settings(tmp_path / "config.json")


def test_a_missing_file_is_empty_unless_it_is_needed(tmp_path):
    assert read_settings(tmp_path / "config.json") == {}
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read_settings(tmp_path / "config.json", needed=True)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json",
                                  "special_tokens_map.json", "added_tokens.json", "adapter_config.json"])
def test_no_value_of_any_field_ends_in_a_traceback(tiny_model, small_bases, tmp_path, file):
    hf.save(tiny_model(), tmp_path / "base", tokenizer=small_bases["small pieces"])
    model, folder = tiny_model(), tmp_path / "base"
    lora.attach(model, lora.LoraConfig(rank=2, embeddings="none"), 0)
    peft_files.save_adapter(model, tmp_path / "adapter", "base")
    home = tmp_path / "adapter" if file == "adapter_config.json" else folder
    right = json.loads((home / file).read_text()) if (home / file).exists() else {}

    def read():
        if file == "adapter_config.json":
            peft_files.load_adapter(tiny_model(), home)
        elif file in ("config.json", "generation_config.json"):
            base = hf.open_base(folder)
            hf.make_config(base.config, base.dtype, base.settings)
            generate.end_ids(folder, tokenizer.load(folder))
        else:
            tokenizer.load(folder).encode("a b")

    refused = []
    for field in (name if name != ANY else "<new>" for name in FILES[file]):
        for value in ODD:
            (home / file).write_text(json.dumps(right | {field: value}))
            try:
                read()
            except UserError as error:
                refused.append(str(error))
            except Exception as error:
                raise AssertionError(f"{field} = {value!r}") from error
    assert len(refused) > len(ODD) // 2
    assert not [line for line in refused if "\n" in line]
