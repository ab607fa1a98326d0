"""stages/evaluate.py, and train.py's dry run: what is said before a run; a plan that a decision changed is what was
drawn, and all of it is written down; what a run leaves is what it trained, also where it died on the way."""

import json
import math
import re
import shutil
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
from runs import arguments, command, lines, one, run_of, settings
from safetensors import safe_open
from safetensors.torch import load_file
from synthetic import texts

import eval as evaluation
import hf
import lora
import tokenizer
import train
from core import checkpoint
from core.context_parallel import SharedSequences
from core.parallel import World
from learn import peft_files
from learn.objectives import Causal
from stages import evaluate
from stages import export as export_stage
from stages.build import build
from stages.evaluate import score
from text.shards import Shards, pack
from text.vocabulary import token_before_document

pytestmark = pytest.mark.usefixtures("quick")


def test_a_chat_model_and_a_source_without_held_out_text_are_warned_of(lab, tmp_path, whole, monkeypatch, capsys):
    base = shutil.copytree(whole[0] / "final", tmp_path / "chat")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    pack(texts("legal")[:20], tokenizer.load(lab / "tok"), tmp_path / "all", heldout=0)
    status, said, _ = command(monkeypatch, capsys, arguments(
        lab, tmp_path / "run", "--model.init", "pretrained", "--model.path", base, "--dry-run",
        "--data.sources.legal.path", tmp_path / "all"))
    assert status == 0
    assert "warning: the base carries a chat template" in said
    assert ("warning: source legal has no held-out documents, so it is not evaluated; to hold some out, pack it with "
            "data.py pack --format text --heldout 0.1") in said


def test_tokens_that_are_put_in_and_not_trained_are_warned_of(base, tmp_path, monkeypatch, capsys):
    lab, folder = base
    masked = ["--objective.name", "masked", "--objective.mask-token-id", 5]
    for words, warns in (([*masked, "--lora.rank", 2], True), (["--lora.rank", 2], False), (masked, False),
                         ([*masked, "--lora.rank", 2, "--lora.embeddings", "full"], False)):
        said = command(monkeypatch, capsys, arguments(
            lab, tmp_path / "run", "--model.init", "pretrained", "--model.path", folder, "--dry-run", *words))[1]
        assert ("puts tokens into the text whose embeddings do not train" in said) == warns


def test_a_dry_run_shows_sequences_as_they_are_before_ranks_share_them(lab, tmp_path, monkeypatch, capsys):
    half = SharedSequences(None, 0, 2)
    # Nobody is there to attend with, so that a rank has the starts of its tokens' documents alone.
    half.parted += ("doc_start",)
    monkeypatch.setattr(World, "cut", lambda world, batch: half.cut(batch))
    monkeypatch.setattr(World, "cut_tokens", lambda world, x: half.cut_tokens(x))
    status, said, _ = command(monkeypatch, capsys, arguments(lab, tmp_path / "run", "--dry-run"))
    shown = said.split("--- a packed sequence")[1:]
    assert (status, len(shown)) == (0, 2)
    for each in shown:
        borders = [tuple(map(int, found)) for found in re.findall(r"^\[(\d+):(\d+)\] '.+'$", each, re.MULTILINE)]
        assert [0, *(end for _, end in borders)] == [*(begin for begin, _ in borders), 32]


def test_what_is_in_no_token_stands_with_the_scores_of_a_run(lab, tmp_path):
    pack(texts("legal"), tokenizer.load(lab / "tok"), tmp_path / "lossy", heldout=0.1, lost_share=0.25)
    out = tmp_path / "run"
    train.train(settings(lab, out, "--data.sources.legal.path", tmp_path / "lossy", steps=2), one())
    result = json.loads((out / "eval.json").read_text())
    for scores in (result["before"], result["after"], *(row["sources"] for row in lines(out, "eval"))):
        assert scores["legal"]["lost_share"] == 0.25
        assert "lost_share" not in scores["story"]


