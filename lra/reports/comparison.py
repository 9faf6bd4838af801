"""Two runs, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import UserError, unknown
from lra.results import result
from lra.results.collection import Collection, Record
from lra.results.statistics import mcnemar

ABSENT = "-"


def find(collection: Collection, name: str) -> Record:
    """A record by its file, its id, or a beginning of its id that no other has. Raises UserError."""
    if name.endswith(".json"):
        return result.read(Path(name))
    known = {r["id"]: r for r in collection.records}
    matching = [identity for identity in known if identity.startswith(name)] if name not in known else [name]
    if len(matching) > 1:
        raise UserError(f"{name!r} begins {len(matching)} run ids: {', '.join(matching[:5])}; give more of it")
    if not matching:
        raise unknown("run", name, known)
    return known[matching[0]]


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field, value as JSON), in the order of the fields' names."""
    for key in sorted(record):
        value = record[key]
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def differences(a: Record, b: Record) -> list[tuple[str, str, str]]:
    """(field, value in a, value in b) of every field that differs; "-" where one lacks it."""
    left, right = dict(flat(a)), dict(flat(b))
    fields = sorted(left.keys() | right.keys())
    return [(f, left.get(f, ABSENT), right.get(f, ABSENT)) for f in fields if left.get(f) != right.get(f)]


def predictions(collection: Collection, a: Record, b: Record) -> str:
    """How often the two were right on the same test examples, in one line; empty where that cannot be said."""
    x, y = collection.answers.get(a["id"]), collection.answers.get(b["id"])
    same_data = a["task"] == b["task"] and a["data"].get("checksum") == b["data"].get("checksum")
    if x is None or y is None or not same_data or not np.array_equal(x.example, y.example):
        return ""
    one, other = int((x.right & ~y.right).sum()), int((y.right & ~x.right).sum())
    return (
        f"of {len(x.right):,} test examples the first alone is right on {one:,}, the second alone on {other:,}: "
        f"p = {mcnemar(x.right, y.right):.3g} (McNemar, these two trained models)"
    )
