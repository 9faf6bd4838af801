"""One way to time things: warm up until stable, then the median and interquartile range of many repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds: median and quartiles of `repeats` calls."""

    median: float
    low: float
    high: float
    repeats: int


def measure(call: Callable[[], object], device: torch.device, *, repeats: int = 30, budget: float = 10.0) -> Timing:
    """Time `call` on `device`, one call after the other.

    Warm-up ends when two calls in a row differ by less than a tenth, after 5 calls at most or a third of `budget`
    seconds; compilation and autotuning are over by then. Then `repeats` calls, or as many as fit `budget`, at least 3.
    CUDA work is timed by events on its stream.
    """
    begin, before = time.perf_counter(), 0.0
    for _ in range(5):
        now = _once(call, device)
        if abs(now - before) < 0.1 * now or time.perf_counter() - begin > budget / 3:
            break
        before = now
    found: list[float] = []
    while len(found) < repeats and (len(found) < 3 or time.perf_counter() - begin < budget):
        found.append(_once(call, device))
    quartiles = statistics.quantiles(found, n=4)
    return Timing(statistics.median(found), quartiles[0], quartiles[2], len(found))


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3