def test_repeats_are_warned_of_and_refused(lab, tmp_path, monkeypatch, capsys):
    status, said, _ = command(monkeypatch, capsys, arguments(lab, tmp_path / "run", "--dry-run", steps=700))
    assert (status, "warning: source legal is read" in said) == (0, True)
    long = arguments(lab, tmp_path / "run", "--dry-run", steps=3000)
    status, said, errors = command(monkeypatch, capsys, long)
    assert (status, said) == (2, "")
    assert re.fullmatch(r"error: source legal would be read .*--data\.sources\.legal\.max-epochs \d+\n", errors)
    long += ["--data.sources.legal.max-epochs", "100", "--data.sources.story.max-epochs", "100"]
    assert command(monkeypatch, capsys, long)[0] == 0


def test_dry_run_says_what_the_run_costs_and_leaves_nothing(lab, tmp_path, monkeypatch, capsys):
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(train.tempfile, "tempdir", str(tmp_path))
    calls = dict.fromkeys(("score_heldout", "save"), 0)
    for name, owner in (("score_heldout", train), ("save", train.Saver)):
        real = getattr(owner, name)

        def counted(*args, name=name, real=real):
            calls[name] += 1
            return real(*args)
        monkeypatch.setattr(owner, name, counted)
    status, said, errors = command(monkeypatch, capsys, arguments(lab, tmp_path / "run", "--dry-run", steps=1000))
    assert (status, errors) == (0, "")
    assert calls == {"score_heldout": 1, "save": 1}
    for pattern in (r"1,000 steps of 4 x 32 = 128 tokens", r"legal \(domain\): [\d,]+ tokens, read [\d.]+ times",
                    r"story \(general\): [\d,]+ tokens, read [\d.]+ times", r"peak memory \d+\.\d\d GB",
                    r"a checkpoint [\d,]+ MB", r"takes about \d+\.\d\d hours"):
        assert re.search(pattern, said), pattern
    shown = re.findall(r"--- a packed sequence of source (\w+), (\d+) documents\n((?:\[\d+:\d+\] .*\n)+)", said)
    assert len(shown) == 2
    run = build(settings(lab, tmp_path / "run", steps=1000), one())
    batch = run.loader.batch(0)
    for row, (source, count, body) in enumerate(shown):
        assert source == run.loader.names[batch.source[row]]
        pieces = re.findall(r"\[(\d+):(\d+)\] (.*)", body)
        assert len(pieces) == int(count)
        assert [int(a) for a, _, _ in pieces] == batch.doc_start[row].unique().tolist()
        assert all(eval(text).count("<|eos|>") <= 1 for _, _, text in pieces)
    assert set(tmp_path.iterdir()) == before


def test_a_plan_that_adaptive_replay_changed_is_what_was_drawn(base, tmp_path):
    """Every evaluation here finds general text much worse, so that replay rises from 0.3 by 0.1 to 0.6."""
    out = tmp_path / "run"
    words = ("--forget.adaptive.policy", "degradation", "--forget.adaptive.start", 0.3, "--eval.every", 2,
             "--data.schedule", "static", "--data.domain-share", 0.9, "--optim.lr", 0.1, "--train.batch-size", 10)
    c = run_of(base, out, *words, "--train.steps", 12)
    train.train(c, one())
    plan = [json.loads(line) for line in (out / "plan.jsonl").read_text().splitlines()]
    assert [(d["step"], d["replay_share"]) for d in plan[1:]] == [(2, 0.4), (4, 0.5), (6, 0.6), (8, 0.6), (10, 0.6)]
    drawn = [line["sources"].get("story", {"tokens": 0})["tokens"] for line in lines(out, "train")]
    steps = [0.1] * 3 + [0.4] * 2 + [0.5] * 2 + [0.6] * 5          # a decision holds from the step after the next batch
    assert drawn[-1] == round(10 * sum(steps)) * 32
    assert {round(line["domain_share"], 9) for line in lines(out, "train")} == {0.9, 0.6, 0.5, 0.4}
    assert [json.loads(line)["replay_share"] for line in (out / "metrics.jsonl").read_text().splitlines()
            if json.loads(line)["kind"] == "replay"] == [0.4, 0.5, 0.6, 0.6, 0.6]


