"""Everything that needs a GPU, in minutes: the kernels' tests, training steps of whole models, the kernel table."""

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data
from core.devices import peak_bytes
from learn.objectives import Causal
from learn.optim import OptimConfig, make_optimizer
from measure import timing
from measure.bench_rows import ROOT, missing_row, row, spread
from measure.bench_steps import update
from model import Model, ModelConfig, matmul_flops_per_token

STEPS = {   # a Hugging Face config's sizes, vocabulary, context, sequences
    "8b": ({"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8}, 128256, 8192, 1),
    "1b": ({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "tie_word_embeddings": True}, 128256, 8192, 2),
    "tiny": ({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2}, 512, 64, 2),
}


@dataclass
class GpuOptions:
    minutes: float = 8
    """For everything; the kernel table gets what is left."""
    out: str = "out/gpu"
    """Folder of what each stage has found, also if a later one fails."""


@dataclass
class StepOptions:
    size: Literal["8b", "1b", "tiny"]
    steps: int = 8
    """Steps that are counted, after two that warm up."""


def bench_gpu(options: GpuOptions) -> list:
    """Tests, training steps and the kernel table, each in a process of its own, so that none takes another down."""
    if not torch.cuda.is_available():
        raise ValueError("bench.py gpu needs a CUDA device; bench.py kernels says what can be known without one")
    end, out, rows = time.monotonic() + 60 * options.minutes, Path(options.out), []
    out.mkdir(parents=True, exist_ok=True)
    for size in ("8b", "1b"):
        rows += stage(["step", "--size", size], out / f"{size}.json", 90)
    many = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    tests = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-v", "-m", "gpu or kernel", *many, "tests/kernels", "tests/test_generate.py"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    rows.append(test_row(tests, 60 * options.minutes / 3))
    left = end - time.monotonic() - 45
    rows += stage(["kernels", "--tokens", "8192", "--seconds", f"{left:.0f}", "--progress", str(out / "kernels.json"),
                   "--picture", str(out / "kernels.png")], out / "kernels.json", left + 40)
    return rows


def stage(words: list[str], out: Path, limit: float) -> list:
    """The rows of another bench.py command; if it failed, those that it had written, and a row that says how."""
    out.unlink(missing_ok=True)
    try:
        done = subprocess.run([sys.executable, str(ROOT / "bench.py"), *words, "--json", str(out)],
                              timeout=limit).returncode
    except subprocess.TimeoutExpired:
        done = f"{limit:.0f} seconds were up"
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    if done == 0:
        return rows
    return [*rows, missing_row(" ".join(words), "", failed=f"exit status {done}" if isinstance(done, int) else done)]


def test_row(process, limit: float) -> dict:
    """How many tests had which outcome, also where the time was up, and the last lines where something failed."""
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        out += f"\n{limit:.0f} seconds were up\n"
    counts = {word.lower(): len(re.findall(rf"\b{word}\b", out)) for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
    made = row("gpu_tests", "passed", counts["passed"], counts=counts, exit_status=process.returncode)
    if process.returncode:
        print(out[-6000:])
        made["failed"] = out[-6000:]
    return made


def bench_step(options: StepOptions) -> list:
    """A training step of a whole model on random tokens, in bf16: ours with 8-bit moments, transformers' with torch's
    fused AdamW. A peer that does not fit on the card leaves our figures alone."""
    sizes, vocab, T, B = STEPS[options.size]
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=vocab, max_position_embeddings=T, rope_theta=500000.0, **sizes)
    found = {}
    for side in ("ours",) if options.size == "8b" else ("ours", "transformers"):
        try:
            found[side] = time_steps(side, options.size, config, B, T, device, options.steps)
        except (torch.cuda.OutOfMemoryError, ImportError) as error:
            if side == "ours":
                raise
            found[side] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    rows = []
    for name, unit in (("tokens_per_second", "tokens/s"), ("peak_bytes", "bytes")):
        peer = found.get("transformers", {}).get(name)
        rows.append(row(f"step_{options.size}_full_{name}", unit, found["ours"][name], peer, peer and "transformers"))
    rows[0] |= {"context": T, "rows": B, "sides": found, "parameters": found["ours"]["parameters"]}
    if cuda:
        done = matmul_flops_per_token(config, T) * found["ours"]["tokens_per_second"] / 1e12
        rows.append(row(f"step_{options.size}_full_matrix_rate", "TFLOP/s", done,
                        timing.device_limits()["bf16_tflops"], "8192 x 8192 matmul"))
    return rows


def time_steps(side, size, config, B, T, device, steps) -> dict:
    """Medians over steps after two that warm up; the same random batch each time, so that the loss must fall.

    8B in full needs about 100 GB: a smaller card recomputes each block in the backward pass, which is reported.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 110e9
    recompute = size == "8b" and small
    with device:
        torch.set_default_dtype(torch.bfloat16)
        if side == "ours":
            model = Model(config)
            model.checkpoint_blocks = recompute
        else:
            import transformers
            same = {**STEPS[size][0], "vocab_size": config.vocab_size, "rope_theta": config.rope_theta}
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(**same, max_position_embeddings=T))
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), device=device, dtype=torch.int32)
    batch = data.Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(T, device=device).expand(B, T), None, None, None)
    objective, seconds, losses = Causal(mask_documents=False), [], []
    if side == "ours":
        optimizer = make_optimizer(model, OptimConfig(name="adamw_8bit", lr=1e-4, min_lr=0.0))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(steps + 2):
        start = time.perf_counter()
        if side == "ours":
            loss, n, _ = objective.loss(model, batch)
            loss = loss / n
        else:
            loss = model(input_ids=tokens[:, :-1].long(), labels=tokens[:, :-1].long()).loss
        losses.append(update(model, optimizer, loss))
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": B * T / statistics.median(seconds[2:]), "peak_bytes": peak_bytes(device),
            "losses": losses, "recompute": recompute, "spread": spread(seconds[2:]),
            "parameters": sum(p.numel() for p in model.parameters())}
