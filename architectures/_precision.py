"""Precision: of the numbers that a long recurrence multiplies, and of modules in bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: a decay near 1 rounded to bfloat16's 8 bits forgets within some 250 steps, or never."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def own_precision(x: Tensor, compute: Callable[[], Any]) -> Any:
    """What `compute`, which reads x, returns: a tensor, or several.

    If x is bfloat16 or float16 outside autocast, as in a module converted by `.to(torch.bfloat16)`, it runs under
    autocast, with products in that dtype and long sums in float32, and its results are cast to the dtype of x.
    """
    kind = x.device.type
    if x.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(kind):
        return compute()
    with torch.autocast(kind, x.dtype):
        return tree_map_only(Tensor, lambda t: t.to(x.dtype), compute())
