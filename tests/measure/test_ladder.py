"""measure/ladder.py. Truths: run folders written by hand, and which runs a second ladder makes."""

import json
import math
from types import SimpleNamespace

import pytest
from synthetic import texts

import tokenizer
import train
from core import cli
from core.errors import UserError
from measure import ladder
from measure.ratio import share_rungs
from text.shards import pack


def scores(role: str, bits: float) -> dict:
    return {"role": role, "bits_per_byte": bits, "nats_per_token": bits, "bytes": 100, "tokens": 100}


def write_run(folder, losses=(3.0, 2.5), domain=1.5, general=1.1, stop=None):
    """The files of a run that ended, from 2.0 bits per byte on the domain and 1.0 in general."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "train", "step": i + 1, "loss": loss if math.isfinite(loss) else None, "grad_norm": 1.0,
              "step_ms": 100.0, "sources": {"law": {}}} for i, loss in enumerate(losses)]
    lines += [{"kind": "stop", "step": len(losses), "message": stop}] if stop else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints").mkdir(exist_ok=True)
    if not stop:
        before, after = ({"law": scores("domain", a), "tale": scores("general", b)} for a, b in (
            (2.0, 1.0), (domain, general)))
        (folder / "eval.json").write_text(json.dumps({"before": before, "after": after}))


def test_a_row_is_what_the_run_left(tmp_path):
    write_run(tmp_path / "run")
    row = ladder.read_row(tmp_path / "run")
    assert (row["domain"], row["general"]) == (1.5, 1.1)
    assert (row["gain"], row["forgetting"], row["score"]) == pytest.approx((0.25, 0.1, 0.2))
    assert row["trouble"] == []
    assert row["seconds"] == pytest.approx(0.2)


def test_spikes_and_divergence_are_named(tmp_path):
    losses = [2.0 + 0.05 * (i % 2) for i in range(40)]
    losses[30], losses[35] = 9.0, math.nan
    write_run(tmp_path / "run", losses, domain=2.2)
    trouble = ladder.read_row(tmp_path / "run")["trouble"]
    assert trouble[0] == "the domain ends 10.0% above the base"
    assert trouble[1].startswith("in step 31 the loss is 9, a spike above 2.02")
    assert trouble[2] == "in step 36 the loss is nan"
    write_run(tmp_path / "ended", [2.0, 3.0], stop="in step 3 the loss is nan; lower --optim.lr")
    row = ladder.read_row(tmp_path / "ended")
    assert row["domain"] is None
    assert row["trouble"][0] == "diverged: in step 3 the loss is nan; lower --optim.lr"


@pytest.fixture
def recipe(lab, tmp_path):
    """A recipe file of the two sources."""
    file = tmp_path / "run.toml"
    file.write_text(f'''[model]
init = "scratch"
tokenizer = "{lab / 'tok'}"
[data.sources.law]
path = "{lab / 'legal'}"
[data.sources.tale]
path = "{lab / 'story'}"
role = "general"
''')
    return str(file)


@pytest.fixture
def made(monkeypatch):
    """The words of each train.py that was started; a run at share 0.15 diverges where `made` begins so."""
    found = []

    def run(program, *words, **more):
        found.append(words)
        folder = train.Path(words[words.index("--out") + 1])
        write_run(folder, stop="the loss is nan" if "0.85" in words and found[0] == "diverge" else None)
        if "0.85" in words and found[0] == "diverge":
            raise UserError("train.py failed: the loss is nan")
    monkeypatch.setattr(cli, "run_command", run)
    return found


def climb(recipe, out, *settings, shares=(0, 0.05, 0.15, 0.3), **more):
    options = SimpleNamespace(**{"steps": 5, "seeds": [0], "out": str(out), "jobs": 1, "dry_run": False} | more)
    return ladder.climb("plan.py ratio", recipe, list(settings), share_rungs(shares), options)


def test_what_is_done_is_not_done_again_and_a_changed_recipe_is(recipe, tmp_path, made):
    rows = climb(recipe, tmp_path / "out")
    assert [row["share"] for row in rows] == [0, 0.05, 0.15, 0.3]
    assert len(made) == 4
    assert not list((tmp_path / "out").glob("*/checkpoints")), "weights are removed"
    words = list(made[1])
    assert words[words.index("--data.domain-share") + 1] == "0.95"
    assert words[words.index("--train.steps") + 1] == "5"
    assert words[words.index("--seed") + 1] == "0"
    assert climb(recipe, tmp_path / "out") == rows
    assert len(made) == 4
    climb(recipe, tmp_path / "out", shares=(0, 0.05, 0.15, 0.3, 0.5), jobs=2)
    assert len(made) == 5
    climb(recipe, tmp_path / "out", "--optim.lr", "1e-4")
    assert len(made) == 9
    climb(recipe, tmp_path / "out", seeds=[0, 1])
    assert len(made) == 13


def test_a_dry_run_makes_none(recipe, tmp_path, made, capsys):
    assert climb(recipe, tmp_path / "out", dry_run=True) == []
    assert not made
    assert capsys.readouterr().out.count("python train.py") == 4


def test_a_run_that_diverged_has_a_row_and_another_mistake_ends_the_ladder(recipe, tmp_path, made, monkeypatch):
    made.append("diverge")
    rows = climb(recipe, tmp_path / "out")
    assert [row["domain"] is None for row in rows] == [False, False, True, False]
    monkeypatch.setattr(cli, "run_command", lambda *words, **more: (_ for _ in ()).throw(UserError("no memory")))
    with pytest.raises(UserError, match="no memory"):
        climb(recipe, tmp_path / "other")


def test_a_recipe_that_no_ladder_can_judge_is_refused(recipe, lab, tmp_path):
    with pytest.raises(UserError, match="has no general source with a weight"):
        ladder.read_settings("plan.py ratio", recipe, ["--data.sources.tale.role", "domain"], general=True)
    with pytest.raises(UserError, match="has no general source with a weight"):
        ladder.read_settings("plan.py ratio", recipe, ["--data.sources.tale.weight", "0"], general=True)
    assert ladder.read_settings("plan.py rate", recipe, ["--data.sources.tale.weight", "0"], general=False)
    pack(texts("legal"), tokenizer.load(lab / "tok"), tmp_path / "none", heldout=0)
    with pytest.raises(UserError, match="the domain source law holds out no document"):
        ladder.read_settings("plan.py ratio", recipe, ["--data.sources.law.path", str(tmp_path / "none")], general=True)


def test_the_recipe_is_the_same_run_with_what_was_chosen(recipe, tmp_path):
    c = ladder.read_settings("plan.py ratio", recipe, ["--optim.lr", "2e-4", "--data.sources.tale.weight", "3"], True)
    c.data.schedule, c.data.domain_share = "static", 0.85
    ladder.write_recipe(str(tmp_path / "new.toml"), c, ["15% of replay"])
    again = cli.parse(train.Config, [str(tmp_path / "new.toml")], recipe=True)
    assert again == c
    assert (tmp_path / "new.toml").read_text().startswith("# 15% of replay\n")
