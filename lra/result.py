"""The record of one run: one JSON file, written once and whole, with the test predictions beside it.

Layout: <results>/runs/<task>/<architecture>/<id>.json and <id>.npz. The id holds recipe, recipe hash, seed and time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import UserError
from lra.schema import SCHEMA as SCHEMA
from lra.schema import check as check

LARGEST = 16 * 2**20
"""Bytes of a record, and of its predictions once decompressed."""
ONCE = {"--resume": 0, "--time-limit": 1, "--checkpoint-dir": 1}
"""Options about one call rather than the run, and the number of their values."""
PACKAGES = ("torch", "lightning", "torchmetrics", "numba", "numpy", "triton", "datasets", "lra-suite")


def folder() -> Path:
    """`LRA_RESULTS`, or `results/` of the checkout, or of the working directory for an installed package."""
    if "LRA_RESULTS" in os.environ:
        return Path(os.environ["LRA_RESULTS"])
    checkout = Path(__file__).parents[1]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"


def unfinished() -> Path:
    """`LRA_RUNS`, or `runs/` of the working directory: logs and checkpoints of runs, before there is a result."""
    return Path(os.environ.get("LRA_RUNS", "runs"))


@contextmanager
def atomic(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """A temporary sibling to write; it becomes `path` when the block succeeds and vanishes when it does not.

    exclusive: FileExistsError where `path` exists by then. A killed process leaves a hidden `.partial` nobody reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".partial")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        if exclusive:
            _publish(name, path)
        else:
            os.replace(name, path)
        _sync_folder(path.parent)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _publish(name: str, path: Path) -> None:
    """Rename without replacing what is there."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise
    except OSError:
        # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(name, path)
    else:
        os.unlink(name)


def _sync_folder(folder: Path) -> None:
    # a rename outlives a power cut only once its folder is on disk; some file systems refuse
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def seal(content: dict[str, Any]) -> str:
    """SHA-256 of JSON content, for its key `seal`: whatever is changed later shows."""
    unsealed = {key: value for key, value in content.items() if key != "seal"}
    return _sha256(json.dumps(unsealed, sort_keys=True).encode(errors="surrogatepass"))


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
    """Write predictions, then the record that names their checksum. Returns the path of the JSON file.

    Nothing that exists is replaced: where the id is taken, by another process or a clock set back, the record gets the
    next free one. Raises UserError where the files cannot be written.
    """
    place = root / "runs" / safe(record["task"]) / slug(record["architecture"])
    content = io.BytesIO()
    np.savez_compressed(content, **predictions)  # type: ignore[arg-type]
    first = safe(record["id"], 180)
    record = record | {"id": first, "predictions": {"file": f"{first}.npz", "sha256": _sha256(content.getvalue())}}
    if problem := check(record | {"seal": ""}):
        raise ValueError(f"refusing to write an invalid result: {problem}")
    try:
        for identity in (first, *(f"{first}-{n}" for n in range(2, 1000))):
            data, path = place / f"{identity}.npz", place / f"{identity}.json"
            if path.exists():
                continue
            try:
                with atomic(data, exclusive=True) as temporary:
                    temporary.write_bytes(content.getvalue())
            except FileExistsError:
                continue
            record |= {"id": identity, "predictions": record["predictions"] | {"file": data.name}}
            _write_json(path, record, data)
            return path
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write the result to {place}: {reason}; the trained weights are kept: make room or set "
            "LRA_RESULTS, and run the same command with --resume"
        ) from error
    raise UserError(f"{place} holds a thousand results called {first}; move some away")


def _write_json(path: Path, record: dict[str, Any], data: Path) -> None:
    try:
        with atomic(path, exclusive=True) as temporary:
            sealed = record | {"seal": seal(record)}
            temporary.write_text(json.dumps(sealed, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    except OSError:
        with suppress(OSError):
            data.unlink()
        raise


def read(path: Path) -> dict[str, Any]:
    """A record, checked, without its seal. Raises UserError naming the file and what is wrong with it."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it holds more than {LARGEST:,} bytes")
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_nan)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a result file: {error}") from None
    problem = check(record)
    if problem:
        raise UserError(f"{path}: {problem}")
    if record.pop("seal") != seal(record):
        raise UserError(f"{path}: it was changed after it was written")
    name = Path(record["predictions"]["file"]).name
    data = path.with_name(name) if name else path
    # unlike Path.is_file it takes an impossible name for a missing file
    if data == path or not os.path.isfile(data):
        raise UserError(f"{path}: its predictions {name[:200]} are missing")
    try:
        content = data.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: its predictions {name} cannot be read: {error.strerror}") from None
    if _sha256(content) != record["predictions"]["sha256"]:
        raise UserError(f"{path}: its predictions {name} do not have the recorded checksum")
    if problem := _unsound(content):
        raise UserError(f"{path}: its predictions {name} are not plain arrays: {problem}")
    return record


def _unsound(content: bytes) -> str:
    """Why these bytes are no .npz of plain arrays; empty when they are."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST:
                return f"they decompress to more than {LARGEST:,} bytes"
            if archive.testzip() is not None:
                return "wrong CRC"
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            for key in arrays.files:
                if not isinstance(arrays[key], np.ndarray):
                    return f"{key} is no array"
    except Exception as error:  # noqa: BLE001  (zipfile and numpy raise whatever the bytes lead them to)
        return f"{type(error).__name__}: {error}"
    return ""


def safe(name: str, limit: int = 120) -> str:
    """A file name that stays in its folder: letters, digits, `-_.`, no leading dot, at most `limit` bytes of UTF-8."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".") or "_"
    if len(kept.encode()) <= limit:
        return kept
    return f"{kept.encode()[: limit - 20].decode(errors='ignore')}-{_sha256(name.encode(errors='surrogatepass'))[:12]}"


def slug(architecture: str) -> str:
    """A folder name for an architecture as addressed: `s4d/inv` -> `s4d-inv`, `my/net.py:Net` -> `Net`."""
    return safe(architecture.rpartition(":")[2].replace("/", "-"))


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


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _no_nan(name: str) -> Any:
    raise ValueError(f"{name} is not a number a result may hold")
