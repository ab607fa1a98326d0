"""experiments/data_quality.py and experiments/probe.py. Truths: counts by hand, the gradient of logistic regression in
numpy, classes that are separable or mere noise, and a run's own eval.json."""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))       # at the end: experiments/tokenizers.py has a package's name

import data_quality as quality  # noqa: E402
import probe  # noqa: E402
import scratch  # noqa: E402

import tokenizer  # noqa: E402
from core import cli  # noqa: E402
from core.errors import UserError  # noqa: E402
from text.shards import Shards  # noqa: E402

TEXTS = [f"Story {i}. There was a cat of {i} years. It sat on a mat. Then it slept. The end of story {i}."
         for i in range(400)]


def test_noise_is_a_function_of_its_seed_and_spoils_its_share():
    noisy = quality.add_noise(TEXTS, 0.6, 0)
    assert noisy == quality.add_noise(TEXTS, 0.6, 0) != quality.add_noise(TEXTS, 0.6, 1)
    # 0.6 +- 3 standard deviations; words of five letters and more seldom come back in their old order
    assert abs(sum(a != b for a, b in zip(noisy, TEXTS)) / len(TEXTS) - 0.6) < 0.075
    # a document is spoilt in the same way whatever stands behind it
    assert quality.add_noise(TEXTS[:50], 0.6, 0) == noisy[:50]


def test_each_kind_of_noise_does_what_it_says():
    text = " ".join(TEXTS)
    garbled = quality.garble(text, random.Random(0))
    changed = sum(a != b for a, b in zip(text, garbled)) / sum(not c.isspace() for c in text)
    assert len(garbled) == len(text)
    assert abs(changed - 0.25) < 0.02
    assert [c for c in garbled if c.isspace()] == [c for c in text if c.isspace()]
    shuffled = quality.shuffle_words(text, random.Random(0))
    assert shuffled != text
    assert Counter(shuffled.split()) == Counter(text.split())
    lines = quality.add_boilerplate(text, random.Random(0)).split("\n")
    added = [line for line in lines if line in quality.BOILERPLATE]
    assert abs(len(added) / (text.count(". ")) - 0.5) < 0.05
    assert " ".join(line for line in lines if line not in quality.BOILERPLATE) == text


def test_copies_take_their_share_of_the_bytes():
    copied = quality.duplicate(TEXTS, 0.6, 0)
    assert copied == quality.duplicate(TEXTS, 0.6, 0)
    size, total = (sum(len(text.encode()) for text in texts) for texts in (copied, TEXTS))
    assert total <= size < total + 200
    counts = Counter(text for text in copied if text in set(TEXTS))
    sources = [text for text, n in counts.items() if n > 1]
    # 1 % of 400 documents are copied; the other documents stand once
    assert len(sources) == 4
    once = sum(len(text.encode()) for text in counts)
    assert abs(once / total - 0.4) < 0.02
    near = [text for text in copied if text not in set(TEXTS)]
    exact = sum(counts[text] - 1 for text in sources)
    # half of the copies have changed words, a few of which are replaced by themselves
    assert abs(len(near) / (len(near) + exact) - 0.5) < 0.15
    for text in near:
        assert min(sum(a != b for a, b in zip(text.split(" "), source.split(" "))) for source in sources) == 1


