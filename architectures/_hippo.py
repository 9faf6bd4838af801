"""HiPPO (arXiv:2008.07669), state matrices that keep Legendre coefficients of what they were fed: LegS of all of it
with the 1 / t of that paper; without, as every user here has it, older input fades; LegT of a window that slides."""

from __future__ import annotations

import torch
from torch import Tensor


def legs(state_size: int) -> tuple[Tensor, Tensor]:
    """A: (N, N) and B: (N,), float64. A_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it; B_n =
    sqrt(2n + 1)."""
    n = torch.arange(state_size, dtype=torch.float64)
    B = torch.sqrt(2 * n + 1)
    return -torch.outer(B, B).tril(-1) - torch.diag(n + 1), B


def legs_modes(state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The normal part of A, A + B B' / 2 = -1/2 + V diag(i frequency) V*: frequency (N,) ascending, in pairs of either
    sign; V (N, N), unitary, complex128; B (N,)."""
    A, B = legs(state_size)
    skew = A + torch.outer(B, B) / 2 + 0.5 * torch.eye(state_size, dtype=torch.float64)
    return *torch.linalg.eigh(-1j * skew), B


def legt(state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A: (N, N), B: (N,) and P: (2, N), which makes A + P' P skew, float64. A_nk = -sqrt((2n + 1)(2k + 1)) / 2 on and
    below the diagonal, times (-1)^(n - k) above it; B_n = sqrt(2n + 1) / 2."""
    n = torch.arange(state_size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    sign = 1 - 2 * (n % 2)
    A = -torch.outer(root, root) * torch.where(n.unsqueeze(1) < n, torch.outer(sign, sign), 1.0) / 2
    return A, root / 2, torch.stack([root * (n % 2), root * (1 - n % 2)]) * 0.5**0.5
