"""The command line of tokenizer.py, and the new base that it writes.
Truth: `transformers`, which must read what is written. Laws: mistakes end in one line; old rows keep their values.
"""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from vocabularies import BASES, LATIN

import hf
import tokenizer
from core import cli
from text import extend_vocabulary as X
from text import vocabulary as T
from text import vocabulary_files
from text.corpus import read_documents
from text.train_vocabulary import train

ROOT = Path(__file__).parents[1]
CORPUS = ["The cat sat on the mat, and the dog didn't.\n\n", "Habeas corpus 1234 naïve 漢字 <0x41>!\r\n",
          "\tres judicata  two\n"] * 8


@pytest.fixture
def command(monkeypatch, capsys):
    """command("add --out ...") -> (exit status, stdout, stderr) of `python tokenizer.py ...`, in this process."""
    def call(line: str):
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", *line.split()])
        try:
            status = tokenizer.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


def test_train_and_encode(tmp_path, command):
    text = "".join(CORPUS)
    (tmp_path / "a.txt").write_text(text)
    status, stdout, stderr = command(f"train --kind bpe --vocab-size 9999 --out {tmp_path}/t {tmp_path}/a.txt")
    ours = T.load(tmp_path / "t")
    assert (status, stderr) == (0, "")
    assert f"bpe tokenizer with {ours.vocab_size} ids of 9999: the text gave no more" in stdout
    ids = ours.encode("the")
    assert command(f"encode --tokenizer {tmp_path}/t the --json {tmp_path}/e.json")[:2] == (
        0, " ".join(map(str, ids)) + "\n" + " ".join(repr(ours.tokens[i]) for i in ids) + "\n")
    assert json.loads((tmp_path / "e.json").read_text()) == {"ids": ids, "tokens": [ours.tokens[i] for i in ids]}
    for line, message in ((f"encode --tokenizer {tmp_path}/no x", "does not exist"),
                          (f"train --out x --vocab-size 300 {tmp_path}/no.txt", "no.txt"),
                          (f"train --out {tmp_path}/t --vocab-size 300 {tmp_path}/a.txt", "exists already")):
        status, stdout, stderr = command(line)
        assert (status, stdout) == (2, "")
        assert re.fullmatch(rf"error: .*{message}.*\n", stderr)
    before = (tmp_path / "t/tokenizer.json").read_bytes()
    assert command(f"train --vocab-size 280 --overwrite --out {tmp_path}/t {tmp_path}/a.txt")[0] == 0
    assert (tmp_path / "t/tokenizer.json").read_bytes() != before


