"""`decay_attention` as a PyTorch operator, with the chunked path: matrix products inside chunks, a scan across them.

With P_i the decay from the start of the chunk through step i, and E_j the decay after step j to its end,

    o_i = S^T (P_i q_i) + sum_{j <= i} (q_i . k_j, decayed from j to i) v_j,      S' = P_last S + sum_j (E_j k_j) v_j^T.

Backward finds the states again and walks back with the gradient of the state; it keeps one state per piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels.decay_attention.chunks import accumulator, carry, chunk_size, cut, paste, per_group, per_head, pieces
from lra.kernels.decay_attention.decays import decays


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = v.shape
    o, size = torch.empty_like(v, memory_format=torch.contiguous_format), chunk_size(chunk, length)
    for piece in pieces(batch * heads, length, size, max(width, k.shape[-1])):
        q_, k_, v_, g = (cut(x, piece, size, state.dtype) for x in (q, k, v, log_decay))
        q_, k_, decay = per_head(q_, heads) * scale, per_head(k_, heads), decays(g)
        found, state = carry((k_ * decay.until).mT @ v_, decay.since[..., -1:, :].mT, state)
        paste(decay.attend(q_, k_, v_).add_((q_ * decay.since) @ found), piece, o)
    return o, state


def _backward(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int,
    scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, length, heads, width = v.shape
    size = chunk_size(chunk, length)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, log_decay)]
    starts = []
    plan = pieces(batch * heads, length, size, max(width, k.shape[-1]))
    for piece in plan:
        starts.append(state)
        k_, v_, g = (cut(x, piece, size, state.dtype) for x in (k, v, log_decay))
        decay = decays(g)
        state = carry((per_head(k_, heads) * decay.until).mT @ v_, decay.since[..., -1:, :].mT, state)[1]
    for piece, state in zip(reversed(plan), reversed(starts), strict=True):
        o_, q_, k_, v_, g = (cut(x, piece, size, state.dtype) for x in (grad, q, k, v, log_decay))
        q_, k_, decay = per_head(q_, heads) * scale, per_head(k_, heads), decays(g)
        through = decay.since[..., -1:, :]
        found, _ = carry((k_ * decay.until).mT @ v_, through.mT, state)
        left, grad_state = carry((q_ * decay.since).mT @ o_, through.mT, grad_state, reverse=True)
        from_state, to_state = (o_ @ found.mT).mul_(decay.since), (v_ @ left.mT).mul_(decay.until)
        rows, columns = from_state * q_, to_state * k_
        # what passes the whole chunk, at the last step of `since`
        rows[..., -1:, :] += (found * left).sum(-1).unsqueeze(-2) * through
        grad_q, grad_k, grad_v, grad_g = decay.backward(o_, q_, k_, v_, rows, columns)
        grad_v += (k_ * decay.until) @ left
        found_grads = (grad_q + from_state) * scale, grad_k + to_state, grad_v, grad_g
        for x, target in zip(found_grads, grads, strict=True):
            paste(per_group(x, target.shape[2]), piece, target)
    return *grads, grad_state


def state_or_zeros(h0: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    dtype = accumulator(v.dtype)
    shape = v.shape[0], v.shape[2], k.shape[3], v.shape[3]
    return v.new_zeros(shape, dtype=dtype) if h0 is None else h0.to(dtype)


@torch.library.custom_op("lra::decay_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, h0: Tensor | None, chunk: int, scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the final state, in float32 or float64. q, k: (B, L, G, K), each of the G groups shared by H / G heads;
    v: (B, L, H, V); log_decay: (B, L, H, 1 or K); h0: (B, H, K, V)."""
    state = state_or_zeros(h0, k, v)
    if triton:
        from lra.kernels.decay_attention.gpu import forward

        return forward(q, k, v, log_decay, state, chunk, scale)
    with torch.autocast(v.device.type, enabled=False):
        return _forward(q, k, v, log_decay, state, chunk, scale)


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, h0: Tensor | None, chunk: int, scale: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = v.shape[0], v.shape[2], k.shape[3], v.shape[3]
    return v.new_empty(v.shape), v.new_empty(shape, dtype=accumulator(v.dtype))


@torch.library.custom_op("lra::decay_attention_backward", mutates_args=())
def attend_backward(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, h0: Tensor | None,
    chunk: int, scale: float, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay and the initial state."""
    state = state_or_zeros(h0, k, v)
    if triton:
        from lra.kernels.decay_attention.gpu import backward

        return backward(grad, grad_state, q, k, v, log_decay, state, chunk, scale)
    with torch.autocast(v.device.type, enabled=False):
        grads = _backward(grad, grad_state, q, k, v, log_decay, state, chunk, scale)
    return grads[0], grads[1], grads[2], grads[3], grads[4]


@attend_backward.register_fake
def _(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, h0: Tensor | None,
    chunk: int, scale: float, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = (q, k, v, log_decay, grad_state)
    return tuple(x.new_empty(x.shape) for x in like)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk, ctx.scale, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, h0 = ctx.saved_tensors
    *grads, grad_h0 = attend_backward(grad, grad_state, *tensors, h0, ctx.chunk, ctx.scale, ctx.triton)
    if h0 is not None:
        grads.append(grad_h0.to(h0.dtype))
    return *grads, *[None] * (8 - len(grads))


attend = register_autograd(attend, _differentiate, _save)


def chunked_flops(k: Tensor, v: Tensor, chunk: int, chunked: float, carried: float) -> int:
    """Work of matrix products per step and head: `chunked` (C, K) and (C, V) pairs, `carried` (K, V) ones."""
    batch, length, heads, width = v.shape
    keys, size = k.shape[-1], chunk_size(chunk, length)
    return int(2 * batch * length * heads * (chunked * size * (keys + width) + carried * keys * width))


@register_flop_formula(torch.ops.lra.decay_attention, get_raw=True)
def _flops(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, chunk: int, *_: Any, **__: Any
) -> int:
    # channel-wise decays visit half of each square of steps
    return chunked_flops(k, v, chunk, 1.0 if log_decay.shape[-1] == 1 else 0.5, 2)


@register_flop_formula(torch.ops.lra.decay_attention_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None,
    chunk: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return chunked_flops(k, v, chunk, 2.5 if log_decay.shape[-1] == 1 else 1.25, 5)
