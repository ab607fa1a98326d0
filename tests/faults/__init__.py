"""What machines and people do to a run, done on purpose: `make faults` (python -m tests.faults --help).

One thread, no network and no GPU, set before torch is imported; what the other tests share stands one folder up.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
sys.path[:0] = [folder for folder in (str(ROOT), str(ROOT / "tests")) if folder not in sys.path]
