"""Benchmarks under a model. Truth: lm-evaluation-harness over transformers on the same files; a planted answer key;
chance; intervals of published tables."""

import json
import random
from dataclasses import replace
from statistics import NormalDist

import harness
import pytest
import torch
from synthetic import Bytes

import eval as evaluation
import hf
import tokenizer as tokenizers
from measure import tasks
from measure.task_list import OWN, Item
from measure.tasks import TaskSettings, load_items, open_tasks, score_tasks

pytestmark = pytest.mark.usefixtures("one_thread")
BENCH = {"arc_easy": "jsonl/arc_easy.jsonl", "arc_challenge": "jsonl/arc_challenge.jsonl", "piqa": "jsonl/piqa.jsonl",
         "boolq": "jsonl/boolq.jsonl", "winogrande": "jsonl/winogrande.jsonl",
         "hellaswag": "hellaswag/hellaswag_val_1000.jsonl"}
ASK = {"doc_to_text": "{{query}}\nAnswer:", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}


def make_questions(n: int, choices: int = 4, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    words = ["lien", "court", "the", "a", "story", "plaintiff", "who", "ran", "home", "again"]
    return [{"query": " ".join(rng.choices(words, k=rng.randint(2, 9))) + rng.choice(["?", " is ", ""]),
             "choices": [" ".join(rng.choices(words, k=rng.randint(1, 4))) + "é" * rng.randint(0, 2)
                         for _ in range(choices)], "gold": rng.randrange(choices)} for _ in range(n)]


def assert_equal(found: dict, truth: dict):
    """Each metric that lm-evaluation-harness has."""
    metrics = {key: value for key, value in truth.items() if not key.endswith("_stderr") and key in found}
    assert metrics
    assert {key: found[key] for key in metrics} == pytest.approx(metrics, rel=1e-6, abs=1e-9)


def test_scores_are_those_of_the_harness(hf_model, tmp_path):
    theirs, folder = hf_model("llama", vocab_size=259, max_position_embeddings=60)
    file = harness.write_lines(tmp_path / "own.jsonl", make_questions(40))
    tok = Bytes(add_bos=True)
    lm = harness.make_lm(theirs, lambda text: list(text.encode()), tok.decode, tok.bos_id, 60)
    truth, answers = harness.score(lm, {"own": harness.CHOICE | {"file": file, **ASK, "doc_to_text": "{{query}}"}})
    model, opened = hf.load(folder), open_tasks({"own": TaskSettings(str(file))})
    for batch_size in (1, 32):
        found = score_tasks(model, tok, opened, batch_size=batch_size)["own"]
        assert_equal(found, truth["own"])
    # Some were longer than the context.
    assert found["cut"] > 0
    requests = tasks.make_requests(tok, "own", *opened["own"])
    ours = tasks.log_likelihoods(model, requests)[0]
    assert [nats for own in ours for nats, _ in own] == pytest.approx(
        [nats for own in answers["own"] for nats, _ in own], rel=1e-5)


def test_a_planted_answer_key_scores_one(tiny_model, monkeypatch):
    """The right choice is the likeliest of every item, then the least likely; a model of equal logits is at chance."""
    items = [Item(q["query"] + ":", tuple(q["choices"]), q["gold"]) for q in make_questions(30)]
    model, tok = tiny_model(vocab_size=259, max_position_embeddings=256), Bytes()
    answers = tasks.log_likelihoods(model, tasks.make_requests(tok, "own", OWN, items))[0]
    for choose, value in ((max, 1.0), (min, 0.0)):
        planted = [replace(item, gold=own.index(choose(own))) for item, own in zip(items, answers)]
        found = score_tasks(model, tok, {"own": (OWN, planted)})["own"]
        assert (found["acc"], found["hits"]) == (value, str(int(value)) * 30)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    items = [replace(item, choices=tuple(f"{i}{choice[:3]:3}" for i, choice in enumerate("abcd")), gold=k % 4)
             for k, item in enumerate(items)]
    found = score_tasks(model, tok, {"own": (OWN, items)})["own"]
    # Equal choices: the first is taken, which is right in a quarter of the items.
    assert found["acc"] == pytest.approx(0.25, abs=0.05) == found["chance"] == 0.25


def test_chance_scores_chance(tiny_model):
    """Random items: within what the binomial distribution gives in all but one of 10,000 cases."""
    items = [Item(q["query"], tuple(q["choices"]), q["gold"]) for q in make_questions(300, 3, seed=5)]
    found = score_tasks(tiny_model(vocab_size=259, max_position_embeddings=128), Bytes(), {"own": (OWN, items)})["own"]
    spread = NormalDist().inv_cdf(1 - 5e-5) * (1 / 3 * 2 / 3 / 300) ** 0.5
    assert abs(found["acc"] - 1 / 3) < spread
    assert found["chance"] == pytest.approx(1 / 3)


def test_the_interval_is_wilsons():
    """Brown, Cai and DasGupta (2001); R's prop.test(81, 263, correct = FALSE) gives 0.2553 to 0.3662 (Newcombe 1998,
    table I)."""
    assert tasks.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert tasks.wilson(0, 20) == pytest.approx([0, 0.1611], abs=5e-5)
    assert tasks.wilson(29, 29)[1] == 1


def test_few_shot_examples_stand_before_each_item(tmp_path):
    records = make_questions(12)
    file = harness.write_lines(tmp_path / "own_test.jsonl", records)
    task = replace(OWN, shots=2)
    items = load_items("own", task, str(file))
    # They are of the file itself, which then has two items fewer, and the same before each.
    assert len(items) == 10
    asked = [item.context.split("\n\n") for item in items]
    assert {tuple(parts[:2]) for parts in asked} == {tuple(asked[0][:2])}
    shown = {f"{r['query']} {r['choices'][r['gold']]}" for r in records}
    assert set(asked[0][:2]) <= shown
    assert not {parts[2] for parts in asked} & {part.rpartition(" ")[0] for part in asked[0][:2]}
    assert load_items("own", task, str(file)) == items != load_items("own", task, str(file), seed=1)
    # Or of the file beside it, and then all items are scored.
    harness.write_lines(tmp_path / "own_train.jsonl", [{"query": "Q", "choices": ["x", "y"], "gold": 1}] * 2)
    items = load_items("own", task, str(file))
    assert (len(items), items[3].context) == (12, f"Q y\n\nQ y\n\n{records[3]['query']}")


def test_a_limit_is_spread_over_the_file(tmp_path):
    file = harness.write_lines(tmp_path / "own.jsonl", [
        {"query": str(i), "choices": ["x", "y"], "gold": 1} for i in range(10)])
    assert [item.context for item in load_items("own", OWN, str(file), limit=4)] == ["0", "2", "5", "7"]


FAULTS = {
    "missing": (None, "own.jsonl does not exist"),
    "empty": ("", "holds no items"),
    "no JSON": ("{", "own.jsonl line 1 is not JSON"),
    "wrong columns": ('{"text": "a", "id": 3}', "has the columns text, id, but needs context_options"),
    "no record": ("[1, 2]", "has the columns a list"),
    "gold outside": ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "the right choice is number 2"),
    "gold no number": ('{"query": "a", "choices": ["b", "c"], "gold": "both"}', "line 1 makes no item"),
    "one choice": ('{"query": "a", "choices": ["b"], "gold": 0}', "it has 1 choices"),
    "an empty choice": ('{"query": "a", "choices": ["b", ""], "gold": 0}', "a choice is empty"),
    "no text": ('{"query": "a", "choices": ["b", 3], "gold": 0}', "a text is 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_one_clear_line(tmp_path, fault, monkeypatch, capsys, pair):
    text, message = FAULTS[fault]
    if text is not None:
        (tmp_path / "own.jsonl").write_text(text)
    monkeypatch.setattr("sys.argv", ["eval.py", "--model", str(pair[0]), "--tasks", f"own={tmp_path}/own.jsonl"])
    assert evaluation.main() == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_task_is_one_clear_line():
    with pytest.raises(ValueError, match="unknown task arc_eas; did you mean arc_easy"):
        open_tasks({"arc_eas": TaskSettings()})
    with pytest.raises(ValueError, match="2 examples are wanted, but there are 1"):
        tasks.choose_examples("own", replace(OWN, shots=2), [Item("", ("a",))], 0)


def test_the_command_scores_a_model_and_the_one_before(tmp_path, monkeypatch, capsys, pair):
    file = harness.write_lines(tmp_path / "own.jsonl", make_questions(9))
    monkeypatch.setattr("sys.argv", ["eval.py", "--model", str(pair[1]), "--baseline", str(pair[0]), "--tasks",
                                     f"own={file}", "--limit", "8", "--shots", "1", "--device", "cpu", "--json",
                                     str(tmp_path / "e.json")])
    assert evaluation.main() == 0
    written = json.loads((tmp_path / "e.json").read_text())
    now, was = written["tasks"]["own"], written["baseline"]["tasks"]["own"]
    assert {"acc", "acc_norm", "acc_bytes"} <= now.keys()
    expected = {"metric": "acc", "value": now["acc"], "direction": "up", "chance": 0.25, "n": 8, "shots": 1,
                "capability": "domain", "version": 1, "items_hash": was["items_hash"]}
    assert {key: now[key] for key in expected} == expected
    assert now["hits"].count("1") == 8 * now["acc"]
    assert now["interval"] == tasks.wilson(now["hits"].count("1"), 8)
    tok = tokenizers.load(pair[0])
    assert now["protocol"]["first_ids"][0] == tok.bos_id
    assert f"| own | acc | {was['value']:.4f} | {now['value']:.4f} |" in capsys.readouterr().out


@pytest.mark.slow
def test_each_benchmark_scores_as_in_the_harness(data_dir, tmp_path):
    """stories260K on the first items of each file, with the prompts of lm-evaluation-harness' own tasks."""
    transformers = pytest.importorskip("transformers")
    import sentencepiece
    from lm_eval.tasks.hellaswag import utils as hellaswag
    folder = data_dir / "models/stories260K"
    sp = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    lm = harness.make_lm(transformers.AutoModelForCausalLM.from_pretrained(folder), sp.encode, sp.decode, 1, 512)
    files = {name: tmp_path / f"{name}.jsonl" for name in BENCH}
    for name, file in files.items():
        lines = (data_dir / "bench" / BENCH[name]).read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:40]), encoding="utf-8")
    wanted = {name: harness.CHOICE | ASK | {"file": file} for name, file in files.items()}
    wanted["piqa"] |= {"doc_to_text": "{{query}}Answer:"}
    wanted["boolq"] |= {"doc_to_text": "{{query[9:]}}\nAnswer:"}
    wanted["hellaswag"] |= {"process_docs": hellaswag.process_docs, "doc_to_text": "{{query}}"}
    wanted["winogrande"] |= {"doc_to_text": lambda r: r["gold"], "doc_to_choice": lambda r: r["context_options"],
                             "doc_to_target": lambda r: r["continuation"], "metric_list": [{"metric": "acc"}]}
    truth, answers = harness.score(lm, wanted)
    model, tok = hf.load(folder), tokenizers.load(folder)
    opened = open_tasks({name: TaskSettings(str(file)) for name, file in files.items()})
    found = score_tasks(model, tok, opened)
    for name in wanted:
        assert_equal(found[name], truth[name])
        ours = tasks.log_likelihoods(model, tasks.make_requests(tok, name, *opened[name]))[0]
        assert [nats for own in ours for nats, _ in own] == pytest.approx(
            [nats for own in answers[name] for nats, _ in own], rel=1e-5), name
