"""Truth: plain Python loops in this file, decode(encode(text)) of the tokenizers, hashlib. Law: a batch depends on
(seed, step) and the manifests alone. Two golden hashes pin the order against a change that the law would allow.
"""

import hashlib
import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic import Bytes, counts_of, document, loader_of, run, scored, some_texts, source

import data
import tokenizer as tokenizers
from core.hashing import mix_keys
from text.mixture import DataConfig, SourceConfig, plan_counts, schedule_at, source_weights
from text.packing import pack_sources
from text.shards import SPLITS, Shards, pack

pytestmark = pytest.mark.usefixtures("fast_disk")
ROOT = Path(__file__).parent.parent
FIELDS = ("tokens", "labels", "position_ids", "doc_start")


def three_sources(tmp_path, batch_size: int = 12) -> tuple[dict, np.ndarray]:
    sources = {}
    for number, (name, n, shard_tokens) in enumerate((("legal", 60, 700), ("wiki", 90, 10**8), ("code", 3, 50))):
        pack(some_texts(n, number), Bytes(), tmp_path / name, heldout=0.0, shard_tokens=shard_tokens)
        sources[name] = Shards(tmp_path / name)
    configs = {"legal": SourceConfig(), "wiki": SourceConfig(role="general", weight=2.0),
               "code": SourceConfig(role="general", weight=1.0)}
    return sources, plan_counts(weights_over(200, configs), batch_size)


def weights_over(steps: int, configs: dict) -> np.ndarray:
    progress = np.arange(steps) / (steps - 1)
    return np.array([source_weights(configs, schedule_at(DataConfig(), p, steps)[0]) for p in progress])


def arrays(batch) -> list[np.ndarray]:
    return [getattr(batch, f).numpy() for f in FIELDS] + [batch.source, batch.rng.uniform(3, 9).numpy()]


# ---- the order is a function

GOLDEN = "db5857fb3fc5a7d6d92f2b51f37c960195b0bffaee082a4e0f5ebdb33a416652"      # of ORDER_VERSION 1


def test_golden_order(tmp_path):
    sources, counts = three_sources(tmp_path)
    loader, digest = loader_of(sources, counts, 32, seed=7), hashlib.sha256()
    for step in range(200):
        for array in arrays(loader.batch(step))[:-1]:
            digest.update(np.ascontiguousarray(array).astype("<i8"))
    assert digest.hexdigest() == GOLDEN, (
        f"the same seed gives another order than ORDER_VERSION {data.ORDER_VERSION} stands for: "
        f"raise data.ORDER_VERSION and pin the new hash, or undo the change")


GOLDEN_1000 = "79b808e1d6b20fb468fc2b16804bb1f198dbe75e53b5cfcbbe1bb552953bea1e"      # the plan too


