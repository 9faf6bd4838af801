"""The floors of a prepared set, computed once and kept beside it."""

from __future__ import annotations

import json
from contextlib import suppress

from lra.result import atomic
from lra.store import Prepared


def floors(prepared: Prepared) -> dict[str, float]:
    """Accuracies in [0, 1] that need no sequence model. What is kept is only believed whole and for these very data,
    and a cache that cannot be written to costs the next run a minute, not this one its result."""
    place = prepared.folder.with_name(f"{prepared.folder.name}.floors.json")
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        known = json.loads(place.read_text(encoding="utf-8"))
        kept = known.get("floors")
        right = isinstance(kept, dict) and all(type(v) is float and 0 <= v <= 1 for v in kept.values())
        if known.get("checksum") == prepared.checksum and right and "majority class" in kept:
            return kept
    found = prepared.task.floors(prepared.split("train"), prepared.split("test"))
    with suppress(OSError), atomic(place) as temporary:
        temporary.write_text(json.dumps({"checksum": prepared.checksum, "floors": found}), encoding="utf-8")
    return found
