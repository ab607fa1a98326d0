"""What machines and people do to a run, done on purpose, as one table.

    python -m tests.faults                          all of it: an hour or two on two cores
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

from .damages import DAMAGES
from .full_disks import DISKS
from .hangs import HANGS_OF_ALL
from .harness import Lab, Row, Worker
from .kills import KILLS, highest_number_wins
from .nodes import NODES
from .not_finite import NOT_FINITE
from .points import POINTS, manifest_not_synced
from .races import RACES
from .shared_damages import SHARED_DAMAGES
from .signals import SIGNALS_AND_MORE
from .strangers import STRANGERS

# Each section is some functions of the lab, each of which gives one row.
SECTIONS = {"kills": KILLS, "points": POINTS, "signals": SIGNALS_AND_MORE, "not_finite": NOT_FINITE,
            "damages": DAMAGES + SHARED_DAMAGES, "hangs": HANGS_OF_ALL, "disks": DISKS, "races": RACES, "nodes": NODES,
            "strangers": STRANGERS, "control": [highest_number_wins, manifest_not_synced]}
# Of the failures of a row.
SHOWN = 12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--short", action="store_true", help="small numbers, for continuous integration")
    parser.add_argument("--seed", type=int, default=0, help="of the times of kills, the places of damages")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="sections at a time; default: one a core")
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
    """The rows of all sections, in their order, made by as many processes as `jobs`; each takes the next that waits."""
    begun, names = time.monotonic(), options.sections or list(SECTIONS)
    waiting = [(name, number) for name in names for number in range(len(SECTIONS[name]))]
    reader, writer = os.pipe()
    os.write(writer, bytes(range(len(waiting))))
    os.close(writer)
    folder.mkdir(parents=True, exist_ok=True)

    def work(job: int):
        lab = Lab(folder / f"job_{job}", options.short, options.seed)
        while taken := os.read(reader, 1):
            name, number = waiting[taken[0]]
            lab.random.seed(f"{options.seed} {name} {number}")
            row = make_row(name, SECTIONS[name][number], lab)
            (folder / f"row_{taken[0]}.json").write_text(json.dumps(asdict(row)))
    jobs = [Worker(lambda job=job: work(job), stdout=sys.stdout.fileno()) for job in range(options.jobs)]
    ended = [job.wait(24 * 3600) for job in jobs]
    assert all(outcome.status == 0 for outcome in ended), "\n".join(outcome.err for outcome in ended)
    rows = [Row(**json.loads((folder / f"row_{i}.json").read_text())) for i in range(len(waiting))]
    return rows, time.monotonic() - begun


def make_row(name: str, function, lab: Lab) -> Row:
    """One row, which is shown; where the suite itself breaks, that is a failure, and the others go on."""
    try:
        row = function(lab)
    except Exception:
        row = Row(name, getattr(function, "__name__", "?"), 1, [traceback.format_exc()])
    print(f"{row.section:10} {row.what:58} {row.held:>6,} of {row.tried:>6,} held {row.seconds:7.1f} s   {row.notes}",
          flush=True)
    return row


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
