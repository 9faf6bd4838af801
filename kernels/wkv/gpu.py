"""`wkv` in Triton: each program takes one row and one block of channels through time, its sums in registers. Backward
goes forward once more, leaving three numbers per step and channel for the way back.

Exponents are in float64 (a rounding of the rate would add up over its memory), sums in float32 (float64 for float64
inputs).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _balance(a, b, ACC: tl.constexpr):
    """The larger of two float64 exponents, and what e^a and e^b are in units of its exponential."""
    largest = tl.maximum(a, b)
    return largest, tl.exp((a - largest).to(ACC)), tl.exp((b - largest).to(ACC))


@triton.jit
def _sums(state, i, d, width, inside, ACC: tl.constexpr):
    num = tl.load(state + (3 * i) * width + d, inside, 0.0).to(ACC)
    den = tl.load(state + (3 * i + 1) * width + d, inside, 1.0).to(ACC)
    return num, den, tl.load(state + (3 * i + 2) * width + d, inside, 0.0).to(tl.float64)


@triton.jit
def _forward(k, v, decay, bonus, state, o, last, length, width, ACC: tl.constexpr, D: tl.constexpr):
    i, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    rate, u = tl.load(decay + d, inside, 0.0), tl.load(bonus + d, inside, 0.0).to(tl.float64)
    num, den, top = _sums(state, i, d, width, inside, ACC)
    for t in tl.range(0, length, num_stages=4):
        at = (i * length + t) * width + d
        k_t, v_t = tl.load(k + at, inside, 0.0).to(ACC), tl.load(v + at, inside, 0.0).to(ACC)
        _, past, now = _balance(top, u + k_t, ACC)
        tl.store(o + at, (past * num + now * v_t) / (past * den + now), inside)
        top, past, now = _balance(top - rate, k_t.to(tl.float64), ACC)
        num, den = past * num + now * v_t, past * den + now
    tl.store(last + (3 * i) * width + d, num, inside)
    tl.store(last + (3 * i + 1) * width + d, den, inside)
    tl.store(last + (3 * i + 2) * width + d, top, inside)


@triton.jit
def _backward(
    grad_o, grad_last, k, v, decay, bonus, state, grad_k, grad_v, grad_rate, grad_u, grad_state, outputs, pulls,
    exponents, length, width, ACC: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    i, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    rate, u = tl.load(decay + d, inside, 0.0), tl.load(bonus + d, inside, 0.0).to(tl.float64)
    num0, den0, top0 = _sums(state, i, d, width, inside, ACC)
    num, den, top = num0, den0, top0
    num_rate, den_rate = tl.zeros([D], ACC), tl.zeros([D], ACC)
    # sums over every step, in double precision to keep the digits
    to_rate, to_u = tl.zeros([D], tl.float64), tl.zeros([D], tl.float64)
    newest = tl.full([D], -1, tl.int32)
    for t in tl.range(0, length, num_stages=4):
        at = (i * length + t) * width + d
        k_t, v_t = tl.load(k + at, inside, 0.0).to(ACC), tl.load(v + at, inside, 0.0).to(ACC)
        g_t = tl.load(grad_o + at, inside, 0.0).to(ACC)
        largest, past, now = _balance(top, u + k_t, ACC)
        below = past * den + now
        o_t, pull = (past * num + now * v_t) / below, g_t / below
        to_v = now * pull
        to_k = to_v * (v_t - o_t)
        to_u += to_k
        to_rate += pull * past * (num_rate - o_t * den_rate)
        tl.store(outputs + at, o_t, inside)
        tl.store(pulls + at, pull, inside)
        tl.store(exponents + at, largest, inside)
        newest = tl.where(k_t > top - rate, t, newest)
        top, past, now = _balance(top - rate, k_t.to(tl.float64), ACC)
        num_rate, den_rate = past * (num_rate - num), past * (den_rate - den)
        num, den = past * num + now * v_t, past * den + now
    above = tl.load(grad_last + (3 * i) * width + d, inside, 0.0).to(ACC)
    below = tl.load(grad_last + (3 * i + 1) * width + d, inside, 0.0).to(ACC)
    to_top = tl.load(grad_last + (3 * i + 2) * width + d, inside, 0.0).to(ACC) - above * num - below * den
    to_rate += above * num_rate + below * den_rate - to_top * (length - 1 - newest)
    exponent = -top
    tl.debug_barrier()  # a narrow block is held by several threads at once: what one kept another may read
    for back in tl.range(0, length, num_stages=4):
        t = length - 1 - back
        at = (i * length + t) * width + d
        k_t, v_t = tl.load(k + at, inside, 0.0).to(ACC), tl.load(v + at, inside, 0.0).to(ACC)
        o_t, pull = tl.load(outputs + at, inside, 0.0), tl.load(pulls + at, inside, 0.0)
        largest = tl.load(exponents + at, inside, 0.0)
        # what the step gave its own output, computed as on the way forward
        to_v = tl.exp((u + k_t - largest).to(ACC)) * pull
        to_k = to_v * (v_t - o_t)
        weight = tl.exp((k_t + exponent).to(ACC))
        tl.store(grad_v + at, to_v + weight * above, inside)
        to_k += weight * (v_t * above + below) + tl.where(newest == t, to_top, 0.0)
        tl.store(grad_k + at, to_k, inside)
        exponent, past, now = _balance(exponent - rate, -largest, ACC)
        above, below = past * above + now * pull, past * below - now * pull * o_t
    weight = tl.exp((exponent + top0).to(ACC))
    to_top = tl.where(newest < 0, to_top, 0.0) + weight * (above * num0 + below * den0)
    tl.store(grad_state + (3 * i) * width + d, weight * above, inside)
    tl.store(grad_state + (3 * i + 1) * width + d, weight * below, inside)
    tl.store(grad_state + (3 * i + 2) * width + d, to_top, inside)
    tl.store(grad_rate + i * width + d, to_rate, inside)
    tl.store(grad_u + i * width + d, to_u, inside)


def _plan(state: Tensor) -> tuple[tuple[int, int], dict[str, object]]:
    """Grid and options. Narrow blocks: only (B, D) run side by side, time does not."""
    batch, _, width = state.shape
    block = min(32, triton.next_power_of_2(width))
    acc = tl.float64 if state.dtype == torch.float64 else tl.float32
    return (triton.cdiv(width, block), batch), {"ACC": acc, "D": block, "num_warps": 1}


def forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments as `wkv`, k and v of one dtype, the state in that of accumulation."""
    k, v, u, state = (x.detach().contiguous() for x in (k, v, u, state))
    o, last = torch.empty_like(v), torch.empty_like(state)
    grid, options = _plan(state)
    with torch.cuda.device_of(k):
        _forward[grid](k, v, w.double().exp(), u, state, o, last, k.shape[1], k.shape[2], **options)
    return o, last


def backward(
    grad_o: Tensor, grad_last: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial state."""
    grad_o, grad_last, k, v, u, state = (x.detach().contiguous() for x in (grad_o, grad_last, k, v, u, state))
    rate = w.double().exp()
    batch, length, width = k.shape
    grad_k, grad_v, grad_state = torch.empty_like(k), torch.empty_like(v), torch.empty_like(state)
    grad_rate, grad_u = k.new_empty(2, batch, width, dtype=torch.float64)
    kept = [torch.empty_like(k, dtype=dtype) for dtype in (state.dtype, state.dtype, torch.float64)]
    grid, options = _plan(state)
    with torch.cuda.device_of(k):
        _backward[grid](
            grad_o, grad_last, k, v, rate, u, state, grad_k, grad_v, grad_rate, grad_u, grad_state, *kept, length,
            width, **options,
        )  # fmt: skip
    grad_w = grad_rate.sum(0) * rate
    return grad_k, grad_v, grad_w.to(w.dtype), grad_u.sum(0).to(u.dtype), grad_state
