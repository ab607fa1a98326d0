"""Truth: a naive writer and plain Python loops in this file, decode(encode(text)) of the tokenizers, struct, hashlib.
Laws: a batch depends on (seed, step) and the manifests alone; every token is a target once an epoch; counts keep within
one sequence of the wanted mix; a permutation is one; a folder appears whole or not at all. One golden hash pins the
order against a change that every law would allow.
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
from synthetic import Bytes, counts_of, run, scored, some_texts, source

import data
import tokenizer as tokenizers
from core.hashing import mix_keys
from data import Loader, best_fit_decreasing
from text.mixture import SourceConfig, domain_share, plan_counts, source_weights
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
    return sources, plan_counts(
        lambda p: source_weights(configs, domain_share("warmup_cooldown", 0.7, p)), 200, batch_size)


def arrays(batch) -> list[np.ndarray]:
    return [getattr(batch, f).numpy() for f in FIELDS] + [batch.source, batch.rng.uniform(3, 9).numpy()]


# ---- 1 to 3: the order is a function

GOLDEN = "08d0749f1e3beffee850a6e1d966e46ccc4d634f4db1e791802743e5be2e8a6b"      # of ORDER_VERSION 1


def test_golden_order(tmp_path):
    sources, counts = three_sources(tmp_path)
    loader, digest = Loader(sources, counts, 32, seed=7), hashlib.sha256()
    for step in range(200):
        for array in arrays(loader.rows(step)):
            digest.update(np.ascontiguousarray(array).astype("<f4" if array.dtype.kind == "f" else "<i8"))
    assert digest.hexdigest() == GOLDEN, (
        f"the same seed gives another order than ORDER_VERSION {data.ORDER_VERSION} stands for: "
        f"raise data.ORDER_VERSION and pin the new hash, or undo the change")


GOLDEN_1000 = "9a130e808ce440f0acb7cdb549269de2716731874020b33df512b5ec7363e775"      # the plan too


def test_golden_order_of_the_first_1000_batches_of_five_sources(tmp_path):
    """Sources of one window, of many epochs, of several shards, and one that is never drawn."""
    sources, configs = {}, {}
    for number, (tokens, weight, shard_tokens) in enumerate(((5000, 2.0, 999), (7, 0.1, 10**8), (640, 1.0, 100),
                                                             (20000, 1.0, 10**8), (300, 0.0, 10**8))):
        lengths = [1 + (17 * i + number) % 41 for i in range(tokens // 20)] or [tokens]
        name = f"source{number}"
        sources[name] = source(tmp_path / name, lengths, shard_tokens)
        configs[name] = SourceConfig(role="general" if number in (1, 3) else "domain", weight=weight)
    counts = plan_counts(lambda p: source_weights(configs, domain_share("warmup_cooldown", 0.7, p)), 1000, 8)
    loader, digest = Loader(sources, counts, 16, seed=11), hashlib.sha256(counts.astype("<i8"))
    for step in range(1000):
        for array in arrays(loader.rows(step)):
            digest.update(np.ascontiguousarray(array).astype("<f4" if array.dtype.kind == "f" else "<i8"))
    assert digest.hexdigest() == GOLDEN_1000, f"this is not the order of ORDER_VERSION {data.ORDER_VERSION}"


@pytest.mark.parametrize("packing", ["window", "best_fit", "document"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12])
def test_any_world_size_and_accumulation_sees_the_same_batch(tmp_path, world, packing):
    sources, counts = three_sources(tmp_path, batch_size=24)
    loader, share = Loader(sources, counts, 32, seed=1, packing=packing), 24 // world
    for step in (0, 1, 57, 199):
        for micro in {1, 2, share}:
            slices = [arrays(loader.rows(step, lo, min(lo + micro, (rank + 1) * share))) for rank in range(world)
                      for lo in range(rank * share, (rank + 1) * share, micro)]
            for whole, *parts in zip(arrays(loader.rows(step)), *slices):
                np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_a_batch_does_not_depend_on_what_was_read_before(tmp_path):
    sources, counts = three_sources(tmp_path)
    loader = Loader(sources, counts, 16, seed=2)
    forward = [arrays(loader.rows(step)) for step in range(60)]
    fresh = Loader({name: Shards(s.folder) for name, s in sources.items()}, counts.copy(), 16, seed=2)
    for step in random.Random(0).sample(range(60), 60):
        for a, b in zip(forward[step], arrays(fresh.rows(step)), strict=True):
            np.testing.assert_array_equal(a, b)
    other = arrays(Loader(sources, counts, 16, seed=3).rows(0))
    assert not np.array_equal(forward[0][0], other[0])
    assert not np.array_equal(forward[0][0], forward[1][0])
    assert not np.array_equal(forward[0][5], forward[1][5])
    assert not np.array_equal(forward[0][5], other[5])


def test_a_batch_far_along_the_plan(tmp_path):
    shards = source(tmp_path / "s", [50, 30])
    counts = np.array([[10**12], [10**12 + 8]])
    batch = Loader({"s": shards}, counts, 16, seed=0).rows(0)
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


# ---- 4: coverage

@pytest.mark.parametrize(("context", "total"), [(8, 100), (8, 96), (16, 100), (100, 100), (99, 100), (101, 100),
                                                (300, 100), (1, 100), (7, 1)])
@pytest.mark.parametrize("shard_tokens", [10**8, 30])
def test_each_epoch_has_every_token_as_a_target_once(tmp_path, context, total, shard_tokens):
    lengths = [13, 1, 40, 1, 1, 25, 19] if total == 100 else [40, 56] if total == 96 else [1]
    shards = source(tmp_path / "s", lengths, shard_tokens)
    assert shards.tokens == total
    windows = -(-total // context)
    loader = Loader({"s": shards}, counts_of(*[[windows]] * 4), context, seed=4)
    starts = []
    for epoch in range(4):
        batch = loader.rows(epoch)
        targets = batch.labels[:, 1:]
        assert sorted(targets[targets != -100].tolist()) == list(range(total))
        assert sorted(np.unique(batch.tokens[:, 0]).tolist()) == sorted(batch.tokens[:, 0].tolist())
        starts.append(min(batch.tokens[:, 0].tolist()))
        for row, label in zip(batch.tokens.tolist(), batch.labels.tolist()):
            n = label.index(-100) if -100 in label else len(label)
            assert row[:n] == label[:n] == [(row[0] + i) % total for i in range(n)]
            assert label[n:] == [-100] * (context + 1 - n)
            assert row[n:] == [0] * (context + 1 - n)
    if total > 2 * context > 2:
        assert len(set(starts)) > 1                                  # cut again at another offset


def test_epochs_need_not_end_with_a_step(tmp_path):
    shards = source(tmp_path / "s", [30, 7, 26])                     # 63 tokens, 8 windows of 8
    loader = Loader({"s": shards}, counts_of(*[[3]] * 13), 8, seed=0)
    seen = np.zeros(63, int)
    for step in range(13):                                           # 39 windows: 4 epochs and 7 windows
        targets = loader.rows(step).labels[:, 1:]
        seen += np.bincount(targets[targets != -100], minlength=63)
        assert seen.max() - seen.min() <= 1 or step % 8 != 7
    assert seen.min() == 4
    assert seen.max() == 5
    assert loader.epochs(8) == {"s": 3.0}


@pytest.mark.parametrize(("context", "total", "windows"), [(8, 100, 12), (100, 100, 1), (300, 100, 1), (50, 100, 2)])
def test_drop_last_leaves_the_short_window_out(tmp_path, context, total, windows):
    shards = source(tmp_path / "s", [60, 40])
    loader = Loader({"s": shards}, counts_of([windows]), context, seed=0, drop_last=True)
    targets = loader.rows(0).labels[:, 1:]
    targets = targets[targets != -100].tolist()
    assert loader.sequences() == {"s": windows}
    assert len(set(targets)) == len(targets) == min(total, windows * context)


def test_epochs_and_sources_have_orders_of_their_own(tmp_path):
    shards, orders = source(tmp_path / "s", [400]), set()
    for name in ("a", "b"):
        loader = Loader({name: shards}, counts_of(*[[1]] * 100), 8, seed=0)
        starts = [int(loader.rows(step).tokens[0, 0]) for step in range(100)]
        for epoch in (starts[:50], starts[50:]):
            orders.add(tuple((start - epoch[0]) % 400 for start in epoch))   # whatever the offset of the first cut
    assert len(orders) == 4


def test_a_source_without_tokens_is_refused(tmp_path):
    source(tmp_path / "s", [5])
    with pytest.raises(ValueError, match=r"source law .* no tokens in its heldout split"):
        Loader({"law": Shards(tmp_path / "s", "heldout")}, counts_of([1]), 8, seed=0)


# ---- packing by documents

def best_fit_by_hand(sizes, capacity) -> list[list[int]]:
    """Best-fit decreasing, an item at a time: the bins, each a list of sizes."""
    bins = []
    for size in sorted(sizes, reverse=True):
        fits = [b for b in bins if sum(b) + size <= capacity]
        if fits:
            max(fits, key=sum).append(size)
        else:
            bins.append([size])
    return bins


@pytest.mark.parametrize("seed", range(8))
def test_best_fit_against_an_item_at_a_time(seed):
    rng = random.Random(seed)
    capacity = rng.choice([5, 17, 64])
    sizes = [min(capacity, 1 + int(rng.expovariate(4 / capacity))) for _ in range(rng.choice([1, 40, 300]))]
    bins = best_fit_decreasing(np.array(sizes), capacity)
    found = np.bincount(bins, sizes).astype(int).tolist()             # which of two bins with as much room is open
    assert sorted(found) == sorted(map(sum, best_fit_by_hand(sizes, capacity)))


@pytest.mark.parametrize("packing", ["best_fit", "document"])
@pytest.mark.parametrize("shard_tokens", [10**8, 30])
def test_documents_stay_whole_and_each_token_is_a_target_once(tmp_path, packing, shard_tokens):
    rng, T = random.Random(1), 12
    lengths = [1, 2, T, T + 1, T + 2, 2 * T + 1, 2 * T + 2, 40, *(rng.randint(2, 20) for _ in range(60))]
    total, begins = sum(lengths), [1, *(1 + end for end in itertools.accumulate(lengths))]
    shards = source(tmp_path / "s", lengths, shard_tokens, ids=list(range(1, total + 1)))       # 0 is padding
    loader = Loader({"s": shards}, None, T, seed=4, packing=packing)
    rows = loader.sequences()["s"]
    loader.counts = counts_of([rows], [rows])
    for epoch in range(2):
        batch, targets, padded = loader.rows(epoch), [], 0
        for tokens, labels, positions, doc_start in zip(*(getattr(batch, f).tolist() for f in FIELDS)):
            end = tokens.index(0) if 0 in tokens else T + 1
            padded += T + 1 - end
            assert labels[end:] == [-100] * (T + 1 - end)
            assert set(doc_start[end:]) <= {end}
            assert positions == [i - d for i, d in enumerate(doc_start)]
            pieces = [tokens[a:b] for a, b in itertools.pairwise([*sorted(set(doc_start[:end])), end])]
            assert len(pieces) == 1 or packing == "best_fit"
            for piece, at in zip(pieces, sorted(set(doc_start[:end]))):
                document = max(b for b in begins if b <= piece[0])
                n = lengths[begins.index(document)]
                assert piece == list(range(piece[0], piece[-1] + 1))
                assert (piece[0], len(piece)) == (document, n) or (n > T + 1 and (
                    (piece[0] - document) % T == 0 and len(piece) == min(T + 1, document + n - piece[0])))
                assert labels[at:at + len(piece)] == ([-100] if piece[0] != document else [piece[0]]) + piece[1:]
                targets += piece[1:]
        assert sorted(targets) == sorted(set(range(1, total + 1)) - set(begins))
        assert padded == loader.packings[0].padded
    assert packing == "document" or rows <= -(-(total + 20) // (T + 1)) + 2


def test_a_long_documents_pieces_share_a_token_that_is_a_target_once(tmp_path):
    shards = source(tmp_path / "s", [7, 20])
    loader = Loader({"s": shards}, counts_of([4]), 8, seed=0, packing="document")
    batch = loader.rows(0)
    rows = sorted(zip(batch.tokens.tolist(), batch.labels.tolist()), key=lambda row: row[0])
    assert [labels for _, labels in rows] == [
        [*range(7), -100, -100], [*range(7, 16)], [-100, *range(16, 24)], [-100, 24, 25, 26, *[-100] * 5]]
    assert [tokens[:4] for tokens, _ in rows] == [[0, 1, 2, 3], [7, 8, 9, 10], [15, 16, 17, 18], [23, 24, 25, 26]]


# ---- 7: boundaries

@pytest.mark.parametrize("shard_tokens", [10**8, 9])
@pytest.mark.parametrize("reset_positions", [True, False])
@pytest.mark.parametrize("context", [4, 7, 60])
def test_rows_against_a_loop(tmp_path, shard_tokens, reset_positions, context):
    lengths = [1, 4, 5, 12, 1, 1, 3, 2, 8]
    total, begins = sum(lengths), {0, *itertools.accumulate(lengths)}
    shards = source(tmp_path / "s", lengths, shard_tokens)
    loader = Loader({"s": shards}, counts_of(*[[5]] * 12), context, seed=3, reset_positions=reset_positions)
    for step in range(12):
        batch = loader.rows(step)
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
    assert Shards(out).document(0)[0][0] == tokenizers.load(tiny_bpe).bos_id
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
    for argv in (["pack"], ["nonsense"], ["pack", "--documents", "word"], ["info", str(out), "--jsn", "x"]):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_no_bos_and_a_warning_where_nothing_is_held_out(tmp_path, tiny_bpe, monkeypatch, capsys):
    (tmp_path / "in.txt").write_text("one document")
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "s", "--no-bos",
               "--heldout", "0.0001", tmp_path / "in.txt") == 0
    assert "no document fell into the held-out share" in capsys.readouterr().err
    tokenizer = tokenizers.load(tiny_bpe)
    assert Shards(tmp_path / "s").document(0)[0].tolist() == tokenizer.encode("one document", eos=True)
    shutil.rmtree(tmp_path / "s")
    assert run(monkeypatch, "pack", "--tokenizer", tiny_bpe, "--out", tmp_path / "s", "--heldout", "0", "--bos",
               tmp_path / "in.txt") == 0
    assert capsys.readouterr().err == ""
    assert Shards(tmp_path / "s").text_document(0)[0].tolist() == tokenizer.encode("one document")


# ---- mix

def test_mixed_files(tmp_path):
    law = [{"text": f"law {i}", "id": i, "metadata": {"x": [i]}} for i in range(10)]
    web = [{"text": f"web {i} \ud800\u2028", "source_type": "old"} for i in range(7)]
    out, seen = tmp_path / "new/mixed.jsonl", set()
    for seed in (0, 0, 1):
        done = data.mix_files(iter(law), iter(web), out, overwrite=True, ratio=0.6, total=45, seed=seed)
        seen.add(out.read_bytes())
        got = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
        for side, records, n in (("domain", law, 27), ("general", web, 18)):
            mine = [r for r in got if r["source_type"] == side]
            texts = [r["text"].replace("\ufffd", "\ud800") for r in mine]
            assert len(mine) == n == done[side]["written"]
            counts = [texts.count(r["text"]) for r in records]             # none twice before all are once
            assert max(counts) - min(counts) <= 1
            assert done[side]["epochs"] == n / len(records)
        assert all(r == {**law[r["id"]], "source_type": "domain"} for r in got if r["source_type"] == "domain")
    assert len(seen) == 2
    assert [r["source_type"] for r in got] != sorted(r["source_type"] for r in got)
    assert data.mix_files(law, web, out, overwrite=True)["total"] == 14  # each of the domain once
    assert sorted(p.name for p in out.parent.iterdir()) == ["mixed.jsonl"]


def test_an_epoch_of_a_mix_has_each_record_once_in_a_new_order(tmp_path):
    law = [{"text": str(i)} for i in range(50)]
    places = data._draw("domain", 200, np.arange(50), seed=3).reshape(4, 50)
    assert all(sorted(row) == list(range(50)) for row in places.tolist())
    assert len({tuple(row) for row in places.tolist()}) == 4
    done = data.mix_files(law, [], tmp_path / "m.jsonl", overwrite=True, ratio=1.0, total=250)
    assert ["read 5.0 times" in line for line in done["warnings"]] == [True]
    before = (tmp_path / "m.jsonl").read_bytes()
    for wrong, match in (({"total": 801}, "16.0 times, above its max_epochs of 16: .* --max-epochs 17"),
                         ({"total": 0}, "at least 1"), ({"ratio": 1.5}, "--domain-ratio"), ({"ratio": 0.0}, "length"),
                         ({"ratio": 0.5, "total": 9}, "the general files hold no records, but 5")):
        with pytest.raises(ValueError, match=match):
            data.mix_files(law, [], tmp_path / "m.jsonl", overwrite=True, **{"ratio": 1.0, **wrong})
    data.mix_files(law, [], tmp_path / "n.jsonl", overwrite=True, ratio=1.0, total=801, max_epochs=20)
    assert (tmp_path / "m.jsonl").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.jsonl", "n.jsonl"]


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
            rows[name] = Loader({"s": Shards(folder)}, None, 16, 0, packing=packing).sequences()["s"]
            assert shown["epochs"][name] == shown["sequences"][name] / rows[name]
    assert rows["wiki"] > windows
    assert run(monkeypatch, *preview, "--train.steps", 5000) == 0
    assert "train.py refuses this plan" in capsys.readouterr().out
    mixed = ("mix", "--domain", law, "--general", wiki, "--out", tmp_path / "m.jsonl", "--json", report)
    assert run(monkeypatch, *mixed, "--domain-ratio", 0.8, "--total-samples", 100) == 0
    assert "domain: 80 of 100 samples from 80 records, read 1.00 times" in capsys.readouterr().out
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == json.loads(report.read_text())["total"] == 100

    def fails(*argv, match):
        try:
            status = run(monkeypatch, *argv)
        except SystemExit as stop:
            status = stop.code
        error = capsys.readouterr().err
        assert (status, error.startswith("error: "), error.count("\n")) == (2, True, 1)
        assert match in error
    fails(*pack_law, "--buckets", 4, match="--buckets K and --score NAME go together")
    fails(*pack_law, "--overwrite", "--first", "low", match="go together")
    fails(*preview, "--data.scedule", "staged", match="did you mean data.schedule?")
    fails("mix", match="mix wants either")
    fails("mix", recipe, match="mix wants either")
    fails("mix", "--domain", law, "--general", wiki, match="mix wants either")
    fails("mix", tmp_path / "no.toml", "--preview", match="no.toml does not exist")
    fails("info", out, "--data.schedule", "x", match="unknown argument --data.schedule")
    fails(*mixed, match="exists already; choose another --out or add --overwrite")
    fails(*mixed, "--overwrite", "--seed", -1, match="--seed is -1, but must be 0 or more")
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 100
    fails(*mixed, "--overwrite", "--total-samples", 100000, match="allow it with --max-epochs")
    recipe.write_text('[data.sources.law]\npath = "nowhere"\n')
    fails(*preview, match="data.sources.law.path is no folder")
    assert run(monkeypatch, *preview, "--train.steps", 4) == 0
