"""What this machine can do: the bandwidth of an element-wise sum and the rate of a matrix product, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lra.profiling.timing import Timing, together

# elements of the sum, width of the product
SIZES = {"cpu": (2**23, 1024), "cuda": (2**27, 4096)}
SUM, PRODUCT = "the machine's sum", "the machine's product"


@dataclass(frozen=True)
class Machine:
    """bandwidth in bytes/s of c = a + b in float32; rate in FLOP/s of a square matrix product in the dtype at hand. Of
    SIZES: more than any cache holds, and enough to fill the device."""

    bandwidth: float
    rate: float

    @classmethod
    def measured(cls, device: torch.device) -> Machine:
        return cls.among(together(cls.probes(device), device, budget=2.0), device)

    @staticmethod
    def probes(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], object]]:
        """What to time beside other calls for `among` to read."""
        elements, width = SIZES[device.type]
        a, b = (torch.rand(elements, device=device) for _ in range(2))
        m, n = (torch.rand(width, width, device=device, dtype=dtype) for _ in range(2))
        c, out = torch.empty_like(a), torch.empty_like(m)
        return {SUM: lambda: torch.add(a, b, out=c), PRODUCT: lambda: torch.mm(m, n, out=out)}

    @classmethod
    def among(cls, timings: Mapping[str, Timing], device: torch.device) -> Machine:
        """The machine as it was while these were timed."""
        elements, width = SIZES[device.type]
        return cls(3 * 4 * elements / timings[SUM].median, 2 * width**3 / timings[PRODUCT].median)
