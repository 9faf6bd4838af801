"""Checkpoint files: written atomically, verified by a checksum when read, loaded without unpickling code.

A checkpoint is an ordinary file of `torch.save`, a zip archive, whose archive comment holds the SHA-256 of everything
before it. torch does not verify the checksums inside the archive, and they do not cover the names of its members.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from lra.errors import UserError
from lra.files import atomic

DIGEST = 64
"""Characters of a SHA-256 in hexadecimal."""


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with its checksum, atomically. Raises UserError and keeps the earlier file where it fails.

    The folder has to belong to one process at a time: temporary files of killed processes are removed from it.
    """
    for partial in path.parent.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    # the last field of a zip archive is the length of its comment
    buffer.seek(-2, io.SEEK_END)
    buffer.write(DIGEST.to_bytes(2, "little"))
    try:
        with atomic(path) as temporary, temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; make room or set LRA_RUNS; the previous checkpoint is "
            "kept: the same command with --resume continues from it"
        ) from error


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, verified by its checksum. Raises UserError where it is missing or damaged."""
    try:
        content = path.read_bytes()
        if hashlib.sha256(memoryview(content)[:-DIGEST]).hexdigest().encode() != content[-DIGEST:]:
            raise ValueError("its checksum does not match")
        loaded = torch.load(io.BytesIO(content), weights_only=True, map_location=map_location)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}, not a dictionary")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (
        OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, AttributeError, TypeError,
        IndexError, AssertionError, MemoryError, OverflowError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged ({reason}); run without --resume to start anew") from None
    return loaded


def model_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """State dict of the classifier in a checkpoint of training."""
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
