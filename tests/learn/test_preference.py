"""Truth: DPO's, IPO's and ORPO's formulas as their papers write them, on full logits of each answer alone, in float64.
Laws: a reference is the same with the adapters off, as a copy and from the file; packing, micro-batches and ranks do
not change a step; a resumed run is the same in every bit."""

import contextlib
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from runs import arguments, command, crash_at, lines, one, same_checkpoint, settings, trace
from safetensors.torch import load_file
from synthetic import texts

import eval as evaluation
import tokenizer as tokenizers
import train
from core import parallel
from core.errors import UserError
from data import Batch, read_batch
from learn.preference import DPO, IPO, ORPO, Preference, StoredReference
from stages.build import build, describe_learning
from text.chat import Example, Segment, encode_examples
from text.heldout import is_held_out, normalise
from text.packing import Sequences
from text.shards import Shards, pack

IGNORE = -100
KINDS = {"dpo": DPO, "ipo": IPO, "orpo": ORPO}


# ---- batches and pairs by hand

def draw_pairs(n: int, seed: int = 0, prompt: int = 3) -> list[list]:
    """n pairs [(tokens, labels) of the chosen, of the rejected]: a prompt that both share, and answers."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(n):
        asked = rng.integers(0, 97, prompt)
        pairs.append([(np.concatenate([asked, answer]), np.concatenate([np.full(prompt, IGNORE), answer]))
                      for answer in (rng.integers(0, 97, rng.integers(1, 9)) for _ in range(2))])
    return pairs


def batch_of(rows: list[list], T: int = 40) -> Batch:
    """A batch [B, T + 1] whose sequences hold these pairs."""
    sequences = Sequences(len(rows), T + 1)
    for row, pairs in enumerate(rows):
        for document in (document for pair in pairs for document in pair):
            sequences.append(row, *document)
    return Batch(**sequences.finish(), source=np.zeros(len(rows), np.int64), place=np.arange(len(rows)))


def corrupted(objective, rows, T: int = 40) -> Batch:
    return objective.corrupt(batch_of(rows, T), None)


def answer_of(model, tokens, labels) -> tuple[torch.Tensor, int]:
    """(log-probability of an answer, its tokens), from all logits of its document alone."""
    tokens, labels = torch.as_tensor(tokens)[None], torch.as_tensor(labels)
    log_p = torch.log_softmax(model.head(model(tokens[:, :-1].int())), -1)[0]
    kept = labels[1:] != IGNORE
    return log_p[kept].gather(1, labels[1:][kept][:, None]).sum(), int(kept.sum())


def truth(name: str, beta: float, model, reference, pairs) -> torch.Tensor:
    """The sum of the papers' losses: DPO eq. 7, IPO eq. 17 with mean log-probabilities, ORPO eq. 6 and 7."""
    total = 0
    for pair in pairs:
        (c, n), (r, m) = (answer_of(model, *document) for document in pair)
        with torch.no_grad():
            c0, r0 = (answer_of(reference, *document)[0] for document in pair)
        if name == "dpo":
            ratio = (c - c0) - (r - r0)
            total = total - torch.log(1 / (1 + torch.exp(-beta * ratio)))
        elif name == "ipo":
            total = total + ((c - c0) / n - (r - r0) / m - 1 / (2 * beta)) ** 2
        else:
            p, q = torch.exp(c / n), torch.exp(r / m)
            ratio = torch.log((p / (1 - p)) / (q / (1 - q)))
            total = total - torch.log(p) - beta * torch.log(1 / (1 + torch.exp(-ratio)))
    return total


def with_reference(objective: Preference, reference) -> Preference:
    objective.reference = lambda model: contextlib.nullcontext(reference)
    return objective


def gradients(model) -> dict:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


# ---- losses

