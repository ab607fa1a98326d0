"""eval.py against transformers, document by document and window by window, and against numbers worked out by hand."""

import dataclasses
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from runs import make_lab, one, settings
from synthetic import Bytes, make_documents, texts
from truth import same, truth

import eval as evaluation
import hf
import tokenizer
import train
from core import checkpoint
from core.cli import Reading
from learn import objectives
from measure import probes, scoring
from model import Model
from text.shards import Shards, pack

pytestmark = pytest.mark.usefixtures("one_thread")
CAUSAL = objectives.Causal(mask_documents=True)


def test_an_objective_is_scored_by_the_command(base, tmp_path, monkeypatch, capsys):
    """Truth: score_objective on the same sequences; accuracy and pseudo-likelihood of a masked model."""
    lab, model = base
    words = ["eval.py", "--model", str(model), "--device", "cpu", "--context", "32", "--text", f"law={lab}/legal"]
    results = []
    for more in (["--objective.mask-token-id", "5", "--objective.name", "masked"],
                 ["--objective.name", "masked", "--objective.mask-ratio", "0.3", "--pll"]):
        monkeypatch.setattr(sys, "argv", [*words, *more, "--json", str(tmp_path / "e.json")])
        assert evaluation.main() == 0
        results.append(json.loads((tmp_path / "e.json").read_text()))
    measured = results[0]["texts"]["law"]["objective"]
    assert results[0]["protocol"]["mask_token_id"] == 5
    assert set(measured) == {"loss", "accuracy", "sequences"}
    assert results[0]["texts"]["law"]["accuracy"] < 1
    assert results[1]["texts"]["law"]["bits_per_byte"] > 0
    assert "law, objective: loss " in capsys.readouterr().out
    for more, message in ((["--objective.name", "span"], "tokenizer.py add --model DIR --for span"),
                          (["--pll"], "--pll is for a masked model"),
                          (["--objective.name", "electra"], "need a second model"),
                          (["--objective.nam", "span"], "objective.nam")):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        assert evaluation.main() == 2
        assert message in capsys.readouterr().err


def test_a_packed_folder_is_its_held_out_documents(tiny_model, lab, tmp_path):
    """In windows of what the model was trained for, here 64; with another tokenizer's ids it is refused."""
    tok, model, shards = tokenizer.load(lab / "tok"), tiny_model(vocab_size=300), Shards(lab / "legal", "heldout")
    found, protocol = evaluation.score_files(model, tok, {"law": str(lab / "legal")}, Reading())
    documents = [shards.text_document(i) for i in range(shards.documents)]
    wanted = scoring.score(model, CAUSAL, documents, tok.bos_id, 64)
    assert (found["law"], protocol["context"]) == (wanted, 64)
    assert found["law"]["bytes"] < 0.3 * Shards(lab / "legal").manifest["splits"]["train"]["bytes"]
    other = tokenizer.train(texts("legal"), "bpe", 280, tmp_path / "other")
    with pytest.raises(ValueError, match="packed with another tokenizer"):
        evaluation.score_files(model, other, {"law": str(lab / "legal")}, Reading())


def test_a_document_without_tokens_has_no_bytes_to_divide_by(tiny_model, tmp_path):
    """SentencePiece makes nothing of a blank, and so does this tokenizer of bytes."""
    class Blanks(Bytes):
        unk_id = None

        def encode_batch(self, texts):
            return [ids[ids != 32] for ids in super().encode_batch(texts)]

        def decode(self, ids):
            return bytes(ids).decode()
    found = []
    for name, text in (("a", "abc\n"), ("b", "abc\n     \n")):
        (tmp_path / f"{name}.txt").write_text(text)
        texts = {"t": str(tmp_path / f"{name}.txt")}
        model = tiny_model(vocab_size=259)
        found.append(evaluation.score_files(model, Blanks(), texts, Reading(documents="line"), 16)[0]["t"])
    assert found[1].pop("lost_share") == 5 / 8
    assert found[0] == found[1]
    assert (found[0]["tokens"], found[0]["bytes"]) == (3, 3)


