"""The floors of a prepared set, computed once and kept beside it."""

from __future__ import annotations

import json
from contextlib import suppress

from lra.data.prepared_sets import Prepared
from lra.files import atomic, seal


def floors(prepared: Prepared) -> dict[str, float]:
    """Accuracies in [0, 1] that need no sequence model. What is kept is only believed whole and for these very data,
    and a cache that cannot be written to costs the next run a minute, not this one its result."""
    place = prepared.folder.with_name(f"{prepared.folder.name}.floors.json")
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        known = json.loads(place.read_text(encoding="utf-8"))
        if known["seal"] == seal(known) and known.get("checksum") == prepared.checksum:
            return known["floors"]
    accuracies = prepared.task.floors(prepared.split("train"), prepared.split("test"))
    content = {"checksum": prepared.checksum, "floors": accuracies}
    with suppress(OSError), atomic(place) as temporary:
        temporary.write_text(json.dumps(content | {"seal": seal(content)}), encoding="utf-8")
    return accuracies
