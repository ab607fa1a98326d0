"""measure/scoring.py against transformers, document by document and window by window, and cases worked by hand."""

import contextlib
import math
import random
import threading
import types

import numpy as np
import pytest
import torch
from synthetic import naive_write
from truth import same, truth

import data
import hf
from core.hashing import mix_keys
from core.parallel import World
from learn import objectives
from measure import scoring
from text.packing import pack_in_order
from text.shards import Shards

pytestmark = pytest.mark.usefixtures("one_thread")
CAUSAL = objectives.Causal(mask_documents=True)


class Ranks:
    """Two ranks as two threads that meet at a sum."""

    def __init__(self, size):
        self.meet, self.parts = threading.Barrier(size), [None] * size

    def world(self, rank):
        def total(values):
            self.parts[rank] = values
            self.meet.wait()
            return [sum(v) for v in zip(*self.parts)]
        return types.SimpleNamespace(rank=rank, size=len(self.parts), share=(rank, len(self.parts)), sum=total,
                                     barrier=self.meet.wait, check=lambda: None, cut=lambda batch: batch,
                                     cut_tokens=lambda x: x, sharing=contextlib.nullcontext)


def random_documents(n: int, longest: int, seed: int = 0) -> list:
    draw = np.random.default_rng(seed)
    lengths = [1, 2, longest, *draw.integers(1, longest, n - 3).tolist()]
    return [(draw.integers(0, 97, k).astype(np.uint16), 3 * k + 1) for k in lengths]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("context", [1, 7, 32, 64])
def test_same_numbers_as_a_loop_over_documents_in_transformers(hf_model, family, context):
    theirs, folder = hf_model(family)
    # transformers makes one forward pass per window, so short windows get short documents.
    documents, model = random_documents(14, 150 if context > 7 else 12 * context), hf.load(folder)
    ours = scoring.score(model, CAUSAL, documents, 5, context)
    assert same(ours, truth(theirs, documents, 5, context), 1e-5)


def test_packing_changes_nothing_and_each_token_counts_once(tiny_model):
    model, documents = tiny_model(), random_documents(20, 90)
    whole = scoring.score(model, CAUSAL, documents, 1, 32)
    alone = [scoring.score(model, CAUSAL, [d], 1, 32, B=1) for d in documents]
    assert whole["tokens"] == sum(len(ids) for ids, _ in documents) == sum(r["tokens"] for r in alone)
    nats = sum(r["nats_per_token"] * r["tokens"] for r in alone)
    assert whole["nats_per_token"] * whole["tokens"] == pytest.approx(nats, rel=1e-6)
    order = random.Random(0).sample(range(len(documents)), len(documents))
    shuffled = whole | {"nats_by_document": [whole["nats_by_document"][i] for i in order]}
    for B in (1, 3, 100):
        assert same(scoring.score(model, CAUSAL, [documents[i] for i in order], 1, 32, B=B), shuffled)


def test_model_comes_back_in_its_mode_and_without_gradients(tiny_model):
    model = tiny_model().train()
    scoring.score(model, CAUSAL, random_documents(4, 9), 0, 8)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size", [2, 3, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_shared_by_ranks_it_equals_one(tiny_model, size, causal):
    objective = CAUSAL if causal else objectives.Masked(True, 96, [0], 97)
    documents, ranks, results, forwards = random_documents(12, 60), Ranks(size), {}, {}
    alone = scoring.score(tiny_model(), objective, documents, 0, 16, World(0, 1, torch.device("cpu")))

    def run(rank):
        model = tiny_model()
        model.register_forward_pre_hook(lambda *_: forwards.update({rank: forwards.get(rank, 0) + 1}))
        results[rank] = scoring.score(model, objective, documents, 0, 16, ranks.world(rank))
    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[r] == results[0] for r in range(size))
    assert same(results[0], alone)
    assert len(set(forwards.values())) == 1                # FSDP gathers in every forward: all ranks make as many


