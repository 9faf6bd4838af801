"""What state-space models share: the first step sizes, and copies of their matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
