"""core/offload.py: weights, gradients and moments in the host's memory. The truth is the plain model on the same
device.

A CPU has one memory. What would part on a GPU is shown on one that is not there (tests/pretend_gpu.py), on which an
operation that mixes devices fails, and by a search for callers that take a parameter's device for the model's.
"""

import json
import re
import subprocess
import sys

import pytest
import torch
from ranks import steps_of
from runs import ENV, ROOT, Crash, crash, lines, one, same_checkpoint, settings, spy, trace
from test_layout import HOUSE

import train
from core import offload, parallel

OFFLOAD = ["--parallel.strategy", "fsdp", "--parallel.offload"]
METHODS = ["--forget.ema.decay", 0.9, "--forget.ewc.strength", 1, "--forget.ewc.samples", 4]
CASES = {"methods": [*METHODS, "--forget.lwf.alpha", 0.5, "--optim.clip", 0.1],
         "qlora": ["--lora.rank", 4, "--lora.base", "nf4", "--lora.dora", "--lora.embeddings", "full"],
         "8 bits": ["--optim.name", "adamw_8bit"], "muon": ["--optim.name", "muon"]}


def words_of(base, name: str) -> list:
    """Of a run on a base."""
    return ["--model.init", "pretrained", "--model.path", base[1], *CASES[name]]


@pytest.fixture
def group():
    """The world of one rank with a group, as a run that offloads has it."""
    yield parallel.start("cpu", offload=True)
    parallel.stop()


@pytest.mark.parametrize("name", ["methods", "qlora", "8 bits"])
def test_one_rank_offloads_what_one_rank_does(base, group, quick, name):
    words = words_of(base, name)
    c = settings(base[0], "unused", *words, *OFFLOAD)
    group.share_sequences(c.parallel)
    found, truth = steps_of(c, group, 3), steps_of(settings(base[0], "unused", *words), one(), 3)
    assert found["unmoved"] == []
    assert found["digest"] == truth["digest"]
    assert found["loss"] == truth["loss"]
    assert found["norm"] == pytest.approx(truth["norm"], rel=1e-6)


def test_a_run_that_offloads_is_resumed_scored_and_exported(base, group, quick, tmp_path, monkeypatch):
    outs = tmp_path / "offload", tmp_path / "plain"
    for out, world, words in ((outs[0], group, OFFLOAD), (outs[1], one(), [])):
        c = settings(base[0], out, *words_of(base, "8 bits"), *words, "--train.save-every", 2, "--eval.sample-tokens",
                     4, steps=4)
        if words:
            group.share_sequences(c.parallel)
            with monkeypatch.context() as patch:
                spy(patch, 2, crash)
                with pytest.raises(Crash):
                    train.train(c, world)
        train.train(c, world)
    same_checkpoint(*outs, 4)
    assert trace(outs[0]) == trace(outs[1])
    assert lines(outs[0], "samples")[-1]["samples"] == lines(outs[1], "samples")[-1]["samples"]
    assert (outs[0] / "final/model.safetensors").read_bytes() == (outs[1] / "final/model.safetensors").read_bytes()


@pytest.mark.slow
def test_on_a_gpu_only_what_computes_leaves_the_host(base):
    """Also: nothing there mixes tensors of the two, in steps, saves, scores, estimates or distances."""
    # There is no way to make the modules of a teacher there.
    cases = {"8 bits": [*words_of(base, "8 bits"), *METHODS, *OFFLOAD], "qlora": [*words_of(base, "qlora"), *OFFLOAD]}
    done = subprocess.run([sys.executable, ROOT / "tests/pretend_gpu.py", base[0], json.dumps(cases, default=str)],
                          env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, where in json.loads(done.stdout.splitlines()[-1]).items():
        for kept in ("weights", "gradients", "state", "read", "exported"):
            assert where[kept] == ["cpu"], (name, kept)
        for used in ("buffers", "loss", "logits"):
            assert where[used] == (["gpu"] if used != "buffers" or name == "qlora" else []), (name, used)


def test_nobody_takes_the_device_of_a_parameter_for_that_of_the_model():
    asks = re.compile(r"parameters\(\)\)\.device|\bp(arameter)?\.device\b|weight\.device\b")
    found = {module for module, source in HOUSE.items() if asks.search(source) and not module.startswith("kernels.")}
    # Where a tensor lies is asked where state is made beside it, by those that compute on a gathered weight, and of
    # models that nobody shards; kernels compute on what they are given.
    assert found <= {"core.sharding", "learn.adapters", "learn.optim", "learn.electra", "learn.quantised"}


def test_a_gpu_exchanges_tensors_of_both_kinds():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert [offload.choose_backend(*pair) for pair in ((True, gpu), (False, gpu), (True, cpu))] == [
        "cpu:gloo,cuda:nccl", "nccl", "gloo"]
    assert offload.choose_policy(True, gpu).pin_memory
    assert not offload.choose_policy(True, cpu).pin_memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_trains_from_the_hosts_memory(base, name):
    words, found = [*words_of(base, name), "--device", "cuda"], []
    for more in (OFFLOAD, []):
        c = settings(base[0], "unused", *words, *more)
        world = parallel.start("cuda", offload=bool(more))
        world.share_sequences(c.parallel)
        found.append(steps_of(c, world, 3))
        parallel.stop()
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-4)
    assert found[0]["norm"] == pytest.approx(found[1]["norm"], rel=1e-3)
