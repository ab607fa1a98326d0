"""Log-likelihoods of continuations. Truth: transformers, one request at a time, without a cache, in float64."""

import random
import threading

import pytest
import torch

import hf
from core.parallel import World
from measure import likelihoods
from measure.likelihoods import log_likelihoods

pytestmark = pytest.mark.usefixtures("one_thread")
# What the questions of a part begin with, as few-shot examples do.
HEADS = {"law": tuple(range(1, 24)), "medicine": tuple(range(50, 62)), "": ()}


def make_questions(seed: int = 0) -> tuple[list, list]:
    """(questions, their parts): choices of one and of many tokens, equal ones, contexts of one length and of others,
    requests longer than 64 positions, and contexts that differ within a question."""
    rng = random.Random(seed)

    def draw(low, high):
        return [rng.randrange(1, 97) for _ in range(rng.randint(low, high))]
    questions, parts = [], []
    for part, head in HEADS.items():
        for length in (1, 12, 12, 12, 20, 45):
            context = [*head, *draw(length, length)]
            questions.append([(context, draw(1, 9)) for _ in range(4)])
        questions += [[([*head, *draw(9, 9)], [choice]) for choice in (3, 4, 5)] for _ in range(2)]
        context, choice = [*head, 7], draw(3, 5)
        questions.append([(context, choice), (context, choice), ([*context, 9], choice)])
        questions.append([(draw(70, 70), draw(5, 5)) for _ in range(2)])
        parts += [part] * (len(questions) - len(parts))
    return questions, parts


@torch.no_grad()
def one_by_one(model, questions, longest: int = 64) -> list:
    found = []
    for requests in questions:
        found.append([])
        for context, continuation in requests:
            ids = torch.tensor([*context, *continuation])[-(longest + 1):]
            log_probs = model.double()(ids[None, :-1]).logits[0].log_softmax(-1)[-len(continuation):]
            wanted = ids[-len(continuation):]
            found[-1].append((log_probs.gather(1, wanted[:, None]).sum().item(),
                              bool((log_probs.argmax(-1) == wanted).all())))
    return found


def assert_same(found, expected):
    for own, others in zip(found, expected, strict=True):
        assert [nats for nats, _ in own] == pytest.approx([nats for nats, _ in others], rel=1e-5, abs=1e-5)
        assert [is_best for _, is_best in own] == [is_best for _, is_best in others]


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 30, "factor": 2.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 3.5]}


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mistral", {"sliding_window": 9}),
                                                 ("llama", {"rope_parameters": LONGROPE})])
def test_each_batch_size_gives_what_transformers_gives(hf_model, family, changes):
    theirs, folder = hf_model(family, **changes)
    model, (questions, parts) = hf.load(folder), make_questions()
    expected = one_by_one(theirs, questions)
    # The likeliest continuation, so that some are greedy.
    assert not all(is_best for own in expected for _, is_best in own)
    for B in (1, 3, 32):
        found, cut = log_likelihoods(model, questions, parts, B=B)
        assert_same(found, expected)
        assert cut == sum(len([*a, *b]) > 65 for own in questions for a, b in own) > 0
    assert_same(log_likelihoods(model, questions, B=4)[0], expected)
    assert_same(log_likelihoods(model, questions, parts, longest=30)[0], one_by_one(theirs, questions, 30))


def test_a_greedy_continuation_is_told(hf_model):
    theirs, folder = hf_model("llama")
    context = [5, 6, 7]
    best = theirs.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 3:]
    [[(_, is_best), (_, is_other)]], _ = log_likelihoods(
        hf.load(folder), [[(context, best.tolist()), (context, [*best.tolist()[:3], 1 + best.tolist()[3] % 90])]])
    assert (is_best, is_other) == (True, False)


def test_what_is_shared_is_computed_once(tiny_model):
    """Ten questions of four choices behind the same 30 ids, each with a context of 12 of its own."""
    model, tokens = tiny_model(), []
    model.embed_tokens.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    rng = random.Random(1)
    head = [*range(1, 31)]
    contexts = [[*head, *(rng.randrange(1, 97) for _ in range(12))] for _ in range(10)]
    questions = [[(context, [choice, 3, 4]) for choice in (5, 6, 7, 8)] for context in contexts]
    log_likelihoods(model, questions)
    # The head, its last id apart; the contexts, of which the last id goes with each choice; the choices without their
    # last id.
    assert sum(tokens) <= 30 + 10 * 12 + 40 * 3
    # A question that is cut begins otherwise, and leaves the others what they share.
    tokens.clear()
    log_likelihoods(model, [*questions, [([*range(1, 90)], [5])]])
    assert sum(tokens) <= 30 + 10 * 12 + 40 * 3 + 64
    # Choices of one token are read from one place.
    tokens.clear()
    log_likelihoods(model, [[(context, [choice]) for choice in (5, 6, 7, 8)] for context in contexts])
    assert sum(tokens) <= 30 + 10 * 12


def test_logits_are_made_in_parts(hf_model, monkeypatch):
    theirs, folder = hf_model("llama")
    questions, parts = make_questions(2)
    monkeypatch.setattr(likelihoods, "MOST_LOGITS", 97 * 3)
    assert_same(log_likelihoods(hf.load(folder), questions, parts)[0], one_by_one(theirs, questions))


@pytest.mark.parametrize("B", [1, 8])
def test_ranks_share_the_work(hf_model, B):
    """Two ranks, a thread each: both return what one alone does, and make equally many forward passes."""
    _, folder = hf_model("llama")
    questions, parts = make_questions(3)
    alone, meeting, box, found, forwards = log_likelihoods(hf.load(folder), questions, parts, B=B)[0], \
        threading.Barrier(2), {}, {}, [0, 0]

    class Rank(World):
        def barrier(self):
            # A rank that comes here with other forward passes behind it would wait for ever under FSDP.
            box[self.rank] = forwards[self.rank]
            meeting.wait(20)
            assert box[0] == box[1]
            meeting.wait(20)

        def gather(self, value):
            box[self.rank] = value
            meeting.wait(20)
            return [box[0], box[1]]

    def work(rank):
        model = hf.load(folder)
        model.embed_tokens.register_forward_hook(lambda *_: forwards.__setitem__(rank, forwards[rank] + 1))
        world = Rank(rank, 2, torch.device("cpu"))
        world.check = lambda: None
        found[rank] = log_likelihoods(model, questions, parts, B=B, world=world)[0]
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1]
    assert_same(found[0], alone)
