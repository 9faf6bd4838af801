"""Checkpoints on disk: replaced whole or not at all, checked before they are read, never unpickled.

Lightning's own writer goes through the folder for temporary files, which may be another disk: a process killed while
the file is copied from there leaves half a checkpoint under the right name. And torch reads a checkpoint without
looking at the checksums that it wrote into it, which leave out the names and places of its parts. So a checkpoint ends
in a checksum of all of it, as the comment that a zip archive may have: `torch.load` reads it like any other.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lra.errors import UserError
from lra.files import atomic

DIGEST = 64
"""Characters of a SHA-256 in hexadecimal."""


class Whole(TorchCheckpointIO):
    """The trainer's writer and reader of checkpoints. The folder has to belong to one process at a time."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return read(Path(path), map_location)


def write(content: dict[str, Any], place: Path) -> None:
    """Write a checkpoint with its checksum. Raises UserError; what was there before is kept then."""
    for left in place.parent.glob(f".{place.name}.*.partial"):
        left.unlink(missing_ok=True)
    made = io.BytesIO()
    torch.save(content, made)
    # the last field of a zip archive is the length of its comment
    made.seek(-2, io.SEEK_END)
    made.write(DIGEST.to_bytes(2, "little"))
    try:
        with atomic(place) as temporary, temporary.open("wb") as file:
            file.write(made.getbuffer())
            file.write(hashlib.sha256(made.getbuffer()).hexdigest().encode())
    except OSError as error:
        raise UserError(
            f"cannot write {place}: {error.strerror or error}; make room or set LRA_RUNS; the checkpoint before it "
            "is kept: the same command with --resume goes on from there"
        ) from error


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint, every byte of it compared with its checksum. Raises UserError."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[:-DIGEST]).hexdigest().encode() != content[-DIGEST:]:
            raise ValueError("its checksum is another")
        found = torch.load(io.BytesIO(content), weights_only=True, map_location=map_location)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (
        OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, AttributeError, TypeError,
        IndexError, AssertionError, MemoryError, OverflowError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); run without --resume to start anew") from None
    return found