def test_golden_order_of_the_first_1000_batches_of_five_sources(tmp_path):
    """Sources of one window, of many epochs, of several shards, and one that is never drawn."""
    sources, configs = {}, {}
    for number, (tokens, weight, shard_tokens) in enumerate(((5000, 2.0, 999), (7, 0.1, 10**8), (640, 1.0, 100),
                                                             (20000, 1.0, 10**8), (300, 0.0, 10**8))):
        lengths = [1 + (17 * i + number) % 41 for i in range(tokens // 20)] or [tokens]
        name = f"source{number}"
        sources[name] = source(tmp_path / name, lengths, shard_tokens)
        configs[name] = SourceConfig(role="general" if number in (1, 3) else "domain", weight=weight)
    counts = plan_counts(weights_over(1000, configs), 8)
    loader, digest = loader_of(sources, counts, 16, seed=11), hashlib.sha256(counts.astype("<i8"))
    for step in range(1000):
        for array in arrays(loader.batch(step))[:-1]:
            digest.update(np.ascontiguousarray(array).astype("<i8"))
    assert digest.hexdigest() == GOLDEN_1000, f"this is not the order of ORDER_VERSION {data.ORDER_VERSION}"


def test_random_values_are_a_function_of_the_place_in_the_data_and_of_the_epoch(tmp_path):
    """Whatever the batch size, a sequence of a source has the same values in one epoch, and others in another."""
    sources, values = {"legal": source(tmp_path / "legal", [70] * 5)}, {}
    for B in (1, 4):
        loader = loader_of(sources, np.arange(0, 61, B)[:, None], 16, seed=3)
        sequences, seen = loader.packings["legal"].sequences, 0
        for step in range(60 // B):
            batch = loader.batch(step)
            for place, row in zip(batch.place.tolist(), batch.rng.uniform(0, 4).tolist()):
                # A step's sequences are in a random order, so with four of them two epochs may share a step.
                values.setdefault(place, {}).setdefault(B, []).append(tuple(row))
                seen += 1
        assert seen == 60
    assert len(values) == sequences == 22
    for found in values.values():
        n = min(map(len, found.values()))
        assert sorted(found[1][:n]) == sorted(found[4][:n])
        assert len(set(found[1])) == len(found[1]) >= 2


@pytest.mark.parametrize("packing", ["window", "best_fit", "document"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12])
def test_any_world_size_and_accumulation_sees_the_same_batch(tmp_path, world, packing):
    sources, counts = three_sources(tmp_path, batch_size=24)
    loader, share = loader_of(sources, counts, 32, seed=1, packing=packing), 24 // world
    for step in (0, 57, 199):
        for micro in {1, 2, share}:
            slices = [arrays(loader.batch(step, lo, min(lo + micro, (rank + 1) * share))) for rank in range(world)
                      for lo in range(rank * share, (rank + 1) * share, micro)]
            for whole, *parts in zip(arrays(loader.batch(step)), *slices):
                np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_a_batch_does_not_depend_on_what_was_read_before(tmp_path):
    sources, counts = three_sources(tmp_path)
    loader = loader_of(sources, counts, 16, seed=2)
    forward = [arrays(loader.batch(step)) for step in range(60)]
    fresh = loader_of({name: Shards(s.folder) for name, s in sources.items()}, counts.copy(), 16, seed=2)
    for step in random.Random(0).sample(range(60), 60):
        for a, b in zip(forward[step], arrays(fresh.batch(step)), strict=True):
            np.testing.assert_array_equal(a, b)
    other = arrays(loader_of(sources, counts, 16, seed=3).batch(0))
    assert not np.array_equal(forward[0][0], other[0])
    assert not np.array_equal(forward[0][0], forward[1][0])
    assert not np.array_equal(forward[0][5], forward[1][5])
    assert not np.array_equal(forward[0][5], other[5])


def test_a_batch_far_along_the_plan(tmp_path):
    shards = source(tmp_path / "s", [50, 30])
    counts = np.array([[10**12], [10**12 + 8]])
    batch = loader_of({"s": shards}, counts, 16, seed=0).batch(0)
    assert sorted(batch.labels[:, 1:].flatten().tolist())[-1] < 80
    assert batch.tokens.shape == (8, 17)


def test_random_numbers_are_uniform_and_streams_differ():
    rng = data.RowRandom(mix_keys(0, "rows", 5, np.arange(100)))
    x, y = rng.uniform(0, 2000).numpy(), rng.uniform(1, 2000).numpy()
    assert x.min() >= 0
    assert x.max() < 1
    assert x.dtype == np.float32
    tenths = np.histogram(x, 10, (0, 1))[0]                          # 200,000 draws: 5 sigma of 20,000 is 671
    assert abs(tenths - 20000).max() < 700
    assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.012      # 5 sigma
    assert abs(np.corrcoef(x[:, :-1].ravel(), x[:, 1:].ravel())[0, 1]) < 0.012
    assert abs(np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]) < 0.012
    np.testing.assert_array_equal(rng.uniform(0, 7).numpy(), x[:, :7])


# ---- sequences

@pytest.mark.parametrize("shard_tokens", [10**8, 9])
@pytest.mark.parametrize("reset_positions", [True, False])
@pytest.mark.parametrize("context", [4, 7, 60])
def test_rows_against_a_loop(tmp_path, shard_tokens, reset_positions, context):
    lengths = [1, 4, 5, 12, 1, 1, 3, 2, 8]
    total, begins = sum(lengths), {0, *itertools.accumulate(lengths)}
    shards = source(tmp_path / "s", lengths, shard_tokens)
    loader = loader_of({"s": shards}, counts_of(*[[5]] * 12), context, seed=3, reset_positions=reset_positions)
    for step in range(12):
        batch = loader.batch(step)
        for row in range(5):
            tokens, labels, positions, doc_start = (getattr(batch, f)[row].tolist() for f in FIELDS)
            begin = 0
            for i in range(context + 1):
                real = labels[i] != -100
                if real:
                    assert tokens[i] == labels[i] == (tokens[0] + i) % total
                if i and (tokens[i] in begins if real else labels[i - 1] != -100):     # padding is a document too
                    begin = i
                assert doc_start[i] == begin
                assert positions[i] == (i - begin if reset_positions else i)
    assert all(getattr(batch, f).dtype == torch.int32 for f in FIELDS)


# ---- command line

def test_command_line(tmp_path, tiny_bpe, monkeypatch, capsys):
    texts = [t.replace("\n", ".") for t in some_texts(300)]
    (tmp_path / "in.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a record"}) + "\n")
    out, report = tmp_path / "s", tmp_path / "m.json"
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", out, "--heldout", "0.1", "--json", report,
               tmp_path / "in.txt", tmp_path / "in.jsonl") == 0
    said = capsys.readouterr()
    assert "packed" in said.out
    assert "heldout" in said.out
    assert said.err == ""
    manifest = json.loads(report.read_text())
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert [i["name"] for i in manifest["inputs"]] == ["in.txt", "in.jsonl"]
    assert manifest["inputs"][0]["bytes"] == (tmp_path / "in.txt").stat().st_size
    assert sum(manifest["splits"][s]["documents"] for s in SPLITS) == 301
    assert manifest["bos"]
    assert document(Shards(out), 0)[0][0] == tokenizers.load(tiny_bpe).bos_id
    assert run(monkeypatch, "verify", out) == 0
    assert "have the hashes" in capsys.readouterr().out
    assert run(monkeypatch, "info", out, "--json", tmp_path / "i.json") == 0
    assert json.loads((tmp_path / "i.json").read_text()) == manifest
    assert "documents" in capsys.readouterr().out

    def fails(*argv, match):
        assert run(monkeypatch, *argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert match in error
    again = ("pack", "--tokenizer", tiny_bpe, "--out")
    fails(*again, out, tmp_path / "in.txt", match="exists already")
    fails(*again, tmp_path / "t", tmp_path / "nowhere.txt", match="nowhere.txt does not exist")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n" * 10)
    fails(*again, tmp_path / "t", tmp_path / "in.txt", tmp_path / "latin.txt", match="latin.txt")
    (tmp_path / "empty.txt").write_text("")
    fails(*again, tmp_path / "t", tmp_path / "empty.txt", match="nothing to train on")
    fails("pack", "--tokenizer", tmp_path / "no", "--out", tmp_path / "t", tmp_path / "in.txt", match="does not exist")
    fails("verify", tmp_path / "t", match="holds no manifest")
    assert not (tmp_path / "t").exists()
    assert not list(tmp_path.glob(".t.partial"))
    raw = bytearray((out / "train_000000.bin").read_bytes())
    raw[-1] ^= 4
    (out / "train_000000.bin").write_bytes(raw)
    fails("verify", out, match="hash differs")
    fails("pack", match="--tokenizer")
    fails("nonsense", match="unknown command nonsense")
    fails(*again, tmp_path / "t", "--documents", "word", tmp_path / "in.txt", match="--documents")
    fails("info", out, "--jsn", "x", match="unknown option --jsn; did you mean --json?")
    fails(*again, tmp_path / "t", "--heldout", 1.0, tmp_path / "in.txt", match="--heldout is 1.0, but must be")
    fails(*again, tmp_path / "t", "--heldout", "nan", tmp_path / "in.txt", match="--heldout is nan")
    fails(*again, tmp_path / "t", "--workers", 0, tmp_path / "in.txt", match="--workers is 0, but must be at least 1")
    fails(*again, tmp_path / "t", "--shard-tokens", 2**31, tmp_path / "in.txt", match="--shard-tokens is 2147483648")
    fails(*again, tmp_path / "t", "--bos", "--no-bos", tmp_path / "in.txt", match="contradict each other")


def test_no_bos_and_a_warning_where_nothing_is_held_out(tmp_path, tiny_bpe, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("one document")
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "s", "--no-bos",
               "--heldout", "0.0001", tmp_path / "in.txt") == 0
    assert "no document fell into the held-out share" in capsys.readouterr().err
    tokenizer = tokenizers.load(tiny_bpe)
    assert document(Shards(tmp_path / "s"), 0)[0].tolist() == tokenizer.encode("one document", eos=True)
    shutil.rmtree(tmp_path / "s")
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "s", "--heldout", "0", "--bos",
               tmp_path / "in.txt") == 0
    assert capsys.readouterr().err == ""
    assert Shards(tmp_path / "s").text_document(0)[0].tolist() == tokenizer.encode("one document")


