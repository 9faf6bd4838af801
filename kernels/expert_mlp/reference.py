"""The definition of `expert_mlp`: every expert processes every token, and the gates select."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(p: Tensor) -> Tensor:
    """(..., 2 F) -> (..., F)."""
    gate, up = p.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swiglu": swiglu}


def reference(
    x: Tensor, expert_index: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, *, activation: str = "gelu"
) -> Tensor:
    """y = sum_e weight_e * act(x w1_e) w2_e, where weight_e (T,) sums the gates of the choices that fell on e."""
    y = x.new_zeros(len(x), w2.shape[2])
    for e in range(len(w1)):
        weight = torch.where(expert_index == e, gate, 0).sum(dim=1, keepdim=True)
        y = y + weight * (ACTIVATIONS[activation](x @ w1[e]) @ w2[e])
    return y