@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_the_papers(tiny_model, name, beta):
    model, reference, pairs = tiny_model(1).double(), tiny_model(2).double(), draw_pairs(5)
    objective = with_reference(KINDS[name](beta), reference)
    batch = corrupted(objective, [pairs[:2], pairs[2:4], pairs[4:]])
    loss, count, metrics = objective.loss(model, batch)
    loss.backward()
    ours, wanted = gradients(model), truth(name, beta, model, reference, pairs)
    wanted.backward()
    assert count == objective.count(batch) == 5
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    assert metrics["sequence_loss"].sum().item() == pytest.approx(loss.item(), rel=1e-9)
    assert metrics["sequence_targets"].tolist() == [2, 2, 1]
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-7, atol=1e-10, msg=key)
    with torch.no_grad():
        assert objective.loss(model, batch)[0].item() == loss.item()
    assert not any(p.grad is not None for p in reference.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_measures_by_hand(tiny_model, name):
    """Over two pairs: rewards, which answer is above, log-probabilities and how they changed."""
    model, reference, pairs = tiny_model(1).double(), tiny_model(2).double(), draw_pairs(2, seed=3)
    objective = with_reference(KINDS[name](0.2), reference)
    measures = objective.loss(model, corrupted(objective, [pairs]))[2]["measures"]
    assert measures.keys() == set(objective.measures)
    got = {key: (total / number).item() for key, (total, number) in measures.items()}
    rows = []
    for pair in pairs:
        (c, n), (r, m) = (answer_of(model, *document) for document in pair)
        (c0, _), (r0, _) = (answer_of(reference, *document) for document in pair)
        if name != "dpo":
            c, r, c0, r0 = c / n, r / m, c0 / n, r0 / m
        c, r, c0, r0 = (value.item() for value in (c, r, c0, r0))
        if name == "orpo":
            margin = math.log(math.exp(c) / (1 - math.exp(c))) - math.log(math.exp(r) / (1 - math.exp(r)))
            more = {"chosen_loss": -c}
        else:
            margin = 0.2 * ((c - c0) - (r - r0))
            more = {"chosen_change": c - c0, "rejected_change": r - r0}
        rows.append({"margin": margin, "accuracy": float(margin > 0), "chosen_logp": c, "rejected_logp": r, **more})
    assert got == pytest.approx({key: sum(row[key] for row in rows) / 2 for key in rows[0]}, rel=1e-9)


def test_before_the_first_step_nothing_is_preferred(tiny_model):
    model, objective = tiny_model(1), DPO(0.1)
    with_reference(objective, model)
    loss, _count, metrics = objective.loss(model, corrupted(objective, [draw_pairs(3)]))
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-6)
    assert {name: (total / number).item() for name, (total, number) in metrics["measures"].items()} | {
        "chosen_logp": 0, "rejected_logp": 0} == {"margin": 0, "accuracy": 0.5, "chosen_logp": 0, "rejected_logp": 0,
                                                  "chosen_change": 0, "rejected_change": 0}


@pytest.mark.parametrize("name", KINDS)
def test_packing_and_micro_batches_do_not_change_a_loss(tiny_model, name):
    """The law of accumulation: the pairs of a step in other sequences, in other batches, between other neighbours."""
    model, pairs = tiny_model(1).double(), draw_pairs(6)
    objective, found = with_reference(KINDS[name](0.3), tiny_model(2).double()), []
    for batches in ([[pairs]], [[pairs[:3]], [pairs[3:]]], [[pairs[4:5], pairs[:1]], [pairs[1:4], pairs[5:]]]):
        made = [corrupted(objective, rows, T) for rows, T in zip(batches, (150, 97))]
        for batch in made:
            (objective.loss(model, batch)[0] / sum(map(objective.count, made))).backward()
        found.append(gradients(model))
    for other in found[1:]:
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-8, atol=1e-11, msg=key)


def test_an_answer_that_is_certain_has_a_finite_loss():
    policy = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    losses, _ = ORPO(0.5).pair_loss(policy, None)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert policy.grad.isfinite().all()