def test_adaptive_replay_goes_on_from_the_share_of_the_schedule(base, tmp_path):
    """Half of the mix is replay, and every evaluation finds general text much worse."""
    out = tmp_path / "run"
    words = ("--forget.adaptive.policy", "degradation", "--eval.every", 2, "--data.schedule", "static",
             "--data.domain-share", 0.5, "--optim.lr", 0.1, "--train.batch-size", 10)
    train.train(run_of(base, out, *words, "--train.steps", 5), one())
    plan = [json.loads(line) for line in (out / "plan.jsonl").read_text().splitlines()]
    assert [(d["before"], d["replay_share"]) for d in plan[1:]] == [(0.5, 0.6), (0.6, 0.6)]


@pytest.mark.parametrize("kind", ["plain", "nf4", "int4", "int8"])
def test_a_weight_in_few_bits_counts_as_the_elements_that_it_stands_for(base, tmp_path, capsys, kind):
    """Truth: transformers' count of the base, and r (in + out) of every linear layer."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base[1])
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    counts = model.num_parameters(), 4 * sum(m.in_features + m.out_features for m in linear)
    train.train(run_of(base, tmp_path / "run", "--lora.rank", 4, "--lora.base", kind, "--train.steps", 1), one())
    start = lines(tmp_path / "run", "start")[0]
    assert (start["parameters"], start["trainable_parameters"]) == counts
    said = capsys.readouterr().out
    assert f"model: {counts[0] / 1e6:.1f}M parameters" in said
    assert f"{counts[1]:,} of {counts[0]:,} parameters trained" in said
    assert f"recommended for {counts[0] / 1e9:.3g}B parameters (lora)" in said


def test_an_evaluation_is_a_file_a_line_and_for_the_user(base, tmp_path, capsys):
    out = tmp_path / "run"
    train.train(run_of(base, out, "--eval.every", 5, "--eval.sample-tokens", 4), one())
    said = capsys.readouterr().out
    for record in lines(out, "eval"):
        found = json.loads((out / f"eval_step_{record['step']}.json").read_text())
        by_document = [scores.pop("nats_by_document") for scores in found["texts"].values()]
        assert found == {"step": record["step"], "texts": record["sources"], "protocol": record["protocol"],
                         "model": "final/" if record["step"] == 8 else "weights in training"}
        for nats, scores in zip(by_document, found["texts"].values()):
            assert len(nats) == scores["documents"]
            assert sum(nats) == pytest.approx(scores["nats_per_token"] * scores["tokens"], rel=1e-5)
        scores = ", ".join(f"{name} {texts['bits_per_byte']:.4f}" for name, texts in found["texts"].items())
        assert f"eval at step {record['step']}: {scores} (bits per byte)" in said
    assert [record["step"] for record in lines(out, "eval")] == [0, 5, 8]
    assert [record["step"] for record in lines(out, "samples")] == [0, 8]          # before and after
    first, last = (record["samples"] for record in lines(out, "samples"))
    assert [sample["prompt"] for sample in first] == [sample["prompt"] for sample in last]
    assert len(first) == 4                                                          # two documents of each source


def test_a_runs_samples_hold_no_id_that_the_tokenizer_lacks(tiny_model, tiny_bpe):
    """Rows that pad the embedding; decoding them would end the run."""
    tok, said, sampling = tokenizer.load(tiny_bpe), [], SimpleNamespace(sample_tokens=60, prompts=["a", "b"])
    run = SimpleNamespace(c=SimpleNamespace(eval=sampling, seed=0), tokenizer=tok, inner=tiny_model(vocab_size=900),
                          objective=Causal(True), heldout={},
                          log=SimpleNamespace(record=lambda *_, samples: said.extend(samples)))
    evaluate.draw_samples(run, 0)
    assert [sample["prompt"] for sample in said] == ["a", "b"]


def test_measures_of_an_objective_are_logged_scored_and_compared(lab, tmp_path, monkeypatch):
    """Of an objective that counts its targets beside the loss: their share is 1, and the held-out loss is a mean."""
    class Counting(Causal):
        measures = ("share", "never")

        def loss(self, model, batch, want_hits=False):
            nats, count, metrics = super().loss(model, batch, want_hits)
            return nats, count, metrics | {"measures": {"share": (count, count), "never": (0 * count, 0 * count)}}
    monkeypatch.setattr("stages.build.make_objective", lambda config, mask, *_: Counting(mask))
    out = tmp_path / "run"
    assert train.run_command(settings(lab, out, "--train.steps", 2, "--eval.every", 10)) is not None
    assert [line["objective"] for line in lines(out, "train")] == 2 * [{"share": 1.0}]
    found = json.loads((out / "eval.json").read_text())["objective"]
    assert found["name"] == "causal"
    for side in ("before", "after"):
        for scores in found[side].values():
            assert scores["share"] == 1.0
            assert "never" not in scores
            assert 0 < scores["loss"] < 12
    assert found["after"] != found["before"]
    assert [line["objective"] for line in lines(out, "eval")] == [found["before"], found["after"]]


@torch.no_grad()
def score_alone(folder, run, source: str) -> float:
    """Bits per byte of a source's held-out documents by transformers, window by window and nothing beside it."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats, size = 0.0, 0
    for ids, nbytes in run.heldout[source]:
        ids = torch.tensor([token_before_document(run.tokenizer), *ids.tolist()])
        for start in range(0, len(ids) - 1, run.c.data.context):
            window = ids[start:start + run.c.data.context + 1]
            logits = model(window[None, :-1]).logits[0].double()
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        size += nbytes
    return nats / math.log(2) / size


