"""Truth: examples worked by hand, token by token; T5's own method for spans (random_spans_noise_mask of its repository)
written out here; binomial bounds. Laws: what was taken out, put back, gives the document; a document is rewritten
within itself, by its row's random values alone; a packed document has the loss that it has alone.
"""

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import crash_at, lines, one, settings, trace

import tokenizer
import train
from core.hashing import mix_keys
from data import Batch, RowRandom
from learn.choose_objective import ObjectiveConfig, make_objective
from learn.infilling import UL2, FillInTheMiddle, Span, count_spans
from learn.objectives import IGNORE
from text import extend_vocabulary, packing

BOS, EOS, PRE, SUF, MID, MODE_R, MODE_S, MODE_X = 1, 2, 3, 4, 5, 6, 7, 8
SENTINELS = [*range(100, 140)]
# Ordinary tokens are 10 to 96.
V = 140


def span(**options) -> Span:
    return Span(True, [0, BOS, EOS], SENTINELS, **options)


def ul2(modes=(MODE_R, MODE_S, MODE_X)) -> UL2:
    return UL2(True, [0, BOS, EOS], SENTINELS, [*modes])


def fim(**options) -> FillInTheMiddle:
    return FillInTheMiddle(True, [0, BOS, EOS], [PRE, SUF, MID], **options)


ALL = [span, ul2, fim]


def batch_of(rows: list[list], length: int, seed=0, first=0, reset=True) -> Batch:
    """A batch as the loader makes it; rows: [[tokens of a document], ...], a document may be (tokens, labels)."""
    sequences = packing.Sequences(len(rows), length)
    for row, documents in enumerate(rows):
        for document in documents:
            tokens, labels = document if isinstance(document, tuple) else (document, document)
            sequences.append(row, np.array(tokens), np.array(labels))
    keys = mix_keys(seed, "rows", np.arange(first, first + len(rows)))
    return Batch(**sequences.finish(reset), source=np.zeros(len(rows), np.int64), rng=RowRandom(keys),
                 place=np.arange(first, first + len(rows)))


def document(n: int, seed=0) -> list[int]:
    """BOS, n - 2 ordinary tokens, EOS."""
    return [BOS, *np.random.default_rng(seed).integers(10, 97, n - 2).tolist(), EOS]


def corrupt(objective, batch):
    return objective.corrupt(batch, batch.rng)


def documents_of(made, row=0) -> list[tuple]:
    """(tokens, the label at each) of each document of a corrupted row, in Python's lists, without padding. Of a full
    row the last token is only a target."""
    starts = [*made.doc_start[row].unique().tolist(), made.tokens.shape[1]]
    parts = [(made.tokens[row, a:b].tolist(), made.labels[row, a:b].tolist()) for a, b in itertools.pairwise(starts)]
    if (last := parts[-1][1][-1]) != IGNORE:
        parts[-1] = [*parts[-1][0], last], [*parts[-1][1], IGNORE]
    return [(tokens, labels) for tokens, labels in parts if any(tokens)]


# ---- spans

def test_spans_by_hand(monkeypatch):
    """the cat sat on the mat, without "cat" and without "the mat"; and a document whose prompt the source masks."""
    noise = [False, True, False, False, True, True]
    monkeypatch.setattr(Span, "choose", lambda self, n, draws: (np.array(noise[6 - n:]), 0))
    text = [BOS, 11, 12, 13, 14, 15, 16, EOS]
    made = corrupt(span(), batch_of([[text, ([21, 22, 23, 24], [-100, -100, 23, 24])]], 30))
    first = [BOS, 11, 100, 13, 14, 101, EOS, 100, 12, 101, 15, 16, 102]
    labels = [-100] * 7 + [12, 101, 15, 16, 102, -100]
    # Both of its ordinary tokens that may be learned are noise here.
    second = [21, 22, 100, 100, 23, 24, 101]
    assert made.tokens.tolist() == [first + second + [0] * 9]
    assert made.labels.tolist() == [labels + [-100] * 3 + [23, 24, 101] + [-100] * 10]
    assert made.doc_start.tolist() == [[0] * 13 + [13] * 7 + [20] * 9]
    assert made.position_ids[0, :20].tolist() == [*range(13), *range(7)]
    across = corrupt(span(), batch_of([[text, [BOS, 31, 32, 33, 34, 35, 36]]], 40, reset=False))
    assert across.position_ids[0, :25].tolist() == [*range(25)]
    assert made.tokens.dtype == made.labels.dtype == made.doc_start.dtype == made.position_ids.dtype == torch.int32


