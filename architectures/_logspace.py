"""Numbers as logarithm of the absolute value and sign, for states smaller than a float holds."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = -1e4
"""The logarithm that stands for zero."""
Signed = tuple[Tensor, Tensor]


def to_log(x: Tensor) -> Signed:
    """log |x| and sign of x; what is smaller than a normal number of its dtype counts as the smallest one."""
    return x.abs().clamp_min(torch.finfo(x.dtype).tiny).log(), torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def to_linear(x: Signed) -> Tensor:
    return x[1] * torch.exp(x[0])


def add(a: Signed, b: Signed) -> Signed:
    """Logarithm and sign of the sum; terms that cancel to the last digit leave the rounding error of the larger."""
    larger, smaller = torch.maximum(a[0], b[0]), torch.minimum(a[0], b[0])
    ratio = torch.exp(smaller - larger) * a[1] * b[1]  # of the terms, from -1 to 1
    total = torch.log1p(ratio.clamp_min(torch.finfo(ratio.dtype).eps - 1))
    return larger + total, torch.where(a[0] >= b[0], a[1], b[1])