def test_a_text_is_as_long_as_its_bytes(tiny_model, tiny_bpe, tmp_path):
    lines = ["naïve café", "漢字 🙂", "e"]
    file = tmp_path / "text.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    tok = tokenizer.load(tiny_bpe)
    found, _ = evaluation.score_files(tiny_model(vocab_size=tok.vocab_size), tok, {"t": str(file)},
                                      Reading(documents="line"), 16)
    assert found["t"]["bytes"] == 12 + 11 + 1 == sum(len(line.encode()) for line in lines)
    nats = found["t"]["nats_per_token"] * found["t"]["tokens"]
    assert found["t"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / 24)


def test_table():
    size = {"documents": 1200, "tokens": 5000}
    was, now = {"bits_per_byte": 2.0, "perplexity": 8.0}, {"bits_per_byte": 1.5, "perplexity": 4.0} | size
    assert scoring.format_table({"law": was}, {"law": now}).splitlines()[-1] == (
        "| law | 2.0000 | 1.5000 | -25.0 % | 8.00 | 4.00 | 1,200 | 5,000 |")
    sure = [side | {"nats_by_document": [share] * 6} for side, share in ((was, 4.0), (now, 3.0))]
    assert "| -25.0 % (95 %: -25.0 to -25.0) |" in scoring.format_table({"law": sure[0]}, {"law": sure[1]})
    assert scoring.format_table(None, {"a|b\nc": now}).splitlines()[2:] == [
        "| a\\|b c |  | 1.5000 |  |  | 4.00 | 1,200 | 5,000 |"]
    assert scoring.format_table(None, {"law": now}).splitlines()[-1] == (
        "| law |  | 1.5000 |  |  | 4.00 | 1,200 | 5,000 |")