def test_the_script_itself(tmp_path):
    """A mistake ends in one line also in a process of its own."""
    (tmp_path / "law.txt").write_text(LATIN, encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "tokenizer.py", "compare", tmp_path / "law.txt"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: 1 documents are too few: every tenth is held out\n")


def bits_per_byte(model, tok, texts) -> float:
    nats = size = 0
    for text in texts:
        ids = torch.tensor([tok.encode(text, bos=True)])
        logits = model.head(model(ids[:, :-1]))[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        size += len(text.encode())
    return nats / np.log(2) / size


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@torch.no_grad()
def test_new_base_folder(data_dir, tmp_path, command):
    """Text without new tokens has the same logits; at step 0 subtoken rows beat random ones; transformers agrees."""
    path = data_dir / BASES["stories"]
    documents = list(read_documents([str(data_dir / "corpora/legal_en_dc/dc_code_title28.txt")]))
    learn, held_out = [text for n, text in enumerate(documents) if n % 10 < 4], documents[9::10]
    (tmp_path / "legal.txt").write_text("\n\n".join(learn), encoding="utf-8")
    for init in ("subtoken", "random"):
        line = f"extend --model {path} --new-tokens 200 --init {init} --out {tmp_path}/{init} {tmp_path}/legal.txt"
        status, said, _ = command(line)
        assert status == 0
        assert said.startswith(f"{tmp_path}/{init}: 200 new tokens, ids 512 to {511 + 200}, from ")
    base, model = hf.load(path), hf.load(tmp_path / "subtoken")
    old, new = T.load(path), T.load(tmp_path / "subtoken")
    assert model.config.vocab_size == new.vocab_size == 512 + 200
    stories = (data_dir / "corpora/tinystories/tinystories_sample_2MiB.txt").read_text(encoding="utf-8")[:100_000]
    sentences = [*re.findall(r"[^.!?]{20,200}[.!?]", stories), "Once upon a time there was a little girl. 漢字"]
    same = [text for text in sentences if new.encode(text) == old.encode(text)]
    assert 30 < len(same) < len(sentences)
    for text in same:
        ids = torch.tensor([old.encode(text, bos=True)])
        hidden = model(ids)
        logits, expected = model.head(hidden), base.head(base(ids))
        assert torch.equal(torch.nn.functional.linear(hidden, model.head.weight[:512]), expected)       # bit for bit
        masked = logits.index_fill(-1, torch.arange(512, 512 + 200), -torch.inf)
        assert torch.allclose(masked.log_softmax(-1)[..., :512], expected.log_softmax(-1), rtol=0, atol=1e-5)
    texts = [text[:600] for text in held_out[:12]]
    subtoken, chance = (bits_per_byte(hf.load(tmp_path / i), new, texts) for i in ("subtoken", "random"))
    before = bits_per_byte(base, T.load(path), texts)
    assert subtoken < 1.3 * before < chance
    transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "subtoken")
    ids = torch.tensor([new.encode(texts[0][:300], bos=True)])
    assert (ids >= 512).any()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "subtoken").encode(texts[0][:300]) == ids[0].tolist()
    # These logits go to 20, of which rounding in fp32 alone makes 1e-4.
    assert torch.allclose(theirs(ids).logits, model.head(model(ids)), atol=2e-4)


@torch.no_grad()
def test_add_to_a_model(data_dir, tmp_path, command):
    path, out = data_dir / BASES["stories"], tmp_path / "out"
    status, stdout, stderr = command(f"add --model {path} --out {out} <legal_case> lien --pad <|pad|> "
                                     f"--json {tmp_path}/add.json")
    assert (status, stdout) == (0, "512 <legal_case>\n513 lien\n514 <|pad|>\n")
    assert "warning: 'lien': plain words; as added tokens they are also cut out of longer words" in stderr
    assert json.loads((tmp_path / "add.json").read_text())["ids"] == {"<legal_case>": 512, "lien": 513, "<|pad|>": 514}
    model, base = hf.load(out), hf.load(path)
    weight = model.embed_tokens.weight
    assert torch.equal(weight[:512], base.embed_tokens.weight)
    assert torch.allclose(weight[513], base.embed_tokens.weight[T.load(path).encode("lien")].mean(0))
    assert not weight[514].any()
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 514
    transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.pad_token_id == 514
    assert theirs.encode("a <legal_case> b", add_special_tokens=False) == T.load(out).encode("a <legal_case> b")
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.pad_token_id == 514


def test_plain_words_are_warned_of(small_bases, tmp_path, command):
    path, file = small_bases["small bytes"], tmp_path / "add.json"
    line = f"add --tokenizer {path} --out {tmp_path}/out --json {file} lien res_judicata <a> x1 Pfändung"
    status, _, stderr = command(line)
    assert (status, json.loads(file.read_text())["plain_words"]) == (0, ["lien", "Pfändung"])
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode        # others may read it
    assert stderr.startswith("warning: 'lien', 'Pfändung': plain words; as added tokens they are also cut out of")


