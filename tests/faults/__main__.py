"""What machines and people do to a run, done on purpose, as one table.

    python -m tests.faults                          all of it: at most 30 minutes on two cores
    python -m tests.faults --short                  small numbers, under two minutes
    python -m tests.faults kills signals --json out/faults.json
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from . import damages, full_disks, kills, not_finite, points, races, signals
from .harness import Lab, Row

SECTIONS = {
    "kills": kills.kills,
    "points": points.points,
    "signals": signals.signals,
    "not_finite": not_finite.not_finite,
    "damages": damages.damages,
    "disks": full_disks.full_disks,
    "races": races.races,
    "control": lambda lab: [kills.highest_number_wins(lab), points.manifest_not_synced(lab)],
}
# Of the failures of a row.
SHOWN = 12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--short", action="store_true", help="small numbers, for continuous integration")
    parser.add_argument("--seed", type=int, default=0, help="of the times of kills, the places of damages")
    parser.add_argument("--json", help="write the table as data")
    parser.add_argument("--folder", help="scratch folder, kept; default: a temporary one")
    options = parser.parse_args()
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    folder = Path(options.folder or tempfile.mkdtemp(prefix="faults_"))
    try:
        rows, seconds = run_sections(options, folder)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n" + table(rows))
    trials, failures = sum(row.tried for row in rows), sum(len(row.failures) for row in rows)
    print(f"\n{trials:,} trials in {seconds:.0f} s, {failures:,} failures")
    for row in rows:
        shown = row.failures[::max(1, len(row.failures) // SHOWN)][:SHOWN]
        print(*(f"{row.section}, {row.what}: {failure}" for failure in shown), sep="\n", end="\n" if shown else "")
        row.failures = row.failures[:100]
    if options.json:
        words = " ".join(["python -m tests.faults", *sys.argv[1:]])
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(
            {"command": words, "date": time.strftime("%Y-%m-%d"), "machine": machine(), "seconds": round(seconds),
             "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return min(1, failures)


def run_sections(options, folder: Path) -> tuple[list[Row], float]:
    begun = time.monotonic()
    lab, rows = Lab(folder, options.short, options.seed), []
    for name in options.sections or SECTIONS:
        lab.random.seed(f"{options.seed} {name}")
        for row in guarded(name, lab):
            rows.append(row)
            print(f"{row.section:10} {row.what:55} {row.held:>6,} of {row.tried:>6,} held {row.seconds:7.1f} s   "
                  f"{row.notes}", flush=True)
    return rows, time.monotonic() - begun


def guarded(name: str, lab: Lab) -> list[Row]:
    """The rows of a section; where the suite itself breaks, that is a failure and the others go on."""
    try:
        return SECTIONS[name](lab)
    except Exception:
        return [Row(name, "the section itself", 1, [traceback.format_exc()])]


def machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores, {platform.machine()}, {versions}"


def table(rows: list[Row]) -> str:
    """As it stands in docs/RESULTS.md."""
    lines = ["| what was done | trials | held | s | |", "|---|---:|---:|---:|---|"]
    lines += [f"| {row.section}: {row.what} | {row.tried:,} | {row.held:,} | {row.seconds:.0f} | {row.notes} |"
              for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
