"""The output vector whose generating function ends at `length`: what S4 trains in the place of C."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels.ssm_kernel_dplr.reference import state_matrix


def transformed_output(A: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """C (I - Abar^length): arguments of `ssm_kernel_dplr` -> (channels, H, N) complex128. Differentiable."""
    A, P, C = (t.to(torch.complex128) for t in (A, P, C))
    backward, forward = state_matrix(A, P, dt.to(torch.float64))
    power = torch.linalg.matrix_power(torch.linalg.solve(backward, forward), length)
    rows = torch.cat([C.real, -C.imag], dim=-1).transpose(0, 1)
    left, right = (rows - rows @ power).transpose(0, 1).chunk(2, dim=-1)
    return torch.complex(left, -right)
