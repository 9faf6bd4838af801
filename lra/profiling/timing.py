"""One way to time things: warm up until stable, then the median and interquartile range of many repeats."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from lra.results.profile import Timing


def measure(call: Callable[[], object], device: torch.device, *, repeats: int = 30, budget: float = 10.0) -> Timing:
    """Time `call` on `device`: `together` for one call."""
    return together({"": call}, device, repeats=repeats, budget=budget)[""]


def together(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int = 30, budget: float = 10.0
) -> dict[str, Timing]:
    """Time calls on `device` in turns, so that what else the machine does meets all of them.

    Every call runs once untimed before any is timed, so that nothing is compiled, loaded or tuned inside a timing. Then
    each warms up until two in a row differ by less than a tenth, after 4 at most or a third of `budget` seconds. Then
    `repeats` calls, or as many as fit `budget` seconds of its own, at least 3; a call that alone takes longer than
    `budget` even when warm is not repeated. CUDA work is timed by events on its stream.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    spent, least = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 3)
    for call in calls.values():
        time_once(call, device)
    for name, call in calls.items():
        now = time_once(call, device)
        if now > budget:
            seconds[name].append(now)
            least[name] = 1
            spent[name] = now
            continue
        warming = now
        for _ in range(3):
            before, now = now, time_once(call, device)
            warming += now
            if abs(now - before) < 0.1 * now or warming > budget / 3:
                break

    def due(name: str) -> bool:
        return len(seconds[name]) < repeats and (len(seconds[name]) < least[name] or spent[name] < budget)

    while waiting := [name for name in calls if due(name)]:
        for name in waiting:
            seconds[name].append(time_once(calls[name], device))
            spent[name] += seconds[name][-1]
    return {name: _summary(taken) for name, taken in seconds.items()}


def _summary(seconds: list[float]) -> Timing:
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return Timing(statistics.median(seconds), quartiles[0], quartiles[2], len(seconds))


def time_once(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes on `device`."""
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
    """Clocks (MHz), temperature (C) and power (W), as far as the device reports them; read right after a timing."""
    readings: dict[str, float] = {}
    if device.type == "cuda":
        with suppress(OSError, subprocess.SubprocessError, ValueError):
            query = ["nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader,nounits", "--id=0"]
            text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split(",")
            readings = {
                name: float(value) for name, value in zip(GPU, text, strict=True) if value.strip()[:1].isdigit()
            }
        return readings
    with suppress(OSError):
        clocks = [float(mhz) for mhz in re.findall(r"cpu MHz\s*:\s*([\d.]+)", CORES.read_text())]
        readings |= {"clock": statistics.mean(clocks)} if clocks else {}
    with suppress(OSError, ValueError):
        degrees = [int(zone.read_text()) / 1000 for zone in ZONES.glob("thermal_zone*/temp")]
        readings |= {"temperature": max(degrees)} if degrees else {}
    return readings
