"""Truths: a scripted model, and the model's own softmax."""

import json
from types import SimpleNamespace

import torch
from synthetic import texts

import tokenizer
from forget import sample_documents
from generate import Settings, first_ids


def test_the_base_writes_its_own_replay(pair, tmp_path, forget_py, capsys):
    words = ["replay", "--model", pair[0], "--documents", 6, "--max-new-tokens", 12]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert forget_py(*words, "--out", tmp_path / f"{name}.jsonl", "--seed", seed,
                   "--json", tmp_path / "said.json") == 0
    a, b, c = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in "abc")
    assert a == b
    assert [r["text"] for r in a] != [r["text"] for r in c]
    assert len({r["text"] for r in a}) == len(a) == 6
    assert all(r["metadata"]["tokens"] <= 12 and r["id"].startswith("self-1-") for r in a)
    words = " ".join(r["text"] for r in a).split()
    assert sum(word.strip(".") in " ".join(texts("story")) for word in words) > 0.7 * len(words), "it knows stories"
    assert json.loads((tmp_path / "said.json").read_text())["documents"] == 6
    assert forget_py(*["replay", "--model", pair[0], "--out", tmp_path / "d.jsonl", "--temperature", 0]) == 2
    assert "every document would be the same" in capsys.readouterr().err
    assert forget_py(*["replay", "--model", pair[0], "--out", tmp_path / "d.jsonl", "--documents", 0]) == 2
    assert forget_py("replay", "--model", pair[0], "--out", tmp_path) == 2
    assert f"{tmp_path} is a folder" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.glob("*.jsonl*")) == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_replay_holds_no_id_that_the_tokenizer_lacks(tiny_model, tiny_bpe):
    """Rows that pad the embedding cannot be decoded."""
    tok = tokenizer.load(tiny_bpe)
    assert list(sample_documents(tiny_model(vocab_size=900), tok, Settings(60, 1.0), set(), 3))


class Scripted(torch.nn.Module):
    """A model that says row r's next id of `answers` whatever it reads; a row that has ended says its last one on."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.said, self.weight = answers, 0, torch.nn.Parameter(torch.zeros(1))
        self.angles = lambda length, device: None
        self.config = SimpleNamespace(vocab_size=20)

    def forward(self, tokens, cache):
        self.said += 1
        return torch.tensor([[[row[min(self.said, len(row)) - 1]]] for row in self.answers[:len(tokens)]])

    def head(self, hidden):
        return 1e4 * torch.nn.functional.one_hot(hidden[:, 0], 20).float()


def test_a_text_ends_where_the_model_ends_it(pair):
    tok, model = tokenizer.load(pair[0]), Scripted([[5, 6, 2], [2], [7, 8, 9]])
    records = list(sample_documents(model, tok, Settings(max_new_tokens=3, temperature=1.0, seed=4), {2}, 3))
    assert [(r["id"], r["text"], r["metadata"]["ended"], r["metadata"]["tokens"]) for r in records] == [
        ("self-4-0", tok.decode([5, 6]).strip(), True, 3), ("self-4-2", tok.decode([7, 8, 9]).strip(), False, 3)]


def test_text_drawn_from_the_base_follows_its_distribution(tiny_model, pair):
    """First ids of 4,000 documents against softmax of the logits after the first token."""
    model, tok = tiny_model(seed=1), tokenizer.load(pair[0])
    start = first_ids(tok, "")
    settings = Settings(max_new_tokens=1, temperature=1.0)
    counts = torch.zeros(model.config.vocab_size)
    tok.decode = lambda ids: f"{ids[0]}." if ids else "."
    for record in sample_documents(model, tok, settings, set(), 4000, batch=500):
        counts[int(record["text"][:-1])] += 1
    with torch.no_grad():
        wanted = 4000 * model.head(model(torch.tensor([start]))[:, -1])[0].double().softmax(0)
    often = wanted > 20
    assert ((counts - wanted)[often].square() / wanted[often]).sum() < often.sum() + 5 * (2 * often.sum()) ** 0.5
    assert often.sum() > 5


def test_stories_come_out_of_a_story_teller(data_dir, tmp_path, forget_py, one_thread):
    out = tmp_path / "replay.jsonl"
    assert forget_py("replay", "--model", data_dir / "models/stories260K", "--out", out, "--documents", 2,
               "--max-new-tokens", 40, "--temperature", 0.5) == 0
    first = json.loads(out.read_text().splitlines()[0])["text"]
    assert first.startswith(("Once upon a time", "One day")), first


def test_an_id_that_the_tokenizer_lacks_ends_no_document(tiny_model, pair):
    """A model of more rows than the tokenizer has ids, and an id in its middle that stands for nothing."""
    tok, model = tokenizer.load(pair[0]), tiny_model(vocab_size=900)
    tok.tokens[50] = None
    records = list(sample_documents(model, tok, Settings(max_new_tokens=20, temperature=5.0), {2}, 40))
    assert len(records) > 30
    assert sum(record["metadata"]["tokens"] for record in records) > 600