def t5_mask(length, density, mean, rng) -> np.ndarray:
    """random_spans_noise_mask of text-to-text-transfer-transformer, t5/data/preprocessors.py, in numpy."""
    noise = min(max(int(np.round(length * density)), 1), length - 1)
    spans = max(int(np.round(noise / mean)), 1)

    def segments(items, parts):
        first_in_segment = np.concatenate([[0], rng.permutation(np.arange(items - 1) < parts - 1)])
        return np.bincount(np.cumsum(first_in_segment.astype(int)))
    lengths = np.stack([segments(length - noise, spans), segments(noise, spans)], axis=1).reshape(-1)
    starts = np.zeros(length, int)
    starts[np.cumsum(lengths)[:-1]] = 1
    return np.cumsum(starts) % 2 == 1


def masks_of(objective, n: int, rows: int) -> np.ndarray:
    rng = RowRandom(mix_keys(3, np.arange(rows)))
    draws = np.stack([rng.uniform(stream, n).numpy() for stream in range(4)], axis=1)
    return np.array([objective.choose(n, each)[0] for each in draws])


@pytest.mark.parametrize(("n", "density", "mean"), [(8, 0.5, 2.0), (12, 0.25, 1.5), (9, 0.3, 3.0), (10, 0.4, 2.0)])
def test_every_mask_of_t5_is_as_likely_as_with_t5(n, density, mean):
    rng, rows = np.random.default_rng(0), 2500
    theirs = Counter(tuple(t5_mask(n, density, mean, rng)) for _ in range(rows))
    ours = Counter(map(tuple, masks_of(span(density=density, mean=mean), n, rows)))
    noise, spans = count_spans(n, density, mean)
    possible = math.comb(noise - 1, spans - 1) * math.comb(n - noise - 1, spans - 1)
    assert theirs.keys() == ours.keys()
    assert len(ours) == possible
    # Chi-square of `possible` equal shares: its mean is possible - 1, its variance twice that.
    for counts in (theirs, ours):
        chi = sum((count - rows / possible)**2 / (rows / possible) for count in counts.values())
        assert chi < possible - 1 + 5 * math.sqrt(2 * max(1, possible - 1))


def test_the_budget_is_exact_at_every_length():
    rng = np.random.default_rng(1)
    for density, mean in ((0.15, 3.0), (0.5, 3.0), (0.15, 64.0), (0.9, 2.0), (0.35, 1.0)):
        objective = span(density=density, mean=mean)
        for n in [*range(2, 90), 255, 256, 1000]:
            mask = masks_of(objective, n, 1)[0]
            begins = (mask & ~np.concatenate([[False], mask[:-1]])).sum()
            assert mask.sum() == min(max(round(n * density), 1), n - 1)
            assert begins == min(max(round(mask.sum() / mean), 1), n - mask.sum())
            if density < 0.5:
                theirs = t5_mask(n, density, mean, rng)
                assert (mask.sum(), begins) == (theirs.sum(), (theirs & ~np.concatenate([[False], theirs[:-1]])).sum())
            assert not mask[0]
            assert mask[-1]


def put_back(tokens: list[int], labels: list[int], sentinels=SENTINELS) -> tuple[list[int], list]:
    """(the document that a rewritten one came from, its spans). What is learned must be the spans, their sentinels and
    the one behind them, and nothing else."""
    order = [t for t in tokens if t in sentinels]
    second = len(tokens) - 1 - tokens[::-1].index(sentinels[0])
    spans, rest = {}, tokens[second:]
    for token in rest:
        if token in sentinels:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    assert order == [*sentinels[:len(spans) - 1], *sentinels[:len(spans)]]
    assert spans.pop(last) == []
    assert labels == [IGNORE] * second + rest[1:] + [IGNORE]
    return [t for token in tokens[:second] for t in spans.get(token, [token])], list(spans.values())


