"""experiments/forgetting.py and experiments/budget.py. Truths: sums worked out by hand, and a run's own eval.json."""

import json
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))       # at the end: experiments/tokenizers.py has a package's name

import budget  # noqa: E402
import forgetting  # noqa: E402

from core import cli  # noqa: E402


def row(method, domain, general, seed=0):
    return {"method": method, "seed": seed, "domain_bits_per_byte": domain, "general_bits_per_byte": general,
            "domain_gain": 1 - domain / 4, "forgetting": general - 1, "seconds": 1.0, "step_ms": 100.0, "peak_gb": 1.0,
            "replay_share": 0.0}


def test_a_method_is_measured_against_domain_only_training():
    runs = [row("domain_only", 1.9, 2.0), row("domain_only", 2.1, 2.2, 1), row("replay", 2.1, 1.1),
            row("replay", 2.1, 1.3, 1), row("freeze", 2.2, 1.9), row("freeze", 2.2, 1.9, 1), row("merge", 3.0, 1.0),
            row("merge", 3.0, 1.0, 1)]
    rows = {r["method"]: r for r in forgetting.summarise(runs)}
    # 110 % forgotten, 20 % with replay: 82 % of it removed, for 2.1 / 2.0 of the domain's bits
    assert rows["replay"]["forgetting_removed"] == pytest.approx(1 - 0.2 / 1.1)
    assert rows["replay"]["domain_cost"] == pytest.approx(0.05)
    assert rows["replay"]["general_bits_per_byte_sd"] == pytest.approx(0.2 / 2**0.5)
    assert rows["domain_only"]["forgetting_removed"] == rows["domain_only"]["domain_cost"] == 0
    assert {method for method, r in rows.items() if r["pareto"]} == {"domain_only", "replay", "merge"}
    assert [line.split(" | ")[0] for line in forgetting.draw_table(list(rows.values())).splitlines()[2:]] == \
        ["| merge *", "| replay 30 % *", "| freeze", "| domain only *"]


def test_what_a_budget_run_spent_and_lost(tmp_path, monkeypatch):
    lines = [{"kind": "eval", "step": step, "sources": {"general": {"bits_per_byte": general}}}
             for step, general in ((0, 1.0), (10, 1.12), (20, 1.05), (30, 1.101))]
    # a mean of 0.6 up to step 10, of 0.5 up to 20 (so 0.4 within) and of 0.4 up to 30 (0.2 within)
    lines += [{"kind": "train", "step": step, "replay_share": share}
              for step, share in ((1, 0.5), (10, 0.6), (20, 0.5), (30, 0.4))]
    kept = {"seed": 0, "domain_bits_per_byte": 2.0, "general_bits_per_byte": 1.101, "replay_share": 0.4}
    monkeypatch.setattr(budget, "measure_run", lambda *a: (kept, lines))
    got = budget.measure_loss("fixed", [], 0, types.SimpleNamespace(epsilon=0.1), tmp_path)
    assert got["replay_shares"] == pytest.approx([0.6, 0.4, 0.2])
    assert got["rises"] == pytest.approx([0, 0.12, 0.05, 0.101])
    assert (got["evaluations_over"], got["evaluations"], got["replay_share"]) == (2, 3, 0.4)
    assert (got["worst_rise"], got["last_rise"]) == (pytest.approx(0.12), pytest.approx(0.101))


def test_the_fixed_share_is_what_the_budget_spent(monkeypatch):
    asked = []

    def measured(method, words, *rest):
        asked.append(words)
        return {"method": method, "replay_share": 0.37, "worst_rise": 0.1, "evaluations_over": 0, "evaluations": 3,
                "last_rise": 0.1, "domain_bits_per_byte": 2.0}
    monkeypatch.setattr(budget, "measure_loss", measured)
    budget.measure_pair(0, types.SimpleNamespace(epsilon=0.1), Path("out"))
    assert "budget" in asked[0]
    assert asked[1] == ["--data.domain-share", 0.63]


def study(data_dir, out, stories) -> int:
    """Exit status of a study of one method, one seed and two steps."""
    corpora = data_dir / "corpora"
    words = ["--model", data_dir / "models/stories260K", "--domain", corpora / "legal_en_dc/dc_code_title16.txt",
             "--general", corpora / "tinystories" / stories, "--separator", "<|endoftext|>",
             "--methods", "domain_only", "--seeds", 3, "--steps", 2, "--out", out]
    return cli.run("forgetting.py", "", (forgetting.Forgetting, forgetting.run_study), argv=list(map(str, words)))


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_run_of_the_study_is_a_run_of_the_project(data_dir, tmp_path):
    out, results = tmp_path / "out", ROOT / "experiments/results/forgetting.json"
    before = results.read_bytes()
    assert study(data_dir, out, "tinystories_sample_2MiB.txt") == 0
    (one,) = json.loads((out / "forgetting.json").read_text())["rows"]
    scores = json.loads((out / "runs/domain_only_3/eval.json").read_text())
    assert one["domain_bits_per_byte"] == scores["after"]["domain"]["bits_per_byte"]
    assert one["forgetting"] == scores["after"]["general"]["bits_per_byte"] / \
        scores["before"]["general"]["bits_per_byte"] - 1
    assert (out / "forgetting.png").stat().st_size > 10_000
    assert results.read_bytes() == before, "some methods alone are no study"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_too_little_text_is_one_line(data_dir, tmp_path, capsys):
    assert study(data_dir, tmp_path / "few", "tinystories_sample_cs336.txt") == 2
    error = capsys.readouterr().err
    assert "--general text no document" in error
    assert error.count("\n") == 1


def test_a_study_does_not_write_over_another(data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert study(data_dir, tmp_path, "tinystories_sample_2MiB.txt") == 2
    assert "exists already" in capsys.readouterr().err
