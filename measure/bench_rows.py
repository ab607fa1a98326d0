"""What every benchmark shares: a row of ours beside a peer's, taking turns, and the machine the figures are of."""

import os
import platform
import shutil
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def describe_machine() -> dict:
    """The processor, the device, the load and the versions that a figure belongs to."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                                cwd=ROOT).stdout.strip()
    return {"cpu": names[0] if names else platform.processor(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "commit": commit,
            "load_average": os.getloadavg()[0],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def row(name, unit, ours, peer=None, peer_name=None, **more) -> dict:
    """Print and return a row; `ratio` is ours / peer."""
    out = {"name": name, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name,
           "ratio": ours / peer if peer else None, **more}
    values = f"{ours:12,.4g}" + (f"  {peer_name} {peer:12,.4g}  ratio {out['ratio']:.2f}" if peer else "")
    print(f"{name:34} {values}  {unit}" + (f"  (spread {more['spread']:.0%})" if "spread" in more else ""), flush=True)
    return out


def missing_row(name, unit, **why) -> dict:
    """A row without figures; `why` says what happened."""
    return {"name": name, "unit": unit, "ours": None, "peer": None, "peer_name": None, "ratio": None, **why}


def spread(values) -> float:
    """Range of the middle half over the median."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 2 else [min(values), 0, max(values)]
    return (quartiles[2] - quartiles[0]) / statistics.median(values)


def compare_in_turn(unit: str, amount, ours, peers: dict, rounds: int, **more) -> list:
    """A row for each peer of {row name: (package, or who it is in two words, call)}.

    All calls take turns, every other round in reverse order; the first round warms up and is not counted. Rates are
    `amount` per second, or, where it is None, what `ours` returns per second. `counts` keeps what the calls return
    (tokens, documents kept), `left_out` says what a peer lacks, `spread` is that of the ratios, round by round.
    """
    calls = {"": ours, **{name: call for name, (_, call) in peers.items()}}
    seconds, counts, missing = {name: [] for name in calls}, {}, {}
    for number in range(rounds + 1):
        for name in [*calls][::1 if number % 2 else -1]:
            start = time.perf_counter()
            try:
                counts[name] = calls[name]() if name not in missing else None
            except ImportError as error:
                if not name:
                    raise
                missing[name] = str(error).splitlines()[0]
            seconds[name].append(time.perf_counter() - start)
    rate = {name: (amount or counts[""]) / statistics.median(seconds[name][1:]) for name in calls.keys() - missing}
    rows = []
    for name, (who, _) in peers.items():
        if name in missing:
            rows.append(row(name, unit, rate[""], left_out=missing[name], **more))
            print(f"  no peer: {missing[name]}")
            continue
        ratios = [theirs / mine for mine, theirs in zip(seconds[""][1:], seconds[name][1:])]
        rows.append(row(name, unit, rate[""], rate[name], who if " " in who else f"{who} {version(who)}",
                        counts={"ours": counts[""], "peer": counts[name]}, spread=spread(ratios), **more))
    return rows
