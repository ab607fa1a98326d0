"""Every objective on four ranks is the objective on one: the same corrupted rows, losses, measures and gradient norms.

The truth is one process with the whole batch in one piece. Four real ranks (torchrun, gloo) go through every case in
one start; this file is also what each runs. Rows are equal in every bit, as corruption is a function of the seed
and the place in the data. Losses and norms differ by the order of sums: 1e-5 relative, as in test_parallel.py.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ENV, digest, one, settings
from synthetic import KINDS, texts

import tokenizer
import train
from core import parallel
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


def steps_of(folder: Path, name: str, strategy: str, world) -> dict:
    """{"rows": {"step/row": hash of the corrupted row}, "told": of each step what was found} of a run without files.
    DPO's reference is the base. Selective learning has another one, since against the base all excesses are 0."""
    words = ["--model.init", "pretrained", "--model.path", folder / "base/final", "--data.schedule", "static",
             "--data.domain-share", 1, "--data.sources.prefs.path", folder / "prefs", "--data.sources.prefs.weight", 0,
             "--train.batch-size", BATCH, "--train.micro-batch-size", BATCH if world.size == 1 else 1,
             "--parallel.strategy", strategy, "--objective.name", name, *OBJECTIVES[name]]
    if name == "selective":
        words += ["--objective.reference", folder / "reference/final"]
    run, found = build(settings(folder, "unused", *words, steps=STEPS), world), {"rows": {}, "told": []}
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


def as_rank(folder: Path):
    torch.set_num_threads(1)
    world = parallel.start("cpu")
    found = {str(case): steps_of(folder, *case, world) for case in CASES}
    (folder / f"rank{world.rank}.json").write_text(json.dumps(found))
    world.barrier()                                    # as train.main: none leaves while another still waits for it
    parallel.stop()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """[what each of the four ranks found], and the folder that they read."""
    folder = tmp_path_factory.mktemp("ranks")
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
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.evaluate.run_command", lambda *words: "")
        for name, share in (("base", 0), ("reference", 1)):
            train.train(settings(folder, folder / name, "--data.domain-share", share, "--data.schedule", "static"),
                        one())
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                           str(RANKS), __file__, folder], env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    yield [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)], folder
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_objective_on_four_ranks_is_that_on_one(ranks, case):
    every, folder = ranks
    every = [found[str(case)] for found in every]
    true = json.loads(json.dumps(steps_of(folder, case[0], "ddp", one())))
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
    as_rank(Path(sys.argv[1]))
