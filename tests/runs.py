"""Two small corpora, short runs on them, and what tests ask of a run: shared by all files that train."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from synthetic import KINDS, texts

import tokenizer
import train
from core import checkpoint, cli, parallel
from text.shards import pack

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}


def make_lab(folder: Path) -> Path:
    """folder/{tok, legal, story}: a tokenizer of 300 ids and two packed sources."""
    tok = tokenizer.train(texts("legal") + texts("story"), "bpe", 300, folder / "tok")
    for kind in KINDS:
        pack(texts(kind), tok, folder / kind, heldout=0.1)
    return folder


def arguments(lab: Path, out, *more, steps: int = 8) -> list[str]:
    """A scratch run on both sources, as words of a command line; later words win."""
    return ["--out", str(out), "--device", "cpu", "--model.init", "scratch", "--model.tokenizer", str(lab / "tok"),
            "--model.hidden-size", "32", "--model.intermediate-size", "64", "--model.num-hidden-layers", "2",
            "--model.num-attention-heads", "4", "--model.num-key-value-heads", "2", "--data.context", "32",
            "--data.sources.legal.path", str(lab / "legal"), "--data.sources.story.path", str(lab / "story"),
            "--data.sources.story.role", "general", "--optim.lr", "1e-2", "--optim.min-lr", "1e-3",
            "--train.precision", "fp32", "--train.batch-size", "4", "--train.micro-batch-size", "2",
            "--train.steps", str(steps), "--train.save-every", "1000", "--eval.every", "1000", "--eval.tokens", "400",
            "--eval.sample-tokens", "0", "--log.every", "1", *map(str, more)]


def settings(lab, out, *more, steps: int = 8) -> train.Config:
    return cli.parse(train.Config, arguments(lab, out, *more, steps=steps), recipe=True)


def one(device="cpu") -> parallel.World:
    return parallel.World(0, 1, torch.device(device))


def lines(out, kind: str) -> list[dict]:
    records = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if r["kind"] == kind]


def trace(out) -> dict:
    """{step: everything that is a function of the step}; the last record of a step that was done twice."""
    return {r["step"]: (r["loss"], r["grad_norm"], r["lr"], r["domain_share"], str(r["sources"]))
            for r in lines(out, "train")}


def digest(batches) -> str:
    parts = [t.numpy().tobytes() for b in batches for t in (b.tokens, b.labels, b.position_ids, b.doc_start)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def same_checkpoint(a, b, step: int, but=()):
    """Weights, moments and state of two runs at `step` are equal in every bit, `but` for these values."""
    a, b = (checkpoint.load(checkpoint.path_of(Path(x) / "checkpoints", step)) for x in (a, b))
    for mine, theirs in zip(a[:2], b[:2]):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert a[1], "no optimizer state"
    but = {"tokenizer", *but}
    assert {k: v for k, v in a[2].items() if k not in but} == {k: v for k, v in b[2].items() if k not in but}


def run_of(base, out, *words):
    lab, folder = base
    return settings(lab, out, "--model.init", "pretrained", "--model.path", folder, *words)


# ---- fixtures: tests/conftest.py gives them to every file

@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """A tokenizer and two packed sources, read only."""
    return make_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def quick(monkeypatch):
    """One thread, so that sums have one order here and in the processes started here; and no report for each run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("stages.evaluate.run_command", lambda *words: "")
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole(lab, tmp_path_factory):
    """A run of 8 steps that nothing interrupted, and the hash of the tokens of each step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.evaluate.run_command", lambda *words: "")
        seen = spy(patch)
        torch.set_num_threads(1)
        assert train.train(settings(lab, out), one()) == 0
    return out, seen


@pytest.fixture(scope="session")
def base(lab, tmp_path_factory):
    """(lab, a base in Hugging Face's format that knows the general source), read only."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.evaluate.run_command", lambda *words: "")
        torch.set_num_threads(1)
        train.train(settings(lab, folder, "--data.domain-share", 0, "--data.schedule", "static", steps=20), one())
    return lab, folder / "final"


# ---- runs that end early, and the command line

def spy(monkeypatch, at=None, act=None, seen=None) -> dict:
    """Note the tokens of every step; after the step numbered `at` call act()."""
    seen, real = {} if seen is None else seen, train.train_step

    def step(run, number, batches):
        seen[number] = digest(batches)
        done = real(run, number, batches)
        if number == at:
            act()
        return done
    monkeypatch.setattr(train, "train_step", step)
    return seen


class Crash(RuntimeError):
    pass


def crash():
    raise Crash


def crash_at(monkeypatch, c, step: int):
    """Run until the process "dies" in the middle of `step`."""
    with monkeypatch.context() as patch:
        spy(patch, step, crash)
        with pytest.raises(Crash):
            train.train(c, one())


def command(monkeypatch, capsys, words) -> tuple[int, str, str]:
    """train.py's command line in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    status = train.main()
    return status, *capsys.readouterr()


def process(*words, **more):
    return subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], capture_output=True, text=True,
                          **{"env": ENV, **more})
