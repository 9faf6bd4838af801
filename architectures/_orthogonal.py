"""Recurrent matrices that turn a state without growing it, and the nonlinearity that goes with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def skew(A: Tensor) -> Tensor:
    """The skew-symmetric matrix with the strict upper triangle of A; the rest of A has no effect: (H, H)."""
    upper = A.triu(1)
    return upper - upper.mT


def cayley(A: Tensor) -> Tensor:
    """(I + A)^-1 (I - A), orthogonal for a skew-symmetric A and never with an eigenvalue of -1: (H, H)."""
    identity = torch.eye(len(A), dtype=A.dtype, device=A.device)
    return torch.linalg.solve(identity + A, identity - A)


def modrelu(x: Tensor, b: Tensor) -> Tensor:
    """sign(x) relu(|x| + b): (..., H) with b: (H,). arXiv:1511.06464."""
    return torch.sign(x) * torch.relu(x.abs() + b)


@torch.no_grad()
def rotations(width: int, kind: str) -> Tensor:
    """A (width, width) whose `skew` turns pairs of features by random angles, as arXiv:1901.08428 starts: "henaff" for
    the exponential, angles uniform in [-pi, pi]; "cayley" for the Cayley map, angles uniform in [0, pi / 2]."""
    A = torch.zeros(width, width)
    if kind == "henaff":
        entries = torch.empty(width // 2).uniform_(-math.pi, math.pi)
    else:
        angles = torch.empty(width // 2).uniform_(0, math.pi / 2)
        entries = -torch.tan(angles / 2)
    pairs = torch.arange(width // 2) * 2
    A[pairs, pairs + 1] = entries
    return A
