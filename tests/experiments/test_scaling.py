"""experiments/scaling.py and experiments/scratch.py. Truths: curves planted by Chinchilla's law, whose compute-optimal
line is known; sums by hand; a run's own eval.json and model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))       # at the end: experiments/tokenizers.py has a package's name

import scaling  # noqa: E402
import scratch  # noqa: E402

import hf  # noqa: E402
from core import cli  # noqa: E402
from core.files import read_json  # noqa: E402


def plant(a=0.34, b=0.28, longest=1e12, seed=0):
    """Rows whose curves follow L(N, D) = 1.7 + 406 / N^a + 411 / D^b with C = 6 N D, N a geometric ladder."""
    rows = []
    for N in 1e6 * 4.0 ** np.arange(5):
        D = np.geomspace(10, longest, 800)
        losses = 1.7 + 406 / N**a + 411 / D**b
        rows.append({"parameters": N, "seed": seed, "curve": list(zip((6 * N * D).tolist(), losses.tolist()))})
    return rows


@pytest.mark.parametrize(("a", "b"), [(0.34, 0.28), (0.3, 0.5)])
def test_the_best_size_grows_with_compute_as_chinchilla_s_law_has_it(a, b):
    """Both terms scale alike along N_opt ~ C^(b / (a + b))."""
    found = scaling.find_optimum([*plant(a, b), *plant(a, b, seed=1)])
    assert len(found["changes"]) == 4
    assert found["exponent"] == pytest.approx(b / (a + b), rel=0.01)
    assert found["exponent_by_seed"] == [pytest.approx(b / (a + b), rel=0.01)] * 2
    assert [change["parameters"] for change in found["changes"]] == pytest.approx([2e6 * 4**k for k in range(4)])


def test_the_end_of_a_run_is_no_change_of_the_best_size():
    """Each run ends before a larger one has passed it: what follows is only what is left."""
    found = scaling.find_optimum(plant(longest=3e7))
    assert (found["changes"], found["exponent"]) == ([], None)


def test_a_larger_size_that_is_worse_throughout_is_never_the_best():
    C = np.geomspace(1, 100, 50)
    curves = {1.0: [(c, 3 - 0.1 * np.log(c)) for c in C], 2.0: [(c, 4 - 0.1 * np.log(c)) for c in C]}
    assert scaling.find_changes(curves) == []


@pytest.mark.parametrize("size", scratch.SIZES)
def test_sizes_are_what_their_names_say(size):
    named = float(size[:-1]) * {"K": 1e3, "M": 1e6}[size[-1]]
    assert scratch.count_block_parameters(size) == pytest.approx(named, rel=0.03)


LAW = {"alpha": 0.5, "alpha_interval": [0.4, 0.6], "L_inf": 2.0, "L_inf_interval": [1.9, 2.1], "r2": 0.99,
       "residual_sd": 0.01, "noise_sd": 0.01, "worst_miss": 0.3, "verdict": "fits"}
ROWS = [{"parameters": N, "tokens": 1000} for N in (1, 10, 100)]
NO_LINE = {"changes": [], "exponent": None, "exponent_by_seed": [None]}


def test_the_paragraph_says_what_was_found():
    unseen = {"predicted": 2.5, "interval": [2.4, 2.6], "measured": 2.7}
    words = scaling.describe(ROWS, LAW, unseen, NO_LINE)
    assert "A power law with a floor fits: alpha 0.500 (95 %: 0.400 to 0.600)" in words
    assert "meets the expected 0.35 to 0.4" in words
    assert "2.700 was measured, outside that interval" in words
    inside = scaling.describe(ROWS, LAW, unseen | {"measured": 2.5}, NO_LINE)
    assert "2.500 was measured, inside that interval" in inside
    assert "No larger model passed a smaller one" in words
    change = {"flops": 1e9, "parameters": 10.0, "loss": 3.0}
    words = scaling.describe(ROWS, LAW, None, NO_LINE | {"changes": [change]})
    assert "changed 1 times within these runs, too few for a compute-optimal line" in words
    assert "lies outside the expected" in scaling.describe(ROWS, LAW | {"alpha_interval": [0.41, 0.6]}, None, NO_LINE)
    words = scaling.describe(ROWS, LAW | {"verdict": "misfit"}, unseen, NO_LINE)
    assert "No power law with a floor fits" in words
    assert "expected" not in words
    assert "no law was found" in scaling.describe(ROWS, LAW | {"verdict": "no trend"}, None, NO_LINE)


def test_only_a_study_by_its_defaults_becomes_the_project_s_result(tmp_path):
    def choose(**given):
        c = scaling.Scaling(text=["a.txt"], out="elsewhere", jobs=1, **given)
        return scratch.choose_results(c, tmp_path, "out", "jobs", "separator")
    assert choose() == choose(separator="--") == scratch.RESULTS
    assert choose(seeds=[0]) == choose(steps=3) == choose(sizes=["25K"] * 4) == choose(vocab_size=300) == tmp_path


def study(*words):
    return cli.run("scaling.py", "", (scaling.Scaling, scaling.run_study), argv=list(map(str, words)))


def test_three_sizes_are_refused_in_one_line(tmp_path, capsys):
    assert study("--text", "a.txt", "--sizes", "25K", "83K", "0.2M", "25K", "--out", tmp_path / "out") == 2
    assert "--sizes has 3 sizes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_study_leaves(tmp_path, monkeypatch):
    """Runs that follow a law give its exponent, a table, a picture and a paragraph; those of another study stay."""
    def measured(size, seed, c, steps, out):
        N = scratch.count_block_parameters(size)
        loss = (3e4 / N) ** 0.4 + 2 + 0.002 * seed
        return {"size": size, "seed": seed, "parameters": N, "steps": steps, "tokens": 1000, "flops": 6000.0 * N,
                "loss": loss, "perplexity": np.exp(loss), "bits_per_byte": loss / 2, "seconds": 1.0,
                "curve": [(N * step, loss + 1 / step) for step in (1, 2, 3)]}
    monkeypatch.setattr(scaling, "measure", measured)
    before = {file: file.read_bytes() for file in scratch.RESULTS.iterdir()}
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The story number {i} begins here and ends." for i in range(100)))
    assert study("--text", text, "--vocab-size", 300, "--out", out) == 0
    found = json.loads((out / "scaling.json").read_text())
    assert found["law"]["alpha"] == pytest.approx(0.4, abs=0.02)
    assert found["law"]["verdict"] == "fits"
    assert found["seeds"] == [0, 1]
    assert [row["size"] for row in found["rows"][::2]] == ["25K", "83K", "0.2M", "0.55M", "1.5M"]
    assert "A power law with a floor fits" in found["shows"]
    assert (out / "scaling.png").stat().st_size > 10_000
    tokens = read_json(out / "shards/manifest.json")["splits"]["train"]["tokens"]
    # an epoch, as recipes/scratch.toml has it, of steps of 2 sequences
    assert {row["steps"] for row in found["rows"]} == {max(1, tokens // (2 * 256))}
    assert {file: file.read_bytes() for file in scratch.RESULTS.iterdir()} == before, "other options: another study"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_run_of_the_study_is_a_run_of_the_project(tiny_bpe, tmp_path, data_dir):
    stories = scratch.read_text([str(data_dir / "corpora/tinystories/tinystories_sample_2MiB.txt")], "<|endoftext|>")
    scratch.pack_text(stories[:150], tmp_path / "shards", tiny_bpe)
    (tmp_path / "tokenizer").symlink_to(tiny_bpe)
    row = scaling.measure("25K", 3, scaling.Scaling(text=[]), 12, tmp_path)
    folder = tmp_path / "runs/25K_3"
    assert row["loss"] == json.loads((folder / "eval.json").read_text())["after"]["text"]["nats_per_token"]
    model = hf.load(folder / "final")
    assert row["parameters"] == model.count_parameters() - model.embed_tokens.weight.numel()
    assert row["tokens"] == 12 * 2 * 256
    # the weights' matmuls, 6 operations per weight and token, the head among them; attention adds a quarter or less
    weights = model.count_parameters() - sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert 1 < row["flops"] / (6 * row["tokens"] * weights) < 1.5
    # within the constant rate: behind the warm-up, before the last fall
    assert [flops / row["flops"] * 12 for flops, _ in row["curve"]] == pytest.approx(list(range(1, 10)))
    metrics = scratch.read_lines(folder / "metrics.jsonl")
    assert row["curve"][4][1] == next(line["sources"]["text"]["nats_per_token"] for line in metrics
                                      if line["kind"] == "eval" and line["step"] == 5)