def test_masked_loss_and_accuracy(tiny_model):
    """Truth: cross-entropy and argmax over the targets of the rows the objective made."""
    model, objective = tiny_model(), objectives.Masked(True, 96, [0], 97, mask_ratio=0.5)
    documents = random_documents(6, 30)
    result = scoring.score(model, objective, documents, 0, 32)
    for B in (1, 3, 4):                                                             # the same masks every time
        assert same(scoring.score(model, objective, documents, 0, 32, B=B), result)
    nats, hits, n = 0.0, 0, 0
    segments = scoring.cut_windows(objective, [d for d, _ in documents], 0, 32)
    for i, sequences in enumerate(pack_in_order(segments, 32, 4)):
        batch = data.Batch(**sequences.finish())
        rng = data.RowRandom(mix_keys("eval", 4 * i + np.arange(len(batch.tokens))))
        batch = objective.corrupt(batch, rng)
        with torch.no_grad():
            logits = model.head(model(batch.tokens, batch.position_ids, batch.doc_start, False)).double()
        labels = batch.labels.long()
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        hits += (logits.argmax(-1) == labels).sum().item()
        n += (labels != -100).sum().item()
    assert 0.3 < n / sum(len(d) for d, _ in documents) < 0.7
    assert (result["tokens"], result["accuracy"]) == (n, pytest.approx(hits / n))
    assert result["nats_per_token"] == pytest.approx(nats / n, rel=1e-5)
    assert sum(result["nats_by_document"]) == pytest.approx(nats, rel=1e-5)


@torch.no_grad()
def test_pseudo_likelihood_against_a_loop_over_tokens(tiny_model):
    """Truth: each document's windows alone, one forward pass for each token, which alone is masked (1910.14659)."""
    model, documents = tiny_model().eval(), random_documents(6, 30)
    by_document = []
    for ids, _ in documents:
        ids, nats = torch.from_numpy(ids.astype(np.int64)), 0.0
        for window in ids.split(16):
            for k in range(len(window)):
                seen = window.clone()
                seen[k] = 96
                positions = torch.arange(len(window))[None]
                logits = model.head(model(seen[None], positions, None, False)).double()
                nats -= logits[0, k].log_softmax(-1)[window[k]].item()
        by_document.append(nats)
    objective = objectives.PseudoLikelihood(objectives.Masked(False, 96, [0], 97))
    nats, nbytes = sum(by_document), sum(n for _, n in documents)
    tokens = sum(len(ids) for ids, _ in documents)
    for B in (1, 4):
        result = scoring.score(model, objective, documents, 0, 16, B=B)
        assert same(result, {"nats_per_token": nats / tokens, "perplexity": math.exp(nats / tokens), "tokens": tokens,
                             "bytes": nbytes, "bits_per_byte": nats / math.log(2) / nbytes, "documents": len(documents),
                             "nats_by_document": by_document}, rel=1e-5)
    assert "at a time" in scoring.protocol(objective, 0, 16, torch.float32)["mask_ratio"]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("learned", [[39], []], ids=["last", "none"])
def test_pseudo_likelihood_where_batches_have_nothing_to_score(tiny_model, size, learned):
    """Of three conversations the last token alone is learned, or none. Truth: the last window with that token masked,
    and of nothing a sum of no tokens."""
    objective, model = objectives.PseudoLikelihood(objectives.Masked(False, 96, [0], 97)), tiny_model().eval()
    draw, nats = np.random.default_rng(3), 0.0
    documents = [(draw.integers(0, 96, 40).astype(np.uint16), 3, np.isin(np.arange(40), learned)) for _ in range(3)]
    for ids, *_ in documents if learned else ():
        window = torch.from_numpy(ids[32:].astype(np.int64))
        seen = torch.where(torch.arange(8) == 7, 96, window)[None]
        with torch.no_grad():
            logits = model.head(model(seen, torch.arange(8)[None], None, False)).double()
        nats -= logits[0, 7].log_softmax(-1)[window[7]].item()
    ranks, found = Ranks(size), {}

    def run(rank):
        found[rank] = scoring.score(tiny_model(), objective, documents, 0, 16, ranks.world(rank), B=1)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert [found[rank]["tokens"] for rank in range(size)] == [3 * len(learned)] * size
    assert sum(found[0]["nats_by_document"]) == pytest.approx(nats, rel=1e-5, abs=2e-4)


def test_held_out_documents_end_before_the_limit(tmp_path):
    """Documents of 4, 3 and 2 tokens beside their EOS. The first is taken whatever its length."""
    naive_write(tmp_path / "s", [([1] * n + [257], 10 * n) for n in (4, 3, 2)], split="heldout")
    shards = Shards(tmp_path / "s", "heldout")
    for limit, taken in ((1, 1), (4, 1), (6, 1), (7, 2), (8, 2), (9, 3), (99, 3)):
        found = scoring.heldout_documents(shards, limit)
        assert [(len(ids), nbytes) for ids, nbytes in found] == [(4, 40), (3, 30), (2, 20)][:taken], limit
