"""experiments/probes.py. Truths: metrics written by hand, and documents of which it is known what they hold."""

import json
import sys
from pathlib import Path

import pytest
from synthetic import make_documents

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))       # at the end: experiments/tokenizers.py has a package's name

import probes  # noqa: E402

import train  # noqa: E402
from core import cli  # noqa: E402


def ask(value, chance, half=0.1):
    return {"value": value, "interval": [value - half, value + half], "chance": chance, "n": 40}


def make_lines(trained=(0.25, 0.6, 0.9), heldout=(0.25, 0.3, 0.3), context=(0.6, 0.55, 0.3), general=(1.0, 1.2, 2.0)):
    lines = [{"kind": "start", "step": 0}]
    for i, values in enumerate(zip(trained, heldout, context, general)):
        if i:
            lines.append({"kind": "train", "step": 10 * i, "distance": {"all": 3.0 * i, "embed": 1.0}})
        lines.append({"kind": "eval", "step": 10 * i, "sources": {
            "domain": {"bits_per_byte": (2.0, 1.5, 1.8)[i]}, "general": {"bits_per_byte": values[3]}},
            "probes": {"facts_trained": ask(values[0], 0.25), "facts_heldout": ask(values[1], 0.25),
                       "in_context": ask(values[2], 0.33), "in_context.copy": ask(0.5, 0.25)}})
    return lines


def test_rows_are_what_the_metrics_say():
    rows = probes.read_rows(make_lines())
    assert [(row["step"], row["distance"], row["facts_trained"], row["domain_bits_per_byte"]) for row in rows] == [
        (0, 0.0, 0.25, 2.0), (10, 3.0, 0.6, 1.5), (20, 6.0, 0.9, 1.8)]
    assert rows[1]["in_context_interval"] == pytest.approx([0.45, 0.65])
    assert not any(key.startswith("in_context.copy") for key in rows[0])


def test_the_paragraph_says_what_was_found():
    said = probes.describe(probes.read_rows(make_lines()))
    assert said.startswith(
        "Facts of trained documents: 0.25 before and 0.90 after 20 steps, above chance (0.25). Facts of held-out ones: "
        "0.25 before and 0.30 after 20 steps, not above chance (0.25). In context: ")
    assert "below where it was, with its interval, from step 20 on; general text is 5 % worse from step 10 on." in said
    assert "best at step 10 (1.500 bits per byte) and ends at 1.800; general text goes from 1.000 to 2.000" in said
    said = probes.describe(probes.read_rows(make_lines(context=(0.35, 0.3, 0.3))))
    assert "cannot fall: this base is not above chance" in said
    kept = probes.describe(probes.read_rows(make_lines(context=(0.6, 0.6, 0.6), general=(1.0, 1.0, 1.0))))
    assert "with its interval, at no step; general text is 5 % worse at no step." in kept


def test_documents_that_hold_a_fact():
    short, filler = make_documents(30), "x" * 260
    long = [f"{text} {filler}" for text in short]
    assert probes.choose_documents([*short, filler, *long], 12) == long[:12]
    with pytest.raises(ValueError, match="has 30 documents of 250 to 1200 characters that hold a fact, and --documents "
                                         "asks for 31"):
        probes.choose_documents([*short, *long], 31)


def test_what_a_study_leaves(base, tmp_path, monkeypatch, capsys):
    """The run itself is replaced; its words are those that train.py takes."""
    model, asked = base[1], []
    (tmp_path / "law.txt").write_text("\n\n".join(f"{text} {'so it was said ' * 18}" for text in make_documents(20)))
    (tmp_path / "tales.txt").write_text("|".join(f"a tale of {i}" for i in range(60)))

    def run(program, recipe, *words, threads):
        asked.append(cli.parse(train.Config, [str(recipe), *map(str, words)], recipe=True))
        folder = Path(asked[0].out)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, make_lines())))
    monkeypatch.setattr(cli, "run_command", run)
    out = tmp_path / "out"
    words = ["--model", model, "--domain", tmp_path / "law.txt", "--general", tmp_path / "tales.txt", "--separator",
             "|", "--out", out, "--documents", 16, "--steps", 20, "--every", 10, "--in-context", 7]
    assert cli.run("probes.py", "", (probes.Probes, probes.run_study), argv=list(map(str, words))) == 0
    [c] = asked
    assert (c.train.steps, c.eval.every, c.eval.probes.facts, c.eval.probes.in_context) == (20, 10, 100, 7)
    assert (c.data.domain_share, c.optim.lr, c.optim.min_lr) == (1, 4e-3, pytest.approx(4e-4))
    packed = json.loads((out / "shards/domain/manifest.json").read_text())["splits"]
    assert sum(split["documents"] for split in packed.values()) == 16
    assert all(split["documents"] for split in packed.values())
    found = json.loads((out / "probes.json").read_text())
    assert [row["step"] for row in found["rows"]] == [0, 10, 20]
    assert found["shows"] in capsys.readouterr().out
    assert (out / "probes.png").stat().st_size > 10_000
    assert cli.run("probes.py", "", (probes.Probes, probes.run_study), argv=[*map(str, words), "--facts", "0",
                                                                           "--in-context", "0"]) == 2
