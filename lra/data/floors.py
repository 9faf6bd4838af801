"""Floors of a prepared set: accuracies of baselines without a sequence model, cached beside the set."""

from __future__ import annotations

import json
from contextlib import suppress

from lra.data.prepared_sets import Prepared
from lra.files import atomic, seal


def floors(prepared: Prepared) -> dict[str, float]:
    """Test accuracies in [0, 1] of baselines without a sequence model, by name.

    A cached file is used only if it is intact and belongs to the same data. If the cache cannot be written, the next
    call computes the floors again.
    """
    path = prepared.folder.with_name(f"{prepared.folder.name}.floors.json")
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        cached = json.loads(path.read_text(encoding="utf-8"))
        if cached["seal"] == seal(cached) and cached.get("checksum") == prepared.checksum:
            return cached["floors"]
    accuracies = prepared.task.floors(prepared.split("train"), prepared.split("test"))
    content = {"checksum": prepared.checksum, "floors": accuracies}
    with suppress(OSError), atomic(path) as temporary:
        temporary.write_text(json.dumps(content | {"seal": seal(content)}), encoding="utf-8")
    return accuracies
