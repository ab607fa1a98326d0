"""What every benchmark shares: a row of ours beside a peer's, taking turns, and the machine the figures are of."""

import os
import platform
import re
import statistics
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from core.hashing import find_commit

ROOT = Path(__file__).parent.parent


def describe_machine() -> dict:
    """The processor, the device, the load and the versions that a figure belongs to."""
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"cpu": name[1] if name else platform.processor(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "commit": find_commit(),
            "load_average": os.getloadavg()[0],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def make_row(name, unit, ours, peer=None, peer_name=None, **more) -> dict:
    """A row. `ours` is None where there are no figures, and `more` says why."""
    return {"name": name, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name,
            "ratio": ours / peer if ours and peer else None, **more}


def row(name, unit, ours, peer=None, peer_name=None, **more) -> dict:
    """Print and return a row."""
    out = make_row(name, unit, ours, peer, peer_name, **more)
    beside = f"  {peer_name} {peer:12,.4g}  ratio {out['ratio']:.2f}" if peer else ""
    notes = f"  (spread {more['spread']:.0%})" if "spread" in more else ""
    notes += f"  (no peer: {more['left_out']})" if "left_out" in more else ""
    print(f"{name:34} {ours:12,.4g}{beside}  {unit}{notes}", flush=True)
    return out


def rate_row(name, unit, amount, seconds: list, peer_seconds: list, peer_name, **more) -> dict:
    """A row of two rates, `amount` per median second; `spread` is that of the ratios, round by round."""
    rates = (amount / statistics.median(taken) for taken in (seconds, peer_seconds))
    ratios = [theirs / mine for mine, theirs in zip(seconds, peer_seconds)]
    return row(name, unit, *rates, peer_name, spread=spread(ratios), **more)


def spread(values) -> float:
    """Range of the middle half over the median."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 2 else [min(values), 0, max(values)]
    return (quartiles[2] - quartiles[0]) / statistics.median(values)


def time_call(call, *args) -> float:
    """Seconds of a call, with what it has started on a GPU."""
    start = time.perf_counter()
    call(*args)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(calls: dict, rounds: int) -> dict:
    """{name: what each of the rounds returned}. Every other round goes in reverse order, so that what else the machine
    does hits all calls alike."""
    results = {name: [] for name in calls}
    for number in range(rounds):
        for name in [*calls][::-1 if number % 2 else 1]:
            results[name].append(calls[name]())
    return results


def compare_in_turn(unit: str, amount, ours, peers: dict, rounds: int, **more) -> list:
    """A row for each peer of {row name: (package, or who it is in two words, call)}; all calls take turns.

    Rates are `amount` per second, or, where it is None, what `ours` returns per second. `counts` keeps what the calls
    return (tokens, documents kept), `left_out` says what a peer lacks.
    """
    # A first round warms up, is not counted, and finds the peers that are not installed.
    counts, calls, missing = {"ours": ours()}, {"ours": partial(time_call, ours)}, {}
    for name, (_, call) in peers.items():
        try:
            counts[name] = call()
            calls[name] = partial(time_call, call)
        except ImportError as error:
            missing[name] = str(error).splitlines()[0]
    seconds, amount, rows = take_turns(calls, rounds), amount or counts["ours"], []
    for name, (who, _) in peers.items():
        if name in missing:
            rows.append(row(name, unit, amount / statistics.median(seconds["ours"]), left_out=missing[name], **more))
        else:
            rows.append(rate_row(name, unit, amount, seconds["ours"], seconds[name],
                                 who if " " in who else f"{who} {version(who)}",
                                 counts={"ours": counts["ours"], "peer": counts[name]}, **more))
    return rows
