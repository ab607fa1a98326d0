"""Every --help, kept in tests/help/ so that a change of the command line is seen in a diff. Truth: these files.

NANOCPT_WRITE_HELP=1 python -m pytest tests/test_help.py writes them anew.
"""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

KEPT = Path(__file__).parent / "help"
# Names that scripts, notebooks and checks outside the project use: {command: options}.
COMMANDS = {
    "data.py pack": "tokenizer out",
    "data.py verify": "",
    "data.py info": "",
    "data.py manifest": "merge",
    "data.py mix": "preview domain general out domain-ratio total-samples",
    "clean.py": "preset out",
    "dedup.py": "out against",
    "tokenizer.py train": "out vocab-size",
    "tokenizer.py encode": "tokenizer",
    "tokenizer.py extend": "model tokenizer out",
    "tokenizer.py add": "model tokenizer out",
    "tokenizer.py report": "tokenizer domain",
    "tokenizer.py compare": "vocab-size",
    "train.py": "model.path out dry-run",
    "eval.py": "model text baseline",
    "generate.py": "model prompt max-new-tokens temperature",
    "hf.py export": "out",
    "hf.py import": "out",
    "lora.py merge": "base adapter out",
    "forget.py merge": "base model alpha out",
    "forget.py replay": "model out",
    "report.py": "out",
    "plan.py gap": "model domain general",
    "plan.py budget": "model domain general gpu gpus recipe",
    "plan.py memory": "gpu gpus",
    "plan.py ratio": "shares steps seeds jobs tolerance recipe out dry-run",
    "plan.py rate": "rates steps seeds jobs recipe out dry-run",
    "bench.py data": "",
    "bench.py train": "",
    "bench.py kernels": "",
    "bench.py lora": "",
    "bench.py gpu": "",
}


def show_help(command: str, monkeypatch, capsys) -> str:
    """What `python COMMAND --help` prints on a terminal of 80 columns."""
    file, *words = command.split()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [file, *words, "--help"])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(file.removesuffix(".py")).main()
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_it_was_and_fits_80_columns(command, monkeypatch, capsys):
    text = show_help(command, monkeypatch, capsys)
    assert max(map(len, text.splitlines())) <= 80
    for option in COMMANDS[command].split():
        assert re.search(rf"--{re.escape(option)}\b", text), f"{command} lacks --{option}"
    file = KEPT / (command.replace(".py", "").replace(" ", "_") + ".txt")
    if os.environ.get("NANOCPT_WRITE_HELP"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted({command.split()[0] for command in COMMANDS if " " in command}))
def test_a_file_lists_its_commands(file, monkeypatch, capsys):
    text = show_help(file, monkeypatch, capsys)
    for command in COMMANDS:
        if command.startswith(file + " "):
            assert re.search(rf"^  {command.split()[1]}  ", text, re.M), f"{file} --help does not list {command}"
