"""The delta rule: a fast-weight memory that corrects the value stored under a key instead of adding to it."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.delta_rule.cpu import write
from lra.kernels.delta_rule.reference import reference

__all__ = ["delta_rule"]

DETERMINISTIC = True
PORTABLE = True
HAS_GPU = True
WIDEST = 256


@overload
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = ..., chunk: int = ..., *,
    scale: float | None = ...,
    h0: Tensor | None = ..., return_state: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = ..., chunk: int = ..., *,
    scale: float | None = ...,
    h0: Tensor | None = ..., return_state: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    chunk: int = 64,
    *,
    scale: float | None = None,
    h0: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """S' = exp(log_decay_t) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,   o_t = scale S_t^T q_t,
    S_0 = `h0` or zeros.

    DeltaNet (Yang et al. 2024) where log_decay is None, Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024) with it.

    q, k: (B, L, H, K); v: (B, L, H, V); beta, log_decay: (B, L, H), log_decay <= 0 (-inf forgets everything). Real;
    bfloat16 and float16 accumulate in float32.
    Keys are not normalised here: the recurrence is stable for beta |k|^2 <= 2, so normalise them first.
    scale: K^-0.5 where None, the convention of softmax attention and of flash-linear-attention.
    chunk: steps per chunk, rounded up to a power of two; changes speed and memory, not the result.

    Returns o: (B, L, H, V) in the dtype of v; with `return_state` also S_L: (B, H, K, V), in the dtype of
    `h0`, or float32 (float64 for float64 inputs) without one.

    Deterministic. Work about 4 B L H (chunk (K + V) + 3/2 K V), memory linear in L: nothing of size L K V is stored.
    Raises ValueError on a wrong rank, shape, dtype or mix of devices, on length 0, and on chunk < 1.
    """
    op = "delta_rule"
    given = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "h0": h0}
    device = check_tensors(op, **given)
    check(q.dim() == 4 and 0 not in q.shape, op, "q", tuple(q.shape), "(B, L, H, K), nothing empty")
    batch, length, heads, keys = q.shape
    check(k.shape == q.shape, op, "k", tuple(k.shape), f"{tuple(q.shape)}, as q")
    fits = v.dim() == 4 and v.shape[:3] == q.shape[:3] and v.shape[3] > 0
    check(fits, op, "v", tuple(v.shape), f"({batch}, {length}, {heads}, V), as q")
    shapes = {"beta": q.shape[:3], "log_decay": q.shape[:3], "h0": (batch, heads, keys, v.shape[3])}
    for name, shape in shapes.items():
        t = given[name]
        check(t is None or t.shape == shape, op, name, t is None or tuple(t.shape), str(tuple(shape)))
    for name, t in given.items():
        check(t is None or not t.is_complex(), op, name, t is None or t.dtype, "a real dtype")
    check(chunk >= 1, op, "chunk", chunk, "at least 1")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    # on a GPU one program holds a whole key, in registers for float32
    widest = WIDEST // 2 if dtype == torch.float32 else WIDEST
    has_gpu = HAS_GPU and dtype != torch.float64 and keys <= widest
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=has_gpu)
    scale = keys**-0.5 if scale is None else scale
    if chosen == "reference":
        return reference(q, k, v, beta, log_decay, scale=scale, h0=h0, return_state=return_state)
    accumulate = torch.promote_types(dtype, torch.float32)
    rate = beta.to(accumulate).unsqueeze(-1)
    decay = torch.zeros_like(rate) if log_decay is None else log_decay.to(accumulate).unsqueeze(-1)
    o, state = write(q.to(dtype), k.to(dtype), v.to(dtype), rate, decay, h0, chunk, scale, chosen == "gpu")
    o = o.to(v.dtype)
    if not return_state:
        return o
    return o, state if h0 is None else state.to(h0.dtype)