OPEN = ["--data.mask-documents", False, "--data.reset-positions", False]


def test_an_evaluation_does_not_follow_the_mask_of_the_training(base, tmp_path):
    """Truth: transformers, document by document; before the run, at a decision of adaptive replay, in the merge."""
    out = tmp_path / "run"
    words = (*OPEN, *METHODS["merge"], "--forget.adaptive.policy", "degradation", "--eval.every", 4)
    run = build(run_of(base, out, *words), one())
    true = {name: pytest.approx(score_alone(base[1], run, name), rel=1e-5) for name in run.heldout}
    train.train(run_of(base, out, *words), one())

    def bits(texts):
        return {name: found["bits_per_byte"] for name, found in texts.items()}
    assert bits(json.loads((out / "eval_step_0.json").read_text())["texts"]) == true
    assert bits(json.loads((out / "merge.json").read_text())["rows"][0]["texts"]) == true       # alpha 0 is the base
    scored = json.loads((out / "eval_step_4.json").read_text())["texts"]["story"]["bits_per_byte"]
    decided = json.loads((out / "plan.jsonl").read_text().splitlines()[1])
    base_bits = true["story"].expected
    assert decided["lost"] == pytest.approx(scored / base_bits - 1, abs=1e-5)
    assert json.loads((out / "eval.json").read_text())["protocol"]["documents_see_each_other"] is False


