"""Linear attention with decay: the core of RetNet, Mamba-2, GLA, HGRN2 and other matrix-state recurrences."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lra.kernels._dispatch import check, check_tensors, choose
from lra.kernels.decay_attention.cpu import attend
from lra.kernels.decay_attention.reference import reference

__all__ = ["decay_attention"]

DETERMINISTIC = True
PORTABLE = True
HAS_GPU = True
WIDEST = 128


@overload
def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = ..., *, scale: float | None = ...,
    h0: Tensor | None = ..., return_state: Literal[False] = ..., impl: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int = ..., *, scale: float | None = ...,
    h0: Tensor | None = ..., return_state: Literal[True], impl: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    chunk: int = 64,
    *,
    scale: float | None = None,
    h0: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t,   S_0 = `h0` or zeros.

    q, k: (B, L, H, K); v: (B, L, H, V); real, bfloat16 and float16 accumulate in float32.
    log_decay: <= 0 (-inf forgets everything), one of
        (H,)          constant per head: retention (Sun et al. 2023);
        (B, L, H)     per step and head: the Mamba-2 form;
        (B, L, H, K)  per step and channel of the key: gated linear attention (Yang et al. 2023), HGRN2.
    scale: K^-0.5 where None, the convention of softmax attention and of flash-linear-attention.
    chunk: steps per chunk, rounded up to a power of two; changes speed and memory, not the result.
    The current step counts undecayed: o_t reads k_t v_t^T itself.

    Returns o: (B, L, H, V) in the dtype of v; with `return_state` also S_L: (B, H, K, V), in the dtype of
    `h0`, or float32 (float64 for float64 inputs) without one.

    Deterministic. Work about 4 B L H (chunk (K + V) / 2 + K V), memory linear in L: nothing of size L K V is stored.
    Raises ValueError on a wrong rank, shape, dtype or mix of devices, on length 0, and on chunk < 1.
    """
    op = "decay_attention"
    device = check_tensors(op, q=q, k=k, v=v, log_decay=log_decay, h0=h0)
    check(q.dim() == 4 and 0 not in q.shape, op, "q", tuple(q.shape), "(B, L, H, K), nothing empty")
    batch, length, heads, keys = q.shape
    check(k.shape == q.shape, op, "k", tuple(k.shape), f"{tuple(q.shape)}, as q")
    fits = v.dim() == 4 and v.shape[:3] == q.shape[:3] and v.shape[3] > 0
    check(fits, op, "v", tuple(v.shape), f"({batch}, {length}, {heads}, V), as q")
    shapes = (heads,), (batch, length, heads), (batch, length, heads, keys)
    fits = log_decay.dim() in (1, 3, 4) and log_decay.shape == shapes[max(log_decay.dim() - 2, 0)]
    check(fits, op, "log_decay", tuple(log_decay.shape), " or ".join(map(str, shapes)))
    state_shape = batch, heads, keys, v.shape[3]
    if h0 is not None:
        check(h0.shape == state_shape, op, "h0", tuple(h0.shape), str(state_shape))
    for name, t in {"q": q, "k": k, "v": v, "log_decay": log_decay, "h0": h0}.items():
        check(t is None or not t.is_complex(), op, name, t is None or t.dtype, "a real dtype")
    check(chunk >= 1, op, "chunk", chunk, "at least 1")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    # on a GPU one program holds a whole key in registers where decays are per channel
    widest = WIDEST // 2 if dtype == torch.float32 else WIDEST
    has_gpu = HAS_GPU and dtype != torch.float64 and (log_decay.dim() < 4 or keys <= widest)
    chosen = choose(op, impl, device, portable=PORTABLE, has_gpu=has_gpu)
    if chosen == "reference":
        return reference(q, k, v, log_decay, scale=scale, h0=h0, return_state=return_state)
    # in float32 before it is spread over steps, so that its gradient is summed in float32
    decay = log_decay.to(torch.promote_types(dtype, torch.float32))
    if decay.dim() == 1:
        decay = decay.expand(batch, length, heads)
    if decay.dim() == 3:
        decay = decay.unsqueeze(-1)
    scale = keys**-0.5 if scale is None else scale
    o, state = attend(q.to(dtype), k.to(dtype), v.to(dtype), decay, h0, chunk, scale, chosen == "gpu")
    o = o.to(v.dtype)
    if not return_state:
        return o
    return o, state if h0 is None else state.to(h0.dtype)
