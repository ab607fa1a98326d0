"""stages/describe.py, and train.py's dry run: what is said before a run."""

import re
import shutil

import pytest
from runs import arguments, command, one, settings
from synthetic import texts

import tokenizer
import train
from stages.build import build
from text.shards import pack

pytestmark = pytest.mark.usefixtures("quick")


def test_a_chat_model_and_a_source_without_held_out_text_are_warned_of(lab, tmp_path, whole, monkeypatch, capsys):
    base = shutil.copytree(whole[0] / "final", tmp_path / "chat")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    pack(texts("legal")[:20], tokenizer.load(lab / "tok"), tmp_path / "all", heldout=0)
    status, said, _ = command(monkeypatch, capsys, arguments(
        lab, tmp_path / "run", "--model.init", "pretrained", "--model.path", base, "--dry-run",
        "--data.sources.legal.path", tmp_path / "all"))
    assert status == 0
    assert "warning: the base carries a chat template" in said
    assert "warning: source legal has no held-out documents" in said


def test_repeats_are_warned_of_and_refused(lab, tmp_path, monkeypatch, capsys):
    status, said, _ = command(monkeypatch, capsys, arguments(lab, tmp_path / "run", "--dry-run", steps=700))
    assert (status, "warning: source legal is read" in said) == (0, True)
    long = arguments(lab, tmp_path / "run", "--dry-run", steps=3000)
    status, said, errors = command(monkeypatch, capsys, long)
    assert (status, said) == (2, "")
    assert re.fullmatch(r"error: source legal would be read .*--data\.sources\.legal\.max-epochs \d+\n", errors)
    long += ["--data.sources.legal.max-epochs", "100", "--data.sources.story.max-epochs", "100"]
    assert command(monkeypatch, capsys, long)[0] == 0


def test_dry_run_says_what_the_run_costs_and_leaves_nothing(lab, tmp_path, monkeypatch, capsys):
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(train.tempfile, "tempdir", str(tmp_path))
    calls = dict.fromkeys(("score_heldout", "save"), 0)
    for name in calls:
        real = getattr(train, name)

        def counted(*args, name=name, real=real):
            calls[name] += 1
            return real(*args)
        monkeypatch.setattr(train, name, counted)
    status, said, errors = command(monkeypatch, capsys, arguments(lab, tmp_path / "run", "--dry-run", steps=1000))
    assert (status, errors) == (0, "")
    assert calls == {"score_heldout": 1, "save": 1}
    for pattern in (r"1,000 steps of 4 x 32 = 128 tokens", r"legal \(domain\): [\d,]+ tokens, read [\d.]+ times",
                    r"story \(general\): [\d,]+ tokens, read [\d.]+ times", r"peak memory \d+\.\d\d GB",
                    r"a checkpoint [\d,]+ MB", r"takes about \d+\.\d\d hours"):
        assert re.search(pattern, said), pattern
    shown = re.findall(r"--- a packed sequence of source (\w+), (\d+) documents\n((?:\[\d+:\d+\] .*\n)+)", said)
    assert len(shown) == 2
    run = build(settings(lab, tmp_path / "run", steps=1000), one())
    batch = run.loader.batch(0)
    for row, (source, count, body) in enumerate(shown):
        assert source == run.loader.names[batch.source[row]]
        pieces = re.findall(r"\[(\d+):(\d+)\] (.*)", body)
        assert len(pieces) == int(count)
        assert [int(a) for a, _, _ in pieces] == batch.doc_start[row].unique().tolist()
        assert all(eval(text).count("<|eos|>") <= 1 for _, _, text in pieces)
    assert set(tmp_path.iterdir()) == before
