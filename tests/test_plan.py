"""Plans before a run. Truth: hand-worked examples, train.py itself, corpora that we made."""

import sys

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
