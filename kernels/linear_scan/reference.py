"""The definition of `linear_scan`: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """a: (B or 1, L or 1, D); b: (B, L, D); h0: (B, D) -> h: (B, L, D), h_t = a_t h_{t-1} + b_t."""
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    states = []
    # unbind, not indexing: the gradient of one index is as large as the whole tensor
    steps = list(zip(a.expand_as(b).unbind(1), b.unbind(1), strict=True))
    for a_t, b_t in reversed(steps) if reverse else steps:
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, dim=1)
