"""Floors of a prepared set: scores of baselines without a sequence model, cached beside the set."""

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
    """Test accuracies in [0, 1] of baselines without a sequence model, by name."""
    return _cached(prepared, "floors")


def floor_bits(prepared: Prepared) -> dict[str, float]:
    """Bits per token of such baselines, by name; empty unless the target is the next token."""
    return _cached(prepared, "floor_bits") if prepared.task.target == "next" else {}


def _cached(prepared: Prepared, kind: str) -> dict[str, float]:
    """The result of the method `kind` of the task, cached.

    A cached file is used only if it is intact and belongs to the same data and the same code of the task. If the cache
    cannot be written, the next call computes the floors again.
    """
    code = _code(prepared.task)
    path = prepared.folder.with_name(f"{prepared.folder.name}.{kind}.json")
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        cached = json.loads(path.read_text(encoding="utf-8"))
        if cached["seal"] == seal(cached) and (cached["checksum"], cached["code"]) == (prepared.checksum, code):
            return cached[kind]
    scores = getattr(prepared.task, kind)(prepared.split("train"), prepared.split("test"))
    content = {"checksum": prepared.checksum, "code": code, kind: scores}
    with suppress(OSError), atomic(path) as temporary:
        temporary.write_text(json.dumps(content | {"seal": seal(content)}), encoding="utf-8")
    return scores


def _code(task: Task) -> str:
    """SHA-256 of the modules of a task and its base classes; empty where their source cannot be read."""
    try:
        files = [inspect.getfile(cls) for cls in type(task).__mro__ if issubclass(cls, Task)]
        source = "".join(Path(file).read_text(encoding="utf-8") for file in files)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()