def test_no_logits_of_the_sequence_exist(tiny_model, monkeypatch):
    monkeypatch.setattr("kernels.cross_entropy.CHUNK_BYTES", 97 * 4 * 64)
    model, objective = tiny_model(1), DPO(0.1)
    with_reference(objective, tiny_model(2))
    batch, largest = corrupted(objective, [draw_pairs(5)] * 3, 100), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (97,):
                largest = max(largest, out.numel() // 97)
            return out
    with Watch():
        objective.loss(model, batch)[0].backward()
    assert largest <= 97


# ---- runs

def pack_pairs(folder, tokenizer, documents, heldout=0.2):
    """A preference source of documents [(prompt, chosen, rejected)] that stand alone, without any template."""
    examples = [Example(f"{i} {asked}", [[Segment(asked, False), Segment(answer, True)] for answer in answers])
                for i, (asked, *answers) in enumerate(documents)]
    pack(examples, tokenizer, folder, encode=functools.partial(encode_examples, {}, None), heldout=heldout,
         records={"format": "preference", "learn": "responses", "template": "none"})
    return folder


@pytest.fixture(scope="session")
def prefs(base, tmp_path_factory):
    """(lab, base, a preference source): the chosen answers are of another kind of text than the rejected ones."""
    folder = tmp_path_factory.mktemp("prefs")
    asked, chosen, rejected = (texts(kind, 60) for kind in ("story", "legal", "story"))
    documents = [(a[:12], c[:30], r[:30]) for a, c, r in zip(asked, chosen, reversed(rejected))]
    return *base, pack_pairs(folder / "prefs", tokenizers.load(base[0] / "tok"), documents)


def words_of(prefs, out, *more, steps=6, name="dpo") -> list[str]:
    """A run on the preferences alone; the lab's general text is scored and not learned."""
    lab, base, folder = prefs
    return arguments(lab, out, "--model.init", "pretrained", "--model.path", base, "--data.sources.legal.path", folder,
                     "--data.sources.story.weight", 0, "--objective.name", name, "--data.context", 64, "--optim.lr",
                     "3e-3", "--eval.tokens", 2000, *more, steps=steps)


def run_of_pairs(prefs, out, *more, **options):
    lab = prefs[0]
    return settings(lab, out, *words_of(prefs, out, *more, **options))


def built(prefs, tmp_path, *more):
    tmp_path.mkdir()
    return build(run_of_pairs(prefs, tmp_path, *more), one(), tmp_path)


REFERENCES = {"a frozen copy": [], "precomputed": ["--objective.precompute"],
              "adapters off": ["--lora.rank", 2], "the base, named": ["--objective.reference"],
              "named, precomputed": ["--objective.precompute", "--objective.reference"]}


@pytest.mark.usefixtures("quick")
def test_the_reference_is_the_same_wherever_it_comes_from(prefs, tmp_path):
    """A model that has moved away from its base, and five ways to ask the base: equal in every bit."""
    found = {}
    for name, words in REFERENCES.items():
        words = [*words, prefs[1]] if words and words[-1] == "--objective.reference" else words
        with built(prefs, tmp_path / name, *words, "--train.micro-batch-size", 1) as run:
            with torch.no_grad():
                for p in run.inner.parameters():
                    if p.requires_grad:
                        p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            assert (run.objective.stored is not None) == ("precomputed" in name)
            assert (run.objective.reference is None) == ("precomputed" in name)
            packings, found[name] = [*run.loader.packings.values(), *run.held.values()], []
            # The first source, and its held-out part behind the two.
            for source in (0, 2):
                for number in range(0, packings[source].sequences, 3):
                    batch = read_batch(packings[source], np.array([number]), source)
                    batch = run.objective.corrupt(batch, batch.rng)
                    own = run.objective.log_probabilities(run.inner, batch)
                    found[name].append(run.objective.reference_log_probabilities(run.inner, batch))
                    assert not torch.equal(own, found[name][-1])
    wanted = found.pop("a frozen copy")
    assert sum(int((values < 0).sum()) for values in wanted) > 20
    for name, values in found.items():
        assert all(torch.equal(a, b) for a, b in zip(values, wanted)), name


@pytest.mark.usefixtures("quick")
def test_a_resumed_run_takes_the_stored_values_and_another_run_does_not(prefs, tmp_path, monkeypatch, capsys):
    whole, out = (run_of_pairs(prefs, tmp_path / name, "--objective.precompute") for name in ("whole", "out"))
    assert train.train(whole, one()) == 0
    passes, real = [], Preference.log_probabilities
    monkeypatch.setattr(Preference, "log_probabilities", lambda *given: passes.append(1) or real(*given))
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, run_of_pairs(prefs, tmp_path / "out", "--objective.precompute", "--train.save-every", 2), 3)
    folder, = (tmp_path / "out").glob("reference_*")
    n, first = len(passes), {file.name: file.read_bytes() for file in folder.iterdir()}
    assert n > 5
    assert train.train(out, one()) == 0
    assert len(passes) == n, "the reference was asked again"
    assert trace(tmp_path / "out") == trace(tmp_path / "whole")
    same_checkpoint(tmp_path / "out", tmp_path / "whole", 6)
    # A file that a disk has damaged is made again, and is what it was.
    damaged, = folder.glob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"damaged!!")
    build(out, one(), tmp_path / "out").__exit__(None, None, None)
    assert len(passes) == 2 * n
    (tmp_path / "first").write_bytes(first[damaged.name])
    was, now = load_file(tmp_path / "first"), load_file(damaged)
    assert was.keys() == now.keys()
    assert all(torch.equal(was[key], now[key]) for key in was)
    # Other weights, another context, other pairs: other values.
    documents = [("ab", "b " * k, "c") for k in range(1, 30)]
    other = pack_pairs(tmp_path / "other", tokenizers.load(prefs[0] / "tok"), documents)
    for words in (["--data.context", 60], ["--data.sources.legal.path", other],
                  ["--objective.reference", f"{whole.out}/final"]):
        before = len(passes)
        build(run_of_pairs(prefs, tmp_path / "out", "--objective.precompute", *words), one(),
              tmp_path / "out").__exit__(None, None, None)
        assert len(passes) > before, words
    assert len(list((tmp_path / "out").glob("reference_*"))) == 4


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", KINDS)
def test_a_run_prefers_what_was_chosen_and_says_what_that_cost(prefs, tmp_path, name, capsys):
    out = tmp_path / "run"
    assert train.train(run_of_pairs(prefs, out, steps=12, name=name), one()) == 0
    result = json.loads((out / "eval.json").read_text())
    before, after = (result["objective"][side]["legal"] for side in ("before", "after"))
    assert result["objective"]["name"] == name
    assert after["margin"] > before["margin"] + 0.05
    assert after["loss"] < before["loss"]
    assert set(after) == {"loss", "sequences", *KINDS[name].measures}
    if name != "orpo":
        assert (before["margin"], before["accuracy"], before["chosen_change"]) == (0, 0.5, 0)
        assert after["accuracy"] > 0.7
        assert after["chosen_change"] == pytest.approx(after["chosen_logp"] - before["chosen_logp"], rel=1e-4)
    # Pairs are no text: only the general source is scored in bits per byte.
    assert list(result["after"]) == ["story"]
    said = capsys.readouterr().out
    assert "held-out pairs" in said
    assert "packing: legal best_fit of whole pairs, story window; " in said
    # Their losses are no nats of a token, so that exp(loss) would be no perplexity.
    assert "| loss " in said
    assert " ppl " not in said
    for row in lines(out, "train"):
        assert set(row["objective"]) == set(KINDS[name].measures)
        assert row["loss"] == row["sources"]["legal"]["loss"]
    # eval.py finds the same of what was exported, beside the base.
    words = {"model": f"{out}/final", "text": [f"prefs={prefs[2]}"], "context": 64}
    with_base = evaluation.Eval(**words, baseline=str(prefs[1]))
    scored = evaluation.run_eval(with_base, ["--objective.name", name])
    assert scored["texts"]["prefs"]["objective"] == pytest.approx(after, rel=1e-3, abs=1e-3)
    assert scored["baseline"]["texts"]["prefs"]["objective"] == pytest.approx(before, rel=1e-3, abs=1e-3)
    if name != "orpo":
        with pytest.raises(UserError, match=f"objective {name} compares .*--baseline"):
            evaluation.run_eval(evaluation.Eval(**words), ["--objective.name", name])


