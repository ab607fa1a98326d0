"""experiments/tokenizers.py in its short mode. Truth: the claim itself, the runs' own eval.json, and counts by hand."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer_study():
    """The file as a module under another name, because `tokenizers` is a package."""
    sys.path.append(str(ROOT / "experiments"))
    spec = importlib.util.spec_from_file_location("tokenizer_study", ROOT / "experiments/tokenizers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study(*words):
    return subprocess.run([sys.executable, ROOT / "experiments/tokenizers.py", *map(str, words)], cwd=ROOT,
                          capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
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


LAW = [f"Section {i}. The Council may, by act number {i}, amend section {2 * i} of this title.\n(a) Fees are due."
       for i in range(300)]


def test_what_the_study_of_kinds_leaves(tokenizer_study, tmp_path, monkeypatch):
    """Real tokenizers; the models' losses are given: BPE 2.0, Unigram 1.9, WordPiece 1.8, 0.1 less with more ids."""
    def trained(row, seed, c, out):
        assert (out / f"shards/{row['kind']}_{row['vocab_size']}/manifest.json").exists()
        kind = ["bpe", "unigram", "wordpiece"].index(row["kind"])
        return 2.0 - 0.1 * kind - 0.1 * (row["vocab_size"] == 600) + 0.01 * seed
    monkeypatch.setattr(tokenizer_study, "train_kind", trained)
    (tmp_path / "law.txt").write_text("\n\n".join(LAW))
    before = {file: file.read_bytes() for file in tokenizer_study.RESULTS.iterdir()}
    c = tokenizer_study.Study(data=str(tmp_path), part="kinds", text=[str(tmp_path / "law.txt")],
                              vocab_sizes=[400, 600], megabytes=0.05, out=str(tmp_path / "out"))
    tokenizer_study.study(c)
    found = json.loads((tmp_path / "out/tokenizer_kinds.json").read_text())
    rows = {(row["kind"], row["vocab_size"]): row for row in found["rows"]}
    assert len(rows) == 6
    assert found["command"].startswith("python experiments/tokenizers.py")
    assert rows["unigram", 600]["by_seed"] == pytest.approx([1.8, 1.81])
    for (kind, size), row in rows.items():
        manifest = json.loads((tmp_path / f"out/shards/{kind}_{size}/manifest.json").read_text())["splits"]["train"]
        # the same bytes for all: updates of 8 x 256 tokens, as recipes/scratch.toml has it
        assert row["steps"] == round(50_000 * manifest["tokens"] / manifest["bytes"] / 2048)
        assert row["exact"] == (kind != "wordpiece")
    assert "With 400 ids WordPiece is best (1.805), ahead of Unigram by 0.100, more than the seeds" in found["shows"]
    assert "BPE gets better from 400 to 600 ids (-0.100)" in found["shows"]
    assert "WordPiece cannot give most documents back" in found["shows"]
    assert (tmp_path / "out/tokenizer_kinds.png").stat().st_size > 10_000
    assert {file: file.read_bytes() for file in tokenizer_study.RESULTS.iterdir()} == before, "another study"


def test_what_lies_within_the_noise_is_no_difference(tokenizer_study):
    rows = [{"kind": kind, "vocab_size": size, "bits_per_byte": 2 + change, "by_seed": [2 + change, 2.05 + change],
             "steps": 10, "exact": 1.0} for kind, change in (("bpe", 0.0), ("unigram", 0.04)) for size in (300, 400)]
    words = tokenizer_study.describe_kinds(rows, 0.5)
    assert "ahead of Unigram by 0.040, no more than the seeds spread" in words
    assert "BPE does not change from 300 to 400 ids" in words
    assert "give most documents back" not in words