def test_report_and_compare_from_the_command_line(small_bases, tmp_path, command):
    (tmp_path / "law.txt").write_text("\n\n".join([LATIN] * 40), encoding="utf-8")
    (tmp_path / "code.txt").write_text("for i in range(10):\n    print(i)\n")
    status, stdout, _ = command(f"report --tokenizer {small_bases['small bytes']} --domain {tmp_path}/law.txt --code "
                                f"{tmp_path}/code.txt --new-tokens 50 --json {tmp_path}/report.json")
    assert status == 0
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["new_tokens"] == 50
    assert result["texts"].keys() == {"domain", "code"}
    assert stdout.rstrip().endswith(f"{result['recommendation']}: {result['reason']}")
    assert command(f"compare --vocab-size 330 {tmp_path}/law.txt --json {tmp_path}/compare.json")[0] == 0
    rows = {row["kind"]: row for row in json.loads((tmp_path / "compare.json").read_text())}
    assert rows.keys() == {"bpe", "unigram", "wordpiece"}
    assert [rows[k]["exact"] for k in ("bpe", "unigram")] == [1.0, 1.0]
    assert rows["wordpiece"]["exact"] == 0                              # it forgets the spaces
    assert all(row["covered"] == 1 and row["unknown"] == 0 for row in rows.values())


def test_report_says_what_is_in_no_token(data_dir, tmp_path, command):
    """Truth: by hand. stories260K drops runs of blanks."""
    (tmp_path / "law.txt").write_text("\n\n".join(["a    law"] * 20))
    model = data_dir / "models/stories260K"
    status, said, _ = command(f"report --tokenizer {model} --extended {model} --domain {tmp_path}/law.txt --json "
                              f"{tmp_path}/o.json")
    row = json.loads((tmp_path / "o.json").read_text())["texts"]["domain"]
    assert (status, row["lost_share_before"], row["lost_share_after"]) == (0, 3 / 8, 3 / 8)
    assert "domain: 37.50% of its bytes are in no token, and 37.50% extended" in said


def test_bits_per_byte_of_a_small_model(tmp_path, command, monkeypatch):
    """Steps are counted in bytes; the number is that of eval.py; a failure is the line that the command ended with."""
    (tmp_path / "law.jsonl").write_text("".join(json.dumps({"text": f"{n}. {LATIN}"}) + "\n" for n in range(600)))
    calls = []

    def run(file, *words):
        words = dict(zip(words[::2], words[1::2]))
        calls.append(words | {"kind": file})
        if file == "eval.py":
            Path(words["--json"]).write_text(json.dumps({"texts": {"held_out": {"bits_per_byte": 2.0 + len(calls)}}}))
        else:
            manifest = json.loads(Path(words["--data.sources.text.path"], "manifest.json").read_text())["splits"]
            assert manifest["heldout"]["documents"] == 0
            per_step = 16 * 256 * manifest["train"]["bytes"] / manifest["train"]["tokens"]
            assert abs(words["--train.steps"] * per_step - 1e6) <= per_step / 2
    monkeypatch.setattr(cli, "run_command", run)
    status, stdout, _ = command(f"compare --vocab-size 330 --bits-per-byte 1 --seeds 2 {tmp_path}/law.jsonl --json "
                                f"{tmp_path}/compare.json")
    assert status == 0
    rows = json.loads((tmp_path / "compare.json").read_text())
    assert [row["bits_per_byte"] for row in rows] == [[4.0, 6.0], [8.0, 10.0], [12.0, 14.0]]
    assert [call["--seed"] for call in calls if call["kind"] == "train.py"] == [0, 1] * 3
    assert "5.0000 (4.0000 to 6.0000)" in stdout
    assert "white space and unknown characters, which wordpiece drops, cost it nothing" in stdout


