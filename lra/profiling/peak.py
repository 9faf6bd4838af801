"""Measured limits of this machine: bandwidth of an element-wise sum and rate of matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from lra.profiling.timing import Timing, time_once

# elements of the sum, width of the product
SIZES = {"cpu": (2**23, 1024), "cuda": (2**27, 4096)}
SUM, PRODUCT = "the machine's sum", "the machine's product"


@dataclass(frozen=True)
class Machine:
    """bandwidth in bytes/s of c = a + b in float32; rate in FLOP/s of a square matrix product in the dtype at hand. Of
    SIZES: more than any cache holds, and enough to fill the device."""

    bandwidth: float
    rate: float

    @staticmethod
    def probes(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], object]]:
        """The calls to time beside others, from which `among` computes the limits."""
        elements, width = SIZES[device.type]
        a, b = (torch.rand(elements, device=device) for _ in range(2))
        m, n = (torch.rand(width, width, device=device, dtype=dtype) for _ in range(2))
        c, out = torch.empty_like(a), torch.empty_like(m)
        return {SUM: lambda: torch.add(a, b, out=c), PRODUCT: lambda: torch.mm(m, n, out=out)}

    @classmethod
    def among(cls, timings: Mapping[str, Timing], device: torch.device) -> Machine:
        """The limits of the machine, from timings of `probes`."""
        elements, width = SIZES[device.type]
        return cls(3 * 4 * elements / timings[SUM].median, 2 * width**3 / timings[PRODUCT].median)


def peak_rate(
    shapes: Iterable[tuple[int, int, int]], device: torch.device, dtype: torch.dtype, *, budget: float = 0.2
) -> float:
    """FLOP/s of the fastest of many matrix products, the ceiling a utilisation is measured against.

    shapes: (m, k, n) of products (m, k) @ (k, n) in the model at hand; a large square product is tried beside them.
    budget: seconds for each shape.
    """
    width = SIZES[device.type][1]
    best = 0.0
    for m, k, n in {*shapes, (width, width, width)}:
        a, b = torch.rand(m, k, device=device).to(dtype), torch.rand(k, n, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        product()
        end = time.monotonic() + budget
        seconds = [time_once(product, device) for _ in range(3)]
        while time.monotonic() < end:
            seconds.append(time_once(product, device))
        best = max(best, 2 * m * k * n / min(seconds))
    return best
