"""experiments/tokenizers.py in its short mode. Truth: the claim itself, and the runs' own eval.json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def study(*words):
    return subprocess.run([sys.executable, ROOT / "experiments/tokenizers.py", *map(str, words)], cwd=ROOT,
                          capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_rows_from_their_parts_beat_random_ones(data_dir, tmp_path):
    """After the same bytes of text the extended stories260K is better with subtoken rows, as it is before."""
    out = tmp_path / "study"
    done = study("--data", data_dir, "--out", out, "--quick")
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "tokenizers.json").read_text())
    words = f"--data {data_dir.name} --out {out.name} --quick"
    assert (result["command"], result["seeds"]) == (f"python experiments/tokenizers.py {words}", [0])
    rows = {row["method"]: row for row in result["rows"]}
    assert rows.keys() == {"subtoken", "random"}
    assert rows["subtoken"]["steps"] == rows["random"]["steps"]                     # one tokenizer: the same bytes
    assert rows["subtoken"]["bits_per_byte"] < rows["random"]["bits_per_byte"] - 0.2
    for method, row in rows.items():
        scores = json.loads((out / f"runs/{method}_0/eval.json").read_text())
        assert row["by_seed"] == [scores["after"]["domain"]["bits_per_byte"]] == [row["bits_per_byte"]]
        assert row["domain_before"] == scores["before"]["domain"]["bits_per_byte"] > row["bits_per_byte"]
        assert len(row["curves"][0]) == 2
    assert (out / "tokenizers.png").stat().st_size > 10_000


def test_a_folder_with_files_is_not_the_study_s(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = study("--data", tmp_path, "--out", tmp_path, "--quick")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_mistakes_end_in_one_line(tmp_path):
    done = study("--data", tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n"), (tmp_path / "out").exists()) == (2, 1, False)
    assert "stories260K does not exist; name a folder that has it as --data" in done.stderr
