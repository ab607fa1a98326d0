"""What a run says: metrics.jsonl always; a console line or progress bar on rank 0; TensorBoard and W&B when asked."""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass
class LogConfig:
    every: int = 10
    """steps between console and metrics lines"""
    tensorboard: bool = False
    """write TensorBoard events into the run folder (extra: log)"""
    wandb: str = ""
    """Weights & Biases project; offline without a key (extra: log)"""

    def __post_init__(self):
        if self.every <= 0:
            raise ValueError(f"log.every is {self.every}, but must be above 0")


class Logger:
    """One JSON object a line in metrics.jsonl, flushed. Only the first rank is `main`; on others nothing happens."""

    def __init__(self, folder: Path, config: LogConfig, total_steps: int, main: bool = True,
                 settings: dict | None = None):
        self.main, self.total = main, total_steps
        self.file = self.bar = self.board = self.run = None
        if not main:
            return
        path = Path(folder) / "metrics.jsonl"
        _end_last_line(path)
        self.file = open(path, "a", encoding="utf-8")      # noqa: SIM115  (open for the life of the run)
        if sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True)
        if config.tensorboard:
            self.board = _tensorboard(folder)
        if config.wandb:
            self.run = _wandb(folder, config.wandb, settings)

    def say(self, text: str):
        """A plain line on rank 0, above the progress bar where there is one."""
        if self.main:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def record(self, kind: str, step: int, **values):
        """Append to metrics.jsonl and pass the numbers on to the trackers."""
        if not self.main:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        numbers = dict(_numbers(values, f"{kind}/"))
        if self.board and kind in ("train", "eval"):
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.run and kind in ("train", "eval"):
            self.run.log(numbers, step=step)

    def at(self, step: int):
        """The run goes on from `step`."""
        if self.bar:
            self.bar.update(step)

    def step(self, step: int, values: dict | None = None):
        """A finished step; with `values`, its line."""
        if not self.main:
            return
        if self.bar:
            self.bar.update(1)
        if values:
            line = format_line(step, self.total, values)
            self.bar.set_postfix_str(line.partition(" | ")[2]) if self.bar else print(line, flush=True)

    def close(self):
        """Flush everything; a second call does nothing."""
        for thing in (self.file, self.bar, self.board):
            if thing:
                thing.close()
        if self.run:
            self.run.finish()
        self.main, self.bar, self.board, self.run = False, None, None, None


def format_line(step: int, total: int, v: dict) -> str:
    """step 120/2000 | loss 2.134 | ppl 8.4 | legal 2.01 stories 2.3 | replay 30% | lr 2.9e-05 | ... | eta 0:42:10"""
    sources = " ".join(f"{name} {s['loss']:.3f}" for name, s in v["sources"].items())
    eta = int((total - step) * v["step_ms"] / 1000)
    parts = [f"step {step}/{total}", f"loss {v['loss']:.3f}", f"ppl {math.exp(min(v['loss'], 99)):.1f}", sources,
             f"replay {100 * v['replay_share']:.0f}%", f"lr {v['lr']:.2e}",
             f"gnorm {v['grad_norm']:.2f}", f"{v['tokens_per_second'] / 1000:.1f}k tok/s"]
    if v.get("mfu"):
        parts.append(f"mfu {100 * v['mfu']:.0f}%")
    parts += [f"mem {v['peak_gb']:.1f}G", f"eta {eta // 3600}:{eta // 60 % 60:02d}:{eta % 60:02d}"]
    return " | ".join(parts)


def _numbers(values: dict, prefix: str):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value


def _end_last_line(path: Path):
    """A killed run may leave half a line; the next record starts on its own."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def _tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log.tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(str(folder))


def _wandb(folder, project, settings):
    try:
        import wandb
    except ImportError:
        raise ValueError("log.wandb needs the wandb package: pip install wandb") from None
    key = os.environ.get("WANDB_API_KEY")
    mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline")     # never asks, never waits
    return wandb.init(project=project, name=Path(folder).name, dir=str(folder), config=settings, mode=mode,
                      resume="allow")