@pytest.mark.parametrize("make", [span, ul2])
def test_what_was_taken_out_and_put_back_gives_the_document(make):
    objective = make() if make is span else ul2(())
    for n in [4, 5, 7, 16, 40, 90]:
        for seed in range(20):
            # A special token in the middle, and a stretch that the source masks.
            tokens = document(n, seed)
            labels = [t if not n // 3 < k < n // 3 + 3 else IGNORE for k, t in enumerate(tokens)]
            tokens[n // 2] = EOS if n > 5 else tokens[n // 2]
            made = corrupt(objective, batch_of([[(tokens, labels)]], 2 * n + 8, seed))
            (rewritten, targets), *rest = documents_of(made)
            ordinary = sum(token > 9 and label != IGNORE for token, label in zip(tokens, labels))
            assert not rest
            if ordinary < 2:
                assert targets == [IGNORE] * len(targets)
                continue
            restored, spans = put_back(rewritten, targets)
            assert restored == tokens
            noise = [token for one in spans for token in one]
            assert min(noise) > 9
            assert not {*noise} & {t for t, label in zip(tokens, labels) if label == IGNORE} or len({*tokens}) < n - 1
            if make is span:
                assert len(noise) == count_spans(ordinary, 0.15, 3.0)[0]


def test_masked_tokens_are_never_noise():
    tokens = [*range(10, 90)]
    labels = [t if t % 3 else IGNORE for t in tokens]
    made = corrupt(span(density=0.5), batch_of([[(tokens, labels)]], 200))
    restored, spans = put_back(*documents_of(made)[0])
    assert restored == tokens
    noise = [t for one in spans for t in one]
    assert all(t % 3 for t in noise)
    assert len(noise) == round(54 * 0.5)
    assert all(np.diff(one).tolist() == [1] * (len(one) - 1) for one in spans)


def test_spans_beyond_the_sentinels_stay_text():
    few = Span(True, [BOS, EOS], SENTINELS[:4], density=0.5, mean=1.0)
    made = corrupt(few, batch_of([[document(22)]], 80))
    restored, spans = put_back(*documents_of(made)[0])
    assert (restored, len(spans)) == (document(22), 3)
    with pytest.raises(ValueError, match=r"needs 14 sentinels, and the vocabulary has 4; .*--sentinels 14"):
        few.text_length(52)
    assert span().text_length(52) > 40


# ---- room

@pytest.mark.parametrize("make", ALL)
def test_one_document_always_fits_and_one_token_more_might_not(make):
    for context in (16, 64, 100):
        objective = make()
        n = objective.text_length(context)
        assert objective.longest(n + objective.shift) <= context + 1 < objective.longest(n + objective.shift + 1)
        longest = 0
        for seed in range(40):
            tokens = document(n + objective.shift, seed)
            made = corrupt(objective, batch_of([[tokens]], context + 1, seed))
            assert made.cut.tolist() == [0]
            assert made.read.tolist() == [n]
            longest = max(longest, int((made.tokens != 0).sum()))
        assert longest >= context - 3


@pytest.mark.parametrize("make", ALL)
def test_what_finds_no_room_is_the_end_and_is_counted(make):
    objective = make()
    rows = [[document(n, k + n) for k in range(64 // n)] for n in (4, 5, 8, 16, 32)]
    made = corrupt(objective, batch_of(rows, 65))
    assert (made.cut[:3] > 0).all()
    for row, documents in enumerate(rows):
        found = documents_of(made, row)
        whole = sum(len(tokens) for tokens in documents) - objective.shift
        assert made.read[row] == whole
        assert 0 <= made.cut[row] < 0.6 * whole
        if make is span:
            restored = [put_back(*each)[0] for each in found if max(each[1]) > 0]
            assert restored[:-1] == documents[:len(restored) - 1]
            assert restored[-1] == documents[len(restored) - 1][:len(restored[-1])]


# ---- fill in the middle

@pytest.mark.parametrize(("spm", "wanted"), [(0.6, [PRE, 11, SUF, 14, 15, MID, 12, 13]),
                                             (0.4, [PRE, SUF, 14, 15, MID, 11, 12, 13])])
def test_the_middle_by_hand(spm, wanted):
    """11 to 15, cut before 12 and before 14; values of streams 0 to 3 are those of the document's first position."""
    values = torch.tensor([[0.4, 0.55, 0.3, spm], [0.6, 0.1, 0.1, 0.1]])
    rng = SimpleNamespace(uniform=lambda stream, n: values[:, stream:stream + 1].expand(2, n))
    batch = batch_of([[[BOS, 11, 12, 13, 14, 15, EOS]], [[BOS, 11, 12, 13, 14, 15, EOS]]], 14)
    made = fim().corrupt(batch, rng)
    rewritten = [BOS, *wanted, EOS]
    assert made.tokens.tolist() == [rewritten + [0] * 3, batch.tokens[1, :13].tolist()]
    assert made.labels[0].tolist() == [*wanted, EOS] + [-100] * 4
    assert made.labels[1].tolist() == [11, 12, 13, 14, 15, EOS] + [-100] * 7
    assert made.part[0][:9].tolist() == [1 if token in (12, 13) else 0 for token in [*wanted, EOS]]
    assert made.part[1][:6].tolist() == [2] * 6


def take_apart(tokens: list[int]) -> tuple:
    """(form, prefix, middle or None, suffix); the middle of SPM stands behind its prefix without a border."""
    body = [t for t in tokens if t not in (BOS, EOS)]
    if PRE not in body:
        return "plain", body, None, None
    assert (body[0], body.count(PRE), body.count(SUF), body.count(MID)) == (PRE, 1, 1, 1)
    suf, mid = body.index(SUF), body.index(MID)
    if suf == 1:
        return "spm", body[mid + 1:], None, body[2:mid]
    return "psm", body[1:suf], body[mid + 1:], body[suf + 1:mid]


def test_fim_s_shares_and_its_cuts():
    rows, n = 4000, 7
    text = [*range(10, 10 + n)]
    made = corrupt(fim(rate=0.7, spm_share=0.4), batch_of([[[BOS, *text, EOS]]] * rows, 14))
    forms, cuts = Counter(), Counter()
    for row in made.tokens.tolist():
        tokens = [t for t in row if t]
        assert (tokens[0], tokens[-1]) == (BOS, EOS)
        form, prefix, middle, suffix = take_apart(tokens)
        forms[form] += 1
        assert prefix + (middle or []) + (suffix or []) == text
        if form == "psm":
            cuts[len(prefix), len(prefix) + len(middle)] += 1
    # Without a prefix both forms are the same, which is so at 15 of 64 pairs of cuts, and counted as SPM.
    for form, share in (("plain", 0.3), ("spm", 0.28 + 0.42 * 15 / 64), ("psm", 0.42 * 49 / 64)):
        assert abs(forms[form] / rows - share) < 5 * math.sqrt(share * (1 - share) / rows)
    # Two independent places, each of the n borders but the first: a pair comes twice as often as a border twice.
    total = sum(cuts.values())
    assert len(cuts) == n * (n + 1) // 2
    for (a, b), count in cuts.items():
        share = (1 + (a < b)) / n**2
        assert abs(count / total - share) < 5 * math.sqrt(share / total)


def test_fim_keeps_the_source_s_masks_and_learns_everything_else():
    tokens = [BOS, *range(10, 40), EOS]
    labels = [t if t % 4 else IGNORE for t in tokens]
    labels[0], labels[-1] = IGNORE, EOS
    made = corrupt(fim(rate=1.0), batch_of([[(tokens, labels)]] * 20, 60))
    for row in range(20):
        (inputs, targets), = documents_of(made, row)
        learned = sorted(t for t in targets if t != IGNORE)
        assert learned == sorted([PRE, SUF, MID, EOS, *(t for t in range(10, 40) if t % 4)])
        assert all(target in (IGNORE, after) for target, after in zip(targets, inputs[1:]))


# ---- UL2

def test_the_denoisers_of_ul2():
    rows, n = 3500, 32
    made = corrupt(ul2(), batch_of([[document(n + 2)]] * rows, 64))
    lengths, parts = [], Counter()
    for row in range(rows):
        (tokens, targets), = documents_of(made, row)
        mode = tokens[1]
        assert tokens[0] == BOS
        part = mode - MODE_R + 1
        assert {*made.part[row][[t != IGNORE for t in made.labels[row].tolist()]].tolist()} == {part}
        restored, spans = put_back([t for t in tokens if t != mode], targets[1:])
        assert restored == document(n + 2)
        sizes = tuple(map(len, spans))
        parts[mode, (sum(sizes), len(sizes)) if mode != MODE_S else "end"] += 1
        if mode == MODE_S:
            lengths.append(sizes[0])
            assert spans == [document(n + 2)[-1 - sizes[0]:-1]]
    # 32 * 0.15 is 4.8 and 32 * 0.5 is 16: (5 noise tokens, 2 spans of 3) and (5, 1 of 8); (16, 5 of 3), (16, 2 of 8);
    # (5, 1 of 64), (16, 1 of 64).
    wanted = {(MODE_R, (5, 2)), (MODE_R, (5, 1)), (MODE_S, "end"), (MODE_X, (16, 5)), (MODE_X, (16, 2)),
              (MODE_X, (5, 1)), (MODE_X, (16, 1))}
    assert parts.keys() == wanted
    assert all(abs(count / rows - 1 / 7) < 5 * math.sqrt(6 / 49 / rows) for count in parts.values())
    # Uniform from 1 to half of the text
    assert {*lengths} == {*range(1, 17)}
    assert abs(np.mean(lengths) - 8.5) < 5 * math.sqrt((16**2 - 1) / 12 / len(lengths))


# ---- all three

MIXED = [[document(20, 1), document(9, 2)], [document(30, 3)], [document(5, 4), document(5, 5), document(14, 6)],
         [document(3, 7), document(21, 8)]]


def same(a, b) -> bool:
    names = ("tokens", "labels", "position_ids", "doc_start", "part", "read", "cut")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("make", ALL)
def test_a_row_depends_on_its_own_random_values_alone(make):
    objective = span(density=0.4, mean=2.0) if make is span else make()
    whole = corrupt(objective, batch_of(MIXED, 50))
    for row in range(4):
        alone = corrupt(objective, batch_of(MIXED[row:row + 1], 50, first=row))
        for name in ("tokens", "labels", "position_ids", "doc_start", "part", "read", "cut"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[row]), name
    assert same(whole, corrupt(objective, batch_of(MIXED, 50)))
    # Another seed or epoch has other keys.
    assert not same(whole, corrupt(objective, batch_of(MIXED, 50, seed=1)))
    twice = corrupt(objective, batch_of([MIXED[1]] * 12, 50))
    assert len({tuple(row) for row in twice.tokens.tolist()}) > 4


@pytest.mark.parametrize("make", ALL)
def test_a_packed_document_has_the_loss_that_it_has_alone(make, tiny_model):
    """Truth: torch's cross-entropy on each rewritten document by itself; sums over rows and micro-batches agree."""
    model, objective = tiny_model(vocab_size=V), make()
    batch = corrupt(objective, batch_of(MIXED, 50))
    loss, count, metrics = objective.loss(model, batch)
    alone = targets = hits = 0
    parts = Counter()
    for row in range(4):
        for tokens, labels in documents_of(batch, row):
            logits = model.head(model(torch.tensor([tokens])))[0]
            labels = torch.tensor(labels)
            kept = labels != IGNORE
            each = F.cross_entropy(logits[kept], labels[kept], reduction="none")
            alone, targets = alone + each.sum().item(), targets + int(kept.sum())
            hits += int((logits.argmax(-1)[kept] == labels[kept]).sum())
    for row, column in (batch.labels != IGNORE).nonzero().tolist():
        parts[int(batch.part[row, column])] += 1
    assert loss.item() == pytest.approx(alone, rel=1e-5)
    assert count == targets == objective.count(batch)
    measured = metrics["measures"]
    assert {*measured} == {*objective.measures}
    assert [x.item() for x in measured["accuracy"]] == [hits, targets]
    assert [x.item() for x in measured["cut"]] == [batch.cut.sum(), batch.read.sum()]
    for i, name in enumerate(objective.parts, 1):
        here = (batch.part == i) & (batch.labels != IGNORE)
        assert measured[name][1] == parts[i] == here.sum()
        assert measured[name][0].item() == pytest.approx(metrics["token_loss"][here].sum().item(), rel=1e-5)
    micro_batches = [corrupt(objective, batch_of(MIXED[a:b], 50, first=a)) for a, b in ((0, 1), (1, 4))]
    split = [objective.loss(model, one) for one in micro_batches]
    assert sum(part[0].item() for part in split) == pytest.approx(loss.item(), rel=1e-5)
    assert sum(part[1].item() for part in split) == count


# ---- runs

@pytest.mark.parametrize("name", ["span", "ul2", "fim"])
def test_a_run_resumes_bit_for_bit_and_accumulates_the_same_loss(name, lab, tmp_path, monkeypatch, quick):
    """The sources are those that the tokenizer packed before it got its tokens."""
    extend_vocabulary.add(lab / "tok", [], tmp_path / "tok", objectives=["ul2", "fim"], sentinels=20)
    words = ["--model.tokenizer", tmp_path / "tok", "--objective.name", name, "--train.save-every", 3]
    runs = {size: settings(lab, tmp_path / str(size), *words, "--train.micro-batch-size", size) for size in (1, 4)}
    for c in runs.values():
        assert train.train(c, one()) == 0
    losses = [[record["loss"] for record in lines(tmp_path / size, "train")] for size in ("1", "4")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    again = settings(lab, tmp_path / "again", *words, "--train.micro-batch-size", 4)
    crash_at(monkeypatch, again, 7)
    assert train.train(again, one()) == 0
    assert trace(tmp_path / "again") == trace(tmp_path / "4")
    measured = json.loads((tmp_path / "4/eval.json").read_text())["objective"]["after"]["legal"]
    made = make_objective(again.objective, True, tokenizer.load(tmp_path / "tok"), 400)
    assert {"loss", "accuracy", "cut"} <= {*measured} <= {"loss", "sequences", *made.measures}


# ---- the settings

def tokenizer_with(*names):
    vocab = {"<s>": 0} | {f"t{i}": i for i in range(1, 50)} | {name: i for i, name in enumerate(names, 50)}
    return SimpleNamespace(vocab=vocab, special_ids=[0], mask_id=None,
                           missing_ids=lambda rows: [*range(len(vocab), rows)])


def test_which_tokens_an_objective_finds():
    four = [f"<extra_id_{i}>" for i in range(4)]
    config = ObjectiveConfig("span", mask_ratio=0.3, span_length=2.0)
    made = make_objective(config, True, tokenizer_with(*four[::-1]), 60)
    assert (made.sentinels.tolist(), made.density, made.mean) == ([53, 52, 51, 50], 0.3, 2.0)
    assert {0, 50, 51, 52, 53, 54, 59} <= {*made.special.tolist()}
    assert make_objective(ObjectiveConfig("ul2"), True, tokenizer_with(*four), 54).modes is None
    made = make_objective(ObjectiveConfig("ul2"), True, tokenizer_with(*four, "[S2S]", "[NLU]", "[NLG]"), 57)
    assert made.modes == [55, 54, 56]
    for names in (("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
                  ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
                  ("▁<PRE>", "▁<MID>", "▁<SUF>"), ("<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜fim▁hole｜>")):
        made = make_objective(ObjectiveConfig("fim", fim_rate=0.9, spm_share=0.1), False, tokenizer_with(*names), 53)
        assert (made.tokens, made.rate, made.spm_share, made.mask_documents) == ([50, 52, 51], 0.9, 0.1, False)
    assert make_objective(ObjectiveConfig("masked"), True, tokenizer_with("[MASK]"), 51).mask_id == 50


@pytest.mark.parametrize("name", ["span", "ul2", "fim", "masked"])
def test_the_refusal_names_the_command(name):
    with pytest.raises(ValueError, match=f"python tokenizer.py add --model DIR --for {name} --out DIR2"):
        make_objective(ObjectiveConfig(name), True, tokenizer_with(), 60)


def test_a_context_without_room_is_refused():
    with pytest.raises(ValueError, match=r"data\.context 2 is too short"):
        span().text_length(2)
