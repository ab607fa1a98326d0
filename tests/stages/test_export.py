"""stages/export.py, which `python hf.py export` starts. Truth: final/ of the same run, bit for bit."""

import json
import shutil
import sys

import pytest
from runs import one, run_of
from safetensors.torch import load_file

import hf
import tokenizer
import train
from core import checkpoint
from stages import export as export_stage

pytestmark = pytest.mark.usefixtures("quick")


def export(monkeypatch, capsys, *words, command=export_stage.main) -> tuple[int, str, str]:
    """In this process, but where hf.py is asked, which starts another one."""
    monkeypatch.setattr(sys, "argv", ["hf.py", *["export"] * (command is hf.main), *map(str, words)])
    return command(), *capsys.readouterr()


def same_model(mine, final):
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (mine / name).exists() == (final / name).exists(), name
    ours, theirs = load_file(mine / "model.safetensors"), load_file(final / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(value.equal(theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items())
    assert json.loads((mine / "config.json").read_text()) == json.loads((final / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["--export.dtype", "bf16"], ["--lora.rank", 4, "--lora.dora"], ["--forget.ema.decay", 0.5]], ids=str)
def test_the_last_checkpoint_is_what_the_run_exported(base, tmp_path, monkeypatch, capsys, words):
    out = tmp_path / "run"
    train.train(run_of(base, out, *words), one())
    capsys.readouterr()
    status, said, errors = export(monkeypatch, capsys, out / "checkpoints/step_00000008", "--out", tmp_path / "hf")
    assert (status, errors) == (0, "")
    assert "step 8" in said
    same_model(tmp_path / "hf", out / "final")


@pytest.mark.slow
def test_a_run_from_scratch_and_what_is_refused(lab, tmp_path, monkeypatch, capsys, whole):
    step = whole[0] / "checkpoints/step_00000008"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    shutil.copytree(step, tmp_path / "damaged")
    (tmp_path / "damaged/state.json").write_text("{}")
    for words, says in ((["--out", tmp_path / "mine", "--overwrite"], "thesis.txt"), ([], "out"),
                        (["--out", step / "hf/new"], "is in the checkpoint")):
        status, _, errors = export(monkeypatch, capsys, step, *words)
        assert (status, errors.count("\n")) == (2, 1)
        assert says in errors
    model, _, state = checkpoint.load(step)
    shards = checkpoint.Shards({f"model/{name}": value for name, value in model.items()})
    for name, change in (("odd", {"lora": {"colour": 1}}), ("large", {"model": {**state["identity"]["model"],
                                                                               "hidden_size": 64}})):
        checkpoint.write(tmp_path / name, shards, state | {"identity": state["identity"] | change})
    for wrong in (*map(tmp_path.joinpath, ("odd", "large", "nowhere", "damaged")), whole[0] / "final", whole[0]):
        status, _, errors = export(monkeypatch, capsys, wrong, "--out", tmp_path / "hf")
        assert (status, errors.count("\n")) == (2, 1)
        assert str(wrong) in errors
        assert not (tmp_path / "hf").exists()
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert export(monkeypatch, capsys, whole[0], "--out", tmp_path / "hf", command=hf.main)[0] == 2
    assert export(monkeypatch, capsys, step, "--out", tmp_path / "hf", command=hf.main)[0] == 0
    same_model(tmp_path / "hf", whole[0] / "final")
    assert tokenizer.load(tmp_path / "hf").vocab_size == tokenizer.load(lab / "tok").vocab_size
