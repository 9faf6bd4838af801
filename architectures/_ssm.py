"""What state-space models share: the first step sizes, copies of their matrices, and sums over a stretch of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 64


def initial_log_dt(number: int, dt_min: float, dt_max: float) -> Tensor:
    """(number,), uniform between the logarithms of both. Raises ValueError unless 0 < dt_min <= dt_max."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min is {dt_min}, dt_max {dt_max}; 0 < dt_min <= dt_max")
    return math.log(dt_min) + torch.rand(number) * math.log(dt_max / dt_min)


def checked_copies(n_ssm: int | None, d_model: int) -> int:
    """How many independent matrices the channels share in turns, d_model for None. Raises ValueError."""
    copies = d_model if n_ssm is None else n_ssm
    if copies < 1 or d_model % copies:
        raise ValueError(f"n_ssm is {copies}; a divisor of d_model, {d_model}")
    return copies


def weighted_sum(x: Tensor, exponent: Callable[[Tensor], Tensor]) -> Tensor:
    """sum_l exp(exponent(l)) x_l over tokens l = 0 .. C - 1, x: (B, C, H) -> (B, H, M) complex128.

    exponent: places (n,) -> (H, M, n) complex128. Done in blocks of tokens, because there are M times as many
    exponentials as inputs of a sequence.
    """
    blocks = []
    for start in range(0, x.shape[1], BLOCK):
        part = x[:, start : start + BLOCK].to(torch.complex128)
        places = torch.arange(start, start + part.shape[1], device=x.device)
        blocks.append(torch.einsum("hml,blh->bhm", exponent(places).exp(), part))
    return torch.stack(blocks).sum(0)
