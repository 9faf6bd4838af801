"""The raw files of a prepared set: whether they are still those that it was prepared from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lra.files import sha256


def facts(files: Iterable[Path], folder: Path) -> dict[str, Any]:
    """Number, state and SHA-256 of files below a folder. The state, of names, sizes and times, is quick to compare."""
    files = sorted(files)
    contents = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            contents.update(f"{path.relative_to(folder).as_posix()}\0".encode(errors="surrogateescape"))
            contents.update(hashlib.file_digest(file, "sha256").digest())
    return {"count": len(files), "state": _state(files, folder), "sha256": contents.hexdigest()}


def changed(stored: dict[str, Any], files: Iterable[Path], folder: Path) -> bool:
    """Whether the names or contents of files differ from the stored facts."""
    files = sorted(files)
    return _state(files, folder) != stored["state"] and facts(files, folder)["sha256"] != stored["sha256"]


def _state(files: list[Path], folder: Path) -> str:
    known = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    lines = [f"{name}\0{state.st_size}\0{state.st_mtime_ns}" for name, state in known]
    return sha256("\n".join(lines).encode(errors="surrogateescape"))
