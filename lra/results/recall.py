"""Measured first-token recall: one JSON file an architecture in `recall/` of the results folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from lra import files
from lra.errors import UserError


class RecallRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First-token recall of one architecture, as `lra check --recall` measures it.

    direction: "causal" or "bidirectional", "" for an encoder without the option. accuracy: share of 1,024 new examples
    at `length`, after `steps` of training. learned: whether accuracy reached the target. seconds: of the training.
    environment: hardware, versions and commit.
    """

    architecture: str
    direction: str
    length: int
    accuracy: float
    learned: bool
    steps: int
    seconds: float
    seed: int
    environment: dict[str, Any]


def path_of(architecture: str, root: Path) -> Path:
    """Where the record of an architecture is, below the results folder `root`."""
    return root / "recall" / f"{architecture.replace('/', '-')}.json"


def write(record: RecallRecord, root: Path) -> Path:
    """Write the record atomically and return its path. Raises UserError if it cannot be written."""
    path = path_of(record.architecture, root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(path) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path


def read(root: Path) -> dict[str, RecallRecord]:
    """Records by architecture. Raises UserError for a file that is not a record."""
    return {record.architecture: record for record in _read_all(root)}


def _read_all(root: Path) -> Iterator[RecallRecord]:
    for path in sorted((root / "recall").glob("*.json")):
        try:
            yield msgspec.json.decode(path.read_bytes(), type=RecallRecord)
        except msgspec.DecodeError as error:
            raise UserError(f"{path}: {error}") from None
