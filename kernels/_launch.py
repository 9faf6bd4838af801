"""Compile-time constants that several Triton kernels are launched with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def exact(x: Tensor) -> str:
    """The `input_precision` of tl.dot that keeps the digits of float32: three TF32 products each; before Ampere, which
    has no TF32, float32 arithmetic."""
    old = x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)
    return "ieee" if old else "tf32x3"


def alignment(*sizes: int) -> int:
    """The largest power of two up to 16 that divides every size.

    A kernel that receives a row length n as `n // alignment(n)` and multiplies by the constant loads vectors of that
    many numbers. Triton by itself knows of multiples of 16 only.
    """
    return math.gcd(16, *sizes)