# ---- command line

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A lab, a run with checkpoints at 2, 4 and 5 of 5 steps, and a text file of the domain."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.evaluate.run_command", lambda *words: "")
        make_lab(folder / "lab")
        train.train(settings(folder / "lab", folder / "run", "--train.save-every", 2, steps=5), one())
    (folder / "legal.txt").write_text("\n\n".join(texts("legal")[:20]))
    return folder


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    try:
        status = evaluation.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_model_against_its_baseline(pair, monkeypatch, capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    base, model, law, tales = pair
    status, said, errors = command(
        monkeypatch, capsys, "--model", model, "--baseline", base, "--documents", "line", "--text", f"law={law}",
        "--text", f"tales={tales}", "--general", "tales", "--device", "cpu", "--context", 16, "--json",
        tmp_path / "out.json")
    assert (status, errors) == (0, "")
    result = json.loads((tmp_path / "out.json").read_text())
    tok = tokenizer.load(base)
    for scores, folder in ((result["texts"], model), (result["baseline"]["texts"], base)):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for name, file in (("law", law), ("tales", tales)):
            docs = [(np.array(tok.encode(t)), len(t.encode())) for t in file.read_text().splitlines()]
            assert same(scores[name], truth(theirs, docs, tok.bos_id, 16), 1e-5)
    bits = [r["tales"]["bits_per_byte"] for r in (result["baseline"]["texts"], result["texts"])]
    assert result["forgetting"] == pytest.approx(bits[1] / bits[0] - 1)
    assert result["protocol"] == {"prefix_token_id": tok.bos_id, "context": 16, "stride": 16, "bos_eos_scored": False,
                                  "dtype": "float32", "documents_see_each_other": False}
    assert "| law | " in said
    assert "forgetting: general bits per byte" in said


def test_a_model_alone_claims_nothing_about_forgetting(runs, monkeypatch, capsys, tmp_path):
    status, said, _ = command(monkeypatch, capsys, "--model", runs / "run/final", "--text", f"law={runs}/legal.txt",
                              "--json", tmp_path / "o.json", "--device", "cpu")
    assert status == 0
    assert set(json.loads((tmp_path / "o.json").read_text())) == {"model", "texts", "protocol"}
    assert "%" not in said


def test_a_document_is_a_block_between_blank_lines_unless_said_otherwise(runs, monkeypatch, capsys, tmp_path):
    found = {}
    for words in ((), ("--documents", "blank"), ("--documents", "file")):
        command(monkeypatch, capsys, "--model", runs / "run/final", "--text", f"law={runs}/legal.txt",
                "--json", tmp_path / "o.json", "--device", "cpu", *words)
        found[words[-1:]] = json.loads((tmp_path / "o.json").read_text())["texts"]["law"]
    assert found[()] == found[("blank",)]
    assert found[()]["bytes"] != found[("file",)]["bytes"]


def test_every_checkpoint_of_a_run_by_number(runs, monkeypatch, capsys, tmp_path):
    run = shutil.copytree(runs / "run", tmp_path / "run")
    (run / "checkpoints/step_00000002").rename(run / "checkpoints/step_100000000")
    status, said, errors = command(monkeypatch, capsys, "--run", run, "--text", f"law={runs}/legal.txt",
                                   "--documents", "blank", "--json", tmp_path / "o.json", "--device", "cpu")
    assert (status, errors) == (0, "")
    rows = json.loads((tmp_path / "o.json").read_text())["checkpoints"]
    assert [r["step"] for r in rows] == [4, 5, 100_000_000]
    final = hf.load(runs / "run/final")
    tok = tokenizer.load(runs / "lab/tok")
    docs = [(np.array(tok.encode(t)), len(t.encode())) for t in texts("legal")[:20]]
    alone = scoring.score(final, CAUSAL, docs, tok.bos_id, 32)
    assert same(rows[1]["texts"]["law"], alone)
    assert said.index("step 4") < said.index("step 5") < said.index("step 100000000")
    path = checkpoint.path_of(run / "checkpoints", 5) / "shard-00001-model-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    status, _, errors = command(monkeypatch, capsys, "--run", run, "--text", f"law={runs}/legal.txt")
    assert (status, errors.count("\n")) == (2, 1)
    assert "is damaged" in errors


# ---- capabilities, and a baseline that was scored before

@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """40 questions in the columns of ARC's files, on which the models of `pair` are of different minds."""
    rows = [{"query": f"{i}", "choices": [law[:12], story[-12:], law[-9:]], "gold": i % 3}
            for i, (law, story) in enumerate(zip(texts("legal")[:40], texts("story")[:40]))]
    file = tmp_path_factory.mktemp("questions") / "arc.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def evaluate(monkeypatch, capsys, folder, *words):
    """(what --json wrote, what was said) of eval.py on the CPU."""
    out = command(monkeypatch, capsys, "--device", "cpu", "--documents", "line", *words, "--json", folder / "out.json")
    # The models of these tests have few positions.
    assert (out[0], [line for line in out[2].splitlines() if "were cut on the left" not in line]) == (0, [])
    return json.loads((folder / "out.json").read_text()), out[1]


def test_what_was_kept_of_tasks(pair, questions, monkeypatch, capsys, tmp_path):
    """Truth: the items' own hits, counted here; and a baseline from a file, which is the one from its folder."""
    base, model, law, _ = pair
    words = "--text", f"law={law}", "--tasks", f"arc_easy={questions}", f"mine={questions}", "--model"
    found, said = evaluate(monkeypatch, capsys, tmp_path, *words, model, "--baseline", base)
    was, now = (side["tasks"]["arc_easy"] for side in (found["baseline"], found))
    pairs = list(zip(was["hits"], now["hits"]))
    flips = found["tasks_change"]["arc_easy"]["flips"]
    assert (flips["lost"], flips["won"]) == (pairs.count(("1", "0")), pairs.count(("0", "1")))
    assert flips["lost"] + flips["won"] > 5
    row = found["capabilities"]["reasoning"]
    assert (row["baseline"], row["current"]) == (was["value"], now["value"])
    assert row["degradation"] == pytest.approx((was["value"] - now["value"]) / was["value"])
    assert found["capabilities"].keys() == {"reasoning", "domain"}
    assert (found["forgetting"], found["forgetting_of"]) == (pytest.approx(row["degradation"]), "tasks")
    assert found["score"] == pytest.approx(found["domain_gain"] - max(0, row["degradation"] - 0.05))
    assert "| reasoning | accuracy |" in said
    assert "| arc_easy |" in said
    assert "overall score: " in said
    alone, said = evaluate(monkeypatch, capsys, tmp_path, *words, base)
    assert "forgetting: unknown (name the model before with --baseline)" in said
    assert "capabilities" not in alone
    saved = (tmp_path / "out.json").rename(tmp_path / "base.json")
    again, _ = evaluate(monkeypatch, capsys, tmp_path, *words, model, "--baseline", saved)
    assert again["baseline"]["model"] == str(saved)
    for key in ("tasks_change", "capabilities", "forgetting", "change", "interval", "score"):
        assert again[key] == found[key]
    general, _ = evaluate(monkeypatch, capsys, tmp_path, *words, model, "--baseline", base, "--general", "law")
    assert (general["forgetting_of"], general["forgetting"]) == ("texts", general["change"]["law"])


def test_a_baseline_that_does_not_compare_is_one_line(pair, questions, monkeypatch, capsys, tmp_path):
    base, model, law, tales = pair
    words = "--text", f"law={law}", "--tasks", f"arc_easy={questions}"
    evaluate(monkeypatch, capsys, tmp_path, *words, "--model", base)
    saved = tmp_path / "out.json"
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "odd.json").write_text(json.dumps(json.loads(saved.read_text()) | {"tasks": 5}))
    masked, half = json.loads(saved.read_text()), json.loads(saved.read_text())
    masked["protocol"]["mask_ratio"] = 0.15
    half["texts"]["law"]["bits_per_byte"] = half["tasks"]["arc_easy"]["value"] = "much"
    (tmp_path / "masked.json").write_text(json.dumps(masked))
    (tmp_path / "half.json").write_text(json.dumps(half))
    (tmp_path / "other.json").write_text(json.dumps(json.loads(saved.read_text()) | {"tokenizer": "00"}))
    for more, says in (
            ((*words, "--baseline", saved, "--limit", 7), "the number of items is 40 in the baseline, but 7 here"),
            ((*words, "--baseline", saved, "--shots", 2), "in the baseline, but"),
            (("--text", f"law={tales}", "--baseline", saved), "text law has"),
            (("--text", f"law={law}", "--context", 8, "--baseline", saved), "context 64, and this model with 8"),
            (("--text", f"new={law}", "--baseline", saved), "has no scores of text new"),
            ((*words, "--baseline", tmp_path / "odd.json"), "has no scores of task arc_easy"),
            ((*words, "--baseline", tmp_path / "other.json"), "has another tokenizer than the model"),
            ((*words, "--baseline", tmp_path / "list.json"), "holds a list"),
            (("--text", f"law={law}", "--baseline", tmp_path / "masked.json"), "mask_ratio 0.15, and this model with"),
            (("--text", f"law={law}", "--baseline", tmp_path / "half.json"), "has no scores of text law"),
            ((*words[2:], "--baseline", tmp_path / "half.json"), "has no scores of task arc_easy"),
            ((*words, "--checkpoints", 2), "name its folder with --run")):
        status, _, errors = command(monkeypatch, capsys, "--device", "cpu", "--documents", "line", "--model", model,
                                    *more)
        assert (status, errors.count("error: "), errors.count("\n")) == (2, 1, 1), (more, errors)
        assert says in errors


