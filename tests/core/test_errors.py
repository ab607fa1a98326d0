"""The nearest word and what a user's mistake is. Truth: hand-made cases."""

import pytest

import eval as evaluation
import train
from core import cli
from core.config import setting_names
from core.errors import FAMILIAR, UserError, nearest


def test_nearest():
    assert nearest("contxt", ["data", "context"]) == "; did you mean context?"
    assert nearest("zzz", ["data", "context"]) == ""


def test_a_users_mistake_is_a_value_error():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(("theirs", "ours"), [
    ("learning_rate", "optim.lr"), ("optim.learning_rate", "optim.lr"), ("train.learning-rate", "optim.lr"),
    ("cutoff_len", "data.context"), ("max_seq_length", "data.context"), ("data.max_seq_length", "data.context"),
    ("per_device_train_batch_size", "train.micro_batch_size"), ("num_train_epochs", "train.epochs"),
    ("warmup_ratio", "optim.warmup_ratio"), ("train.warmup_ratio", "optim.warmup_ratio"), ("lora_r", "lora.rank"),
    ("lora.r", "lora.rank"), ("lora_alpha", "lora.alpha"), ("gradient_accumulation_steps", "train.batch_size"),
    ("save_steps", "train.save_every"), ("bf16", "train.precision"), ("lr", "optim.lr"), ("data.lr", "optim.lr"),
    ("epochs", "train.epochs"), ("output_dir", "out"), ("domain.path", "model.path"),
])
def test_names_of_other_trainers_are_understood_in_recipes_and_on_the_command_line(theirs, ours, tmp_path):
    with pytest.raises(UserError) as caught:
        cli.parse(train.Config, [f"--{theirs}", "1"], recipe=True)
    assert str(caught.value) == f"unknown key {theirs.replace('-', '_')}; did you mean {ours}?"
    *section, key = theirs.split(".")
    (tmp_path / "r.toml").write_text(f"[{section[0]}]\n{key} = 1\n" if section else f"{key} = 1\n")
    if section and section[0] not in vars(train.Config()):
        return
    with pytest.raises(UserError) as caught:
        cli.parse(train.Config, [str(tmp_path / "r.toml")], recipe=True)
    assert str(caught.value) == f"unknown key {theirs}; did you mean {ours}?"


def test_each_familiar_name_leads_to_a_setting_that_exists():
    known = setting_names(train.Config)
    assert {ours.split()[0] for ours in FAMILIAR.values()} <= set(known)
    for theirs in FAMILIAR:
        assert f"; did you mean {FAMILIAR[theirs].split()[0]}?" == nearest(theirs, known)
    for theirs, ours in (("--max-seq-length", "--context"), ("--bf16", "--dtype"), ("--base-model", "--model")):
        with pytest.raises(UserError, match=f"unknown option {theirs}; did you mean {ours}\\?"):
            cli.parse(evaluation.Eval, [theirs, "1"], "eval.py")