def test_a_fall_of_the_chosen_answers_is_said():
    def sides(chosen, rejected):
        return {"chosen_logp": -40.0, "rejected_logp": -42.0}, {"chosen_logp": chosen, "rejected_logp": rejected}
    for chosen, rejected in ((-38, -50), (-41, -50), (-45, -53), (-40.1, -42.1)):
        assert DPO(0.1).judge(*sides(chosen, rejected)) == [], (chosen, rejected)
    for chosen, rejected in ((-45, -51), (-60, -62), (-45, -40)):
        line, = DPO(0.1).judge(*sides(chosen, rejected))
        assert f"lost {-40 - chosen:.3g} nats of log-probability" in line
        assert f"rose by {chosen - rejected - 2:.3g}" in line


@pytest.mark.usefixtures("quick")
def test_two_ranks_share_the_pairs_of_a_step_and_of_the_reference(prefs, tmp_path):
    """The sums over two ranks, one after the other, are those of one: counts, losses, gradients, stored values."""
    found = []
    for name, ranks in (("one", 1), ("two", 2)):
        sums, stored = {}, 0
        for rank in range(ranks):
            (tmp_path / name).mkdir(exist_ok=True)
            with build(run_of_pairs(prefs, tmp_path / name, "--data.context", 160), one(), tmp_path / name) as run:
                run.world = parallel.World(rank, ranks, torch.device("cpu"))
                # What each rank would give to the others.
                run.world.sum = lambda values: [float(value) for value in values]
                learning = dataclasses.replace(describe_learning(run), folder=None)
                values = StoredReference(run.objective, run.inner, contextlib.nullcontext, learning).values
                stored = stored + torch.cat([*values.values()])
                for batch in train.micro_batches(run, 1):
                    loss, count, _ = run.objective.loss(run.inner, batch)
                    loss.backward()
                    assert count == run.objective.count(batch)
                    sums["count"] = sums.get("count", 0) + int(count)
                    sums["loss"] = sums.get("loss", 0) + loss.item()
                for key, gradient in gradients(run.inner).items():
                    sums[key] = sums.get(key, 0) + gradient
        found.append((sums, stored))
    (one_rank, stored), (two_ranks, shared) = found
    assert one_rank["count"] == two_ranks["count"] > 4
    assert torch.equal(stored, shared)
    assert (stored < 0).all()
    for key, value in one_rank.items():
        torch.testing.assert_close(two_ranks[key], value, rtol=1e-5, atol=1e-6, msg=key)


