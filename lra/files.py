"""Atomic writes, checksums and safe file names."""

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


def cache_root() -> Path:
    """The folder of the cache: LRA_CACHE, else `~/.cache/lra`."""
    return Path(os.environ.get("LRA_CACHE") or Path.home() / ".cache" / "lra").expanduser()


@contextmanager
def atomic(path: Path, *, exclusive: bool = False) -> Iterator[Path]:
    """Write a file atomically: yields a temporary path, which is renamed to `path` if the block succeeds.

    If the block fails, the temporary file is deleted. exclusive: raise FileExistsError if `path` exists at the end of
    the block. A killed process leaves a hidden `.partial` file, which no reader opens.
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
    """Rename a file. Raises FileExistsError if the target exists."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise
    except OSError:
        # the file system has no hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(name, path)
    else:
        os.unlink(name)


def _sync_folder(folder: Path) -> None:
    # a rename survives a power cut only after the folder is synced; some file systems cannot sync a folder
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def seal(content: dict[str, Any]) -> str:
    """SHA-256 of JSON content without its key `seal`. Stored under that key, it detects later changes."""
    unsealed = {key: value for key, value in content.items() if key != "seal"}
    return sha256(json.dumps(unsealed, sort_keys=True).encode(errors="surrogatepass"))


def check_writable(folder: Path, advice: str = "set LRA_RESULTS") -> None:
    """Raise UserError if results cannot be written to a folder. Called before the work starts. advice: what else to do
    than to make it writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write results to {folder}: {error.strerror}; make it writable or {advice}") from None


def safe_name(name: str, limit: int = 120) -> str:
    """Turn a name into a safe file name: letters, digits, `-_.`, no leading dot, at most `limit` bytes of UTF-8."""
    cleaned = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".") or "_"
    if len(cleaned.encode()) <= limit:
        return cleaned
    return (
        f"{cleaned.encode()[: limit - 20].decode(errors='ignore')}-{sha256(name.encode(errors='surrogatepass'))[:12]}"
    )


def sha256(content: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
