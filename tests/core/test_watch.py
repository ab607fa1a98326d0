"""core/watch.py. Truth: two real ranks, started as torchrun starts them, of which one is made to fail; the clock.

This file is also what each of them runs. Rank 0 holds the store here, which under torchrun its agent does: the harder
case, as the store is gone with it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ENV, arguments, lines, make_lab, same_checkpoint

from core import checkpoint
from core.errors import UserError
from core.watch import Watch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]
STEPS = 12
# What PyTorch says by itself of a store that is gone, and of DDP's options.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}


def as_rank(fault: str, rank: int, words: list[str]):
    """train.py on one rank of two, on which something goes wrong in the sixth step, in the build or at a save."""
    import train
    from core import groups, parallel, watch
    from core.log import Logger
    from stages import build, evaluate
    torch.set_num_threads(1)
    evaluate.run_command = lambda *command: ""
    watch.LOOK = 0.3
    kind, _, where = fault.partition("@")
    real = train.train_step

    def go_wrong(*_, **__):
        if kind == "mistake":
            raise UserError("the shelf is empty; fill it")
        if kind == "bug":
            raise ZeroDivisionError("a bug")
        if kind in ("kill", "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    def step(run, number, batches):
        clip = parallel.clip_gradients
        if kind == "killed" and number == 7:
            go_wrong()
        if rank == int(where) and (number >= 5 if kind == "gradient" else number == 5 and kind in ("once", "killed")):
            # After the ranks have shared it, so that their norms differ.
            parallel.clip_gradients = lambda model, limit: clip(model, limit) * float("nan")
        elif rank == int(where) and number == 5 and kind == "weight":
            own = run.inner.layers[1].mlp.down_proj.weight.data
            (own.to_local() if hasattr(own, "to_local") else own)[3, 5] = float("nan")
        elif rank == int(where) and number == 5:
            go_wrong()
        done = real(run, number, batches)
        parallel.clip_gradients = clip
        return done
    if kind == "sync":
        def sync(logger):
            if logger.main and not synced:
                synced.append(1)
                raise OSError(28, "No space left on device")
        synced, Logger.sync = [], sync
        tell_what_is_known(rank)
    elif where == "meeting":
        groups.CONNECT = 3
        if rank:
            parallel.dist.new_group = go_wrong
    elif where == "groups":
        groups.CONNECT = 3
        if rank:
            parallel.World.share_sequences = go_wrong
    elif where.startswith("build"):
        build.verify = go_wrong                   # only rank 0 verifies the shards
    else:
        train.train_step = step
    sys.argv = ["train.py", *words]
    sys.exit(train.main())


def tell_what_is_known(rank: int):
    """Print the step after which this rank knows of a save that failed, which the writer of rank 1 hears of late, and
    how many small collectives the training made in each step."""
    import train
    from core import checkpoint, parallel
    from stages.build import Run
    on_all, check, known, calls, each = checkpoint.run_on_all, Run.check, [], [], []

    def late(*arguments):
        try:
            return on_all(*arguments)
        except UserError:
            time.sleep(2 * rank)
            raise

    def look(run):
        check(run)
        if run.done % 4:
            # After the others the run saves.
            each.append(len(calls))
        if run.saver.error and not known:
            known.append(run.done)
        if run.done == run.steps:
            print(f"rank {rank} knew at {known}, collectives {sorted(set(each))}", flush=True)

    def counted(function):
        def call(*arguments, **options):
            if threading.current_thread() is threading.main_thread():
                calls.append(1)
            return function(*arguments, **options)
        return call
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
        setattr(parallel.dist, name, counted(getattr(parallel.dist, name)))
    real = train.train_step

    def slow(run, number, batches):
        # The first save, after step 4, has failed on rank 0 when step 6 begins.
        time.sleep(1 if number == 5 else 0)
        calls.clear()
        return real(run, number, batches)
    checkpoint.run_on_all, Run.check, train.train_step = late, look, slow


def ranks(fault: str, lab: Path, out: Path, *words, steps: int = STEPS) -> tuple[list[int], str, str, float]:
    """(exit statuses, stdout, stderr, seconds) of two ranks."""
    words = arguments(lab, out, "--parallel.step-timeout", 3, "--train.save-every", 4, *words, steps=steps)
    port, start = str(20_000 + os.getpid() % 20_000), time.monotonic()
    started = [subprocess.Popen([sys.executable, __file__, fault, *words], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**ENV, **QUIET, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in (0, 1)]
    said = [process.communicate(timeout=240) for process in started]
    return ([process.returncode for process in started], *("".join(texts) for texts in zip(*said)),
            time.monotonic() - start)


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("watch"))


@pytest.mark.parametrize(("fault", "status"), [("mistake@1", 2), ("mistake@build", 2), ("bug@1", 1)])
def test_one_rank_says_why_and_all_end(shared_lab, tmp_path, fault, status):
    statuses, _, errors, _ = ranks(fault, shared_lab, tmp_path / "run")
    assert statuses == [status, status], errors
    if status == 2:
        assert errors == "error: the shelf is empty; fill it\n"
    else:
        assert errors.count("Traceback") == errors.count("ZeroDivisionError: a bug") == 1
        assert "gloo" not in errors


@pytest.mark.parametrize(("fault", "says"), [
    ("kill@1", r"error: rank 1 died in step 6; the same command goes on"),
    ("kill@0", r"error: rank 0 died in step 6; the same command goes on"),
    ("hang@0", r"error: rank 0 \(at tests/core/test_watch\.py:\d+\) hangs in step 6: no rank went on for \d+ seconds"),
])
def test_a_dead_or_hung_rank_is_named_with_its_step(shared_lab, tmp_path, fault, says):
    out = tmp_path / "run"
    statuses, _, errors, seconds = ranks(fault, shared_lab, out, "--train.save-every", 2)
    assert sorted(statuses) == ([-9, 1] if "kill" in fault else [1, 1]), errors
    assert errors.count("\n") == 1
    assert re.match(says, errors), errors
    # Steps of milliseconds, the limit of 3 s, and starts on a busy machine.
    assert seconds < 240
    # The save at step 4 waited for the one before, and may have been on its way.
    assert checkpoint.steps(out / "checkpoints")[0] == 2
    for step in checkpoint.steps(out / "checkpoints"):
        checkpoint.verify(checkpoint.path_of(out / "checkpoints", step))


@pytest.mark.parametrize(("halted", "rows", "who"), [
    # It waited in a collective when it was halted; where it was then is not told.
    ([1], [(2, [5, 7]), (2, [5, 7])], "rank 1 shows no sign of life"),
    # Both wait, or both compute: the fewest collectives of all ranks, those of saves last.
    ([], [(2, [5, 7]), (2, [4, 9])], "rank 1 (at data.py:1) hangs"),
    ([], [(0, [5, 6]), (0, [5, 7])], "rank 0 (at data.py:0) hangs"),
    # Rank 0 waits for rank 1, in groups of some ranks, or at the end of a pipeline with fewer of them.
    ([], [(2, [5, 7]), (0, [5, 7]), (1, [5, 7])], "rank 1 (at data.py:1) hangs"),
    ([], [(2, [4, 7]), (1, [6, 7])], "rank 1 (at data.py:1) hangs"),
    ([], [(2, [5, 7]), (0, [5, 7]), (0, [5, 7])], "rank 1 (at data.py:1) and rank 2 (at data.py:2) hangs"),
    ([], [(2, [5, 7]), (2, [5, 7])], "all ranks wait"),
])
def test_the_rank_that_the_others_wait_for_is_named(monkeypatch, capsys, halted, rows, who):
    """rows: whether each rank is in a collective (2), in a backward pass (1) or not, and what it has begun."""
    seen = Watch.__new__(Watch)
    vars(seen).update(rank=0, size=len(rows), since=time.monotonic() - 60, limit=50, what="the start",
                      nodes={1: "node 1, b"})
    known = [{"waits": waits, "begun": begun, "where": f" (at data.py:{i})"} for i, (waits, begun) in enumerate(rows)]
    for name, answer in (("find_dead", halted), ("read_all", known), ("claim", True), ("wait_for", None)):
        monkeypatch.setattr(Watch, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    seen.name_the_last()
    who = who.replace("rank 1", "rank 1 (node 1, b)")
    assert capsys.readouterr().err.startswith(f"error: {who} in the start: no rank went on for 60 sec")


def test_what_ends_while_the_ranks_are_looked_at_was_slow_and_does_not_hang(monkeypatch):
    seen = Watch.__new__(Watch)
    vars(seen).update(since=time.monotonic() - 60)
    monkeypatch.setattr(Watch, "find_dead", lambda self, looks: self.enter("step 7", is_step=True))
    monkeypatch.setattr(Watch, "claim", lambda self, status: pytest.fail("it is ended"))
    vars(seen).update(is_step=True, slowest=0.0, short=3.0, long=9.0)
    seen.name_the_last()
    assert seen.what == "step 7"


@pytest.mark.parametrize(("rank", "events"), [(0, ["failed 1", "count end 0", "count ends", "ends 3", "exit 2"]),
                                              (2, ["failed 1", "count end 2", "count ends", "exit 2"])])
def test_the_rank_that_may_hold_the_store_ends_last(monkeypatch, rank, events):
    """Of four ranks that all fail alike, as by weights that are not finite, one speaks: those that come late still find
    that it has."""
    seen, found = Watch.__new__(Watch), []
    vars(seen).update(rank=rank, size=4, speaks=False, is_ending=False, store=SimpleNamespace(get=lambda name: b"2"))
    monkeypatch.setattr(Watch, "wait_for", lambda self, name, number: found.append(f"{name} {number}"))
    monkeypatch.setattr(Watch, "count", lambda self, name, more=0: found.append(f"count {name}"))
    monkeypatch.setattr(os, "_exit", lambda status: found.append(f"exit {status}"))
    seen.end()
    assert found == events


@pytest.mark.parametrize(("where", "words"), [("meeting", []), ("groups", ["--parallel.context", 2])])
def test_a_rank_that_dies_while_the_ranks_connect_is_not_waited_for_long(shared_lab, tmp_path, where, words):
    statuses, _, errors, seconds = ranks(f"kill@{where}", shared_lab, tmp_path / "run", *words)
    assert sorted(statuses) == [-9, 1], errors
    says = r"error: rank 1 (died|shows no sign of life) in the (start|build)[;:].* the same command goes on"
    assert re.search(says, errors), errors
    assert seconds < 240


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_on_both(shared_lab, tmp_path, strategy):
    out = tmp_path / "run"
    statuses, _, errors, _ = ranks("gradient@1", shared_lab, out, "--parallel.strategy", strategy,
                                      "--guard.limit", 2, "--train.save-every", 5)
    # The next step is left out as well, and the second stops the run.
    assert statuses == [2, 2]
    assert re.fullmatch(r"error: in step 7 the gradient norm is nan .* saved at step 7 of 12.*\n", errors), errors
    assert [row["step"] for row in lines(out, "left_out")] == [6, 7]
    assert checkpoint.steps(out / "checkpoints") == [5, 7]
    # Each rank writes some of the tensors: on neither has one moved.
    before, after = (checkpoint.load(checkpoint.path_of(out / "checkpoints", step))[:2] for step in (5, 7))
    assert all(torch.equal(old[name], new[name]) for old, new in zip(before, after) for name in old)
    statuses, _, errors, _ = ranks("none@9", shared_lab, out, "--parallel.strategy", strategy)
    assert (statuses, errors) == ([0, 0], "")
    assert json.loads((out / "eval.json").read_text())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_on_one_rank_rewinds_both(shared_lab, tmp_path, strategy):
    """At a save step; the second run is killed after that save and the rewind, and resumed."""
    outs, words = (tmp_path / "a", tmp_path / "b"), ["--parallel.strategy", strategy, "--guard.nonfinite", "rewind",
                                                     "--train.save-every", 3, "--train.keep", 9]
    statuses, said, errors, _ = ranks("once@1", shared_lab, outs[0], *words)
    assert (statuses, errors, said.count("was rewound to step 3")) == ([0, 0], "", 1)
    assert [(row["step"], row["to"]) for row in lines(outs[0], "rewind")] == [(6, 3)]
    # Each rank writes some of the tensors.
    before, after, later = (checkpoint.load(checkpoint.path_of(outs[0] / "checkpoints", step))[:2]
                            for step in (3, 6, 9))
    assert all(torch.equal(old[name], new[name]) for old, new in zip(before, after) for name in old)
    assert not all(torch.equal(old[name], new[name]) for old, new in zip(after, later) for name in old)
    assert ranks("killed@1", shared_lab, outs[1], *words)[0] == [-9, -9]
    statuses, _, errors, _ = ranks("once@1", shared_lab, outs[1], *words)
    assert (statuses, errors) == ([0, 0], "")
    same_checkpoint(*outs, STEPS)


def test_a_weight_that_is_not_finite_on_one_rank_is_not_saved(shared_lab, tmp_path):
    statuses, _, errors, _ = ranks("weight@1", shared_lab, tmp_path / "run")
    assert statuses == [2, 2]
    assert errors.count("\n") == 1
    assert "NaN or infinity (first in " in errors
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [4]


def test_what_fails_on_one_rank_before_a_save_is_a_warning_and_holds_up_nobody(shared_lab, tmp_path):
    statuses, said, errors, _ = ranks("sync@0", shared_lab, tmp_path / "run")
    assert (statuses, errors) == ([0, 0], "")
    assert said.count("warning: checkpoint") == 1
    # Both know of it after the same step, from the sum that each step makes of losses, finite norms and requests to
    # stop; the one before is of the targets. A line of the log, which each step has here, gathers who was slow.
    knew = re.findall(r"rank . knew at \[([56])\], collectives (.*)", said)
    assert len(knew) == 2, said
    assert knew[0] == knew[1]
    assert knew[0][1] == "[3]"
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [8, 12]


def test_a_thread_says_nothing_once_the_other_has_spoken(monkeypatch):
    """A hanging rank was named and has ended, with the store and the connection that the main thread waited for."""
    def gone(*_):
        raise RuntimeError("the store is gone")
    seen = Watch.__new__(Watch)
    vars(seen).update(rank=1, size=2, speaks=True, is_ending=False, since=time.monotonic() - 60, limit=50.0, nodes={},
                      what="step 6", ends=threading.Event(), closed=threading.Event())
    known = [{"waits": waits, "begun": [5], "where": ""} for waits in (0, 2)]
    for name, answer in (("find_dead", []), ("read_all", known), ("claim", True), ("wait_for", None)):
        monkeypatch.setattr(Watch, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(os, "_exit", lambda status: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    seen.name_the_last()
    monkeypatch.setattr(Watch, "count", gone)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(UserError, match="rank 0 died"):
        seen.fail(RuntimeError("connection closed by peer"))
    # Long before it speaks after all, the other thread has ended the process.
    assert waited == [10.0]


if __name__ == "__main__":
    as_rank(sys.argv[1], int(os.environ["RANK"]), sys.argv[2:])
