"""The definition of `ssd`: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk: int = 64,
    *,
    h0: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t; `chunk` has no influence."""
    batch, _, heads, width = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    h = x.new_zeros(batch, heads, width, B.shape[-1]) if h0 is None else h0
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(t.unbind(1) for t in (x, dt[..., None, None], B, C)), strict=True):
        h = torch.exp(dt_t * A[:, None, None]) * h + dt_t * x_t.unsqueeze(-1) * B_t.unsqueeze(-2)
        outputs.append((h * C_t.unsqueeze(-2)).sum(-1))
    y = torch.stack(outputs, dim=1)
    return (y, h) if return_state else y