def blobs(distance, n=300, D=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    centres = distance * np.eye(3, D)
    return centres[labels] + rng.standard_normal((n, D)), labels, np.arange(n) % 5 == 4


def test_the_probe_is_logistic_regression_at_its_optimum():
    states, labels, is_test = blobs(1.5)
    found = probe.fit_probe(states, labels, is_test, penalty=0.01)
    train = probe.decorrelate(states, ~is_test)[~is_test]
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(train.T @ train / len(train), np.eye(6), atol=1e-9)
    # by hand: the gradient of the mean cross-entropy and the penalty vanishes
    x = np.concatenate([train, np.ones((len(train), 1))], 1)
    w = found["weights"]
    p = np.exp(x @ w)
    p /= p.sum(1, keepdims=True)
    one_hot = np.eye(3)[labels[~is_test]]
    gradient = x.T @ (p - one_hot) / len(x) + 0.01 * np.concatenate([w[:-1], np.zeros((1, 3))])
    assert np.abs(gradient).max() < 1e-5
    assert 0.5 < found["accuracy"] < 1


def test_the_probe_reads_what_stands_beside_one_large_direction():
    """What is read off states is the same after any linear map of them. One direction that is in every feature, as in a
    model that has learned little but how frequent tokens are, hides nothing."""
    states, labels, is_test = blobs(4.0)
    rng = np.random.default_rng(1)
    alone = probe.fit_probe(states, labels, is_test)["accuracy"]
    assert alone > 0.9
    large = states @ rng.standard_normal((6, 6)) + 1e4 * rng.standard_normal((len(states), 1)) * np.ones(6)
    assert probe.fit_probe(large, labels, is_test)["accuracy"] > 0.9 * alone
    assert probe.fit_probe(states @ rng.standard_normal((6, 6)), labels, is_test)["accuracy"] == alone
    # a feature that says what others say is nothing new
    assert probe.fit_probe(states[:, [0, 1, 2, 3, 4, 5, 5]], labels, is_test)["accuracy"] == alone


def test_the_probe_finds_what_is_there_and_no_more():
    assert probe.fit_probe(*blobs(12.0))["accuracy"] == 1.0
    states, labels, is_test = blobs(0.0, n=1500)
    assert abs(probe.fit_probe(states, labels, is_test)["accuracy"] - 1 / 3) < 0.09


def test_passages_keep_neighbours_on_one_side(tmp_path, tiny_bpe, tiny_model):
    tok = tokenizer.load(tiny_bpe)
    for name in "ab":
        (tmp_path / name).write_text("<|x|>".join(f"{name}{i} and some words" for i in range(300)))
    files = {name: str(tmp_path / name) for name in "ab"}
    tokens, labels, is_test = probe.cut_passages(tok, files, 8, 30, "<|x|>")
    assert tokens.shape == (60, 8)
    assert Counter(zip(labels.tolist(), is_test.tolist())) == {(k, test): 10 + 10 * (not test)
                                                              for k in (0, 1) for test in (False, True)}
    # spread over the file, the test's behind the others
    ids = tok.encode((tmp_path / "a").read_text().replace("<|x|>", "\n"))
    assert tokens[0].tolist() == ids[:8]
    assert tokens[29].tolist() == ids[-8:]
    model = tiny_model(vocab_size=300)
    with torch.no_grad():
        alone = model(tokens[5:6]).double().mean(1)[0]
    assert np.allclose(probe.mean_states(model, tokens)[5], alone, atol=1e-6)
    with pytest.raises(UserError, match="too few for 30 passages"):
        probe.cut_passages(tok, files, 1000, 30)


def rows(**bits):
    """Two seeds of each version, 0.01 apart."""
    return [{"version": version, "seed": seed, "bits_per_byte": value + 0.01 * seed, "perplexity": 3.0, "documents": n,
             "tokens": 1000, "epochs": 1.5, "seconds": 1.0, "accuracy": 0.5 + 0.01 * seed}
            for (version, value), n in zip(bits.items(), (100, 100, 60, 100, 41)) for seed in (0, 1)]


def test_the_paragraph_says_what_was_found():
    bits = {"clean": 2.0, "noisy": 2.4, "noisy, cleaned": 2.1, "duplicated": 2.009, "duplicated, deduped": 2.0}
    table = quality.summarise(rows(**bits))
    assert {row["version"]: round(row["cost"], 4) for row in table}["noisy"] == round(0.4 / 2.005, 4)
    words = quality.describe(table, 0.4, 4, 0.6)
    # 0.4 lost, 0.1 left of it: three quarters came back; 0.009 is less than the seeds' 0.01
    assert "clean.py kept 60% of its documents and brought back 75% of that, the rest read 1.5 times" in words
    assert "duplicated version cost +0.0090 bits per byte, no more than the seeds spread (0.0100)" in words
    assert "chance is 25.0%" in words
    assert "do not differ" in words
    assert "probe" not in quality.describe(table, None, 0, 0.6)


def study(*words):
    return cli.run("data_quality.py", "", (quality.Quality, quality.run_study), argv=list(map(str, words)))


@pytest.mark.parametrize(("words", "error"), [(["a=missing.txt"], "names no file"), ([f"a={__file__}"], "two or more")])
def test_mistakes_end_in_one_line(tmp_path, capsys, words, error):
    assert study("--text", "a.txt", "--probe", *words, "--out", tmp_path / "out") == 2
    assert error in capsys.readouterr().err


def test_what_a_study_leaves(tmp_path, monkeypatch):
    bits = {"clean": 2.0, "noisy": 2.4, "noisy, cleaned": 2.1, "duplicated": 2.2, "duplicated, deduped": 2.1}
    found = {(row["version"], row["seed"]): row for row in rows(**bits)}
    monkeypatch.setattr(quality, "measure", lambda version, seed, *rest: found[version, seed] | {"accuracy": None})
    monkeypatch.setattr(quality, "pack_versions", lambda *a: {"clean": 10_000})
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS))
    monkeypatch.setattr(sys, "argv", ["x.py", "--text", "/a/b.txt", "--probe", "law=/a/c.txt", "--seeds", "0"])
    assert study("--text", text, "--vocab-size", 300, "--out", out) == 0
    result = json.loads((out / "data_quality.json").read_text())
    assert result["command"] == "python experiments/data_quality.py --text b.txt --probe law=c.txt --seeds 0"
    assert [row["version"] for row in result["rows"]] == [version for version in quality.VERSIONS for seed in (0, 1)]
    assert "dedup.py kept 41% of its documents and brought back 50% of that" in result["shows"]
    assert (out / "data_quality.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_run_of_the_study_is_a_run_of_the_project(data_dir, tiny_bpe, tmp_path, monkeypatch):
    stories = scratch.read_text([str(data_dir / "corpora/tinystories/tinystories_sample_2MiB.txt")], "<|endoftext|>")
    c = quality.Quality(text=[], size="25K")
    (tmp_path / "tokenizer").symlink_to(tiny_bpe)
    tokens = quality.pack_versions(c, stories[:300], tmp_path)
    assert tokens.keys() == set(quality.VERSIONS)
    # the copies go, and most documents that are garbled or have boilerplate
    assert tokens["duplicated, deduped"] < 0.6 * tokens["duplicated"]
    assert tokens["noisy, cleaned"] < 0.8 * tokens["noisy"]
    files = (data_dir / "corpora" / file for file in ("legal_en_dc/dc_code_title16.txt", "tinyshakespeare/input.txt"))
    passages = probe.cut_passages(tokenizer.load(tiny_bpe), dict(zip("ab", map(str, files))), 16, 60)
    row = quality.measure("duplicated, deduped", 3, c, 3, passages, tmp_path)
    scores = json.loads((tmp_path / "runs/duplicated_deduped_3/eval.json").read_text())["after"]
    assert row["bits_per_byte"] == scores["clean"]["bits_per_byte"]
    assert row["epochs"] == pytest.approx(3 * 8 * 256 / row["tokens"], rel=0.1)
    assert row["accuracy"] > 0.6
    # all are scored by documents that none trains on
    all_texts, clean = (Shards(tmp_path / "shards" / name, "train").documents for name in ("all", "clean"))
    assert all_texts == clean
    assert scores["clean"]["documents"] == Shards(tmp_path / "shards/all", "heldout").documents > 3
