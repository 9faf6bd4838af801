"""One thread for each parallel test worker: more than there are cores only wait for each other on small tensors.

Drawn cases are the same in every run, so that a change is judged by itself; `make test-faults` draws new ones.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from hypothesis import settings

pytest_plugins = ("golden_coverage", "interpreter_process")

settings.register_profile("same", derandomize=True, database=None)
if os.environ.get("LRA_FAULTS") != "full":
    settings.load_profile("same")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how long the tests of each folder took, setup and teardown included."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "nodeid"):
                seconds[str(PurePosixPath(report.nodeid.partition("::")[0]).parent)] += report.duration
    parts = ", ".join(f"{folder} {total:.0f}" for folder, total in seconds.most_common())
    terminalreporter.write_line(f"seconds by folder: {parts}")
