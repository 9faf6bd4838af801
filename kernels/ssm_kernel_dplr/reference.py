"""Definition of ssm_kernel_dplr: the dense discrete system, step by step, in real arithmetic.

A half-pair state x stands for [Re x, Im x]; then P^* x over all pairs is 2 Re(P^H x), and C x is 2 Re(C^T x).
"""

from __future__ import annotations

import torch
from torch import Tensor


def state_matrix(A: Tensor, P: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """I - dt/2 S and I + dt/2 S on [Re x, Im x]: (H, 2N, 2N)."""
    upper = torch.cat([A.real.diag_embed(), -A.imag.diag_embed()], dim=-1)
    lower = torch.cat([A.imag.diag_embed(), A.real.diag_embed()], dim=-1)
    low_rank = torch.cat([P.real, P.imag], dim=-1)
    S = torch.cat([upper, lower], dim=-2) - 2 * torch.einsum("rhi,rhj->hij", low_rank, low_rank)
    half = dt[:, None, None] / 2 * S
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return eye - half, eye + half


def reference(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, transformed: bool = False) -> Tensor:
    """K_l = C Abar^l Bbar: arguments of `ssm_kernel_dplr`."""
    backward, forward = state_matrix(A, P, dt)
    A_bar = torch.linalg.solve(backward, forward)
    state = dt[:, None] * torch.linalg.solve(backward, torch.cat([B.real, B.imag], dim=-1))
    output = 2 * torch.cat([C.real, -C.imag], dim=-1)
    if transformed:
        undo = torch.eye(A_bar.shape[-1], dtype=A_bar.dtype) - torch.linalg.matrix_power(A_bar, length)
        output = torch.linalg.solve(undo, output.transpose(0, 1), left=False).transpose(0, 1)
    kernel = []
    for _ in range(length):
        kernel.append((output * state).sum(-1))
        state = torch.einsum("hij,hj->hi", A_bar, state)
    return torch.stack(kernel, dim=-1).to(dt.dtype)