# ---- mistakes

MISTAKES = {
    "text": (["--data.sources.story.weight", 1], r"source story holds documents of the form text, and the objective "
             r"learns from preference"),
    "a causal run": (["--objective.name", "causal"], r"source legal holds documents of the form preference.*dpo, ipo"),
    "neighbours": (["--data.mask-documents", "false"], r"objective dpo compares documents .* data\.mask_documents"),
    "lwf": (["--forget.lwf.alpha", 0.5], r"forget\.lwf has a divergence per token, and objective dpo"),
    "z-loss": (["--objective.z-loss", 0.1], r"objective\.z_loss is 0\.1, but objective dpo does not"),
    "orpo's reference": (["--objective.name", "orpo", "--objective.precompute"],
                         r"objective\.precompute is True, but objective orpo"),
    "scratch": (["--model.init", "scratch"], r"model\.init scratch has none"),
}


@pytest.mark.usefixtures("quick")
def test_a_source_whose_held_out_pairs_are_all_too_long_is_trained_on_and_not_evaluated(prefs, tmp_path, capsys):
    asked, chosen, rejected = (texts(kind, 60) for kind in ("story", "legal", "story"))
    long = [is_held_out(normalise(f"{i} {a[:12]}").encode(), 0.2) for i, a in enumerate(asked)]
    assert 0 < sum(long) < 60
    documents = [(a[:12], c[:30] * (1 + 20 * longer), r[:30]) for a, c, r, longer in
                 zip(asked, chosen, reversed(rejected), long)]
    folder = pack_pairs(tmp_path / "long", tokenizers.load(prefs[0] / "tok"), documents)
    assert Shards(folder, "heldout").documents == 2 * sum(long)
    train.train(run_of_pairs((*prefs[:2], folder), tmp_path / "run", steps=2), one())
    assert "source legal has no held-out documents that fit into data.context 64, so" in capsys.readouterr().out
    assert "objective" not in json.loads((tmp_path / "run/eval.json").read_text())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(prefs, tmp_path, monkeypatch, capsys, name):
    words, message = MISTAKES[name]
    status, _, errors = command(monkeypatch, capsys, words_of(prefs, tmp_path / "run", *words))
    assert status == 2
    assert len(errors.splitlines()) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(errors)


def test_answers_of_which_nothing_is_learned_are_found_before_the_run(prefs, tmp_path):
    tok = tokenizers.load(prefs[0] / "tok")
    documents = [("abc", "def", "ghi")] * 7
    folder = pack_pairs(tmp_path / "whole", tok, documents, heldout=0)
    DPO(0.1).check_source("prefs", Shards(folder))
    examples = [Example(str(i), [[Segment("abc", False), Segment("def", True)],
                                 [Segment("abc", False), Segment("ghi", i != 4)]]) for i in range(7)]
    pack(examples, tok, tmp_path / "masked", encode=functools.partial(encode_examples, {}, None), heldout=0,
         records={"format": "preference", "learn": "responses", "template": "none"})
    with pytest.raises(UserError, match="in 1 answers nothing is learned, first the rejected one of pair 4"):
        DPO(0.1).check_source("prefs", Shards(tmp_path / "masked"))
    shards = Shards(folder)
    shards.document_ends = lambda: Shards(folder).document_ends()[:-1]
    with pytest.raises(UserError, match="source prefs holds 13 documents, and those of preferences come in pairs"):
        DPO(0.1).check_source("prefs", shards)
