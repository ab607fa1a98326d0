"""stages/import_gguf.py as `hf.py import` starts it; what is read is judged in tests/core/test_gguf_files.py. Truth:
the folder that it leaves, and the rules of folders that hold for every command."""

import subprocess
import sys
from pathlib import Path

import pytest
from gguf_models import add_joins, write_gguf

import hf

ROOT = Path(__file__).parents[2]


def test_the_command_writes_a_folder_with_the_licence_beside_the_file(hf_model, tiny_bpe, tmp_path, request):
    gguf = pytest.importorskip("gguf", reason="GGUF files are read and written with the package gguf")
    sizes = {"vocab_size": 304, "hidden_size": 64, "intermediate_size": 96}
    model, known = hf_model("llama", **sizes)[0], add_joins(tiny_bpe)
    file, out = write_gguf(gguf, tmp_path / "small.gguf", model, known), tmp_path / "out"
    (tmp_path / "LICENSE").write_text("Do what is right.")

    def run(*words) -> tuple[int, str, str]:
        ended = subprocess.run([sys.executable, ROOT / "hf.py", "import", *words, "--out", out], capture_output=True,
                               text=True, check=False)
        return ended.returncode, ended.stdout, ended.stderr
    weights = sum(p.numel() for p in model.parameters())
    assert run(file) == (0, f"{out}: {weights / 1e6:.1f}M parameters, bfloat16\n", "")
    # What follows shows rules, which need no process that imports all again.
    request.getfixturevalue("forked")
    assert (out / "LICENSE").read_text() == "Do what is right."
    assert hf.open_base(out).facts["license"] == "apache-2.0"
    assert str(hf.open_base(out).dtype) == "torch.bfloat16"
    status, _, said = run(file, "--dtype", "fp32")
    assert status == 2
    assert "exists already" in said
    assert run(file, "--dtype", "fp32", "--overwrite")[0] == 0
    assert str(hf.open_base(out).dtype) == "torch.float32"
    status, _, said = run(tmp_path / "LICENSE", "--overwrite")
    assert status == 2
    assert said.count("\n") == 1
    assert "no GGUF file, or damaged" in said
    assert str(hf.open_base(out).dtype) == "torch.float32"      # what was there stays
