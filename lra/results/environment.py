"""What a number depends on and the code does not show: hardware, versions, commit, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lra.results.schema import SCHEMA as SCHEMA
from lra.results.schema import check as check

ONCE = {"--resume": 0, "--time-limit": 1, "--checkpoint-dir": 1}
"""Options about one call rather than the run, and the number of their values."""
PACKAGES = ("torch", "lightning", "torchmetrics", "numba", "numpy", "triton", "datasets", "lra-suite")


def environment() -> dict[str, Any]:
    """Hardware, versions and commit: what a number depends on and cannot be seen in the code."""
    import torch

    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    versions["torch"] = str(torch.__version__)  # its metadata may lack the +cu132
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


@cache
def _cpu() -> str:
    """Model, and how many of its processors this process may use: it may be confined to some of them."""
    name = platform.processor() or "unknown"
    with suppress(OSError):
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name} x{cpus()}"


def cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> dict[str, Any]:
    """The git commit of the running code and whether files that matter differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/*.py", ":/*.toml")
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"hash": "", "dirty": True}


def command_line(repeatable: bool = False) -> str:
    """What was typed; `repeatable`: without the options of ONCE, so that the whole run can be done again."""
    import shlex

    words, kept = iter(sys.argv[1:]), ["lra"]
    for word in words:
        flag, equals, _ = word.partition("=")
        if not repeatable or flag not in ONCE:
            kept.append(word)
        elif ONCE[flag] and not equals:
            next(words, None)
    return shlex.join(kept)
