"""The WKV operator of RWKV-4 (Peng et al. 2023): a softmax-like average with a decay and a bonus per channel."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.wkv.cpu import scan
from lra.kernels.wkv.reference import reference

__all__ = ["wkv"]

DETERMINISTIC = True
PORTABLE = False
HAS_GPU = True


@overload
def wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, *,
    h0: Tensor | None = ..., return_state: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def wkv(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, *,
    h0: Tensor | None = ..., return_state: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    h0: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """o_t = (sum_{i<t} e^{k_i - (t-1-i) e^w} v_i + e^{u + k_t} v_t) / (the same with v = 1), per channel.

    k, v: (B, L, D); w, u: (D,). Real; bfloat16 and float16 accumulate in float32. w is the logarithm of the decay rate,
    `time_decay` in the published code: a step multiplies by e^{-e^w}. The token before the current one is not decayed,
    and the bonus u takes the place of the decay for the current one.
    h0: (B, 3, D), numerator and denominator of the state divided by e^{top}, and the exponent top; top = -1e38 is the
    empty state.

    Returns o: (B, L, D) in the dtype of v; with `return_state` also the state after the last step: (B, 3, D), in the
    dtype of `h0`, or float32 (float64 for float64 inputs) without one.

    Deterministic. Work 18 B L D, with two exponentials per step and channel; memory is that of the output.
    Raises ValueError on a wrong rank, shape, dtype or mix of devices, and on length 0.
    """
    op = "wkv"
    device = check_tensors(op, k=k, v=v, w=w, u=u, h0=h0)
    check(k.dim() == 3 and 0 not in k.shape, op, "k", tuple(k.shape), "(B, L, D), nothing empty")
    batch, _, width = k.shape
    shapes = {"v": k.shape, "w": (width,), "u": (width,), "h0": (batch, 3, width)}
    for name, t in {"k": k, "v": v, "w": w, "u": u, "h0": h0}.items():
        if t is None:
            continue
        check(not t.is_complex(), op, name, t.dtype, "a real dtype")
        check(t.shape == shapes.get(name, k.shape), op, name, tuple(t.shape), str(tuple(shapes.get(name, k.shape))))
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=HAS_GPU)
    if chosen == "reference":
        return reference(k, v, w, u, h0=h0, return_state=return_state)
    dtype = torch.promote_types(k.dtype, v.dtype)
    o, state = scan(k.to(dtype), v.to(dtype), w, u, h0, chosen == "gpu")
    o = o.to(v.dtype)
    if not return_state:
        return o
    return o, state if h0 is None else state.to(h0.dtype)
