"""The memory planner on several ranks. Truth: the peaks of real ranks (gloo) of two layouts, above what their
processes took before (docs/RESULTS.md has the others); and the orders in which PyTorch runs a pipeline.

Large tensors are mapped one by one here and given back when they are freed: what a heap cannot reuse is no part of the
layouts. This file is also what each rank runs.
"""

import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import fork_ranks, meet
from runs import ENV
from torch.distributed.pipelining import ScheduleInterleaved1F1B

import lora
import train
from core import cli, parallel
from core.architecture import ModelConfig
from learn.objectives import Causal
from learn.optim import LossScale, make_optimizer
from measure import calibrate, memory
from model import Model
from stages.build import Run, build_model, lay_out

FSDP = ["--parallel.strategy", "fsdp"]
PIPE = ["--parallel.pipeline", "2"]
# {case: (ranks, micro-batches of a step, words)}
CASES = {"shards": (2, 2, FSDP), "pipeline": (2, 3, PIPE)}
# Vocabulary, width, MLP width, blocks, heads, key-value heads, tokens and sequences of a micro-batch.
SIZE, TINY = (4096, 320, 864, 8, 4, 2, 256, 2), (512, 64, 96, 8, 4, 2, 64, 2)


def settings(name: str, size: tuple):
    """(train.Config, ModelConfig) of a case."""
    ranks, N, words = CASES[name]
    words = ["--data.sources.a.path", "x", "--train.precision", "fp32", "--device", "cpu", "--model.init", "scratch",
             "--data.context", str(size[6]), "--train.micro-batch-size", str(size[7]), *words]
    p = cli.parse(train.Config, words, recipe=True).parallel
    sequences = size[7] * N * ranks // p.context // p.tensor // p.pipeline
    c = cli.parse(train.Config, [*words, "--train.batch-size", str(sequences)], recipe=True)
    return c, ModelConfig(*size[:6], max_position_embeddings=size[6])


@torch.no_grad()
def fill(model: Model, *rest):
    for p in model.parameters():
        own = p.to_local() if hasattr(p, "to_local") else p
        own.fill_(1.0) if p.ndim == 1 else own.normal_(0, 0.02)


def status(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def make_steps(name: str, size: tuple, world):
    """Two steps of a model that is made and laid out as a run's; the peak is counted from the second on."""
    c, config = settings(name, size)
    world.sequences = world.matmuls = world.pipe = None
    world.share_sequences(c.parallel)
    model, plan = build_model(c, config, None, world), np.zeros((1000, 1), np.int64)
    run = Run(c, world, folder=None, base=None, tokenizer=None, config=config, sources={}, inner=model, planned=plan,
              loader=SimpleNamespace(names=["random"], plan=plan), objective=Causal(c.data.mask_documents),
              scale=LossScale(False))
    run.model = lay_out(run)
    run.optimizer = make_optimizer(model, c.optim, lora.lr_scales(model, c.lora) if c.lora.rank else None)
    rng, (T, B) = np.random.default_rng(0), size[6:]
    batches = [world.cut(run.objective.corrupt(calibrate.draw_batch(config, B, T, 100, rng), None))
               for _ in range(CASES[name][1])]
    train.train_step(run, run.done, batches)
    Path("/proc/self/clear_refs").write_text("5")
    train.train_step(run, run.done, batches)


def as_rank(rank: int, folder: Path):
    torch.set_num_threads(1)
    parallel.keep_freed_memory, Model.initialise, lora.initialise = (lambda: None), fill, (lambda *words: None)
    peaks = {}
    for i, name in enumerate(CASES):
        with meet(folder, f"case_{i}", rank, CASES[name][0]) as world:
            if world is None:
                continue
            # What a rank takes beside its tensors is loaded by a tiny run. What was there of the case before is gone.
            make_steps(name, TINY, world)
            gc.collect()
            before = status("VmRSS")
            make_steps(name, SIZE, world)
            peaks[name] = status("VmHWM") - before
    (folder / f"{rank}.json").write_text(json.dumps(peaks))


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peaks")
    env = {**ENV, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, folder], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_each_rank_is_as_planned(peaks, name):
    c, config = settings(name, SIZE)
    ranks = CASES[name][0]
    planned = memory.estimate_stages(c, config, ranks, "cpu")
    for rank in range(ranks):
        parts = planned[rank // (ranks // len(planned))]
        plan = parts["peak"] - parts["holes"]
        print(f"{name}, rank {rank}: planned {plan / 1e6:.0f} MB, measured {peaks[rank][name] / 1e6:.0f}")
        assert plan == pytest.approx(peaks[rank][name], rel=0.1)
    # The fullest is the one whose peak is highest.
    fullest, _ = memory.find_fullest(c, config, ranks, "cpu")
    measured = [max(peaks[rank][name] for rank in range(ranks) if rank // (ranks // len(planned)) == part)
                for part in range(len(planned))]
    assert measured[fullest] == max(measured) or max(measured) < 1.1 * measured[fullest]


@pytest.mark.parametrize(("P", "N"), [(2, 2), (2, 6), (4, 8), (3, 7)])
def test_a_rank_keeps_as_many_micro_batches_as_pytorch_runs_ahead(P, N):
    rounds = max(1, N // P)
    order = SimpleNamespace(n_local_stages=2, microbatches_per_round=N // rounds, pp_group_size=P, _n_microbatches=N,
                            number_of_rounds=rounds)
    c, config = settings("pipeline", SIZE)
    c.parallel.schedule = "interleaved"
    c.parallel.pipeline = P
    c.train.batch_size = N * c.train.micro_batch_size
    for rank in memory.list_ranks(c, config, P, "cpu"):
        ahead, most = 0, 0
        for action in filter(None, ScheduleInterleaved1F1B._calculate_single_rank_operations(order, rank.number)):
            ahead += 1 if action.computation_type.value == "F" else -1
            most = max(most, ahead)
        assert memory.count_passes(rank) == most
        assert sum(memory.split_passes(rank, most)) == most
    # 1f1b by its definition, and gpipe.
    c.parallel.schedule = "1f1b"
    assert [memory.count_passes(rank) for rank in memory.list_ranks(c, config, P, "cpu")] == [
        min(N, P - r) for r in range(P)]
    c.parallel.schedule = "gpipe"
    assert [memory.count_passes(rank) for rank in memory.list_ranks(c, config, P, "cpu")] == [N] * P


if __name__ == "__main__":
    fork_ranks(as_rank, 2, Path(sys.argv[1]))
