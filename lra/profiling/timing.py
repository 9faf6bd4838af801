"""One way to time things: warm up until stable, then the median and interquartile range of many repeats."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds: median and quartiles of `repeats` calls."""

    median: float
    low: float
    high: float
    repeats: int


def measure(call: Callable[[], object], device: torch.device, *, repeats: int = 30, budget: float = 10.0) -> Timing:
    """Time `call` on `device`: `together` for one call."""
    return together({"": call}, device, repeats=repeats, budget=budget)[""]


def together(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 30, budget: float = 10.0
) -> dict[str, Timing]:
    """Time calls on `device` in turns, so that what else the machine does meets all of them.

    Warm-up of a call ends when two in a row differ by less than a tenth, after 5 at most or, from the second on, a
    third of `budget` seconds; compilation and autotuning, in the first, are over by then. Then `repeats` calls, or as
    many as fit `budget` seconds of its own, at least 3; a call that alone takes longer than `budget` even when warm is
    not repeated. CUDA work is timed by events on its stream.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    spent, least = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 3)
    for name, call in calls.items():
        before, warming = _once(call, device), 0.0
        for _ in range(4):
            now = _once(call, device)
            warming += now
            if abs(now - before) < 0.1 * now or warming > budget / 3:
                break
            before = now
        if now > budget:
            found[name].append(now)
            least[name] = 1
            spent[name] = now

    def due(name: str) -> bool:
        return len(found[name]) < repeats and (len(found[name]) < least[name] or spent[name] < budget)

    while waiting := [name for name in calls if due(name)]:
        for name in waiting:
            found[name].append(_once(calls[name], device))
            spent[name] += found[name][-1]
    return {name: _summary(seconds) for name, seconds in found.items()}


def _summary(seconds: list[float]) -> Timing:
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Timing(statistics.median(seconds), quartiles[0], quartiles[2], len(seconds))


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


GPU = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
CORES = Path("/proc/cpuinfo")
ZONES = Path("/sys/class/thermal")


def conditions(device: torch.device) -> dict[str, float]:
    """Clocks (MHz), temperature (C) and power (W), as far as the device tells; asked for right after a timing."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            query = ["nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader,nounits", "--id=0"]
            told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split(",")
            found = {name: float(value) for name, value in zip(GPU, told, strict=True) if value.strip()[:1].isdigit()}
        return found
    with suppress(OSError):
        clocks = [float(mhz) for mhz in re.findall(r"cpu MHz\s*:\s*([\d.]+)", CORES.read_text())]
        found |= {"clock": statistics.mean(clocks)} if clocks else {}
    with suppress(OSError, ValueError):
        degrees = [int(zone.read_text()) / 1000 for zone in ZONES.glob("thermal_zone*/temp")]
        found |= {"temperature": max(degrees)} if degrees else {}
    return found