def test_a_masked_model_is_not_taken_for_a_causal_one(base, tmp_path, monkeypatch, capsys):
    """The cards of final/ and of a checkpoint's export say how it reads; eval.py warns where it scores it otherwise."""
    from huggingface_hub import ModelCard
    out, lab = tmp_path / "run", base[0]
    train.train(run_of(base, out, "--objective.name", "masked", "--objective.mask-token-id", 5), one())
    monkeypatch.setattr(sys, "argv", ["hf.py", str(out / "checkpoints/step_00000008"), "--out", str(tmp_path / "hf")])
    assert export_stage.main() == 0
    for folder in (out / "final", tmp_path / "hf"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag is None
        assert "objective masked: each token sees those before and after it, and token id 5 stands" in card.text
    masked = ["--objective.name", "masked", "--objective.mask-token-id", "5"]
    for words, warned in (([], 1), (masked, 0)):
        monkeypatch.setattr(sys, "argv", ["eval.py", "--run", str(out), "--device", "cpu", "--context", "32",
                                          "--text", f"law={lab}/legal", *words])
        capsys.readouterr()
        assert evaluation.main() == 0
        said = capsys.readouterr().err
        assert said.count("warning:") == said.count(f"is scored as causal, where no token sees those after it; set "
                                                    f"{' '.join(masked)}") == warned


def test_a_masked_evaluation_depends_on_the_text_alone(base, tmp_path):
    """Neither on what documents see in training nor on how many sequences a step computes at a time."""
    masked = ["--objective.name", "masked", "--objective.mask-token-id", 5]
    found = []
    for more in ([], OPEN, ["--train.micro-batch-size", 1], ["--train.micro-batch-size", 4]):
        run = build(run_of(base, tmp_path / "run", *masked, *more), one())
        scores, protocol = evaluate.score(run, run.inner, one())
        found.append({name: (texts["tokens"], texts["nats_per_token"], texts["accuracy"])
                      for name, texts in scores.items()})
        assert protocol["mask_ratio"] == 0.15
    for other in found[1:]:
        for name, values in found[0].items():
            assert other[name] == pytest.approx(values, rel=1e-5)


def test_a_line_of_the_metrics_says_what_the_steps_were(lab, tmp_path):
    """Truth: the sources of the sequences that were read, counted. warmup_cooldown goes from 0.3 up to 0.7 in the first
    tenth of the run, here one step, and down to 0.5 in the last."""
    c = settings(lab, tmp_path / "run", "--log.every", 4, "--data.domain-share", 0.7, steps=11)
    loader = build(c, one()).loader
    train.train(c, one())
    records = lines(tmp_path / "run", "train")
    assert {r["step"]: round(r["domain_share"], 12) for r in records} == {1: 0.3, 4: 0.7, 8: 0.7, 11: 0.5}
    for record in records:
        step = record["step"]
        read = [loader.names[i] for s in range(step) for i in loader.batch(s).source]
        assert record["tokens"] == step * 4 * 32
        assert record["replay_share"] == read.count("story") / len(read)
        assert {loader.names[i] for i in loader.batch(step - 1).source} == record["sources"].keys()
        for name, found in record["sources"].items():
            assert found["tokens"] == 32 * read.count(name)
            assert found["epochs"] == read.count(name) / -(-Shards(lab / name).tokens // 32)


def test_the_run_folder_says_what_the_run_began_from(base, tmp_path):
    """Truth: the base's config.json, its card and the sources' manifests."""
    lab, folder = base
    out = tmp_path / "run"
    train.train(run_of(base, out, "--lora.rank", 4), one())
    (start,), config = lines(out, "start"), json.loads((folder / "config.json").read_text())
    written = tomllib.loads((out / "config.toml").read_text())["model"]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "tie_word_embeddings"):
        assert written[name] == config[name], name
    assert start["base"]["fingerprint"] == hf.open_base(folder).fingerprint
    assert start["vocab_size"] == start["tokenizer"]["vocab_size"] == config["vocab_size"]
    assert start["recommended_lr"] == 3e-3                         # of a small model, ten times that of full training
    split = json.loads((lab / "legal/manifest.json").read_text())["splits"]["train"]
    assert re.fullmatch("[0-9a-f]{16}", start["sources"]["legal"].pop("fingerprint"))
    assert start["sources"]["legal"] == {
        "role": "domain", "cleaning": [], **{key: split[key] for key in ("tokens", "documents", "bytes")}}


# ---- the end of a run

METHODS = {
    "lora": ["--lora.rank", 4, "--lora.dropout", 0.1],
    "dora": ["--lora.rank", 4, "--lora.dora", "--lora.rslora", "--lora.b-lr-ratio", 4],
    "lora_rows": ["--lora.rank", 4, "--lora.embeddings", "rows", "--lora.embedding-rows", "290:"],
    "lora_full": ["--lora.rank", 4, "--lora.embeddings", "full", "--model.activation-checkpointing"],
    "qlora": ["--lora.rank", 4, "--lora.base", "nf4", "--optim.name", "adamw_8bit"],
    "int8": ["--lora.rank", 4, "--lora.base", "int8", "--train.precision", "bf16"],
    "merge": ["--forget.merge.method", "linear", "--forget.merge.alphas", 0.0, 0.5, 1.0],
}


def merged_with(base, out) -> dict:
    """The adapter that a run left, on its base, as one state."""
    model = hf.load(base)
    peft_files.load_adapter(model, out / "adapter")
    lora.merge(model)
    return dict(model.named_parameters())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "merge"])
