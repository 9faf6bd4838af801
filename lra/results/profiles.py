"""A measured cell on file: what its readers rely on, checked before anything is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lra.results.schema import ABSENT, NUMBER, Kinds, at, misfit

CELL: Kinds = {
    "cell": dict, "environment": dict, "environment.cpu": str, "cell.architecture": str, "cell.length": int,
    "cell.batch": int, "cell.d_model": int, "cell.n_layers": int, "cell.direction": str,
}  # fmt: skip
TIMED = tuple(f"seconds.{part}.{key}" for part in ("forward", "train") for key in ("median", "low", "high", "repeats"))
COUNTED = (
    "parameters", "tokens_per_second", "mfu", "flops.forward", "flops.algorithmic", "flops.forward_backward",
    "flops.matmul_counted", "memory.peak_bytes", "memory.parameters", "memory.gradients", "memory.optimiser",
    "memory.activations",
)  # fmt: skip
MEASURED: Kinds = {
    "rounds": list, "machine": dict, "machine.rate": NUMBER, "seconds": dict,
    "seconds.forward": dict, "seconds.train": dict, "flops": dict, "memory": dict,
    "flops.uncounted": list, "flops.matmul_by_formula": (*NUMBER, type(None)), **dict.fromkeys(TIMED + COUNTED, NUMBER),
}  # fmt: skip
OPTIONAL: Kinds = {
    "failed": str, "cell.task": str, "environment.gpu": str, "environment.threads": int, "environment.versions": dict,
    "environment.commit": dict, "environment.commit.hash": str, "seconds.step": dict,
}  # fmt: skip
ABOVE_ZERO = ("cell.length", "cell.batch", "memory.peak_bytes", *TIMED, "seconds.step.median")


def read(path: Path) -> Any:
    """What a file holds; None where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def problem(content: Any) -> str:
    """What is wrong with a profile; empty when nothing is."""
    if not isinstance(content, dict):
        return "not a JSON object"
    required = CELL if "failed" in content else {**CELL, **MEASURED}
    if "failed" not in content and at(content, "seconds.step") is not ABSENT:
        required = {**required, "seconds.step.median": NUMBER}
    if why := misfit(content, required, OPTIONAL):
        return why
    numbers = {key: at(content, key) for key in ABOVE_ZERO if key in required}
    if low := [key for key, value in numbers.items() if value <= 0]:
        return f"{low[0]} is {numbers[low[0]]}; more than 0"
    if "failed" in content:
        return ""
    if not all(isinstance(name, str) for name in content["flops"]["uncounted"]):
        return "flops.uncounted holds something other than names"
    taken, rounds = set(content["seconds"]), content["rounds"]
    # a later round may have failed, and says nothing then
    if not rounds or not all(isinstance(r, dict) and set(r) in (taken, set()) for r in rounds) or not rounds[0]:
        return "rounds are not the medians of each timing"
    if not all(type(median) in NUMBER and median > 0 for r in rounds for median in r.values()):
        return "rounds holds something other than seconds"
    return ""
