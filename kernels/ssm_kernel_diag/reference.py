"""Definition of ssm_kernel_diag: the impulse response, step by step."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(A: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str = "zoh") -> Tensor:
    """K_l = 2 Re sum_n C_n Bbar_n Abar_n^l: arguments of `ssm_kernel_diag`."""
    z = dt.unsqueeze(-1) * A
    if discretization == "bilinear":
        A_bar, B_bar = (1 + z / 2) / (1 - z / 2), dt.unsqueeze(-1) / (1 - z / 2)
    elif discretization == "zoh":
        A_bar, B_bar = torch.exp(z), torch.expm1(z) / A
    else:
        A_bar, B_bar = torch.exp(z), torch.ones_like(A)
    state, kernel = B_bar, []
    for _ in range(length):
        kernel.append(2 * (C * state).sum(-1).real)
        state = A_bar * state
    return torch.stack(kernel, dim=-1).to(dt.dtype)
