"""Peak memory of the work between two points, from CUDA's own counter or the high-water mark that the system keeps of
this process, and control over memory that the C library has freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2
"""Parameters of glibc's mallopt(3)."""


class Peak:
    """peak = Peak(device); ... work ...; peak.read() -> bytes above what was in use at the start, and how measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.method, self.start = "cuda max_memory_allocated", 0
            return
        give_back()
        try:
            CLEAR.write_text("5")  # resets the high-water mark of this process
            self.method, self.start = "process high-water mark above start", status("VmRSS")
        except OSError:
            self.method, self.start = "process lifetime maximum (no reset on this system)", 0

    def read(self) -> dict[str, int | str]:
        if self.device.type == "cuda":
            reserved = int(torch.cuda.max_memory_reserved(self.device))
            peak = int(torch.cuda.max_memory_allocated(self.device))
            return {"peak_bytes": peak, "reserved_bytes": reserved, "method": self.method}
        if self.start:
            peak = max(status("VmHWM") - self.start, 0)
        else:
            # getrusage(2): kilobytes on Linux and the BSDs, bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"peak_bytes": int(peak), "method": self.method}


def keep_freed() -> bool:
    """Make the C library keep freed memory for later allocations. Returns whether it does so (glibc only).

    By default it maps every block above 32 MiB anew and returns it when freed, so that each activation of that size
    costs a page fault per 4 KiB in every step: a third to half of the time of attention on a CPU.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(key, value) for key, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26)))
    return False


def give_back() -> None:
    """Return freed memory to the system, so that its counters show what is in use (glibc; elsewhere a no-op)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def status(key: str) -> int:
    """A size of this process in bytes: VmRSS, VmHWM, VmSize. Raises OSError on a system without it."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")
