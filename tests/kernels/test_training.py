"""The model on Triton kernels learns what the model on the references learns. Truth: the reference run, whose own
truth is transformers (test_model.py); in the interpreter without a GPU."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from quick import slow_except
from runs import arguments, make_lab, trace

import data
import kernels
from kernels import backend
from learn.objectives import Causal
from learn.optim import OptimConfig, make_optimizer
from model import Model, ModelConfig

pytestmark = pytest.mark.kernel
ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = {
    "llama": {},
    "qwen3": {"qk_norm": True, "num_key_value_heads": 1},
    "mistral": {"windows": [5, 5]},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 16}, "tie_word_embeddings": True},
}


def batches(count, rows=2, T=21, vocab=53):
    """Rows of documents of 1, 7, 13 and more tokens."""
    rng = np.random.default_rng(0)
    starts = torch.tensor([0] + [1] * 7 + [8] * (T - 7), dtype=torch.int32).expand(rows, -1)
    for _ in range(count):
        tokens = torch.from_numpy(rng.integers(0, vocab, (rows, T + 1)).astype(np.int32))
        positions = torch.arange(T + 1, dtype=torch.int32) - starts
        yield data.Batch(tokens, tokens, positions, starts, np.zeros(rows, np.int64), None)


def three_steps(kernel, family, recompute):
    """-> (losses, the first step's gradients, the parameters after three steps)."""
    model = Model(ModelConfig(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, **{"num_key_value_heads": 2, **FAMILIES[family]},
                              max_position_embeddings=32, initializer_range=0.2))
    model.initialise(0)
    model.to(DEVICE).checkpoint_blocks = recompute
    objective, losses = Causal(mask_documents=True), []
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2, min_lr=0.0))
    with backend.using(kernel):
        for step, batch in enumerate(batches(3)):
            loss, n, _ = objective.loss(model, objective.corrupt(batch, None).to(DEVICE))
            (loss / n).backward()
            losses.append((loss / n).item())
            if step == 0:
                gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses, gradients, dict(model.named_parameters())


@pytest.mark.parametrize(("family", "recompute"), slow_except([("llama", False), ("qwen3", True)],
                                                              product(FAMILIES, (False, True))))
def test_three_steps(family, recompute):
    """fp32 against fp32: losses and gradients may differ by the order of sums. AdamW divides a gradient by itself,
    so that where one is nearly zero its sign decides; the parameters may be a fraction of the three steps apart."""
    losses, gradients, parameters = three_steps("triton", family, recompute)
    expected = three_steps("reference", family, recompute)
    assert losses == pytest.approx(expected[0], rel=2e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)
    for name, truth in expected[1].items():
        assert (gradients[name] - truth).norm() <= 2e-5 * truth.norm(), name
        moved = (parameters[name] - expected[2][name]).abs()
        assert moved.mean() < 1e-4, name


@pytest.mark.slow
def test_a_whole_model_in_one_graph():
    """torch.compile sees every kernel as one registered op and breaks nowhere; the numbers are those of eager mode."""
    model = Model(ModelConfig(vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, qk_norm=True,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32))
    model.initialise(0)
    model.to(DEVICE)
    batch = Causal(mask_documents=True).corrupt(next(batches(1)), None).to(DEVICE)

    def loss(tokens, positions, starts, labels):
        hidden = model(tokens, positions, starts)
        return kernels.linear_cross_entropy(hidden, model.head.weight, labels)[0]

    given = batch.tokens, batch.position_ids, batch.doc_start, batch.labels
    with backend.using("triton"):
        eager = torch.autograd.grad(loss(*given), list(model.parameters()))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*given), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), eager, found):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max(), name


def run_train(folder, lab, name, kernel, *more, ranks=1, python=sys.executable):
    """-> [(loss, gradient norm)] of three steps of train.py itself."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [python, *launcher, ROOT / "train.py",
         *arguments(lab, folder / name, "--device", DEVICE, "--eval.tokens", 50, "--train.batch-size", 2,
                    "--train.micro-batch-size", 1, *more, steps=3)],
        capture_output=True, text=True, cwd=folder,
        env={**os.environ, "NANOCPT_KERNELS": kernel, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [numbers[:2] for numbers in trace(folder / name).values()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forked_python):
    """The corpora, and the run on the references."""
    folder = tmp_path_factory.mktemp("runs")
    lab = make_lab(folder / "lab")
    return folder, lab, run_train(folder, lab, "reference", "reference", python=forked_python)


@pytest.mark.slow
def test_train_py_on_triton_kernels(runs):
    """The command itself, with the kernels forced by the environment."""
    folder, lab, truth = runs
    found = run_train(folder, lab, "triton", "triton", "--model.activation-checkpointing", "True")
    assert len(truth) == 3
    assert np.allclose(found, truth, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_train_py_on_two_ranks(runs, strategy, forked_python):
    folder, lab, truth = runs
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two ranks on CUDA need two GPUs")
    found = run_train(folder, lab, strategy, "triton", "--parallel.strategy", strategy, ranks=2,
                      python=forked_python)
    assert np.allclose(found, truth, rtol=1e-4)


RANDOM_LENGTHS = """
import sys
import numpy as np, torch
from measure.scoring import make_batches
from learn.objectives import Causal
from model import Model, ModelConfig

rng, kind = np.random.default_rng(0), sys.argv[1]
model = Model(ModelConfig(vocab_size=53, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                          num_attention_heads=4, num_key_value_heads=2))
model.initialise(0)
documents = [rng.integers(0, 53, n) for n in rng.integers(2, 90, 500)]
for batch, _ in make_batches(Causal(True), documents, 1, 256, 2)[:-1]:
    if kind == "few labels":
        batch.labels[torch.rand(batch.labels.shape) < 0.85] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != "half weights"):
        Causal(True).loss(model.to(torch.bfloat16) if kind == "half weights" else model, batch)[0].backward()
    print("a step", flush=True)
"""


@pytest.mark.parametrize("kind", ["autocast", "few labels", "half weights"])
def test_half_precision_on_a_cpu_keeps_no_code_for_each_length(kind):
    """Truth: oneDNN's own log. Each primitive that it makes is kept (up to 1,024 of them, of up to 1 MB), so that
    memory grew with the lengths of documents and with the counts of labels."""
    variables = os.environ | {"ONEDNN_VERBOSE": "profile_create", "NANOCPT_KERNELS": "reference"}
    out = subprocess.run([sys.executable, "-c", RANDOM_LENGTHS, kind], cwd=ROOT, capture_output=True, text=True,
                         check=True, env=variables).stdout
    steps = [step.count("create:cache_miss") for step in out.split("a step")]
    assert len(steps) > 40
    assert sum(steps[10:]) == 0
