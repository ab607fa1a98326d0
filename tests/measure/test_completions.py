"""What models write behind prompts. Truth: transformers' greedy decoding, one prompt at a time."""

import random
import threading

import pytest
import torch
from synthetic import Bytes

import hf
from core.parallel import World
from generate import Settings
from measure.completions import complete_all

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = Settings(max_new_tokens=12, temperature=0)


def make_prompts(n: int = 11) -> list[str]:
    rng = random.Random(0)
    return ["Question: one\nAnswer: two\n\n" + "".join(rng.choices("abcdef gh", k=rng.choice([3, 5, 5, 9])))
            for _ in range(n)]


@torch.no_grad()
def one_by_one(theirs, prompts, new=12, longest=64):
    texts = []
    for prompt in prompts:
        ids = torch.tensor([[256, *prompt.encode()][-(longest - new):]])
        out = theirs.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=257, pad_token_id=0,
                              suppress_tokens=[256, 258])
        texts.append(bytes(i for i in out[0, ids.shape[1]:].tolist() if i < 256).decode(errors="replace"))
    return texts


def test_each_batch_size_writes_what_transformers_does(hf_model):
    theirs, folder = hf_model("llama", vocab_size=259)
    model, tok, prompts = hf.load(folder), Bytes(add_bos=True), make_prompts()
    tok.missing_ids = lambda rows: [256, 258]
    expected = one_by_one(theirs, prompts)
    for B in (1, 4, 32):
        assert complete_all(model, tok, prompts, (), GREEDY, 64, B) == (expected, 0)
    # No room for the prompts: they are cut on the left, and then begin alike no more.
    short, cut = complete_all(model, tok, prompts, (), GREEDY, 30, 4)
    assert (short, cut) == (one_by_one(theirs, prompts, longest=30), len(prompts))
    # A context that is shorter than what is to be written leaves half of it to the prompt.
    assert complete_all(model, tok, prompts, (), Settings(max_new_tokens=50, temperature=0), 40)[0] == one_by_one(
        theirs, prompts, 20, 40)


def test_a_completion_ends_before_a_stop_string(hf_model):
    _, folder = hf_model("llama", vocab_size=259)
    model, tok, prompts = hf.load(folder), Bytes(), make_prompts()
    tok.missing_ids = lambda rows: []
    complete, _ = complete_all(model, tok, prompts, (), GREEDY, 64)
    stop = complete[0][3:5]
    ended, _ = complete_all(model, tok, prompts, (stop,), GREEDY, 64)
    assert ended == [text.partition(stop)[0] for text in complete]
    assert ended != complete


def test_examples_are_read_once(tiny_model):
    model, tok, seen = tiny_model(vocab_size=259), Bytes(), []
    tok.missing_ids = lambda rows: []
    model.embed_tokens.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    prompts = make_prompts()
    complete_all(model, tok, prompts, (), Settings(max_new_tokens=1, temperature=0), 64)
    common = len("Question: one\nAnswer: two\n\n")
    assert sum(seen) == common + sum(len(prompt) - common for prompt in prompts)


def test_ranks_share_the_prompts(hf_model):
    _, folder = hf_model("llama", vocab_size=259)
    tok, prompts, box, found, meeting = Bytes(), make_prompts(), {}, {}, threading.Barrier(2)
    tok.missing_ids = lambda rows: []
    alone = complete_all(hf.load(folder), tok, prompts, (), GREEDY, 64, 4)

    class Rank(World):
        def barrier(self):
            meeting.wait(20)

        def check(self):
            pass

        def gather(self, value):
            assert len(value) < len(prompts)
            box[self.rank] = value
            meeting.wait(20)
            return [box[0], box[1]]

    def work(rank):
        found[rank] = complete_all(hf.load(folder), tok, prompts, (), GREEDY, 64, 4, Rank(rank, 2, torch.device("cpu")))
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1] == alone
