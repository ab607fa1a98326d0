"""log.py against json, TensorBoard's own reader, and lines written by hand."""

import contextlib
import io
import json
import os
import sys
import types

import pytest

from core.config import check_limits
from core.errors import UserError
from core.log import LogConfig, Logger, format_line

VALUES = {"loss": 2.1344, "lr": 2.9e-5, "grad_norm": 0.7149, "tokens_per_second": 41_240.0, "step_ms": 1350.0,
          "peak_gb": 12.34, "domain_share": 0.7, "replay_share": 0.25, "tokens": 4096, "flag": True,
          "sources": {"legal": {"loss": 2.01}, "stories": {"loss": 2.3}}}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_flushed_json_object_a_line(tmp_path):
    logger = Logger(tmp_path, LogConfig(), 10)
    logger.record("start", 0, time=1.5)
    logger.record("train", 1, **VALUES)
    assert records(tmp_path) == [{"kind": "start", "step": 0, "time": 1.5}, {"kind": "train", "step": 1, **VALUES}]
    logger.close()
    logger.close()
    logger.record("train", 2)                            # after the end, and on other ranks, nothing
    Logger(tmp_path, LogConfig(), 10, main=False).record("train", 3)
    assert len(records(tmp_path)) == 2


def test_lines_reach_the_disk_when_asked(tmp_path, monkeypatch):
    logger, synced = Logger(tmp_path, LogConfig(), 10), []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    logger.record("train", 1)
    assert not synced, "a line a step is flushed, and not waited for"
    logger.sync()
    assert synced == [str(tmp_path / "metrics.jsonl")]
    Logger(tmp_path, LogConfig(), 10, main=False).sync()


def test_a_full_disk_is_a_warning_and_loses_no_line(small_disk, capsys):
    logger = Logger(small_disk, LogConfig(), 10)
    ballast, found = small_disk / "ballast", os.statvfs(small_disk)
    ballast.write_bytes(bytes(found.f_bavail * found.f_frsize))
    for step in (1, 2, 3):
        logger.record("train", step, text="x" * 8192)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1
    assert "No space left on device" in said
    assert str(small_disk / "metrics.jsonl") in said
    # What is not on the disk may not be taken for done.
    with pytest.raises(OSError, match="No space left on device") as full:
        logger.sync()
    assert full.value.filename == str(small_disk / "metrics.jsonl")
    ballast.unlink()
    logger.sync()
    logger.record("train", 4)
    logger.close()
    assert [record["step"] for record in records(small_disk)] == [1, 2, 3, 4]


def test_numbers_survive_to_the_last_bit(tmp_path):
    value = 0.1 + 0.2
    with_tail = {"loss": value, "small": 5e-324}
    logger = Logger(tmp_path, LogConfig(), 1)
    logger.record("train", 1, **with_tail)
    logger.close()
    assert records(tmp_path)[0] == {"kind": "train", "step": 1, **with_tail}


def test_half_a_line_of_a_killed_run_stays_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    for step in (2, 3):
        logger = Logger(tmp_path, LogConfig(), 10)
        logger.record("train", step)
        logger.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines.pop(1) == '{"kind": "tr'
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_lines_that_are_there_are_not_read(tmp_path):
    os.truncate(os.open(tmp_path / "metrics.jsonl", os.O_CREAT | os.O_WRONLY), 1 << 40)
    with contextlib.closing(Logger(tmp_path, LogConfig(), 10)) as logger:
        logger.record("train", 1)
    with open(tmp_path / "metrics.jsonl", "rb") as file:
        file.seek(1 << 40)
        assert file.read() == b'\n{"kind": "train", "step": 1}\n'


def test_console_line():
    assert format_line(120, 2000, VALUES) == ("step 120/2000 | loss 2.134 | ppl 8.5 | legal 2.010 stories 2.300 | "
                                              "replay 25% | lr 2.90e-05 | "
                                              "gnorm 0.71 | 41.2k tok/s | mem 12.3G | eta 0:42:18")
    assert format_line(120, 2000, VALUES, False) == format_line(120, 2000, VALUES).replace(" | ppl 8.5", "")
    assert " | mfu 41% | " in format_line(1, 2, VALUES | {"mfu": 0.412})
    assert format_line(0, 100_000, VALUES).endswith("eta 37:30:00")


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    logger = Logger(tmp_path, LogConfig(), 10)
    logger.show_step(1)
    logger.show_step(2, VALUES)
    logger.say("hello")
    assert capsys.readouterr() == (format_line(2, 10, VALUES) + "\nhello\n", "")
    quiet = Logger(tmp_path, LogConfig(), 10, main=False)
    quiet.show_step(3, VALUES)
    quiet.say("no")
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal_goes_on_where_the_run_does(tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    logger = Logger(tmp_path, LogConfig(), 10)
    logger.bar.update(6)
    logger.show_step(7, VALUES)
    assert logger.bar.n == 7
    logger.close()
    assert "7/10" in screen.getvalue()
    assert "loss 2.134" in screen.getvalue()


def test_tensorboard_reads_the_numbers_back(tmp_path):
    pytest.importorskip("tensorboard", reason="the truth is TensorBoard's own reader")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = Logger(tmp_path, LogConfig(tensorboard=True), 10)
    logger.record("start", 0, parameters=5)
    for step in (1, 2):
        logger.record("train", step, **VALUES)
    logger.record("eval", 2, sources={"legal": {"bits_per_byte": 0.75, "role": "domain"}})
    logger.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    tags = set(read.Tags()["scalars"])
    assert tags == {"train/sources/legal/loss", "train/sources/stories/loss", "eval/sources/legal/bits_per_byte",
                    *(f"train/{k}" for k in VALUES if k not in ("sources", "flag"))}
    for tag, steps, value in (("train/loss", [1, 2], 2.1344), ("train/sources/stories/loss", [1, 2], 2.3),
                              ("eval/sources/legal/bits_per_byte", [2], 0.75)):
        assert [(e.step, e.value) for e in read.Scalars(tag)] == [(s, pytest.approx(value, rel=1e-6)) for s in steps]


@pytest.mark.parametrize(("package", "settings"), [("wandb", LogConfig(wandb="project")),
                                                   ("tensorboard", LogConfig(tensorboard=True))])
def test_missing_package_is_one_clear_line(tmp_path, monkeypatch, package, settings):
    for name in [m for m in sys.modules if m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"log.{package} needs the {package} package: pip install {package}"):
        Logger(tmp_path, settings, 10)


def test_wandb_gets_the_settings_and_numbers_and_never_asks_for_a_key(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda numbers, step: calls.append((numbers, step)),
                                finish=lambda: calls.append("finish"))
    fake = types.SimpleNamespace(init=lambda **kw: calls.append(kw) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = Logger(tmp_path, LogConfig(wandb="nano"), 10, settings={"seed": 1})
    logger.record("train", 4, loss=1.0, sources={"a": {"loss": 2.0}})
    logger.close()
    assert calls[0] | {"project": "nano", "mode": "offline", "config": {"seed": 1}} == calls[0]
    assert calls[1:] == [({"train/loss": 1.0, "train/sources/a/loss": 2.0}, 4), "finish"]


def test_every_must_be_positive():
    with pytest.raises(UserError, match=r"log.every is 0, but must be above 0"):
        check_limits(LogConfig(every=0), "log.")