def test_the_adapter_on_its_base_is_the_exported_model(base, tmp_path, name):
    out = tmp_path / "run"
    train.train(run_of(base, out, *METHODS[name]), one())
    exported, merged, plain = hf.load(out / "final"), merged_with(base[1], out), hf.load(base[1])
    moved = 0
    for key, weight in exported.named_parameters():
        assert torch.allclose(weight, merged[key].float(), rtol=0, atol=1e-2 if name == "int8" else 1e-6), key
        moved += not torch.equal(weight, plain.get_parameter(key))
    assert moved >= 14                                     # seven matrices in each of two blocks
    tensors = checkpoint.load(checkpoint.path_of(out / "checkpoints", 8))[0]
    assert tensors
    assert all(".adapters." in key for key in tensors)     # the base is where it was


def test_what_is_exported_after_an_average_or_a_merge_is_what_was_scored(base, tmp_path):
    """Truth: the mean of the checkpoints' weights by hand; the score of the folder that was written."""
    words = {"ema": ["--forget.ema.decay", 0.5, "--train.save-every", 1, "--train.keep", 9],
             "merge": ["--forget.merge.method", "linear", "--forget.merge.alphas", 0.0, 1.0, "--optim.lr", 0.3]}
    for name, more in words.items():
        c = run_of(base, tmp_path / name, *more, "--train.steps", 3)
        train.train(c, one())
        final = hf.load(tmp_path / name / "final")
        scored = score(build(c, one()), final, None)[0]
        after = json.loads((tmp_path / name / "eval.json").read_text())["after"]
        for text, found in scored.items():
            assert found["bits_per_byte"] == pytest.approx(after[text]["bits_per_byte"], rel=1e-6), name
    assert json.loads((tmp_path / "merge/merge.json").read_text())["alpha"] == 0       # at this rate nothing was gained
    mean = {key: p.detach().double() for key, p in hf.load(base[1]).named_parameters()}
    for step in (1, 2, 3):
        weights = checkpoint.load(checkpoint.path_of(tmp_path / "ema/checkpoints", step))[0]
        mean = {key: (old + weights[key].double()) / 2 for key, old in mean.items()}
    for key, p in hf.load(tmp_path / "ema/final").named_parameters():
        torch.testing.assert_close(p.detach().double(), mean[key], rtol=1e-5, atol=1e-7, msg=key)


