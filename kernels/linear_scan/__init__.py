"""First-order linear recurrence over time, h_t = a_t * h_{t-1} + b_t, the core of gated and diagonal linear RNNs."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.linear_scan.cpu import scan
from lra.kernels.linear_scan.reference import reference

__all__ = ["linear_scan"]

DETERMINISTIC = True
PORTABLE = False
HAS_GPU = True


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False, impl: str = "auto") -> Tensor:
    """h_t = a_t * h_{t-1} + b_t, elementwise, for t = 1..L, with h_0 = `h0` (zeros where None).

    a: (B or 1, L or 1, D): the recurrent factor; a dimension of 1 is shared, and is never expanded in memory.
    b: (B, L, D); h0: (B, D). Real or complex, mixed dtypes promote; bfloat16 and float16 accumulate in float32.
    reverse: runs from the last step to the first, h_t = a_t * h_{t+1} + b_t with h_{L+1} = `h0`.
    Returns h: (B, L, D); the state after the last step is h[:, -1] (h[:, 0] in reverse).

    Deterministic. Work 2 B L D (8 B L D complex), time bound by memory: reads a and b, writes h once.
    Raises ValueError on a wrong rank, shape, dtype or mix of devices, and on length 0.
    """
    device = check_tensors("linear_scan", a=a, b=b, h0=h0)
    check(b.dim() == 3 and b.shape[1] > 0, "linear_scan", "b", tuple(b.shape), "(B, L, D) with L > 0")
    batch, length, width = b.shape
    fits = a.dim() == 3 and a.shape[0] in (1, batch) and a.shape[1] in (1, length) and a.shape[2] == width
    check(fits, "linear_scan", "a", tuple(a.shape), "(B or 1, L or 1, D) for the (B, L, D) of b")
    check(h0 is None or h0.shape == (batch, width), "linear_scan", "h0", h0 is None or tuple(h0.shape), "(B, D)")
    chosen = choose("linear_scan", impl, device, portable=PORTABLE, has_gpu=HAS_GPU)
    dtype = torch.promote_types(a.dtype, b.dtype)
    if h0 is not None:
        dtype = torch.promote_types(dtype, h0.dtype)
        h0 = h0.to(dtype)
    if chosen == "reference":
        return reference(a.to(dtype), b.to(dtype), h0, reverse=reverse)
    return scan(a.to(dtype), b.to(dtype), h0, reverse, chosen == "gpu")
