"""stages/questions.py: tasks and probes in a run. Truth: the scores of base and export, computed apart; the texts that
were packed. Laws: the same items on every rank and in a resumed run; switched off, they leave no trace."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from runs import arguments, command, lines, one, run_of, settings
from synthetic import make_documents

import hf
import tokenizer
import train
from core import checkpoint, parallel
from core.foreign_files import find_odd
from measure.probes import score_probes
from measure.tasks import score_tasks
from stages.build import build
from stages.questions import compare_answers, open_questions, read_heldout, read_trained
from text.shards import pack

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def asked(lab, base, tmp_path_factory):
    """(lab, base, words of a recipe: a packed source that has facts, a task of two items, both probes)"""
    folder = tmp_path_factory.mktemp("asked")
    pack(make_documents(150), tokenizer.load(lab / "tok"), folder / "facts", heldout=0.3)
    items = [{"query": f"the party of {word} is", "choices": ["the lien", "a cat"], "gold": 0} for word in "ab"]
    (folder / "mine.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return base, ("--data.sources.legal.path", folder / "facts", "--eval.tasks.mine.file", folder / "mine.jsonl",
                  "--eval.probes.facts", 10, "--eval.probes.in-context", 2, "--eval.every", 2, "--train.steps", 4,
                  "--eval.tokens", 20_000, "--data.context", 256)


def test_a_run_scores_its_tasks_and_probes_at_each_evaluation(asked, tmp_path, capsys):
    base, words = asked
    out = tmp_path / "run"
    train.train(c := run_of(base, out, *words), one())
    result, tok = json.loads((out / "eval.json").read_text()), tokenizer.load(base[1])
    questions = build(c, one()).questions
    for side, folder in (("before", base[1]), ("after", out / "final")):
        model = hf.load(folder)
        for kind, found in (("tasks", score_tasks(model, tok, questions.tasks)),
                            ("probes", score_probes(model, tok, questions.probes))):
            assert json.loads(json.dumps(found)) == result[kind][side]
    assert list(result["tasks"]["after"]) == ["mine"]
    assert {"facts_trained", "facts_heldout", "in_context", "in_context.copy"} < result["probes"]["after"].keys()
    for name, change in result["probes"]["change"].items():
        assert change == result["probes"]["after"][name]["value"] - result["probes"]["before"][name]["value"]
    assert [line["step"] for line in lines(out, "eval")] == [0, 2, 4]
    for line in lines(out, "eval"):
        file = json.loads((out / f"eval_step_{line['step']}.json").read_text())
        for kind in ("tasks", "probes"):
            # A line has all but the hits of each item, and what it took of nats.
            assert line[kind] == {name: {key: value for key, value in each.items()
                                         if key != "hits" and not key.endswith("_by_item")}
                                  for name, each in file[kind].items()}
            assert all(len(each["hits"]) == each["n"] for each in file[kind].values())
    assert result["probes"]["before"]["facts_trained"]["n"] == 10
    assert "| facts_heldout | acc norm |" in capsys.readouterr().out
    assert "| facts_heldout | acc norm |" in (out / "final" / "README.md").read_text()


def test_facts_are_asked_of_what_is_trained_on_and_of_what_is_not(asked, tmp_path):
    run = build(run_of(asked[0], tmp_path / "run", *asked[1]), one())
    trained, heldout = read_trained(run), read_heldout(run)
    packed = make_documents(150)
    assert len(trained) > 10
    assert len(heldout) > 10
    assert not {text[:20] for text in trained} & {text[:20] for text in heldout}
    # A document may begin or end in another sequence.
    assert all(any(text.strip("�") in each for each in packed) for text in trained + heldout)
    read = [run.tokenizer.decode(row.tolist()) for step in range(run.steps) for row in run.loader.batch(step).tokens]
    assert all(any(text in row for row in read) for text in trained)


def test_each_rank_and_a_resumed_run_ask_the_same(asked, tmp_path):
    """What adaptive replay has decided by then changes the plan, and not what is asked."""
    run = build(run_of(asked[0], tmp_path / "run", *asked[1]), one())
    assert run.questions == open_questions(replace(run, world=parallel.World(1, 2, torch.device("cpu"))))
    run.loader.plan = run.loader.plan * 2
    assert run.questions == open_questions(run)


def test_without_them_there_is_nothing_of_them(whole):
    result = json.loads((whole[0] / "eval.json").read_text())
    assert not {"tasks", "probes", "ended"} & result.keys()
    assert not [line for line in lines(whole[0], "eval") if {"tasks", "probes"} & line.keys()]


def test_scores_that_one_side_lacks_have_no_change():
    task = {"value": 0.5, "metric": "acc", "interval": [0, 1], "chance": 0.25, "n": 4, "direction": "up",
            "capability": "reasoning"}
    found, tables = compare_answers({}, {"tasks": {"new": task}})
    assert found["tasks"] == {"before": {}, "after": {"new": task}, "change": {}}
    assert found["capabilities"]["reasoning"]["retention"] is None
    assert "| new | acc |  | 0.5000 |" in tables[0]


def test_capabilities_and_lost_items_are_those_of_retention():
    """Of four items two were right before; one of them is lost, and none is won."""
    task = {"metric": "acc", "interval": [0, 1], "chance": 0.25, "n": 4, "direction": "up", "capability": "reasoning",
            "shots": 0, "version": 1, "items_hash": "x"}
    found, tables = compare_answers({"tasks": {"own": {**task, "value": 0.5, "hits": "1100"}}},
                                    {"tasks": {"own": {**task, "value": 0.25, "hits": "1000"}}})
    assert found["capabilities"]["reasoning"] | {"interval": None} == found["capabilities"]["reasoning"]
    assert (found["capabilities"]["reasoning"]["retention"], found["capabilities"]["reasoning"]["sign"]) == (0.5, "bad")
    flips = found["tasks"]["change"]["own"]["flips"]
    assert (flips["lost"], flips["won"], flips["p"]) == (1, 0, 1.0)
    assert "reasoning" in tables[1]


@pytest.mark.parametrize(("words", "told"), [
    (("--eval.tasks.mine.file", "nowhere.jsonl"), r"task mine: nowhere\.jsonl does not exist"),
    (("--eval.tasks.humaneval.file", "PROGRAMS"), r"eval\.tasks\.humaneval runs programs that the model writes"),
    (("--eval.tasks.arc_eazy.limit", 2), r"unknown task arc_eazy; did you mean arc_easy"),
    (("--eval.probes.facts", 5, "--objective.name", "masked"), r"leave them out"),
    (("--eval.tasks.mine.shot", 2), r"unknown key eval\.tasks\.mine\.shot; did you mean eval\.tasks\.mine\.shots"),
])
def test_what_cannot_be_asked_is_one_line(lab, tmp_path, monkeypatch, capsys, words, told):
    record = {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}
    (tmp_path / "programs.jsonl").write_text(json.dumps(record) + "\n")
    words = [tmp_path / "programs.jsonl" if word == "PROGRAMS" else word for word in words]
    status, _, errors = command(monkeypatch, capsys, arguments(lab, tmp_path / "run", *words))
    assert (status, errors.count("\n")) == (2, 1)
    assert re.search(told, errors), errors
    assert not (tmp_path / "run").exists()


def test_a_run_with_tasks_and_probes_goes_on(asked, tmp_path):
    """Truth: the same run without a break. A checkpoint whose answers are odd is refused by name."""
    base, words = asked
    train.train(run_of(base, tmp_path / "whole", *words, "--train.save-every", 2), one())
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for name in ("checkpoints/step_00000004", "final"):
        shutil.rmtree(tmp_path / "parts" / name)
    (tmp_path / "parts/eval.json").unlink()
    train.train(run_of(base, tmp_path / "parts", *words, "--train.save-every", 2), one())
    assert [line["step"] for line in lines(tmp_path / "parts", "resume")] == [2]
    whole, parts = (json.loads((tmp_path / out / "eval.json").read_text()) for out in ("whole", "parts"))
    assert parts["tasks"] == whole["tasks"]
    assert parts["probes"] == whole["probes"]
    state = checkpoint.read_state(tmp_path / "parts/checkpoints/step_00000004")
    assert find_odd(state, checkpoint.FIELDS) is None
    answers = state["evaluations"]["eval_step_0.json"]["tasks"]["mine"]
    for name, value in (("value", "1"), ("interval", [0.5]), ("n", -1), ("capability", None)):
        kept, answers[name] = answers[name], value
        assert "tasks" in find_odd(state, checkpoint.FIELDS), name
        answers[name] = kept


def test_few_facts_are_warned_of(base, tmp_path):
    run = build(settings(base[0], tmp_path / "run", "--eval.probes.facts", 20), one())
    assert run.questions.notes[0].startswith("warning: facts_trained has 0 items, and eval.probes.facts asks for 20")
