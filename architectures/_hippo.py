"""HiPPO-LegS (arXiv:2008.07669), the state matrix that keeps Legendre coefficients of what it was fed: of
all of it with the 1 / t of that paper; without, as every user here has it, older input fades."""

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
