"""Shared by state space models: initial step sizes, copies of their matrices, and sums over a range of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._precision import wide


def initial_log_dt(number: int, dt_min: float, dt_max: float) -> Tensor:
    """(number,), uniform between the logarithms of both. Raises ValueError unless 0 < dt_min <= dt_max."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min is {dt_min}, dt_max {dt_max}; 0 < dt_min <= dt_max")
    return math.log(dt_min) + torch.rand(number) * math.log(dt_max / dt_min)


def checked_copies(n_ssm: int | None, d_model: int) -> int:
    """Number of independent matrices that the channels share in turns; d_model for None. Raises ValueError."""
    copies = d_model if n_ssm is None else n_ssm
    if copies < 1 or d_model % copies:
        raise ValueError(f"n_ssm is {copies}; a divisor of d_model, {d_model}")
    return copies


def weighted_sum(x: Tensor, ratio: Tensor) -> Tensor:
    """sum_l ratio^l x_l over tokens l = 0 .. C - 1: x: (B, C, H) real, ratio: (H, M) complex128 -> (B, H, M) complex.

    With l = i K + j, the sums over j are matrix products with ratio^j, and those over i follow: powers are made for
    about 2 sqrt(C) places only, in complex128, and rounded to the precision of x, float32 at least.
    """
    batch, tokens, width = x.shape
    columns = 2 << (tokens.bit_length() // 2)
    rows = -(-tokens // columns)
    x = wide(x)
    inner, outer = powers(ratio, columns), powers(power(ratio, columns), rows).to(x.dtype.to_complex())
    places = F.pad(x.permute(2, 0, 1), (0, rows * columns - tokens)).view(width, batch * rows, columns)
    with torch.autocast(x.device.type, enabled=False):
        sums = torch.bmm(places, torch.view_as_real(inner).flatten(2).to(x.dtype))
    sums = torch.view_as_complex(sums.view(width, batch, rows, -1, 2))
    return (sums * outer.unsqueeze(1)).sum(2).transpose(0, 1)


def powers(x: Tensor, count: int) -> Tensor:
    """x^0 .. x^(count - 1): (H, M) -> (H, count, M)."""
    table, x = torch.ones_like(x).unsqueeze(1), x.unsqueeze(1)
    while table.shape[1] < count:
        table, x = torch.cat([table, table * x], dim=1), x * x
    return table[:, :count]


def power(x: Tensor, exponent: int) -> Tensor:
    """x^exponent by repeated squaring, which takes a tenth of the time of torch.pow on complex numbers."""
    result = torch.ones_like(x)
    while exponent:
        result, x, exponent = (result * x if exponent & 1 else result), x * x, exponent >> 1
    return result
