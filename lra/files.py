"""Files that are whole or absent: atomic writes, checksums, names that stay in their folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lra.errors import UserError


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
    return sha256(json.dumps(unsealed, sort_keys=True).encode(errors="surrogatepass"))


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


def safe(name: str, limit: int = 120) -> str:
    """A file name that stays in its folder: letters, digits, `-_.`, no leading dot, at most `limit` bytes of UTF-8."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".") or "_"
    if len(kept.encode()) <= limit:
        return kept
    return f"{kept.encode()[: limit - 20].decode(errors='ignore')}-{sha256(name.encode(errors='surrogatepass'))[:12]}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
