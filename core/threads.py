"""Settings of the thread pools, made before torch is imported; importing this file makes them.

OpenMP's threads spin at each barrier while they wait for the slowest one. On a machine that does anything else, the
spinning threads take the cores that the slowest one needs: a model of 1.3M parameters on two busy cores trains at 219
tokens per second as OpenMP comes, and at 1,379 where a thread gives up its core after 1,000 turns (quiet machine:
15,400 and 15,000). libgomp reads the variables when it is loaded, which importing torch does: every command therefore
imports this file before anything else, and processes that it starts inherit them.
"""

import os

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