def test_a_vocabulary_that_was_extended_compares(pair, questions, monkeypatch, capsys, tmp_path):
    base, model, *_ = pair
    words = shutil.copytree(model, tmp_path / "words") / "tokenizer.json"
    held = json.loads(words.read_text())
    held["added_tokens"].append({"id": tokenizer.load(base).vocab_size, "content": "<new>", "special": True,
                                 "single_word": False, "lstrip": False, "rstrip": False, "normalized": False})
    words.write_text(json.dumps(held))
    small = hf.load(model)
    large = Model(dataclasses.replace(small.config, vocab_size=small.config.vocab_size + 1))
    large.load_state_dict({name: torch.cat([weight, weight[:1]]) if len(weight) == small.config.vocab_size else weight
                           for name, weight in small.state_dict().items()})
    hf.save(large, tmp_path / "longer", tokenizer=words.parent)
    found, _ = evaluate(monkeypatch, capsys, tmp_path, "--tasks", f"arc_easy={questions}", "--model",
                        tmp_path / "longer", "--baseline", base)
    assert found["tokenizer"] != found["baseline"]["tokenizer"]
    assert found["capabilities"]["reasoning"]["baseline"] is not None


def test_programs_run_where_the_user_allows_it(pair, monkeypatch, capsys, tmp_path):
    """A problem whose tests ask for nothing, and one that no small model solves; HumanEval's columns."""
    rows = [{"task_id": f"HumanEval/{i}", "prompt": "def f():\n    return 1\n", "entry_point": "f",
             "test": f"def check(f):\n    assert f() == {i}\n"} for i in (1, 2)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--model", pair[0], "--tasks", f"humaneval={tmp_path}/code.jsonl"
    status, said, errors = command(monkeypatch, capsys, *words)
    assert (status, said, errors.count("\n")) == (2, "", 1)
    assert "Pass --run-code to allow it" in errors
    monkeypatch.setattr("measure.tasks.complete_all", lambda *_: (["\n    pass", "\n    pass"], 0))
    found, said = evaluate(monkeypatch, capsys, tmp_path, *words, "--run-code")
    assert said.startswith("programs run with no network")
    assert {key: found["tasks"]["humaneval"][key] for key in ("pass_at_1", "hits", "capability")} == {
        "pass_at_1": 0.5, "hits": "10", "capability": "coding"}


def test_probes_of_a_model_outside_a_run(pair, monkeypatch, capsys, tmp_path):
    """Truth: the items that a run would make of the same documents, scored apart; and a saved baseline is the one
    that was scored."""
    base, model, *_ = pair
    documents = {"trained": make_documents(60), "heldout": make_documents(60, seed=1)}
    for name, own in documents.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(own))
    words = ("--probes", "facts", "in_context", "--probe-items", 6, "--trained", f"{tmp_path}/trained.txt",
             "--heldout", f"{tmp_path}/heldout.txt")
    found, said = evaluate(monkeypatch, capsys, tmp_path, "--model", model, "--baseline", base, *words)
    tok = tokenizer.load(base)
    items = probes.open_probes(probes.ProbeSettings(6, 6), tok, *documents.values(), seed=0)
    for side, folder in ((found, model), (found["baseline"], base)):
        truth = probes.score_probes(hf.load(folder), tok, items)
        assert side["probes"] == json.loads(json.dumps(truth))
    assert {"facts_trained", "facts_heldout", "in_context", "in_context.copy"} <= found["probes"].keys()
    for name, change in found["probes_change"].items():
        assert change == found["probes"][name]["value"] - found["baseline"]["probes"][name]["value"]
    assert "| probe | metric | before | after |" in said
    saved = tmp_path / "base.json"
    saved.write_text(json.dumps(found["baseline"]))
    again, _ = evaluate(monkeypatch, capsys, tmp_path, "--model", model, "--baseline", saved, *words)
    assert again["probes_change"] == found["probes_change"]
    # Of packed folders, what was trained on and what was held out; of a run, each checkpoint.
    pack(documents["trained"], tok, tmp_path / "packed", heldout=0.5)
    packed = ("--probes", "facts", "--trained", tmp_path / "packed", "--heldout", tmp_path / "packed")
    found, _ = evaluate(monkeypatch, capsys, tmp_path, "--model", model, *packed)
    sides = [found["probes"][name]["n"] for name in ("facts_trained", "facts_heldout")]
    assert all(0 < n <= 100 for n in sides)
    (tmp_path / "none.txt").write_text("no facts here")
    for wrong, says in ((("--probes", "facts"), "name them with --trained"),
                        (("--probes", "in_context", "--trained", "x"), "documents of --probes facts, which is not"),
                        (("--probes", "facts", "--trained", f"{tmp_path}/none.txt"), "--trained hold no facts"),
                        (("--probes", "in_context", "--baseline", tmp_path / "texts.json"), "has no scores of probes")):
        (tmp_path / "texts.json").write_text(json.dumps({"texts": {}}))
        status, _, errors = command(monkeypatch, capsys, "--model", model, *wrong)
        assert (status, errors.count("\n")) == (2, 1), errors
        assert says in errors


