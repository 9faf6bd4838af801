"""One thread for each parallel test worker: more than there are cores only wait for each other on small tensors.

Drawn cases are the same in every run, so that a change is judged by itself; `make test-faults` draws new ones.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True, database=None)
if os.environ.get("LRA_FAULTS") != "full":
    settings.load_profile("same")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
