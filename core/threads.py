"""Settings of the thread pools, made before torch is imported; importing this file makes them.

OpenMP's threads spin at each barrier while they wait for the slowest one. On a machine that does anything else, the
spinning threads take the cores that the slowest one needs. A thread that gives up its core sooner helps there, and
costs time on a quiet machine, where it must be woken. How many turns a thread spins therefore depends on what else runs
when the command starts (docs/RESULTS.md, Busy machines, has the figures); it changes no result. The number of threads
does change the last bits of results, so that it is the user's to choose (OMP_NUM_THREADS): one thread is the fastest
setting on a crowded machine.

libgomp reads the variables when it is loaded, which importing torch does: every command therefore imports this file
before anything else, and processes that it starts inherit them.
"""

import os
import re
import time
from pathlib import Path


def count_others() -> int:
    """Threads of other processes that want a core now: the least of five looks within 8 ms, because some only pass."""
    looks = []
    for _ in range(5):
        try:
            looks.append(int(re.search(r"procs_running (\d+)", Path("/proc/stat").read_text())[1]) - 1)
        except (OSError, TypeError):
            # Not Linux, or a /proc without this line: as on a quiet machine.
            return 0
        time.sleep(0.002)
    return min(looks)


def choose_spin_turns(others: int, cores: int) -> int:
    """How many turns a thread spins before it gives up its core. OpenMP's own 300,000 are about 3 ms."""
    if others == 0:
        return 50_000
    return 20_000 if others < 2 * cores else 1_000


if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(choose_spin_turns(count_others(), os.cpu_count()))
