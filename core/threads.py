"""Settings of the thread pools, made before torch is imported; importing this file makes them.

OpenMP's threads spin at each barrier while they wait for the slowest one. On a machine that does anything else, the
spinning threads take the cores that the slowest one needs. A thread that gives up its core sooner costs time on a quiet
machine, where it must be woken: 20,000 turns, instead of OpenMP's 300,000, cost 1 % there and are 1.7 times as fast
beside two busy loops; 1,000 turns are faster still on a crowded machine, and cost 30 % on a quiet one
(docs/RESULTS.md, Busy machines). libgomp reads the variables when it is loaded, which importing torch does: every
command therefore imports this file before anything else, and processes that it starts inherit them.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "20000"
