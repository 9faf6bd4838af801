"""State space duality (Dao and Gu 2024, arXiv:2405.21060): the scan of Mamba-2, a scalar decay per head."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.decay_attention.cpu import attend
from lra.kernels.ssd.reference import reference

__all__ = ["ssd"]

DETERMINISTIC = True
PORTABLE = True
HAS_GPU = True


@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = ..., *,
    h0: Tensor | None = ..., return_state: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = ..., *,
    h0: Tensor | None = ..., return_state: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk: int = 64,
    *,
    h0: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,   y_t = h_t C_t,   h_0 = `h0` or zeros.

    x: (B, L, H, P); dt: (B, L, H), positive step sizes (softplus already taken); A: (H,), negative; B, C: (B, L, G, N),
    each of the G groups shared by H / G heads. Real; bfloat16 and float16 accumulate in float32. Without the skip
    D x and the gate of the Mamba-2 block.
    chunk: steps per chunk, rounded up to a power of two; changes speed and memory, not the result.

    Returns y: (B, L, H, P) in the dtype of x; with `return_state` also h_L: (B, H, P, N), in the dtype of
    `h0`, or float32 (float64 for float64 inputs) without one.

    It is decayed attention with C as query, B as key, dt x as value and log decay dt A, and runs on the operator of
    `decay_attention` (CPU and Triton).

    Deterministic. Work about 4 B L H (chunk (N + P) / 2 + N P), memory linear in L: nothing of size L N P is stored.
    Raises ValueError on a wrong rank, shape, dtype or mix of devices, on length 0, and on chunk < 1.
    """
    op = "ssd"
    device = check_tensors(op, x=x, dt=dt, A=A, B=B, C=C, h0=h0)
    check(x.dim() == 4 and 0 not in x.shape, op, "x", tuple(x.shape), "(B, L, H, P), nothing empty")
    batch, length, heads, width = x.shape
    check(dt.shape == x.shape[:3], op, "dt", tuple(dt.shape), f"{(batch, length, heads)}, as x")
    check(A.shape == (heads,), op, "A", tuple(A.shape), f"({heads},), one per head of x")
    fits = B.dim() == 4 and B.shape[:2] == x.shape[:2] and 0 not in B.shape and heads % B.shape[2] == 0
    check(fits, op, "B", tuple(B.shape), f"({batch}, {length}, G, N) with G dividing {heads}")
    check(C.shape == B.shape, op, "C", tuple(C.shape), f"{tuple(B.shape)}, as B")
    if h0 is not None:
        shape = batch, heads, width, B.shape[3]
        check(h0.shape == shape, op, "h0", tuple(h0.shape), str(shape))
    for name, t in {"x": x, "dt": dt, "A": A, "B": B, "C": C, "h0": h0}.items():
        check(t is None or not t.is_complex(), op, name, t is None or t.dtype, "a real dtype")
    check(chunk >= 1, op, "chunk", chunk, "at least 1")
    dtype = torch.promote_types(torch.promote_types(B.dtype, C.dtype), x.dtype)
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU and dtype != torch.float64)
    if chosen == "reference":
        return reference(x, dt, A, B, C, h0=h0, return_state=return_state)
    accumulate = torch.promote_types(dtype, torch.float32)
    log_decay = dt.to(accumulate) * A.to(accumulate)
    value = (x * dt.unsqueeze(-1)).to(dtype)
    state = None if h0 is None else h0.mT
    y, last = attend(C.to(dtype), B.to(dtype), value, log_decay.unsqueeze(-1), state, chunk, 1.0, chosen == "gpu")
    y = y.to(x.dtype)
    if not return_state:
        return y
    return y, last.mT if h0 is None else last.mT.to(h0.dtype)
