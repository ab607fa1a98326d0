"""experiments/lora_rates.py. Truth: curves whose points are worked out by hand."""

import json
import sys
from pathlib import Path

import pytest
import torch

from core import cli

sys.path.append(str(Path(__file__).parents[2] / "experiments"))     # at the end: tokenizers.py has a package's name

import lora_rates


def run(method, domain, forgetting, seed=0):
    return {"method": method, "seed": seed, "domain_bits_per_byte": domain, "general_bits_per_byte": 1 + forgetting,
            "domain_gain": 1 - domain / 4, "forgetting": forgetting, "step_ms": 1.0,
            "way": [[0, 4.0, 0.0], [75, domain, forgetting]]}


def test_a_model_is_set_beside_full_training_where_that_has_learned_as_much():
    """The curve of full training: (4, 0), the base, then (3, 20 %) and (2, 80 %), which are means of two seeds; the run
    at the highest rate is beaten in both values and no part of it."""
    runs = [run("full at 0.1", 3.1, 0.1), run("full at 0.1", 2.9, 0.3, 1), run("full at 1", 2.0, 0.7),
            run("full at 1", 2.0, 0.9, 1), run("full at 3", 2.2, 1.5),
            run("LoRA 8 at 1", 3.5, 0.15), run("LoRA 8 at 3", 2.5, 0.4), run("LoRA 8 at 10", 1.9, 0.9)]
    rows = {row["method"]: row for row in lora_rates.summarise(runs)}
    assert rows["LoRA 8 at 1"]["full"] == pytest.approx(0.1)
    assert rows["LoRA 8 at 1"]["excess"] == pytest.approx(0.05)
    assert rows["LoRA 8 at 3"]["full"] == pytest.approx(0.5)
    assert rows["LoRA 8 at 3"]["excess"] == pytest.approx(-0.1)
    assert rows["LoRA 8 at 10"]["full"] is rows["LoRA 8 at 10"]["excess"] is None, "full training never got so far"
    assert rows["full at 1"]["excess"] == pytest.approx(0)
    assert rows["full at 3"]["excess"] == pytest.approx(1.5 - 0.68)
    lines = lora_rates.draw_table(list(rows.values())).splitlines()
    assert [line.count("|") for line in lines] == [7] * 8
    assert lines[6] == "| LoRA 8 | 3x | 2.5000 | +40.0% | +50.0% | -10.0 points |"


def test_a_part_of_a_change_is_a_share_or_the_nearest_matrix_of_a_rank():
    """The change has the singular values 3, 2 and 1 along three pairs of axes."""
    change = torch.zeros(5, 4)
    change[0, 1], change[4, 0], change[2, 3] = 2.0, -3.0, 1.0
    kept = torch.zeros(5, 4)
    kept[0, 1], kept[4, 0] = 2.0, -3.0
    torch.testing.assert_close(lora_rates.take_rank(change, 2), kept)
    torch.testing.assert_close(lora_rates.take_rank(change, 4), change)
    assert lora_rates.take_share(change, 0.5)[4, 0] == -1.5
    assert torch.equal(lora_rates.take_rank(torch.ones(3), 1), torch.ones(3)), "a vector is kept"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_way_back_ends_at_the_base_and_begins_at_the_run(data_dir, tmp_path, monkeypatch):
    """A study of two steps: with a share of 0 there is the base, with 1 or all ranks what the run itself found."""
    corpora, shares = data_dir / "corpora", [(lora_rates.take_share, 0.0), (lora_rates.take_share, 1.0)]
    monkeypatch.setattr(lora_rates, "TOKENS", 2000)
    monkeypatch.setattr(lora_rates, "WORDS", [*lora_rates.WORDS[:-1], 2000])
    monkeypatch.setattr(lora_rates, "SHARES", shares)
    monkeypatch.setattr(lora_rates, "RANKS", [(lora_rates.take_rank, 64)])
    words = ["--model", data_dir / "models/stories260K", "--domain", corpora / "legal_en_dc/dc_code_title16.txt",
             "--general", corpora / "tinystories/tinystories_sample_2MiB.txt", "--separator", "<|endoftext|>",
             "--methods", "full at 1", "--seeds", 3, "--steps", 2, "--out", tmp_path / "out"]
    study = (lora_rates.Rates, lora_rates.run_study)
    assert cli.run("lora_rates.py", "", study, argv=list(map(str, words))) == 0
    (row,) = json.loads((tmp_path / "out/lora_rates.json").read_text())["rows"]
    (one,) = row["runs"]
    none, whole, ranks = (found[2:] for found in one["back"])
    assert none == pytest.approx([one["way"][0][1], 0])
    assert whole == pytest.approx([row["domain_bits_per_byte"], row["forgetting"]], rel=1e-5)
    assert ranks == pytest.approx(whole, rel=1e-4)
    assert (tmp_path / "out/lora_rates.png").stat().st_size > 10_000


def test_every_rate_of_a_curve_differs_in_the_rate_alone():
    words = {method: words for method, (_, words) in lora_rates.METHODS.items()}
    assert words["full at 1"] == ["--optim.lr", 1e-3, "--optim.min-lr", 1e-4]
    assert words["LoRA 32 at 10"] == ["--lora.rank", 32, "--lora.alpha", 64, "--optim.lr", 1e-2, "--optim.min-lr", 1e-3]
