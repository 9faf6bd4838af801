"""What a record holds: the fields that its readers rely on, and what no table could show."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from lra.errors import brief

SCHEMA = 1
NUMBER = (int, float)
Kinds = Mapping[str, type | tuple[type, ...]]
REQUIRED: Kinds = {
    "schema": int, "id": str, "task": str, "architecture": str, "protocol": dict, "recipe": dict, "recipe_hash": str,
    "seed": int, "regime": str, "direction": str, "test": dict, "validation": dict, "floors": dict, "parameters": int,
    "flops": dict, "speed": dict, "memory": dict, "implementations": dict, "data": dict, "environment": dict,
    "command": str, "started": str, "predictions": dict, "wall_seconds": NUMBER, "seal": str,
    "protocol.name": str, "recipe.name": str, "environment.cpu": str, "speed.examples_per_second": NUMBER,
    "speed.examples": int, "memory.peak_bytes": NUMBER, "predictions.file": str, "predictions.sha256": str,
}  # fmt: skip
OPTIONAL: Kinds = {
    "collapsed": str, "protocol.length": int, "validation.accuracy": NUMBER, "flops.forward": (*NUMBER, type(None)),
    "flops.forward_backward": (*NUMBER, type(None)), "flops.uncounted": list, "environment.gpu": str,
    "environment.device": str, "environment.versions": dict, "environment.commit": dict,
    "environment.commit.hash": str, "data.checksum": str, "curve": list, "receptive_field": int,
}  # fmt: skip
DEEPEST = 16
ABSENT = object()
"""What `at` finds where there is nothing."""


def check(record: Any) -> str:
    """What is wrong with a record; empty when nothing is."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get("schema") != SCHEMA:
        return f"schema is {brief(record.get('schema'))}; this version reads {SCHEMA}"
    return misfit(record, REQUIRED, OPTIONAL) or _ranges(record)


def misfit(content: dict[str, Any], required: Kinds, optional: Kinds) -> str:
    """Which value is not of its kind, or nothing that could be shown; empty when none is. Keys may be dotted."""
    if problem := _improper(content):
        return problem
    for key, kind in {**required, **optional}.items():
        value = at(content, key)
        if value is ABSENT and key in required:
            return f"{key} is missing"
        if value is not ABSENT and not _is(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            return f"{key} is a {type(value).__name__}; expected {wanted}"
    return ""


def _ranges(record: dict[str, Any]) -> str:
    accuracy, count = record["test"].get("accuracy"), record["test"].get("n")
    if not isinstance(accuracy, float) or not 0 <= accuracy <= 1:
        return f"test.accuracy is {brief(accuracy)}; a number from 0 to 1"
    if not _is(count, int) or not 1 <= count < 2**31:
        return f"test.n is {brief(count)}; a positive integer"
    for name, floor in record["floors"].items():
        if not _is(floor, NUMBER) or not 0 <= floor <= 1:
            return f"floors.{name} is {brief(floor)}; a number from 0 to 1"
    if record["protocol"].get("length", 1) < 1:
        return f"protocol.length is {record['protocol']['length']}; at least 1"
    if not all(_is(name, str) for name in record["flops"].get("uncounted", ())):
        return "flops.uncounted holds something other than names"
    if not all(_is(point, dict) and _is(point.get("step"), int) for point in record.get("curve", ())):
        return "curve holds something other than points with a step"
    return ""


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def at(record: dict[str, Any], dotted: str) -> Any:
    """The value behind a dotted key."""
    found: Any = record
    for part in dotted.split("."):
        if not isinstance(found, dict) or part not in found:
            return ABSENT
        found = found[part]
    return found


def _improper(value: Any, where: str = "", depth: int = 0) -> str:
    """The first number that is not finite, character that cannot be shown, or nesting without end."""
    if depth > DEEPEST:
        return f"{where[:60]} is nested more than {DEEPEST} deep"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{where} is {value}, not a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{where} is a number of more than 63 bits"
    if isinstance(value, str) and any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in value):
        return f"{where} holds a control character"
    if isinstance(value, dict):
        for key, part in value.items():
            # a key stands in messages of one line
            if problem := _improper(key.replace("\n", "\0"), "a key", depth) or _improper(
                part, f"{where}.{key}".lstrip("."), depth + 1
            ):
                return problem
    if isinstance(value, list):
        for number, part in enumerate(value):
            if problem := _improper(part, f"{where}[{number}]", depth + 1):
                return problem
    return ""
