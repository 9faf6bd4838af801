"""Segments of a sequence, for recurrences on a GPU whose batch and width alone leave processors idle.

Every segment is walked from a zero state, for what it leaves behind and its total decay. A scan over the segments makes
of these the state each one starts from, and from there each is walked as a sequence of its own, all at once.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST = 512  # steps of a segment: in fewer, three launches cost more than is gained


def segments(programs: int, processors: int, length: int) -> int:
    """Into how many segments `length` steps are cut: one where `programs`, those of a whole sequence, are twice the
    processors or more; else as many as make them so, but none shorter than SHORTEST."""
    if programs >= 2 * processors:
        return 1
    return max(1, min(-(-2 * processors // programs), length // SHORTEST))


@cache
def processors(device: torch.device) -> int:
    """Those of a GPU; none of a CPU, where Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def cut(programs: int, length: int, tile: int, device: torch.device) -> tuple[int, int]:
    """How many segments, none empty, and the steps of each, a multiple of `tile`; the last one may end earlier."""
    count = segments(programs, processors(device), length)
    steps = -(-length // (count * tile)) * tile
    return -(-length // steps), steps


def totals(x: Tensor, count: int, steps: int) -> Tensor:
    """Sums over each of `count` segments of `steps` steps: (B, L, ...) to (B, count, ...), in double precision."""
    missing = count * steps - x.shape[1]
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (count, steps)).sum(2, dtype=torch.float64)