def test_command_line_of_buckets_and_mixes(tmp_path, tiny_bpe, monkeypatch, capsys):
    law, wiki, out = tmp_path / "law.jsonl", tmp_path / "wiki.txt", tmp_path / "s"
    law.write_text("".join(json.dumps(r) + "\n" for r in scored(80)))
    wiki.write_text("\n\n".join(t.replace("\n", ".") for t in some_texts(40)))
    pack_law = ("pack", "--tokenizer", tiny_bpe, "--out", out, law)
    assert run(monkeypatch, *pack_law, "--buckets", 4, "--score", "quality") == 0
    said = capsys.readouterr().out
    best = sorted((r["metadata"]["scores"]["quality"] for r in scored(80)), reverse=True)
    assert f"bucket_00, read first: quality from {best[19]} to {best[0]}\n" in said
    assert json.loads((out / "buckets.json").read_text())["first"] == "high"
    assert run(monkeypatch, "verify", out) == run(monkeypatch, "info", out, "--json", tmp_path / "i.json") == 0
    assert len(json.loads((tmp_path / "i.json").read_text())["manifests"]) == 4
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "w", wiki) == 0
    capsys.readouterr()
    recipe, picture, report = tmp_path / "r.toml", tmp_path / "mix.png", tmp_path / "mix.json"
    recipe.write_text(f"""[model]\npath = "x"\n[data]\ncontext = 16\n[data.sources.law]\npath = "{out}"
[data.sources.wiki]\npath = "{tmp_path / "w"}"\nrole = "general"\nstratum = "math"\n[train]\nsave_every = 3\n""")
    preview = ("mix", recipe, "--preview", "--out", picture, "--json", report)
    assert run(monkeypatch, *preview, "--data.schedule", "staged", "--train.steps", 20, "--train.batch-size", 5) == 0
    said, shown = capsys.readouterr().out, json.loads(report.read_text())
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "staged, 20 steps of 5 sequences of 16 tokens" in said
    assert "law/3" in said
    assert "math 1.000; no source for reasoning" in said
    assert (len(shown["rows"]), sum(shown["sequences"].values()), shown["schedule"]) == (10, 100, "staged")
    assert shown["rows"][0]["sources"]["law/3"] == 0 < shown["rows"][9]["sources"]["law/3"]
    windows = -(-Shards(tmp_path / "w").tokens // 16)
    assert shown["epochs"]["wiki"] == shown["sequences"]["wiki"] / windows
    for packing in ("best_fit", "document"):
        assert run(monkeypatch, *preview, "--train.steps", 20, "--data.packing", packing) == 0
        shown, rows = json.loads(report.read_text()), {}
        for name, folder in (("law/0", out / "bucket_00"), ("wiki", tmp_path / "w")):
            config = DataConfig(context=16, packing=packing)
            rows[name] = pack_sources({"s": Shards(folder)}, config)["s"].sequences
            assert shown["epochs"][name] == shown["sequences"][name] / rows[name]
    assert rows["wiki"] > windows
    assert run(monkeypatch, *preview, "--train.steps", 5000) == 0
    assert "train.py refuses this plan" in capsys.readouterr().out
    mixed = ("mix", "--domain", law, "--general", wiki, "--out", tmp_path / "m.jsonl", "--json", report)
    assert run(monkeypatch, *mixed, "--domain-ratio", 0.8, "--total-samples", 100) == 0
    assert "domain: 80 of 100 samples from 80 records, read 1.00 times" in capsys.readouterr().out
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == json.loads(report.read_text())["total"] == 100

    def fails(*argv, match):
        assert run(monkeypatch, *argv) == 2
        error = capsys.readouterr().err
        assert (error.startswith("error: "), error.count("\n")) == (True, 1)
        assert match in error
    fails(*pack_law, "--score", "quality", "--buckets", 1, match="--buckets is 1, but must be at least 2")
    fails(*pack_law, "--buckets", 4, match="--buckets K and --score NAME go together")
    fails(*pack_law, "--overwrite", "--first", "low", match="go together")
    fails(*preview, "--data.scedule", "staged", match="did you mean data.schedule?")
    fails("mix", match="mix wants either")
    fails("mix", recipe, match="mix wants either")
    fails("mix", "--domain", law, "--general", wiki, match="mix wants either")
    fails("mix", tmp_path / "no.toml", "--preview", match="no.toml does not exist")
    fails("info", out, "--data.schedule", "x", match="unknown option --data.schedule")
    fails(*mixed, match="exists already; choose another --out or add --overwrite")
    fails(*mixed, "--overwrite", "--seed", -1, match="--seed is -1, but must be at least 0")
    fails(*mixed, "--overwrite", "--domain-ratio", 1.5, match="--domain-ratio is 1.5")
    fails(*mixed, "--overwrite", "--total-samples", 0, match="--total-samples is 0, but must be above 0")
    fails(*mixed, "--overwrite", "--train.steps", 3, match="mix wants either")
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 100
    fails(*mixed, "--overwrite", "--total-samples", 100000, match="allow it with --max-epochs")
    recipe.write_text('[data.sources.law]\npath = "nowhere"\n')
    fails(*preview, match="data.sources.law.path is no folder")
    assert run(monkeypatch, *preview, "--train.steps", 4) == 0
