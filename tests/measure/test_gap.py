"""How far a domain is. Truth: hand-worked figures, SPEC's rules case by case, sets and entropies written out here, and
what a practitioner says of real corpora."""

import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import hf
import tokenizer as tokenizers
from core.cli import Reading
from core.errors import UserError
from measure import gap
from text.sample import Sample, draw_sample


def figures(overlap=0.95, ratio=1.0, tokens=5e9, copies=0.0, new_language=False):
    side = {"tokens": tokens, "copies": copies, "language": "zh" if new_language else "en", "unknown": 0.0,
            "perplexity": 10.0 * ratio}
    return {"domain": side, "general": side | {"language": "en", "perplexity": 10.0}, "vocabulary_overlap": overlap,
            "relative_overlap": overlap, "perplexity_ratio": ratio, "new_language": new_language}


# (figures, limits) -> (recommendation, instead, a word of the reason)
RULES = {
    "same domain": (({"overlap": 0.95, "ratio": 1.1}, {}), ("skip", "prompt", "small gap")),
    "same words, but harder": (({"overlap": 0.95, "ratio": 1.5}, {}), ("prompt", None, "well enough")),
    "other words": (({"overlap": 0.69, "ratio": 1.0}, {}), ("pretrain", None, "below 0.7")),
    "far, with much text": (({"overlap": 0.8, "ratio": 2.1, "tokens": 1.1e9}, {}), ("pretrain", None, "more than 1B")),
    "far, with a billion": (({"overlap": 0.8, "ratio": 2.1, "tokens": 1e9}, {}), ("sft", None, "at most 1B")),
    "far, half of it copies": (
        ({"overlap": 0.8, "ratio": 2.1, "tokens": 1.8e9, "copies": 0.5}, {}), ("sft", None, "900M")),
    "far, 50 MB": (({"overlap": 0.8, "ratio": 5.0, "tokens": 12e6}, {}), ("sft", None, "LoRA")),
    "other words, 50 MB": (({"overlap": 0.5, "ratio": 5.0, "tokens": 12e6}, {}), ("skip", "adapters", "LoRA")),
    "another language": (
        ({"overlap": 0.1, "ratio": 9.0, "tokens": 6e9, "new_language": True}, {}), ("pretrain", None, "zh")),
    "a language and little text": (({"overlap": 0.1, "tokens": 1e6, "new_language": True}, {}),
                                   ("pretrain", None, "5 to 20 billion")),
    "a language and few hours": (({"overlap": 0.1, "new_language": True}, {"gpu_hours": 99}),
                                 ("pretrain", None, "99 GPU-hours")),
    "fresh": (({"overlap": 0.1}, {"fresh_hours": 12}), ("retrieval", None, "24 hours")),
    "not so fresh": (({"overlap": 0.1}, {"fresh_hours": 24}), ("pretrain", None, "0.10")),
    "few hours": (({"overlap": 0.5}, {"gpu_hours": 99}), ("skip", "adapters", "100")),
    "tasks": (({"ratio": 1.5}, {"accuracy_gap": 0.3}), ("sft", None, "0.30")),
    "tasks, little text": (({"ratio": 1.5, "tokens": 9e7}, {"accuracy_gap": 0.3}), ("retrieval", None, "0.30")),
}


@pytest.mark.parametrize("case", RULES)
def test_the_first_rule_that_holds_gives_the_answer(case):
    (values, limits), (recommendation, instead, word) = RULES[case]
    found = gap.recommend(figures(**values), **limits)
    assert (found["recommendation"], found["instead"]) == (recommendation, instead)
    assert word in " ".join(found["reasons"])


def test_settings_follow_the_shift():
    weak, strong = figures(), figures(ratio=3.0, tokens=5e9)
    for values, replay in ((weak, 0.05), (strong, 0.25), (figures(new_language=True), 0.25)):
        found = gap.choose_settings(values, gap.recommend(values), 7e9)
        assert (found["replay"], found["lr"], found["method"]) == (replay, 1e-5, "full")
    small = figures(overlap=0.5, tokens=1e7)
    assert gap.choose_settings(small, gap.recommend(small), 7e9)["lr"] == pytest.approx(1e-4)


