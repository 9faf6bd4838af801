"""The record of one run: one JSON file, written once and whole, with the test predictions beside it.

Layout: <results>/runs/<task>/<architecture>/<id>.json and <id>.npz, or below <results>/smoke for a recipe that is a
smoke test. The id holds recipe, recipe hash, seed and time.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import UserError
from lra.files import atomic, safe, seal, sha256
from lra.results.schema import SCHEMA as SCHEMA
from lra.results.schema import check as check

LARGEST = 16 * 2**20
"""Bytes of a record, and of its predictions once decompressed."""


def folder() -> Path:
    """`LRA_RESULTS`, or `results/` of the checkout, or of the working directory for an installed package."""
    if "LRA_RESULTS" in os.environ:
        return Path(os.environ["LRA_RESULTS"])
    checkout = Path(__file__).parents[2]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"


def unfinished() -> Path:
    """`LRA_RUNS`, or `runs/` of the working directory: logs and checkpoints of runs, before there is a result."""
    return Path(os.environ.get("LRA_RUNS", "runs"))


def write(record: dict[str, Any], predictions: dict[str, np.ndarray], root: Path, place: str = "runs") -> Path:
    """Write predictions, then the record that names their checksum. Returns the path of the JSON file.

    Nothing that exists is replaced: where the id is taken, by another process or a clock set back, the record gets the
    next free one. Raises UserError where the files cannot be written.
    """
    folder = root / place / safe(record["task"]) / slug(record["architecture"])
    content = io.BytesIO()
    np.savez_compressed(content, **predictions)  # type: ignore[arg-type]
    first = safe(record["id"], 180)
    record = record | {"id": first, "predictions": {"file": f"{first}.npz", "sha256": sha256(content.getvalue())}}
    if problem := check(record | {"seal": ""}):
        raise ValueError(f"refusing to write an invalid result: {problem}")
    try:
        for identity in (first, *(f"{first}-{n}" for n in range(2, 1000))):
            data, path = folder / f"{identity}.npz", folder / f"{identity}.json"
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
            f"cannot write the result to {folder}: {reason}; the trained weights are kept: make room or set "
            "LRA_RESULTS, and run the same command with --resume"
        ) from error
    raise UserError(f"{folder} holds a thousand results called {first}; move some away")


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
    if sha256(content) != record["predictions"]["sha256"]:
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


def slug(architecture: str) -> str:
    """A folder name for an architecture as addressed: `s4d/inv` -> `s4d-inv`, `my/net.py:Net` -> `Net`."""
    return safe(architecture.rpartition(":")[2].replace("/", "-"))


def _no_nan(name: str) -> Any:
    raise ValueError(f"{name} is not a number a result may hold")
