"""experiments/lora_rates.py. Truth: curves whose points are worked out by hand."""

import sys
from pathlib import Path

import pytest

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


def test_every_rate_of_a_curve_differs_in_the_rate_alone():
    words = {method: words for method, (_, words) in lora_rates.METHODS.items()}
    assert words["full at 1"] == ["--optim.lr", 1e-3, "--optim.min-lr", 1e-4]
    assert words["LoRA 32 at 10"] == ["--lora.rank", 32, "--lora.alpha", 64, "--optim.lr", 1e-2, "--optim.min-lr", 1e-3]
