"""Definition of fft_conv: one shifted product per tap."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(u: Tensor, k: Tensor, D: Tensor | None = None, bidirectional: bool = False) -> Tensor:
    """y_t = sum_{j >= 0} k0_j u_{t-j} + sum_{j >= 1} k1_{j-1} u_{t+j} + D u_t: arguments of `fft_conv`."""
    length = u.shape[1]
    behind = k[0] if bidirectional else k
    y = torch.zeros_like(u) if D is None else D * u
    for j in range(min(behind.shape[-1], length)):
        y = y + torch.nn.functional.pad(behind[:, j] * u[:, : length - j], (0, 0, j, 0))
    if bidirectional:
        for j in range(1, min(k.shape[-1], length - 1) + 1):
            y = y + torch.nn.functional.pad(k[1, :, j - 1] * u[:, j:], (0, 0, 0, j))
    return y.to(u.dtype)
