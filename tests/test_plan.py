"""Plans before a run. Truth: hand-worked examples, train.py itself, corpora that we made."""

import json
import sys
from pathlib import Path

import pytest

import plan


@pytest.fixture
def plan_py(monkeypatch):
    """plan_py(word, ...) -> exit status of plan.py with these words."""
    def run(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, words)])
        return plan.main()
    return run


def test_memory_takes_the_settings_of_a_recipe(plan_py, pair, tmp_path, capsys):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[data]\ncontext = 64\n[data.sources.domain]\npath = "shards"\n')
    words = ["memory", recipe, "--model.path", pair[0], "--gpu", "H100"]
    assert plan_py(*words) == 0
    assert "GB of 80 on each H100" in capsys.readouterr().out
    assert plan_py("memory", recipe, "--model.path", pair[0], "--gpu", "H10") == 2
    assert "known are B200" in capsys.readouterr().err
    assert plan_py("memory", recipe, "--model.path", pair[0], "--gpus", 3) == 2
    assert "not a multiple of the 3 --gpus" in capsys.readouterr().err


def test_gap_says_what_to_do_and_why(plan_py, pair, tmp_path, capsys):
    base, _, law, story = pair
    words = ["gap", "--model", base, "--general", f"tales={story}", "--documents", "line", "--score-tokens", 500]
    assert plan_py(*words, "--domain", law, "--json", tmp_path / "gap.json") == 0
    found = json.loads((tmp_path / "gap.json").read_text())
    text = capsys.readouterr().out
    assert f"recommendation: {found['recommendation']}" in text
    assert all(reason in text for reason in found["reasons"])
    assert {"recommendation", "perplexity_ratio", "vocabulary_overlap", "reasons", "settings"} <= found.keys()
    assert found["sources"].keys() == {"domain", "tales"}
    assert found["sources"]["domain"]["counted"]
    ratio = found["sources"]["domain"]["perplexity"] / found["sources"]["tales"]["perplexity"]
    assert found["perplexity_ratio"] == pytest.approx(ratio)
    assert ratio > 1
    assert found["sources"]["domain"]["worst"][0]["text"] in Path(law).read_text()


MISTAKES = {
    "no such file": (["--domain", "nowhere.txt"], "input file nowhere.txt does not exist"),
    "empty": (["--domain", "law=empty.txt"], "--domain law: it has no text"),
    "binary": (["--domain", "x.pdf"], "is a PDF"),
    "one name on both sides": (["--domain", "general=law.txt"], "both have a source called general"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case, plan_py, pair, tmp_path, monkeypatch, capsys):
    words, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "law.txt").write_text("a law")
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.4")
    assert plan_py("gap", "--model", pair[0], "--general", pair[3], *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_a_tokenizer_is_one_line(plan_py, pair, tmp_path, capsys):
    (tmp_path / "config.json").write_text((pair[0] / "config.json").read_text())
    assert plan_py("gap", "--model", tmp_path, "--general", pair[3], "--domain", pair[2]) == 2
    assert "no tokenizer in" in capsys.readouterr().err


def test_a_chat_model_is_warned_about(plan_py, pair, tmp_path, capsys):
    for file in pair[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    words = ["gap", "--model", tmp_path, "--general", f"tales={pair[3]}", "--domain", pair[2], "--score-tokens", 100]
    assert plan_py(*words) == 0
    assert "warning: the base carries a chat template" in capsys.readouterr().out