def test_checkpoints_of_a_run_beside_a_baseline(runs, questions, monkeypatch, capsys, tmp_path):
    """The run's result is its last checkpoint: as the baseline it is no better than itself."""
    run = shutil.copytree(runs / "run", tmp_path / "run")
    words = ("--run", run, "--tasks", f"arc_easy={questions}", "--text", f"law={runs}/legal.txt", "--probes",
             "in_context", "--probe-items", 1)
    found, said = evaluate(monkeypatch, capsys, tmp_path, *words, "--checkpoints", "--baseline", run / "final")
    assert json.loads((run / "eval_checkpoints.json").read_text()) == found
    rows = {row["step"]: row for row in found["checkpoints"]}
    assert [*rows] == [2, 4, 5]
    assert (rows[5]["forgetting"], rows[5]["domain_gain"], rows[5]["score"]) == pytest.approx((0, 0, 0))
    assert rows[2]["domain_gain"] == pytest.approx(
        1 - rows[2]["texts"]["law"]["bits_per_byte"] / found["final"]["texts"]["law"]["bits_per_byte"])
    assert rows[2]["capabilities"]["reasoning"]["current"] == rows[2]["tasks"]["arc_easy"]["value"]
    assert (rows[5]["probes_change"]["in_context"], rows[2]["probes"]["in_context"]["n"]) == (0, 5)
    assert "| 5 | +0.0% | +0.0% | +0.0% | " in said
    found, said = evaluate(monkeypatch, capsys, tmp_path, *words, "--checkpoints", 5, 2)
    assert [row["step"] for row in found["checkpoints"]] == [2, 5]
    assert "forgetting" not in found["checkpoints"][0]
    assert "forgetting: unknown" in said
    status, _, errors = command(monkeypatch, capsys, *words, "--checkpoints", 3, "--device", "cpu")
    assert (status, errors) == (2, f"error: {run} has no checkpoint of step 3, but of 2, 4, 5\n")


