"""Precision: of the numbers that a long recurrence multiplies, and of modules in bfloat16 or float16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: a decay near 1 rounded to bfloat16's 8 bits forgets within some 250 steps, or never."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mixed(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast to the dtype of x where that is bfloat16 or float16: a module converted by `.to(torch.bfloat16)` then
    computes as one under autocast, with products in bfloat16 and long sums in float32."""
    kind = x.device.type
    if x.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, x.dtype)
