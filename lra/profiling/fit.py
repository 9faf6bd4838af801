"""The largest batch or length whose training step fits a memory budget: found by trying, each in a fresh process."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lra.errors import UserError
from lra.profiling.profiler import Cell, in_process, measure_memory

LIMITS = {"batch": 4096, "length": 65_536}
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Fit:
    """value: the largest found, 0 where not even the smallest fits; peak: bytes it took; capped: it is the largest that
    was tried, more may fit; tries: training steps that were run."""

    value: int
    peak: int
    capped: bool
    tries: int


def budget_of(text: str) -> int:
    """ "2GiB" -> bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)", text)
    if not match:
        raise UserError(f"--fit is {text!r}; expected a number and a unit, for example 512MiB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])


def largest(
    peak_of: Callable[[int], int | None], budget: int, *, first: int, most: int, precision: float = 0.05
) -> Fit:
    """Double from `first` until a step does not fit, then halve the gap down to `precision` of its lower end.

    peak_of: bytes a step of that size takes, or None where it failed. Needs peaks that grow with size.
    """
    tries, low, peak, size = 0, 0, 0, first
    high: int | None = None
    while high is None or high - low > max(1, int(precision * low)):
        found = peak_of(size)
        tries += 1
        if found is not None and found <= budget:
            low, peak = size, found
        else:
            high = size
        if low >= most or high == first:
            break
        size = min(2 * low, most) if high is None else (low + high) // 2
    return Fit(low, peak, low >= most, tries)


def fit(cell: Cell, vary: str, budget: int, *, timeout: float = 120.0) -> Fit:
    """The largest `vary` ("batch" or "length") of a cell; its own value is where the search starts."""
    here = "cuda" if torch.cuda.is_available() else "cpu"

    def peak_of(size: int) -> int | None:
        # beyond twice the budget nobody wants to know how much it would have been
        tried = replace(cell, **{vary: size})  # type: ignore[arg-type]
        found = in_process(measure_memory, tried, here, timeout, limit=2 * budget + 2**29)
        return None if "failed" in found else int(found["peak_bytes"])

    return largest(peak_of, budget, first=getattr(cell, vary), most=LIMITS[vary])
