"""stages/sources.py: a run packs conversations that are named by their files, once. Truth: what data.py pack makes of
the same file, and the run on that; labels put together by hand."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from chat_templates import TEMPLATES
from runs import ENV, ROOT, arguments, crash_at, lines, one, same_checkpoint, settings, trace
from synthetic import KINDS, run

import hf
import tokenizer as tokenizers
import train
from core.errors import UserError
from generate import Settings, generate
from stages.build import build
from text.shards import Shards

pytestmark = pytest.mark.usefixtures("quick")
FORM = ("{% for m in messages %}{{ '<|bos|>' + m.role + '\n' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|bos|>assistant\n' }}{% endif %}")


@pytest.fixture
def chats(lab, tmp_path):
    """(a copy of the lab whose tokenizer has a template, a file of conversations)."""
    home, draw, words = tmp_path / "lab", random.Random(0), KINDS["legal"].split()
    shutil.copytree(lab, home)
    (home / "tok/chat_template.jinja").write_text(FORM)
    with open(tmp_path / "chats.jsonl", "w") as file:
        for _ in range(80):
            ask, say = (" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(2))
            file.write(json.dumps({"instruction": ask, "output": say}) + "\n")
    return home, tmp_path / "chats.jsonl"


def mixed(home, out, path, *more, **options):
    return settings(home, out, "--data.sources.chat.path", path, "--data.sources.chat.role", "general",
                    "--data.sources.chat.format", "chat", *more, **options)


def test_a_model_follows_a_form_that_its_base_did_not_know(lab, whole, tmp_path):
    """Every answer begins with two words and ends; so do those to prompts that no record has."""
    base, draw, words = shutil.copytree(whole[0] / "final", tmp_path / "base"), random.Random(0), KINDS["legal"].split()
    (base / "chat_template.jinja").write_text(FORM)
    asked = [" ".join(draw.choices(words, k=3)) for _ in range(90)]
    (tmp_path / "chats.jsonl").write_text("".join(
        json.dumps({"prompt": ask, "response": f"so then {ask.split()[-1]}"}) + "\n" for ask in asked[:80]))
    assert train.train(mixed(
        lab, tmp_path / "run", tmp_path / "chats.jsonl", "--model.init", "pretrained", "--model.path", base,
        "--data.schedule", "static", "--data.domain-share", 0, "--data.sources.story.weight", 0,
        "--data.sources.chat.weight", 1, "--data.context", 64, steps=160), one()) == 0
    tok, said = tokenizers.load(base), []
    for folder in (base, tmp_path / "run/final"):
        model = hf.load(folder)
        for ask in asked[80:]:
            prompt = [tok.bos_id, *tok.encode(f"user\n{ask}"), tok.eos_id, tok.bos_id, *tok.encode("assistant\n")]
            new = generate(model, prompt, Settings(max_new_tokens=24, temperature=0), {tok.eos_id})
            said.append((tok.decode(new).startswith("so then "), new[-1] == tok.eos_id))
    assert not any(begins for begins, _ in said[:10])
    assert said[10:] == 10 * [(True, True)]


def test_a_run_that_packs_is_the_run_on_what_data_py_packs(chats, tmp_path, monkeypatch):
    home, file = chats
    assert train.train(mixed(home, tmp_path / "a", file, steps=4), one()) == 0
    assert run(monkeypatch, "pack", file, "--format", "chat", "--tokenizer", home / "tok", "--out",
               tmp_path / "chat") == 0
    assert train.train(mixed(home, tmp_path / "b", tmp_path / "chat", steps=4), one()) == 0
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    same_checkpoint(tmp_path / "a", tmp_path / "b", 4)
    mine, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (
        tmp_path / "a/packed/chat", tmp_path / "chat"))
    assert mine == theirs
    # Its loss stands apart, in training and on what is held out, and it trained on answers alone.
    last = lines(tmp_path / "a", "train")[-1]
    assert set(last["sources"]) <= {"legal", "story", "chat"}
    after = json.loads((tmp_path / "a/eval.json").read_text())["after"]
    held = Shards(tmp_path / "chat", "heldout")
    assert after["chat"]["tokens"] == sum(int(held.document_mask(i).sum()) for i in range(held.documents))
    assert after["chat"]["bytes"] == sum(held.text_document(i)[1] for i in range(held.documents))
    assert 0 < after["chat"]["nats_per_token"] < after["chat"]["tokens"]


@pytest.mark.slow
def test_a_resumed_run_takes_what_it_has_packed(chats, tmp_path, monkeypatch):
    home, file = chats
    train.train(mixed(home, tmp_path / "whole", file), one())
    words = ("--train.save-every", 3)
    crash_at(monkeypatch, mixed(home, tmp_path / "run", file, *words), 5)
    packed = tmp_path / "run/packed/chat/train_000000.bin"
    before = packed.stat()
    monkeypatch.setattr("stages.sources.pack_conversations", None)
    assert train.train(mixed(home, tmp_path / "run", file, *words), one()) == 0
    assert packed.stat().st_ino == before.st_ino
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    same_checkpoint(tmp_path / "run", tmp_path / "whole", 8)


def test_files_that_changed_are_packed_again_before_the_first_save_and_refused_after_it(chats, tmp_path, monkeypatch):
    home, file = chats
    for at, saved in ((1, False), (5, True)):
        out = tmp_path / f"run{at}"
        crash_at(monkeypatch, mixed(home, out, file, "--train.save-every", 3), at)
        before = Shards(out / "packed/chat").tokens
        with open(file, "a") as more:
            more.write(json.dumps({"instruction": "court", "output": "lien " * 5}) + "\n")
        if saved:
            with pytest.raises(UserError, match=r"chats\.jsonl, the tokenizer.* has changed since .*/packed/chat was"):
                build(mixed(home, out, file), one(), out)
            assert Shards(out / "packed/chat").tokens == before
        else:
            build(mixed(home, out, file), one(), out)
            assert Shards(out / "packed/chat").tokens > before


def test_a_changed_file_of_the_same_size_is_packed_again(chats, tmp_path):
    home, file = chats
    build(mixed(home, tmp_path / "run", file), one(), tmp_path / "run")
    before = Shards(tmp_path / "run/packed/chat").manifest
    text = file.read_text()
    file.write_text(text[:-20] + text[-20:].replace("e", "a").replace("o", "a"))
    assert len(file.read_text()) == len(text)
    assert file.read_text() != text
    build(mixed(home, tmp_path / "run", file), one(), tmp_path / "run")
    assert Shards(tmp_path / "run/packed/chat").manifest != before


def test_labels_of_a_mixed_run_are_the_answers(chats, tmp_path):
    home, file = chats
    made = build(mixed(home, tmp_path / "run", file, "--data.packing", "document", "--data.context", 256,
                       "--train.batch-size", 40), one(), tmp_path / "run")
    tok = tokenizers.load(home / "tok")
    wanted = {(*tok.encode(json.loads(line)["output"]), tok.eos_id) for line in file.read_text().splitlines()}
    batch = made.objective.corrupt(made.loader.batch(0), None)
    rows = [row for row, source in enumerate(batch.source) if made.loader.names[source] == "chat"]
    assert len(rows) > 5
    for row in rows:
        assert tuple(i for i in batch.labels[row].tolist() if i != -100) in wanted


def test_a_run_on_conversations_longer_than_its_context_says_so_and_learns_in_each_step(chats, tmp_path, capsys):
    home, file = chats
    words = ("--data.context", 24, "--train.batch-size", 2, "--log.every", 1)
    assert train.train(mixed(home, tmp_path / "run", file, *words, steps=12), one()) == 0
    said, shards = capsys.readouterr().out, Shards(tmp_path / "run/packed/chat")
    lengths = [int(shards.document_mask(i).size) for i in range(shards.documents)]
    assert said.count(f"warning: {sum(n > 25 for n in lengths)} of {len(lengths)} conversations of source chat are "
                      f"longer than data.context 24: ") == 1
    assert "packing: legal window, story window, chat best_fit; " in said
    scored = [row["sources"] for row in lines(tmp_path / "run", "train")]
    assert any("chat" in sources for sources in scored)
    assert all(source["loss"] > 0 for sources in scored for source in sources.values())


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_two_ranks_are_one(chats, tmp_path):
    home, file = chats
    for n in (1, 2):
        words = arguments(home, tmp_path / f"run{n}", "--data.sources.chat.path", file, "--data.sources.chat.role",
                          "general", "--data.sources.chat.format", "chat", steps=4)
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                               str(n), ROOT / "train.py", *words], capture_output=True, text=True, env=ENV)
        assert done.returncode == 0, done.stderr[-2000:]
    one_rank, two = (trace(tmp_path / f"run{n}") for n in (1, 2))
    assert one_rank.keys() == two.keys()
    for step in one_rank:
        assert two[step][0] == pytest.approx(one_rank[step][0], rel=1e-5)


def test_mistakes_are_one_line(chats, tmp_path, monkeypatch):
    home, file = chats
    assert run(monkeypatch, "pack", file, "--format", "chat", "--tokenizer", home / "tok", "--out",
               tmp_path / "chat") == 0
    for words, match in (
            (["--data.sources.chat.path", file, "--data.sources.chat.format", "text"], "is no folder; name a folder"),
            (["--data.sources.chat.path", file], "name a folder made by data.py pack, or for conversations a"),
            (["--data.sources.chat.path", tmp_path / "x.jsonl", "--data.sources.chat.format", "chat"],
             r"input file .*x\.jsonl does not exist"),
            (["--data.sources.legal.format", "chat"], r"legal\.format is chat, but .*legal was packed as text"),
            (["--data.sources.chat.path", tmp_path / "chat", "--data.sources.chat.format", "preference"],
             "was packed as chat; name its format"),
            (["--data.sources.chat.path", tmp_path / "chat", "--data.sources.chat.format", "chat",
              "--data.sources.chat.learn", "all"], "was packed to learn responses"),
            (["--data.sources.chat.path", file, "--data.sources.chat.format", "preference",
              "--data.sources.chat.learn", "all"], "learn all does nothing for preferences"),
            (["--data.sources.chat.path", file, "--data.sources.chat.format", "preference"],
             r"chats\.jsonl line 1 has nothing under chosen")):
        with pytest.raises(UserError, match=match):
            build(settings(home, tmp_path / "run", *words), one(), tmp_path / "run")
    (home / "tok/chat_template.jinja").write_text(TEMPLATES["gemma"] + "{{ x.y }}")
    with pytest.raises(UserError, match=r"chats\.jsonl line 1 cannot be written by the chat template in .*'x' is un"):
        build(mixed(home, tmp_path / "run", file), one(), tmp_path / "run")
    assert not (tmp_path / "run/packed/chat").exists()
