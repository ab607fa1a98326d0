"""What a run reports: metrics.jsonl, a console line or progress bar on rank 0, and on request TensorBoard and W&B."""

import contextlib
import importlib.util
import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.config import setting
from core.errors import UserError
from core.files import naming_full_disks


@dataclass
class LogConfig:
    every: int = setting(10, above=0)
    """steps between console and metrics lines"""
    distance: int | None = setting(None, at_least=0)
    """steps between lines that also have the distance of the weights from the base, per block (the base is read again
    for it); 0: none; default: eval.every"""
    tensorboard: bool = False
    """write TensorBoard events into the run folder (extra: log)"""
    wandb: str = ""
    """Weights & Biases project; offline without a key (extra: log)"""

    def refuse_missing(self):
        """UserError where a package is not installed that a setting needs."""
        for package in ("tensorboard", "wandb"):
            if getattr(self, package) and not importlib.util.find_spec(package):
                raise UserError(f"log.{package} needs the {package} package: pip install {package}")


class Logger:
    """metrics.jsonl, one JSON object per line, and the console; nothing on ranks not `main`, nor after close()."""

    def __init__(self, folder: Path | None, config: LogConfig, total_steps: int, main: bool = True,
                 settings: dict | None = None):
        self.main, self.total, self.trackers, self.opened = main, total_steps, [], contextlib.ExitStack()
        # None: without a terminal the bar does nothing.
        self.bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, disable=None if main else True)
        self.opened.callback(self.bar.close)
        if not main:
            return
        path = Path(folder) / "metrics.jsonl"
        with open(path, "ab+") as file:
            # A killed run may leave half a line, which must not swallow the next record.
            is_cut = file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        self.file = self.opened.enter_context(open(path, "ab", buffering=0))        # noqa: SIM115
        # What the disk has not taken yet. The thread that saves looks at it too.
        self.waiting, self.lock = b"\n" if is_cut else b"", threading.Lock()
        if config.tensorboard:
            board = _import_extra("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder))
            self.trackers.append(lambda values, step: [board.add_scalar(*item, step) for item in values.items()])
            self.opened.callback(board.close)
        if config.wandb:
            # Without a key wandb would ask for one and wait.
            mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
            tracker = _import_extra("wandb", "wandb").init(
                project=config.wandb, name=Path(folder).name, dir=str(folder), config=settings, mode=mode,
                resume="allow")
            self.trackers.append(tracker.log)
            self.opened.callback(tracker.finish)

    def say(self, text: str):
        """A plain line, above the progress bar where there is one."""
        if self.main:
            print(text, flush=True) if self.bar.disable else tqdm.write(text)

    def record(self, kind: str, step: int, **values):
        """Write a line of metrics.jsonl; of "train" and "eval" lines the trackers get the values. A disk that is full
        stops no training: what it does not take comes before the next line, and nothing is saved until then."""
        if not self.main:
            return
        # JSON has no NaN, and a reader may be strict: what is not finite is null.
        record = json.loads(json.dumps({"kind": kind, "step": step, **values}), parse_constant=lambda name: None)
        with self.lock:
            said, self.waiting = bool(self.waiting), self.waiting + f"{json.dumps(record)}\n".encode()
        with self.going_on(quietly=said):
            self.write()
        for track in self.trackers if kind in ("train", "eval") else ():
            track(dict(_flatten_numbers(values, f"{kind}/")), step=step)

    def write(self):
        with self.lock, naming_full_disks(self.file.name):
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting):]

    @contextlib.contextmanager
    def going_on(self, quietly: bool = False):
        """A block that writes what is in memory as well: where the disk does not take it, that is said."""
        try:
            yield
        except OSError as error:
            if not quietly:
                self.say(f"warning: {error}; the training goes on, and tries again")

    def sync(self):
        """Wait until the lines so far are on the disk."""
        if self.main:
            self.write()
            os.fsync(self.file.fileno())

    def show_step(self, step: int, values: dict | None = None, is_likelihood: bool = True):
        """Move the progress bar on by one step; where its `values` are given, show them as a line."""
        self.bar.update(1)
        if values and self.main:
            line = format_line(step, self.total, values, is_likelihood)
            print(line, flush=True) if self.bar.disable else self.bar.set_postfix_str(line.partition(" | ")[2])

    def close(self):
        if self.main and self.waiting:
            with self.going_on():
                self.write()
        self.opened.close()
        self.main = False


def format_line(step: int, total: int, values: dict, is_likelihood: bool = True) -> str:
    """step 120/2000 | loss 2.134 | ppl 8.4 | legal 2.01 | ... | eta 0:42:10; ppl only where is_likelihood"""
    sources = " ".join(f"{name} {source['loss']:.3f}" for name, source in values["sources"].items())
    seconds_left = int((total - step) * values["step_ms"] / 1000)
    mfu = [f"mfu {100 * values['mfu']:.0f}%"] if values.get("mfu") else []
    perplexity = math.exp(min(values["loss"], 99))
    shown = [f"ppl {perplexity:{'.1f' if perplexity < 1e6 else '.1e'}}"] if is_likelihood else []
    parts = [f"step {step}/{total}", f"loss {values['loss']:.3f}", *shown, sources,
             f"replay {100 * values['replay_share']:.0f}%", f"lr {values['lr']:.2e}",
             f"gnorm {values['grad_norm']:.2f}", f"{values['tokens_per_second'] / 1000:.1f}k tok/s", *mfu,
             f"mem {values['peak_gb']:.1f}G",
             f"eta {seconds_left // 3600}:{seconds_left // 60 % 60:02d}:{seconds_left % 60:02d}"]
    return " | ".join(parts)


def _flatten_numbers(values: dict, prefix: str):
    """Yield (prefixed name, number) of nested values: with the prefix train/, {"loss": 1.0, "sources": {"a": {"loss":
    2.0}}} gives train/loss and train/sources/a/loss."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + key, value


def _import_extra(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"log.{package} needs the {package} package: pip install {package}") from None
