"""Checkpoints on disk: replaced whole or not at all, checked before they are read, never unpickled.

Lightning's own writer goes through the folder for temporary files, which may be another disk: a process killed while
the file is copied from there leaves half a checkpoint under the right name. And torch reads a checkpoint without
looking at the checksums that it wrote into it.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lra.errors import UserError
from lra.result import atomic


class Whole(TorchCheckpointIO):
    """The trainer's writer and reader of checkpoints. The folder has to belong to one process at a time."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        place = Path(path)
        for left in place.parent.glob(f".{place.name}.*.partial"):
            left.unlink(missing_ok=True)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            with atomic(place) as temporary:
                temporary.write_bytes(content.getbuffer())
        except OSError as error:
            raise UserError(
                f"cannot write {place}: {error.strerror or error}; make room or set LRA_RUNS; the checkpoint before it "
                "is kept: the same command with --resume goes on from there"
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return read(Path(path), map_location)


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint, every byte of its contents compared with their checksums. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} has another checksum")
        found = torch.load(path, weights_only=True, map_location=map_location)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (
        OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, AttributeError, TypeError,
        IndexError, AssertionError, MemoryError, OverflowError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); run without --resume to start anew") from None
    return found
