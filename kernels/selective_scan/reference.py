"""The definition of `selective_scan`: a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    h0: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """u, delta, z: (batch, L, D); A: (D, N); B, C: (batch, L, N); D: (D,); h0: (batch, D, N) -> y: (batch, L, D)."""
    h = A.new_zeros(u.shape[0], *A.shape) if h0 is None else h0
    outputs = []
    # unbind, not indexing: the gradient of one index is as large as the whole tensor
    for u_t, delta_t, B_t, C_t in zip(*(t.unbind(1) for t in (u, delta, B, C)), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
        outputs.append((h * C_t[:, None]).sum(-1))
    y = torch.stack(outputs, dim=1)
    y = y if D is None else y + D * u
    y = y if z is None else y * F.silu(z)
    y = y.to(u.dtype)
    return (y, h) if return_state else y
