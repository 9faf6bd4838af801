"""The record of one run: one JSON file, written once and whole, with the test predictions beside it.

Layout: <results>/runs/<task>/<architecture>/<id>.json and <id>.npz. The id holds recipe, recipe hash, seed and time.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import UserError

SCHEMA = 1
REQUIRED = {
    "schema": int, "id": str, "task": str, "architecture": str, "protocol": dict, "recipe": dict, "recipe_hash": str,
    "seed": int, "regime": str, "direction": str, "test": dict, "validation": dict, "floors": dict, "parameters": int,
    "flops": dict, "speed": dict, "memory": dict, "implementations": dict, "data": dict, "environment": dict,
    "command": str, "started": str, "predictions": dict,
}  # fmt: skip
PACKAGES = ("torch", "lightning", "torchmetrics", "numba", "numpy", "triton", "datasets", "lra-suite")


def folder() -> Path:
    """`LRA_RESULTS`, or `results/` of the checkout, or of the working directory for an installed package."""
    if "LRA_RESULTS" in os.environ:
        return Path(os.environ["LRA_RESULTS"])
    checkout = Path(__file__).parents[1]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary sibling to write; it becomes `path` when the block succeeds and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def check_writable(where: Path) -> None:
    """Raise UserError now rather than after an hour of training."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=where):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write results to {where}: {error.strerror}; make it writable or set LRA_RESULTS"
        ) from None


def write(record: dict[str, Any], predictions: dict[str, np.ndarray], root: Path) -> Path:
    """Write predictions, then the record that names their checksum. Returns the path of the JSON file."""
    place = root / "runs" / record["task"] / slug(record["architecture"])
    data = place / f"{record['id']}.npz"
    with atomic(data) as temporary:
        np.savez_compressed(temporary, **predictions)  # type: ignore[arg-type]
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    record = record | {"predictions": {"file": data.name, "sha256": digest}}
    problem = check(record)
    if problem:
        raise ValueError(f"refusing to write an invalid result: {problem}")
    path = place / f"{record['id']}.json"
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Any]:
    """A record, checked. Raises UserError naming the file and what is wrong with it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_nan)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a result file: {error}") from None
    problem = check(record)
    if problem:
        raise UserError(f"{path}: {problem}")
    data = path.with_name(Path(record["predictions"]["file"]).name)
    if not data.is_file():
        raise UserError(f"{path}: its predictions {data.name} are missing")
    if hashlib.sha256(data.read_bytes()).hexdigest() != record["predictions"]["sha256"]:
        raise UserError(f"{path}: its predictions {data.name} do not have the recorded checksum")
    return record


def check(record: Any) -> str:
    """What is wrong with a record; empty when nothing is."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get("schema") != SCHEMA:
        return f"schema is {record.get('schema')!r}; this version reads {SCHEMA}"
    for key, kind in REQUIRED.items():
        if key not in record:
            return f"{key} is missing"
        if not isinstance(record[key], kind):
            return f"{key} is a {type(record[key]).__name__}; expected {kind.__name__}"
    accuracy, count = record["test"].get("accuracy"), record["test"].get("n")
    if not isinstance(accuracy, float) or not 0 <= accuracy <= 1:
        return f"test.accuracy is {accuracy!r}; a number from 0 to 1"
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return f"test.n is {count!r}; a positive integer"
    return ""


def slug(architecture: str) -> str:
    """A folder name for an architecture as addressed: `s4d/inv` -> `s4d-inv`, `my/net.py:Net` -> `Net`."""
    name = architecture.rpartition(":")[2].replace("/", "-")
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".") or "_"


def environment() -> dict[str, Any]:
    """Hardware, versions and commit: what a number depends on and cannot be seen in the code."""
    import torch

    versions = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
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
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x{os.cpu_count()}"
    return f"{platform.processor() or 'unknown'} x{os.cpu_count()}"


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


def command_line() -> str:
    import shlex

    return shlex.join(["lra", *sys.argv[1:]])


def _no_nan(name: str) -> Any:
    raise ValueError(f"{name} is not a number a result may hold")
