"""Zoneout (arXiv:1606.01305): features of a state that keep their old value for a token, by chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kept(x: Tensor, width: int, rates: Sequence[float], training: bool) -> Tensor:
    """For each rate the share of the old value that every token of x (B, L, ...) keeps, (rates, B, L, width): 1 or 0 by
    chance in training, the rate itself in evaluation. What is not kept is not rescaled."""
    rate = torch.tensor(rates, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)
    if not training:
        return rate.expand(-1, *x.shape[:2], width)
    return (torch.rand(len(rates), *x.shape[:2], width, dtype=x.dtype, device=x.device) < rate).to(x.dtype)


def checked(**rates: float) -> None:
    """A rate outside [0, 1) is a ValueError that names it."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} is {rate}; a probability in [0, 1)")
