"""`wkv` as a PyTorch operator, with the compiled CPU path. README.md derives the backward pass.

A thread processes one row and one block of channels step by step. The larger of two exponents has the factor 1, so each
step costs two exponentials. Exponents are in float64 (rounding errors of the rate would add up over the steps), sums in
the accumulating dtype. The backward pass repeats the forward pass, storing three numbers per step and channel of its
block, and then runs from the last step to the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels._exp import exp
from lra.kernels._threads import over_rows

BLOCK = 128  # channels; the running sums of a block stay in the first cache
NOTHING = -1e38  # exponent of an empty sum


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _forward(start, stop, k, v, decay, u, state, o, last, blocks):
    _, length, width = k.shape
    for row in range(start, stop):
        i, block = divmod(row, blocks)
        lo, hi = width * block // blocks, width * (block + 1) // blocks
        num, den = state[i, 0, lo:hi].copy(), state[i, 1, lo:hi].copy()
        top, rate, bonus, one = state[i, 2, lo:hi].astype(np.float64), decay[lo:hi], u[lo:hi], k.dtype.type(1)
        gap = np.empty_like(num)
        for t in range(length):
            k_t, v_t, o_t = k[i, t, lo:hi], v[i, t, lo:hi], o[i, t, lo:hi]
            for d in range(hi - lo):
                gap[d] = bonus[d] + k_t[d] - top[d]
            for d in range(hi - lo):
                small = exp(-abs(gap[d]))
                past, now = (small, one) if gap[d] > 0 else (one, small)
                o_t[d] = (past * num[d] + now * v_t[d]) / (past * den[d] + now)
            for d in range(hi - lo):
                decayed = top[d] - rate[d]
                gap[d] = k_t[d] - decayed
                top[d] = max(k_t[d], decayed)
            for d in range(hi - lo):
                small = exp(-abs(gap[d]))
                past, now = (small, one) if gap[d] > 0 else (one, small)
                num[d] = past * num[d] + now * v_t[d]
                den[d] = past * den[d] + now
        last[i, 0, lo:hi], last[i, 1, lo:hi], last[i, 2, lo:hi] = num, den, top


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _shares(gap, past, now):
    """Factors of the old sums and the new term, the new one's exponent being larger by `gap`."""
    one = gap.dtype.type(1)
    for d in range(gap.size):
        small = exp(-abs(gap[d]))
        past[d], now[d] = (small, one) if gap[d] > 0 else (one, small)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _backward(
    start, stop, grad_o, grad_last, k, v, decay, u, state, grad_k, grad_v, grad_rate, grad_u, grad_state, blocks
):
    _, length, width = k.shape
    # for one block of one row: the output, the gradient of its numerator, and the exponent of both
    kept, exponents = np.empty((length, 2, -(-width // blocks)), k.dtype), np.empty((length, -(-width // blocks)))
    for row in range(start, stop):
        i, block = divmod(row, blocks)
        lo, hi = width * block // blocks, width * (block + 1) // blocks
        num, den = state[i, 0, lo:hi].copy(), state[i, 1, lo:hi].copy()
        top, rate, bonus = state[i, 2, lo:hi].astype(np.float64), decay[lo:hi], u[lo:hi]
        num_rate, den_rate = np.zeros_like(num), np.zeros_like(num)  # derivatives by the decay rate
        newest = np.full(hi - lo, -1)  # the step whose key is the state's exponent; -1: the initial state
        gap, past, now = np.empty_like(num), np.empty_like(num), np.empty_like(num)
        to_rate, to_u = grad_rate[i, lo:hi], grad_u[i, lo:hi]
        for t in range(length):
            k_t, v_t, g_t = k[i, t, lo:hi], v[i, t, lo:hi], grad_o[i, t, lo:hi]
            to_k, to_v = grad_k[i, t, lo:hi], grad_v[i, t, lo:hi]
            o_t, pull, largest = kept[t, 0], kept[t, 1], exponents[t]
            # one loop for few arrays: with more, LLVM gives up proving them distinct, and vectorising
            for d in range(hi - lo):
                shifted = bonus[d] + k_t[d]
                gap[d] = shifted - top[d]
                largest[d] = max(shifted, top[d])
            _shares(gap, past, now)
            for d in range(hi - lo):
                below = past[d] * den[d] + now[d]
                o_t[d] = (past[d] * num[d] + now[d] * v_t[d]) / below
                pull[d] = g_t[d] / below
            for d in range(hi - lo):
                to_v[d] = now[d] * pull[d]
                to_k[d] = to_v[d] * (v_t[d] - o_t[d])
                to_u[d] += to_k[d]
            for d in range(hi - lo):
                to_rate[d] += pull[d] * past[d] * (num_rate[d] - o_t[d] * den_rate[d])
            for d in range(hi - lo):
                decayed = top[d] - rate[d]
                gap[d] = k_t[d] - decayed
                top[d] = max(k_t[d], decayed)
                newest[d] = t if k_t[d] > decayed else newest[d]
            _shares(gap, past, now)
            for d in range(hi - lo):
                num_rate[d], den_rate[d] = past[d] * (num_rate[d] - num[d]), past[d] * (den_rate[d] - den[d])
                num[d] = past[d] * num[d] + now[d] * v_t[d]
                den[d] = past[d] * den[d] + now[d]
        above, below, exponent = grad_last[i, 0, lo:hi].copy(), grad_last[i, 1, lo:hi].copy(), -top
        # the state's own exponent, beside its part in the two sums
        to_top = grad_last[i, 2, lo:hi] - above * num - below * den
        for d in range(hi - lo):
            to_rate[d] += above[d] * num_rate[d] + below[d] * den_rate[d] - to_top[d] * (length - 1 - newest[d])
        for t in range(length - 1, -1, -1):
            k_t, v_t, to_k, to_v = k[i, t, lo:hi], v[i, t, lo:hi], grad_k[i, t, lo:hi], grad_v[i, t, lo:hi]
            o_t, pull, largest = kept[t, 0], kept[t, 1], exponents[t]
            for d in range(hi - lo):
                gap[d] = k_t[d] + exponent[d]
            for d in range(hi - lo):
                weight = exp(gap[d])
                to_v[d] += weight * above[d]
                to_k[d] += weight * (v_t[d] * above[d] + below[d])
            for d in range(hi - lo):
                decayed = exponent[d] - rate[d]
                gap[d] = -largest[d] - decayed
                exponent[d] = max(-largest[d], decayed)
            _shares(gap, past, now)
            for d in range(hi - lo):
                above[d] = past[d] * above[d] + now[d] * pull[d]
                below[d] = past[d] * below[d] - now[d] * pull[d] * o_t[d]
        for d in range(hi - lo):
            gap[d] = exponent[d] + state[i, 2, lo + d]
            weight = exp(gap[d])
            grad_state[i, 0, lo + d], grad_state[i, 1, lo + d] = weight * above[d], weight * below[d]
            to_top0 = weight * (above[d] * state[i, 0, lo + d] + below[d] * state[i, 1, lo + d])
            if newest[d] < 0:
                to_top0 += to_top[d]
            else:
                grad_k[i, newest[d], lo + d] += to_top[d]
            grad_state[i, 2, lo + d] = to_top0


def _blocks(batch: int, width: int) -> int:
    """Blocks of channels per row: none wider than BLOCK, and enough of them for every thread."""
    return min(width, max(-(-width // BLOCK), -(-torch.get_num_threads() // batch)))


def _state(h0: Tensor | None, k: Tensor) -> Tensor:
    if h0 is not None:
        return h0.to(torch.promote_types(k.dtype, torch.float32))
    state = k.new_zeros(k.shape[0], 3, k.shape[2], dtype=torch.promote_types(k.dtype, torch.float32))
    state[:, 2] = NOTHING
    return state


def _arrays(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, *grads: Tensor) -> list[Any]:
    """Gradients first, then k, v, the decay rate, u and the state."""
    arrays = [t.detach().to(state.dtype).contiguous().numpy() for t in (*grads, k, v, state)]
    exponents = [t.detach().double().contiguous().numpy() for t in (w.double().exp(), u)]
    return [*arrays[:-1], *exponents, arrays[-1]]


@torch.library.custom_op("lra::wkv", mutates_args=())
def scan(k: Tensor, v: Tensor, w: Tensor, u: Tensor, h0: Tensor | None, triton: bool) -> tuple[Tensor, Tensor]:
    """o and the final state, in float32 or float64."""
    state = _state(h0, k)
    if triton:
        from lra.kernels.wkv import gpu

        return gpu.forward(k, v, w, u, state)
    o, last = torch.empty(k.shape, dtype=state.dtype), torch.empty_like(state)
    blocks = _blocks(k.shape[0], k.shape[2])
    over_rows(_forward, k.shape[0] * blocks, *_arrays(k, v, w, u, state), o.numpy(), last.numpy(), blocks)
    return o.to(v.dtype), last


@scan.register_fake
def _(k: Tensor, v: Tensor, w: Tensor, u: Tensor, h0: Tensor | None, triton: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(k.dtype, torch.float32)
    return v.new_empty(v.shape), k.new_empty((k.shape[0], 3, k.shape[2]), dtype=dtype)


@torch.library.custom_op("lra::wkv_backward", mutates_args=())
def scan_backward(
    grad_o: Tensor, grad_last: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, h0: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of k, v, w, u and the initial state."""
    state = _state(h0, k)
    if triton:
        from lra.kernels.wkv import gpu

        return gpu.backward(grad_o, grad_last, k, v, w, u, state)
    grad_k, grad_v = torch.empty(k.shape, dtype=state.dtype), torch.empty(k.shape, dtype=state.dtype)
    # sums over every step, in double precision to keep the digits
    grad_rate, grad_u = torch.zeros(2, k.shape[0], k.shape[2], dtype=torch.float64)
    grad_state, blocks = torch.empty_like(state), _blocks(k.shape[0], k.shape[2])
    over_rows(
        _backward, k.shape[0] * blocks, *_arrays(k, v, w, u, state, grad_o, grad_last),
        *(t.numpy() for t in (grad_k, grad_v, grad_rate, grad_u, grad_state)), blocks,
    )  # fmt: skip
    grad_w = grad_rate.sum(0) * w.double().exp()
    return grad_k.to(k.dtype), grad_v.to(v.dtype), grad_w.to(w.dtype), grad_u.sum(0).to(u.dtype), grad_state


@scan_backward.register_fake
def _(
    grad_o: Tensor, grad_last: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, h0: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = (k, v, w, u, grad_last)
    return tuple(x.new_empty(x.shape) for x in like)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, h0 = ctx.saved_tensors  # read once: checkpointing refuses a second reading
    *grads, grad_h0 = scan_backward(grad, grad_last, *tensors, h0, ctx.triton)
    return *grads, None if h0 is None else grad_h0.to(h0.dtype), None


scan = register_autograd(scan, _differentiate, _save)


@register_flop_formula(torch.ops.lra.wkv, get_raw=True)
def _flops(k: Tensor, *_: Any, **__: Any) -> int:
    """Per step and channel: 8 for the output, 8 for the sums, 2 exponentials counted as one operation each."""
    return 18 * k.numel()


@register_flop_formula(torch.ops.lra.wkv_backward, get_raw=True)
def _backward_flops(grad: Tensor, *_: Any, **__: Any) -> int:
    return 50 * grad.numel()
