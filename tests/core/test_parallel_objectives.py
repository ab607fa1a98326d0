"""Every objective on four ranks is the objective on one: the same corrupted rows, losses, measures and gradient norms.

The truth is one process with the whole batch in one piece. Four forked ranks (gloo) go through every case; this file is
also what each runs. Rows are equal in every bit, as corruption is a function of the seed
and the place in the data. Losses and norms differ by the order of sums: 1e-5 relative, as in test_parallel.py.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import pytest
from ranks import fork_ranks, found_by, go_through, run_once
from runs import digest, one, settings
from synthetic import KINDS, texts

import tokenizer
import train
from stages.build import build
from text.chat import Example, Segment, encode_examples
from text.extend_vocabulary import add
from text.shards import pack

STEPS, BATCH, RANKS = 3, 8, 4
ALONE = ["--data.sources.legal.weight", 0, "--data.sources.prefs.weight", 1]
OBJECTIVES = {
    "masked": [], "span": [], "ul2": [], "fim": ["--objective.fim-rate", 0.5], "selective": ["--objective.keep", 0.4],
    "mixture": ["--objective.weights.causal", 1, "--objective.weights.span", 1, "--objective.weights.masked", 1],
    "electra": [], "dpo": ALONE, "orpo": ALONE}
CASES = [(name, "ddp") for name in OBJECTIVES] + [(name, "fsdp") for name in ("selective", "dpo", "orpo")]


def case(folder: Path, name: str, strategy: str, ranks: int):
    """DPO's reference is the base. Selective learning has another one, since against the base all excesses are 0."""
    words = ["--model.init", "pretrained", "--model.path", folder / "base/final", "--data.schedule", "static",
             "--data.domain-share", 1, "--data.sources.prefs.path", folder / "prefs", "--data.sources.prefs.weight", 0,
             "--train.batch-size", BATCH, "--train.micro-batch-size", BATCH if ranks == 1 else 1,
             "--parallel.strategy", strategy, "--objective.name", name, *OBJECTIVES[name]]
    if name == "selective":
        words += ["--objective.reference", folder / "reference/final"]
    return settings(folder, "unused", *words, steps=STEPS)


def steps_of(c, world) -> dict:
    """{"rows": {"step/row": hash of the corrupted row}, "told": of each step what was found} of a run without files."""
    run, found = build(c, world), {"rows": {}, "told": []}
    share = BATCH // world.size
    for step in range(STEPS):
        batches = train.micro_batches(run, step)
        rows = [dataclasses.replace(batch, **{key: getattr(batch, key)[i:i + 1] for key in
                                              ("tokens", "labels", "position_ids", "doc_start")})
                for batch in batches for i in range(len(batch.tokens))]
        found["rows"] |= {f"{step}/{world.rank * share + i}": digest([row]) for i, row in enumerate(rows)}
        done = train.train_step(run, step, batches)
        found["told"].append({key: done[key] for key in ("loss", "grad_norm", "measured", "sources")})
    return found


def make_bases(rank: int, folder: Path):
    tokenizer.train(texts("legal") + texts("story"), "bpe", 300, folder / "words")
    (folder / "tok").mkdir()
    add(folder / "words", [], folder / "tok", objectives=["masked", "span", "ul2", "fim"], sentinels=10)
    tok = tokenizer.load(folder / "tok")
    for kind in KINDS:
        pack(texts(kind), tok, folder / kind, heldout=0.1)
    pairs = [Example(f"{i}", [[Segment(f"{i} ", False), Segment(answer[:20], True)] for answer in answers])
             for i, answers in enumerate(zip(texts("legal", 60), texts("story", 60)))]
    pack(pairs, tok, folder / "prefs", encode=functools.partial(encode_examples, {}, None), heldout=0,
         records={"format": "preference", "learn": "responses", "template": "none"})
    for name, share in (("base", 0), ("reference", 1)):
        train.train(settings(folder, folder / name, "--data.domain-share", share, "--data.schedule", "static"), one())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return found_by(run_once(tmp_path_factory, __file__))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_objective_on_four_ranks_is_that_on_one(ranks, case):
    every, (true,) = ranks[str(case)], ranks[case[0]]
    assert len(every) == RANKS
    rows = [row for found in every for row in found["rows"]]
    assert len(rows) == len(set(rows)) == STEPS * BATCH
    assert {key: row for found in every for key, row in found["rows"].items()} == true["rows"]
    assert len(set(true["rows"].values())) == STEPS * BATCH, "each row is another"
    for found in every:
        for mine, theirs in zip(found["told"], true["told"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
            assert mine["measured"] == pytest.approx(theirs["measured"], rel=1e-5, abs=1e-6)
            for source, (nats, targets) in theirs["sources"].items():
                assert mine["sources"][source] == [pytest.approx(nats, rel=1e-5), targets]
    losses = [told["loss"] for told in true["told"]]
    assert len(set(losses)) == STEPS
    assert true["told"][0]["grad_norm"] > 1e-3


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Read once, for all ranks.
    parsed = {str(key): (RANKS, case(folder, *key, RANKS)) for key in CASES}
    parsed |= {name: (1, case(folder, name, "ddp", 1)) for name in OBJECTIVES}
    fork_ranks(make_bases, 1, folder)
    go_through(folder, parsed, steps_of)