def score_run(monkeypatch, out, lab, *more) -> int:
    words = ["eval.py", "--run", out, "--text", f"law={lab}/legal", "--device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    return evaluation.main()


FINAL = METHODS | {"ema": ["--forget.ema.decay", 0.9], "plain": [], "half": ["--train.precision", "bf16"],
                   "lora_bf16": ["--lora.rank", 4, "--export.dtype", "bf16"],
                   "merge_lora": [*METHODS["merge"], *METHODS["qlora"]]}


@pytest.mark.parametrize("name", [name for name in FINAL if name not in ("int8", "half")])
def test_what_is_reported_is_what_is_exported(base, tmp_path, monkeypatch, capsys, name):
    """Truth: transformers on final/ and on the base, document by document. All checkpoints are scored as exported."""
    out = tmp_path / "run"
    train.train(run_of(base, out, *FINAL[name], "--optim.lr", 0.05), one())
    run = build(run_of(base, tmp_path / "other"), one())
    result = json.loads((out / "eval.json").read_text())
    assert result["model"]["after"] == "final/"
    card = (out / "final/README.md").read_text()
    assert card.count("\n# ") == 1
    assert "\n# final\n" in card
    for source in run.heldout:
        for side, folder in (("before", base[1]), ("after", out / "final")):
            found = result[side][source]["bits_per_byte"]
            assert found == pytest.approx(score_alone(folder, run, source), rel=2e-5), side
        assert f"| {source} | {result['before'][source]['bits_per_byte']:.4f} | {found:.4f} |" in card
    assert json.loads((out / "eval_step_8.json").read_text())["texts"] == result["after"]
    # The last checkpoint and final/ are the same model, but for a merge.
    monkeypatch.chdir(tmp_path)
    assert score_run(monkeypatch, out, base[0], "--json", tmp_path / "o.json") == 0
    found = json.loads((tmp_path / "o.json").read_text())
    last, final = (row["texts"]["law"]["bits_per_byte"] for row in (found["checkpoints"][-1], found["final"]))
    merged = "merge" in name and json.loads((out / "merge.json").read_text())["alpha"] != 1
    assert (last == pytest.approx(final, rel=2e-5)) != merged
    assert "merge" not in name or "before the merge" in found["checkpoints"][-1]["model"]


def test_a_final_model_that_does_not_fit_beside_the_run_is_not_what_is_claimed(base, tmp_path, monkeypatch):
    out, real = tmp_path / "run", hf.load

    def load(path, dtype=torch.float32, device="cpu"):
        if str(path).endswith("final") and dtype == torch.bfloat16:
            raise torch.OutOfMemoryError("no room")
        return real(path, dtype, device)
    monkeypatch.setattr(hf, "load", load)
    train.train(run_of(base, out, *METHODS["qlora"], "--train.precision", "bf16"), one())
    result = json.loads((out / "eval.json").read_text())
    assert result["model"] == {"before": "nf4 base with the adapter", "after": "nf4 base with the adapter"}
    assert "nf4 base with the adapter against nf4 base with the adapter" in (out / "final/README.md").read_text()


@pytest.mark.parametrize("words", [[], ["--lora.rank", 4], METHODS["merge"], ["--forget.ema.decay", 0.9]])
@pytest.mark.parametrize("asked", [None, "float16"])
def test_the_type_of_final_is_that_of_the_base_unless_another_is_named(base, tmp_path, words, asked):
    hf.save(hf.load(base[1], torch.bfloat16), tmp_path / "half", base=base[1])
    named = json.loads((tmp_path / "half/config.json").read_text())
    (tmp_path / "half/config.json").write_text(json.dumps({k: v for k, v in named.items() if "dtype" not in k}))
    words = [*words, *(["--export.dtype", asked] if asked else [])]
    train.train(run_of((base[0], tmp_path / "half"), tmp_path / "run", *words), one())
    tensors = load_file(tmp_path / "run/final/model.safetensors")
    wanted = getattr(torch, asked or "bfloat16")
    assert {t.dtype for t in tensors.values()} == {wanted}
    settings = json.loads((tmp_path / "run/final/config.json").read_text())
    assert settings["dtype"] == settings["torch_dtype"] == str(wanted).removeprefix("torch.")


def test_a_base_is_found_again_from_another_folder(base, tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    shutil.copytree(base[1], tmp_path / "one/base")
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    train.train(run_of((base[0], "base"), "run", "--lora.rank", 4), one())
    monkeypatch.chdir(tmp_path / "two")
    out = tmp_path / "one/run"
    stated = json.loads((out / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(stated), out / "adapter")
    assert score_run(monkeypatch, out, base[0]) == 0
    assert command(monkeypatch, capsys, [out / "config.toml", "--out", "again"])[0] == 0
    # Other weights at that place are not its base.
    hf.save(hf.load(tmp_path / "one/run/final"), tmp_path / "one/base", base=base[1])
    assert score_run(monkeypatch, out, base[0]) == 2
    assert "is not the base that" in capsys.readouterr().err


def test_an_adapter_is_merged_onto_its_own_base_unless_told_otherwise(base, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    train.train(run_of(base, out, "--lora.rank", 4), one())
    shutil.copytree(base[1], tmp_path / "copy")
    for place, more, status in (("copy", [], 0), ("run/final", [], 2), ("run/final", ["--any-base"], 0)):
        words = ["lora.py", "merge", "--base", tmp_path / place, "--adapter", out / "adapter", "--out",
                 tmp_path / f"merged_{place[:3]}_{status}_{len(more)}", *more]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        assert lora.main() == status
    assert "another base" in capsys.readouterr().err
    with safe_open(out / "adapter" / peft_files.TENSORS, "pt") as file:
        # Of several keys safetensors would choose the order at random, and equal runs would leave other files.
        assert list(file.metadata()) == ["base_fingerprint"]


def test_a_run_that_died_between_its_export_and_its_last_file_is_finished(base, tmp_path):
    out, words = tmp_path / "run", METHODS["merge"]
    train.train(run_of(base, out, *words), one())
    whole = (out / "eval.json").read_bytes(), (out / "final/model.safetensors").read_bytes()
    (out / "eval.json").unlink()
    assert train.train(run_of(base, out, *words), one()) == 0
    assert whole == ((out / "eval.json").read_bytes(), (out / "final/model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds a finished run"):
        train.train(run_of(base, out, *words), one())