@pytest.mark.parametrize("kill", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("line", ["extend --tokenizer BASE --out OUT LAW", "add --tokenizer BASE --out OUT <x>",
                                  "train --vocab-size 300 --out OUT LAW"])
def test_a_kill_leaves_nothing_and_the_same_command_completes(line, kill, small_bases, tmp_path, command, monkeypatch):
    (tmp_path / "law.txt").write_text(LATIN * 20, encoding="utf-8")
    out, stale = tmp_path / "to/out", tmp_path / "to/.out.partial"
    for word, path in (("BASE", small_bases["small bytes"]), ("OUT", out), ("LAW", tmp_path / "law.txt")):
        line = line.replace(word, str(path))

    def die(*_, **__):
        raise kill
    for module, name in ((vocabulary_files, "write_settings"), (X, "write_settings"), (os, "replace")):
        monkeypatch.setattr(module, name, die)
    status, _, stderr = command(line)
    assert (status, stderr.count("\n")) == (130 if kill is KeyboardInterrupt else 2, 1)
    assert not out.exists() or not (out / "tokenizer.json").exists()
    monkeypatch.undo()
    assert not stale.exists()
    stale.mkdir(parents=True, exist_ok=True)            # what a SIGKILL leaves
    (stale / "half").write_text("{")
    assert command(line)[0] == 0
    assert T.load(out).vocab_size >= 300
    assert line.startswith("train") or not stale.exists()
    assert {file.name for file in out.iterdir()} <= {"tokenizer.json", "tokenizer_config.json", "tokenizer.tiktoken"}


HOSTILE = {"missing.txt": None, "empty.txt": b"", "blank.jsonl": b'{"text": ""}\n' * 20, "wrong.jsonl": b'{"txt": 1}',
           "list.jsonl": b"[1]\n", "cut.jsonl": b'{"text": "x"', "deep.jsonl": b"[" * 100_000, "latin.txt": b"\xe9",
           "no.txt.gz": b"plain", "cut.txt.gz": gzip.compress(LATIN.encode() * 99)[:-9], "x.parquet": b"PAR1",
           "broken.jsonl.gz": gzip.compress(b'{"text": "x"}\n' * 999)[:-30] + b"\xff" * 30, "x.pdf": b"%PDF", "x": ""}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(name, small_bases, tmp_path, command):
    file, out = tmp_path / name, tmp_path / "out"
    if HOSTILE[name] == "":
        file.mkdir()
    elif HOSTILE[name] is not None:
        file.write_bytes(HOSTILE[name])
    tok = small_bases["small bytes"]
    for line in (f"train --vocab-size 300 --out {out} {file}",
                 f"train --kind unigram --vocab-size 300 --out {out} {file}",
                 f"extend --tokenizer {tok} --out {out} {file}", f"report --tokenizer {tok} --domain {file}",
                 f"compare --vocab-size 300 {file}"):
        status, stdout, stderr = command(line)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1)
        assert stderr.startswith("error: ")
        assert not list(tmp_path.glob("*out*"))


def test_hostile_text_is_learnt_from(small_bases, tmp_path, command):
    """Half surrogates, NUL, U+FEFF, 200,000 times `^`, letters without a space, spaces."""
    texts = ["a\ud800b \udc80 " + LATIN, "\x00a\x00 \ufeff" + LATIN, "^" * 200_000, "ab" * 100_000,
             "x" + " " * 200_000 + "y", *[LATIN] * 40]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for kind in ("bpe", "unigram", "wordpiece"):
        line = f"train --kind {kind} --vocab-size 330 --out {tmp_path}/{kind} {tmp_path}/x.jsonl"
        assert command(line)[0] == 0
    status, stdout, _ = command(f"extend --tokenizer {small_bases['small bytes']} --new-tokens 9999 --out {tmp_path}/e "
                                f"{tmp_path}/x.jsonl")
    assert status == 0
    assert re.search(r": \d+ new tokens of 9999: no other pair that may be joined occurs 4 times, ids 300 to", stdout)


def test_out_is_looked_at_before_the_text(small_bases, tmp_path, command):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for model in ("tokenizer", "model"):
        line = f"extend --{model} {small_bases['small bytes']} --out {tmp_path}/full {tmp_path}/none.txt"
        status, _, stderr = command(line)
        assert (status, "holds 'file', which is no part of a" in stderr) == (2, True)