def test_mistakes_are_one_line(runs, monkeypatch, capsys, tmp_path):
    (tmp_path / "empty.txt").touch()
    model, law = ("--model", runs / "run/final"), ("--text", f"law={runs}/legal.txt")
    for words, says in ((law, "name one of --model and --run"), ((*model, "--run", runs, *law), "name one of"),
                        (model, "--text"), ((*model, "--text", "legal.txt"), "must be NAME=FILE"),
                        ((*model, "--text", "law=/nowhere.txt"), "/nowhere.txt does not exist"),
                        ((*model, "--text", f"law={tmp_path}/empty.txt"), "is empty"),
                        ((*model, *law, "--general", "tales"), "--general names 'tales'"),
                        (("--model", "/nowhere", *law), "/nowhere"), (("--run", tmp_path, *law), "no checkpoints"),
                        ((*model, *law, "--context", "0"), "--context is 0"),
                        (("--run", runs / "run", *law, "--objective.name", "dpo"), "name --model and --baseline, not"),
                        (("--run", runs / "run", *law, "--dtype", "bfloat16"), "--dtype bfloat16 is for --model"),
                        ((*model, *law, *law), "one name to two texts"),
                        ((*model, *law, "--contxt", "9"), "did you mean --context?")):
        status, said, errors = command(monkeypatch, capsys, *words, "--device", "cpu")
        assert (status, said, errors.count("\n")) == (2, "", 1), (words, errors)
        assert errors.startswith("error: ")
        assert says in errors, words


# ---- a real model on real text

@pytest.mark.parametrize("context", [512, 100])
@pytest.mark.parametrize("corpus", ["tinystories", "wikitext2", "legal_en_dc"])
def test_stories260k_on_real_text(data_dir, corpus, context):
    transformers = pytest.importorskip("transformers")
    file = {"tinystories": "tinystories_sample_2MiB.txt", "wikitext2": "wiki.valid.raw",
            "legal_en_dc": "dc_code_title28.txt"}[corpus]
    text = (data_dir / "corpora" / corpus / file).read_text(encoding="utf-8")[:20_000]
    raw = [t for t in (text.split("<|endoftext|>") if corpus == "tinystories" else text.split("\n\n")) if t.strip()]
    folder = data_dir / "models/stories260K"
    tok, theirs = tokenizer.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    documents = [(np.array(tok.encode(t)), len(t.encode())) for t in raw]
    ours = scoring.score(hf.load(folder), CAUSAL, documents, tok.bos_id, context)
    theirs = truth(theirs, documents, tok.bos_id, context)
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], abs=1e-3)
    assert ours["nats_per_token"] == pytest.approx(theirs["nats_per_token"], rel=1e-5)
    assert (ours["tokens"], ours["bytes"]) == (theirs["tokens"], theirs["bytes"])
    if corpus == "tinystories":
        assert ours["bits_per_byte"] < 1.2              # llama2.c reports a validation loss of 1.297 a token
