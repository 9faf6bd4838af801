"""Segments of a sequence, for recurrences on a GPU if batch and width are too small to use all its processors.

Every segment is first run from a zero state, which gives its last state and its total decay. A scan over the segments
computes from these the initial state of each segment. Then all segments run at once, as independent sequences.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST = 512  # steps of a segment: in fewer, three launches cost more than is gained


def segments(programs: int, processors: int, length: int) -> int:
    """Number of segments for `length` steps. programs: number of programs without segments. It is 1 if these are twice
    the processors or more, and else large enough to reach that, with segments of at least SHORTEST steps."""
    if programs >= 2 * processors:
        return 1
    return max(1, min(-(-2 * processors // programs), length // SHORTEST))


@cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 0 for a CPU, where Triton's interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def cut(programs: int, length: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Number of segments, none of them empty, and steps of each, a multiple of `tile`; the last one may be shorter."""
    count = segments(programs, processors(device), length)
    steps = -(-length // (count * tile)) * tile
    return -(-length // steps), steps


def totals(x: Tensor, count: int, steps: int) -> Tensor:
    """Sums over each of `count` segments of `steps` steps: (B, L, ...) to (B, count, ...), in double precision."""
    missing = count * steps - x.shape[1]
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (count, steps)).sum(2, dtype=torch.float64)