def test_overlap_and_divergence_by_hand():
    assert gap.measure_overlap(np.array([1, 2, 2, 3]), np.array([2, 3, 4, 4, 5])) == pytest.approx(2 / 3)
    # p = (3/4, 1/4, 0), q = (0, 1/2, 1/2) over the words a, b, c; m is their mean.
    p, q = np.array([3, 1, 0]) / 4, np.array([0, 2, 2]) / 4
    kl = lambda x, y: sum(a * math.log2(a / b) for a, b in zip(x, y) if a)       # noqa: E731
    m = (p + q) / 2
    assert gap.measure_divergence(["a a", "a b"], ["b c b c"], 1) == pytest.approx((kl(p, m) + kl(q, m)) / 2)
    assert gap.measure_divergence(["a b c"], ["a b c"], 2) == 0
    assert gap.measure_divergence(["a b"], ["c d"], 2) == 1


def test_copies_are_found():
    text = " ".join(f"word{n}" for n in range(100))
    near = text.replace("word50", "other")
    assert gap.find_copies([text, "other text", text.upper(), near]) == (0.25, 0.25)


@torch.no_grad()
def test_scores_are_those_of_the_plain_formula(pair):
    """Independent of measure/scoring.py: one document at a time, in float64."""
    model, tok = hf.load(pair[0]), tokenizers.load(pair[0])
    texts = Path(pair[2]).read_text().split("\n")[:6]
    found = gap.score_source(model, tok, texts, 10**6, 0)
    nats = size = count = 0
    for text in texts:
        ids = tok.encode(text)[:64]
        logits = model.double().head(model(torch.tensor([[tok.bos_id if tok.bos_id is not None else tok.eos_id,
                                                          *ids[:-1]]])))[0]
        nats += float(F.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        size, count = size + len(tok.decode(ids).encode()), count + len(ids)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_volume_is_counted_or_estimated(tiny_bpe):
    tok = tokenizers.load(tiny_bpe)
    sample = Sample(["the cat sat", "a dog"], 16, True, 1)
    row, ids = gap.measure_source(sample, tok, gap.find_byte_ids(tok))
    assert (row["tokens"], row["counted"], row["tokens_per_word"]) == (len(ids), True, len(ids) / 5)
    sample = Sample(["the cat sat", "a dog"], 16e9, False, 1)
    assert gap.measure_source(sample, tok, gap.find_byte_ids(tok))[0]["tokens"] == len(ids) * 10**9


def test_overlap_is_judged_by_that_of_general_text_with_itself(pair, monkeypatch):
    """Halves of a general text share 1 of 4 types, and the domain shares 1 of 4 with the second half too."""
    model, tok = hf.load(pair[0]), tokenizers.load(pair[0])
    general, domain = [10, 11, 12, 13, 13, 14, 15, 16], [13, 20, 21, 22, 10]
    monkeypatch.setattr(tok, "encode_batch", lambda texts: [np.array(general if texts[0] == "g" else domain)])
    found = gap.measure(model, tok, {"d": Sample(["d"], 1, True, 1)}, {"g": Sample(["g"], 1, True, 1)}, 5, 0)
    assert (found["overlap_within_general"], found["relative_overlap"]) == (0.25, 1.0)
    assert found["vocabulary_overlap"] == 2 / 5


def test_the_order_of_sources_changes_no_overlap(pair, monkeypatch):
    """General text is a and b, the domain is text as a is: half of a has the types of the other half, whichever source
    is named first. Of a long domain of a and c the compared part has as much of each as the whole."""
    model, tok = hf.load(pair[0]), tokenizers.load(pair[0])
    ids = {"a": [10, 11] * 20, "b": [20, 21] * 20, "c": [30, 31] * 20}
    monkeypatch.setattr(tok, "encode_batch", lambda texts: [np.array(ids[text]) for text in texts])
    samples = {name: Sample([name], 1, True, 1) for name in ids}

    def overlap(domain, general):
        found = gap.measure(model, tok, *({name + side: samples[name] for name in names} for side, names in (
            ("d", domain), ("g", general))), 5, 0)
        return found["overlap_within_general"], found["relative_overlap"]
    assert overlap("a", "ab") == overlap("a", "ba") == (1, 1)
    assert overlap("ac", "a") == overlap("ca", "a") == (1, 0.5)


def test_a_source_without_a_size_is_weighed_as_the_others_are():
    """Of a Hub dataset nothing says how large it is: then each source counts by its sample."""
    row = {"nats_per_token": 1.0, "bits_per_byte": 1.0, "exact_copies": 0.0, "near_copies": 0.0, "tokens_per_byte": 0.5,
           "tokens_per_word": 2.0, "spelt_in_bytes": 0.0, "unknown": 0.0, "language": "en", "counted": False,
           "bytes": 8e9, "tokens": 4e9, "sample_bytes": 2000, "sample_tokens": 1000}
    found = gap.combine({"file": row, "hub": row | {"bytes": None, "tokens": None, "bits_per_byte": 3.0,
                                                    "nats_per_token": 2.0}})
    assert (found["tokens"], found["bits_per_byte"], found["perplexity"]) == (None, 2, pytest.approx(math.exp(1.5)))


def test_a_source_without_text_is_one_line(pair):
    model, tok = hf.load(pair[0]), tokenizers.load(pair[0])
    with pytest.raises(UserError, match="--domain law: it has no text"):
        gap.measure(model, tok, {"law": Sample([], 0, True, 1)}, {"b": Sample(["x"], 1, True, 1)}, 10, 0)


# ---- real corpora

@pytest.fixture(scope="module")
def stories(data_dir):
    folder = data_dir / "models/stories260K"
    return hf.load(folder).eval(), tokenizers.load(folder)


def draw(path, size=300_000, separator=None):
    return draw_sample([str(path)], Reading(separator=separator), size, 0)


@pytest.mark.slow
def test_a_practitioner_agrees_on_real_corpora(stories, data_dir, tmp_path):
    corpora, general = data_dir / "corpora", data_dir / "corpora/tinystories/tinystories_sample_2MiB.txt"
    code = tmp_path / "code.txt"
    library = Path(sysconfig.get_paths()["stdlib"])
    code.write_text("\n\n".join((library / f"{name}.py").read_text() for name in ("argparse", "typing", "inspect")))
    text = general.read_text(encoding="utf-8")
    for half, name in ((0, "a.txt"), (1, "b.txt")):
        (tmp_path / name).write_text(text[half * len(text) // 2:(half + 1) * len(text) // 2], encoding="utf-8")
    law, zh = corpora / "legal_en_dc/dc_code_title16.txt", corpora / "legal_zh/civil_code.txt"
    cases = {"same": (tmp_path / "b.txt", None, "skip"), "law": (law, None, "sft"), "code": (code, None, "sft"),
             "law, much of it": (law, 5e9, "pretrain"), "law, 50 MB": (law, 30e6, "sft"),
             "language": (zh, None, "pretrain"), "language, much of it": (zh, 5e9, "pretrain")}
    general = {"general": draw(tmp_path / "a.txt")}
    for name, (file, declared, recommendation) in cases.items():
        found = gap.measure(*stories, {"domain": draw(file)}, general, 10_000, 0, declared)
        assert gap.recommend(found)["recommendation"] == recommendation, name
        assert (gap.name_shift(found) == "another language") == name.startswith("language")
        assert found["domain"]["spelt_in_bytes"] > 0.9 or not name.startswith("language")
