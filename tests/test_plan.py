"""Plans before a run. Truth: hand-worked examples, train.py itself, corpora that we made."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from synthetic import texts

import plan
import tokenizer as tokenizers
import train
from text.shards import Shards, pack


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
    out = capsys.readouterr().out
    assert "GB of 80 on each H100" in out
    assert "advised: ddp" in out
    # A pipeline of two: the second part has the head. A known size needs no folder.
    assert plan_py("memory", recipe, "--model.path", "llama-2-7b", "--gpus", 2, "--parallel.pipeline", 2,
                   "--json", tmp_path / "plan.json") == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert "that holds the 1. of 2 parts of the layers, the fullest" in capsys.readouterr().out
    assert [each["name"] for each in found["layouts"]][:3] == ["ddp, pipeline 2, 1f1b", "ddp", "fsdp"]
    assert found["layouts"][2]["parallel"] == {"strategy": "fsdp"}
    assert found["fits"] == found["layouts"][0]["fits"] is True
    assert plan_py("memory", recipe, "--model.path", pair[0], "--gpu", "H10") == 2
    assert "known are B200" in capsys.readouterr().err
    assert plan_py("memory", recipe, "--model.path", pair[0], "--gpus", 3) == 2
    assert "not a multiple of the 3 ranks" in capsys.readouterr().err


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


def test_budget_writes_a_recipe_that_train_takes_as_it_is(plan_py, pair, lab, tmp_path, capsys, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    for file in pair[0].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    for kind in ("legal", "story"):
        pack(texts(kind), tokenizers.load(base), tmp_path / kind, heldout=0.1)
    words = ["budget", "--model", base, "--domain", f"law={tmp_path}/legal", "--general", f"tales={tmp_path}/story",
             "--batch-tokens", 256, "--recipe", tmp_path / "run.toml", "--json", tmp_path / "budget.json"]
    for method in ("full", "qlora"):
        assert plan_py(*words, "--method", method) == 0
        found = json.loads((tmp_path / "budget.json").read_text())
        assert found["chosen"] == method
        assert found["methods"].keys() == {"full", "lora", "qlora"}
        tokens = Shards(tmp_path / "legal").tokens
        assert found["tokens"]["domain"] == tokens
        assert found["tokens"]["replay"] == pytest.approx(tokens * 3 / 7)
        assert found["methods"][method]["hours"] > 0
        monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "run.toml"), "--dry-run"])
        assert train.main() == 0
        said = capsys.readouterr().out
        assert f"run: {found['methods'][method]['steps']:,} steps" in said
        assert "dry run: the whole run takes about" in said


def test_budget_counts_text_that_is_not_packed_and_says_how_to_pack_it(plan_py, pair, tmp_path):
    words = ["budget", "--model", pair[0], "--domain", pair[2], "--general", pair[3], "--documents", "line",
             "--no-calibrate", "--recipe", tmp_path / "run.toml", "--json", tmp_path / "b.json"]
    assert plan_py(*words) == 0
    recipe = (tmp_path / "run.toml").read_text()
    assert f"# first: python data.py pack --tokenizer {pair[0]} --out shards/domain {pair[2]}" in recipe
    tok = tokenizers.load(pair[0])
    tokens = sum(len(tok.encode(line)) for line in Path(pair[2]).read_text().split("\n"))
    assert json.loads((tmp_path / "b.json").read_text())["tokens"]["domain"] == pytest.approx(tokens)


def test_the_commands_of_a_recipe_stand_names_that_a_shell_would_split(plan_py, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "my law; touch x\n[train]\nsteps = 7.txt"
    Path(name).write_text(Path(pair[2]).read_text())
    assert plan_py("budget", "--model", pair[0], "--domain", name, "--replay", 0, "--no-calibrate", "--recipe",
                   "run.toml") == 0
    text = Path("run.toml").read_text()
    assert tomllib.loads(text)["train"]["steps"] != 7
    assert "'my law; touch x" in text


def test_budget_goes_on_from_gap(plan_py, tmp_path, capsys):
    (tmp_path / "gap.json").write_text(json.dumps({
        "model": "llama-2-7b", "domain": {"tokens": 5e9}, "settings": {"replay": 0.25, "method": "lora"}}))
    words = ["budget", "--model", "llama-3-8b", "--gap", tmp_path / "gap.json", "--gpu", "H100", "--gpus", 8]
    assert plan_py(*words, "--json", tmp_path / "b.json") == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert (found["chosen"], found["replay"], found["tokens"]["total"]) == ("lora", 0.25, pytest.approx(5e9 / 0.75))
    assert "gap.json is of llama-2-7b" in capsys.readouterr().err


BUDGET_MISTAKES = {
    "no volume": (["--model", "llama-3-8b"], "how much domain text there is nobody says"),
    "text for the name of a size": (["--model", "llama-3-8b", "--domain", "law.txt"], "the name of a size has none"),
    "nothing fits": (["--model", "llama-3-70b", "--domain-tokens", "1e9", "--gpu", "T4", "--recipe", "x.toml"],
                     "no method fits on 1 x T4"),
    "several CPUs": (["--model", "llama-3-8b", "--domain-tokens", "1e9", "--gpus", "2"], "name a --gpu"),
    "no gap": (["--model", "llama-3-8b", "--gap", "x.json"], "is not what plan.py gap --json wrote"),
    "half a gap": (["--model", "llama-3-8b", "--gap", "y.json"], "is not what plan.py gap --json wrote"),
    "a rate of this machine": (["--model", "llama-3-8b", "--domain-tokens", "1e9", "--tflops", "3"], "name a --gpu"),
}


@pytest.mark.parametrize("case", BUDGET_MISTAKES)
def test_a_mistake_in_a_budget_is_one_line(case, plan_py, tmp_path, monkeypatch, capsys):
    words, message = BUDGET_MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law.txt").write_text("a law")
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_text('{"domain": {"tokens": 1e9}, "settings": {"replay": "much", "method": "full"}}')
    assert plan_py("budget", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_ladder_of_real_runs_ends_in_a_recipe_that_trains(plan_py, base, lab, tmp_path, capsys):
    recipe = tmp_path / "run.toml"
    recipe.write_text(f'''[model]
path = "{base[1]}"
[data]
context = 32
[data.sources.law]
path = "{lab}/legal"
[data.sources.tale]
path = "{lab}/story"
role = "general"
[optim]
lr = 1e-2
min_lr = 1e-3
[train]
batch_size = 4
precision = "fp32"
[eval]
tokens = 400
''')
    words = ["--out", tmp_path / "rate", "--recipe", tmp_path / "rate.toml", "--json", tmp_path / "rate.json"]
    assert plan_py("rate", recipe, "--steps", 8, *words, "--rates", 1e-3, 1e-2, 1e-1) == 0
    found = json.loads((tmp_path / "rate.json").read_text())
    assert {row["rate"] for row in found["rows"]} == {1e-3, 1e-2, 1e-1}
    assert f"take a rate of {found['chosen']:g}" in capsys.readouterr().out
    assert f"lr = {found['chosen']}" in (tmp_path / "rate.toml").read_text()
    words = ["ratio", tmp_path / "rate.toml", "--steps", 8, "--out", tmp_path / "ratio", "--shares", 0, 0.1, 0.3, 0.6,
             "--tolerance", 10, "--json", tmp_path / "ratio.json"]
    assert plan_py(*words) == 0
    shown = json.loads((tmp_path / "ratio.json").read_text())
    assert Path(shown["picture"]).read_bytes().startswith(b"\x89PNG")
    assert [row["share"] for row in shown["rows"]] == [0, 0.1, 0.3, 0.6]
    for row in shown["rows"]:
        kept = json.loads(Path(row["folder"], "eval.json").read_text())
        assert row["domain"] == kept["after"]["law"]["bits_per_byte"]
    c = train.cli.parse(train.Config, [str(tmp_path / "rate.toml"), "--dry-run"], recipe=True)
    assert train.run_command(c) == 0


def test_a_ladder_that_cannot_be_judged_is_one_line(plan_py, lab, tmp_path, capsys):
    recipe = tmp_path / "run.toml"
    recipe.write_text(f'[model]\ninit = "scratch"\ntokenizer = "{lab}/tok"\n'
                      f'[data.sources.law]\npath = "{lab}/legal"\n')
    for words, message in ((["ratio", recipe], "has no general source with a weight"),
                           (["ratio", recipe, "--data.sources.tale.path", lab / "story", "--data.sources.tale.role",
                             "general", "--shares", 0.3], "--shares names 1 share of replay"),
                           (["rate", recipe, "--rates", 1e-3], "--rates names 1 rate, and a parabola needs three"),
                           (["rate", "nowhere.toml"], "recipe nowhere.toml does not exist")):
        assert plan_py(*words, "--out", tmp_path / "out") == 2
        assert message in (said := capsys.readouterr().err)
        assert said.count("\n") == 1
    assert plan_py("rate", recipe, "--dry-run", "--steps", 5, "--out", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("python train.py") == 3
    Path(tmp_path / "my run.toml").write_text(recipe.read_text())
    assert plan_py("rate", tmp_path / "my run.toml", "--dry-run", "--steps", 5, "--out", tmp_path / "out") == 0
    assert f"python train.py '{tmp_path}/my run.toml' " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
