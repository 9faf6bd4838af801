"""Mamba's selective scan: a diagonal state-space recurrence whose step, input and output maps change with time."""

from __future__ import annotations

from functools import reduce
from typing import Literal, overload

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.selective_scan.cpu import scan
from lra.kernels.selective_scan.reference import reference

__all__ = ["selective_scan"]

DETERMINISTIC = True
PORTABLE = False
HAS_GPU = True


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    *, h0: Tensor | None = ..., return_state: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = ..., z: Tensor | None = ...,
    *, h0: Tensor | None = ..., return_state: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    h0: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = (<C_t, h_t> + D u_t) silu(z_t).

    u, delta, z: (batch, L, D); B, C: (batch, L, N), shared by all channels; A: (D, N), already negative; D: (D,);
    h0: (batch, D, N), zeros where None. delta is the step itself: bias and softplus are the caller's.
    u, delta, B, C and z promote to one dtype, which is y's; A, D, h0 and all accumulation are in float32 (float64 where
    that dtype is).
    Returns y: (batch, L, D), and with `return_state` also the state after the last step: (batch, D, N).

    Deterministic. Work 7 batch L D N, and 19 backward. The states are not stored: backward recomputes them, chunk by
    chunk, from one saved state per chunk.
    Raises ValueError on a wrong rank, shape, dtype or mix of devices, and on length 0.
    """
    op = "selective_scan"
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "h0": h0}
    device = check_tensors(op, **tensors)
    check(u.dim() == 3 and u.shape[1] > 0, op, "u", tuple(u.shape), "(batch, L, D) with L > 0")
    batch, length, width = u.shape
    check(A.dim() == 2 and A.shape[0] == width and A.shape[1] > 0, op, "A", tuple(A.shape), "(D, N) with N > 0")
    size = A.shape[1]
    stream, shared = (batch, length, width), (batch, length, size)
    wanted = {"delta": stream, "z": stream, "B": shared, "C": shared, "D": (width,), "h0": (batch, width, size)}
    for name, t in tensors.items():
        if t is not None:
            check(not t.is_complex(), op, name, t.dtype, "a real dtype")
            check(name not in wanted or t.shape == wanted[name], op, name, tuple(t.shape), str(wanted.get(name)))
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU)
    dtype = reduce(torch.promote_types, [t.dtype for t in (u, delta, B, C, z) if t is not None])
    wide = torch.promote_types(dtype, torch.float32)
    u, delta, B, C = (t.to(dtype) for t in (u, delta, B, C))
    A, z = A.to(wide), None if z is None else z.to(dtype)
    D, h0 = (None if t is None else t.to(wide) for t in (D, h0))
    if chosen == "reference":
        return reference(u, delta, A, B, C, D, z, h0=h0, return_state=return_state)
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    y, state, _ = scan(u, delta, A, B, C, D, z, h0, differentiated, chosen == "gpu")
    return (y, state.mT) if return_state else y
