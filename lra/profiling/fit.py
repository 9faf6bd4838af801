"""The largest batch or length whose training step fits a memory budget; each candidate runs in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from lra.profiling.profiler import in_process, measure_memory
from lra.results.profile import Cell

LIMITS = {"batch": 4096, "length": 65_536}


@dataclass(frozen=True)
class Fit:
    """value: the largest that fits, 0 if the smallest does not; peak: bytes it took; capped: the search ended at its
    upper limit, so more may fit; tries: number of training steps that were run."""

    value: int
    peak: int
    capped: bool
    tries: int


def largest(
    peak_of: Callable[[int], int | None], budget: int, *, first: int, most: int, precision: float = 0.05
) -> Fit:
    """Double from `first` until a step does not fit, then halve the gap down to `precision` of its lower end.

    peak_of: bytes a step of that size takes, or None where it failed. Needs peaks that grow with size.
    """
    tries, low, peak, size = 0, 0, 0, first
    high: int | None = None
    while high is None or high - low > max(1, int(precision * low)):
        used = peak_of(size)
        tries += 1
        if used is not None and used <= budget:
            low, peak = size, used
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
        # beyond twice the budget the exact peak does not matter
        candidate = msgspec.structs.replace(cell, **{vary: size})
        used = in_process(measure_memory, candidate, here, timeout, limit=2 * budget + 2**29)
        return None if "failed" in used else int(used["peak_bytes"])

    return largest(peak_of, budget, first=getattr(cell, vary), most=LIMITS[vary])