def test_mistakes_end_in_one_line(small_bases, tmp_path, command):
    (tmp_path / "law.txt").write_text(LATIN * 20, encoding="utf-8")
    (tmp_path / "some.jsonl").write_text(f'{{"text": "{LATIN}"}}\n' * 20)
    (tmp_path / "blank.jsonl").write_text((f'{{"text": "{LATIN}"}}\n' * 9 + '{"text": "\\n"}\n') * 3)
    train([LATIN] * 20, "wordpiece", 200, tmp_path / "wordpiece")
    (tmp_path / "unigram").mkdir()
    with open(tmp_path / "unigram/tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([LATIN] * 3), model_writer=f, vocab_size=50,
                                                 minloglevel=2)
    tok, law, out = small_bases["small bytes"], tmp_path / "law.txt", tmp_path / "out"
    for line, message in (
            (f"extend --tokenizer {tmp_path}/wordpiece --out {out} {law}", "is neither a byte-level BPE nor a BPE"),
            (f"extend --tokenizer {tmp_path}/unigram --out {out} {law}", "is no BPE: a Unigram model's scores are"),
            (f"extend --tokenizer {tok} --out {tok} {law}", "exists already; choose another folder, or"),
            (f"extend --tokenizer {tok} --out {out} --min-count 999 {law}", "may be joined and occurs 999 times"),
            (f"extend --tokenizer {tok} --out {out} --new-tokens 0 {law}", "must be at least 1"),
            (f"extend --tokenizer {tok} --out {out} {law}x", "does not exist"),
            (f"extend --model {tok} --out {out} {law}", "config.json does not exist"),
            (f"extend --out {out} {law}", "give one of --model and --tokenizer"),
            (f"report --tokenizer {tok} --extended {small_bases['small pieces']} --domain {law}", "is no extension of"),
            (f"compare {law}", "are too few: every tenth is held out"),
            (f"compare {tmp_path}/some.jsonl --bits-per-byte 9", "9 megabytes are more than 16 times the text's 0.00"),
            (f"compare {tmp_path}/some.jsonl --bits-per-byte nan", "--bits-per-byte is nan, but must be at least 0"),
            (f"compare {tmp_path}/blank.jsonl", "there is not a word in those"),
            (f"report --tokenizer {tok} --domain {law} --corpus-tokens 0", "must be at least 1")):
        status, _, stderr = command(line)
        assert status == 2
        assert message in stderr
        assert stderr.count("\n") == 1
        assert stderr.startswith("error: ")
        assert not out.exists()


def test_add_what_objectives_need(small_bases, tmp_path, command):
    path = small_bases["small bytes"]
    status, stdout, _ = command(f"add --tokenizer {path} --out {tmp_path}/out --for span fim --sentinels 3")
    assert status == 0
    assert [line.split()[1] for line in stdout.splitlines()] == [
        "<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    status, _, stderr = command(f"add --tokenizer {tmp_path}/out --out {tmp_path}/more --for fim")
    assert (status, stderr.strip()) == (2, "error: there is nothing to add: the vocabulary has the tokens for fim")
    assert command(f"add --tokenizer {path} --out {tmp_path}/more --for spam")[0] == 2


def test_rows_of_sentinels_all_differ(data_dir, tmp_path, monkeypatch):
    """<extra_id_12> and <extra_id_21> have the same parts. Rows stay near those of the parts, and old ones as they are.
    """
    model = data_dir / "models/stories260K"
    weights = []
    for out in (tmp_path / "a", tmp_path / "b"):
        monkeypatch.setattr(sys, "argv", ["tokenizer.py", "add", "--model", str(model), "--for", "span", "--out",
                                          str(out)])
        assert tokenizer.main() == 0
        weights.append(hf.load(out).state_dict())
    old = hf.load(model).state_dict()
    tok = tokenizer.load(tmp_path / "a")
    ids = [tok.vocab[f"<extra_id_{i}>"] for i in range(100)]
    for name in ("embed_tokens.weight", "head.weight"):
        rows = weights[0][name][ids].float()
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[0][name][:len(old[name])], old[name])
        apart = torch.cdist(rows, rows) / rows.norm(dim=1)
        assert apart[~torch.eye(100, dtype=torch.bool)].min() > 1e-3
        parts = torch.stack([old[name][tokenizer.load(model).encode(f"<extra_id_{i}>")].float().mean(0)
                             for i in range(100)])
        assert (rows - parts).norm(dim=1).max() < old[name].float().norm(dim=1).mean()
