"""A bad setting is one line and exit 2, before a file is made or a process group is started. The cases stand in
bad_settings.py; here they run in this process, one after another, and in the suite each in one of its own."""

import importlib
import sys
import time

import bad_settings
import pytest
import torch.distributed

from core import devices
from core.output import CONTROL

from .hostile_models import SECONDS

SECTIONS = {"fields": lambda folder: bad_settings.of_recipes(), "combinations": lambda folder:
            bad_settings.of_combinations(), "recipes": bad_settings.of_texts, "commands": lambda folder:
            bad_settings.of_commands()}


def one_of_each(cases: list) -> list:
    """Of each setting one wrong value, another one in turn."""
    settings = {}
    for case in cases:
        settings.setdefault(case.names, []).append(case)
    return [wrong[i % len(wrong)] for i, wrong in enumerate(settings.values())]


def run(case, here, tools, monkeypatch, capsys) -> tuple[int, str, float]:
    """(exit status, what was printed, seconds)"""
    monkeypatch.setattr(sys, "argv", [f"{case.module}.py", *case.line(here, tools)])
    begun = time.monotonic()
    status = importlib.import_module(case.module).main()
    seconds = time.monotonic() - begun
    printed = capsys.readouterr()
    return status, printed.out + printed.err, seconds


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_a_bad_setting_is_one_line(section, tools, tmp_path, monkeypatch, capsys):
    def refuse(*words, **more):
        raise AssertionError("a process group was started")
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    here, faults, before = tmp_path / "here", [], devices.peak_bytes(torch.device("cpu"))
    here.mkdir()
    # One wrong value of each setting, and one in four of the rest; `make faults` has them all.
    cases = SECTIONS[section](tmp_path / "recipes")
    for case in one_of_each(cases) if section == "fields" else cases[::4]:
        try:
            status, said, seconds = run(case, here, tools, monkeypatch, capsys)
        except (Exception, SystemExit) as error:
            faults.append((case.module, case.words[-3:], f"{type(error).__name__}: {str(error)[:200]}"))
            continue
        lines, names = said.splitlines(), case.names.replace("{here}", str(here)).replace("_", "-")
        is_line = status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and not CONTROL.search(said)
        if not is_line or names not in said.replace("_", "-") or seconds > SECONDS or any(here.iterdir()):
            faults.append((case.module, [word[:80] for word in case.words[-3:]], status, said[-300:], round(seconds, 1),
                           list(here.iterdir())))
    assert not faults, "\n".join(map(str, faults))
    assert devices.peak_bytes(torch.device("cpu")) - before < 2e9


def test_there_are_enough_of_them(tmp_path):
    assert len(bad_settings.cases(tmp_path)) > 400


def test_limits_come_before_relations(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--optim.lr", "-1"])
    assert importlib.import_module("train").main() == 2
    assert capsys.readouterr().err == "error: optim.lr is -1.0, but must be at least 0 and at most 100\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "--export.dtype", "x"])
    assert importlib.import_module("train").main() == 2
    assert "one of ('bf16', 'bfloat16', 'float16', 'float32', 'fp16', 'fp32')" in capsys.readouterr().err
