"""Floors of a prepared set: accuracies of baselines without a sequence model, cached beside the set."""

from __future__ import annotations

import hashlib
import inspect
import json
from contextlib import suppress
from pathlib import Path

from lra.data.prepared_sets import Prepared
from lra.files import atomic, seal
from lra.task import Task


def floors(prepared: Prepared) -> dict[str, float]:
    """Test accuracies in [0, 1] of baselines without a sequence model, by name.

    A cached file is used only if it is intact and belongs to the same data and the same code of the task. If the cache
    cannot be written, the next call computes the floors again.
    """
    code = _code(prepared.task)
    path = prepared.folder.with_name(f"{prepared.folder.name}.floors.json")
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        cached = json.loads(path.read_text(encoding="utf-8"))
        if cached["seal"] == seal(cached) and (cached["checksum"], cached["code"]) == (prepared.checksum, code):
            return cached["floors"]
    accuracies = prepared.task.floors(prepared.split("train"), prepared.split("test"))
    content = {"checksum": prepared.checksum, "code": code, "floors": accuracies}
    with suppress(OSError), atomic(path) as temporary:
        temporary.write_text(json.dumps(content | {"seal": seal(content)}), encoding="utf-8")
    return accuracies


def _code(task: Task) -> str:
    """SHA-256 of the modules that define `floors` of a task; empty where their source cannot be read."""
    owners = [cls for cls in type(task).__mro__ if "floors" in vars(cls)]
    try:
        source = "".join(Path(inspect.getfile(cls)).read_text(encoding="utf-8") for cls in owners)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()
