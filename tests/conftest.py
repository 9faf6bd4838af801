"""One thread for each parallel test worker: more than there are cores only wait for each other on small tensors."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
