"""`linear_scan` as a PyTorch operator, with the compiled CPU path: one pass over memory forward, one backward.

Backward, for a cotangent y_t of h_t: g_t = y_t + conj(a_{t+1}) g_{t+1} is the gradient of b_t (the same recurrence,
other way round), conj(h_{t-1}) g_t that of a_t, and conj(a_1) g_1 that of h_0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels._threads import blocks_of, over_rows

WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _forward(start, stop, a, b, h0, h, blocks, reverse):
    _, length, width = b.shape
    by_row, by_time = min(1, a.shape[0] - 1), min(1, a.shape[1] - 1)
    for row in range(start, stop):
        i, block = divmod(row, blocks)
        lo, hi = width * block // blocks, width * (block + 1) // blocks
        state = h0[i, lo:hi].copy()
        for step in range(length):
            t = length - 1 - step if reverse else step
            a_t, b_t, h_t = a[i * by_row, t * by_time, lo:hi], b[i, t, lo:hi], h[i, t, lo:hi]
            for d in range(hi - lo):
                state[d] = a_t[d] * state[d] + b_t[d]
                h_t[d] = state[d]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _backward(start, stop, grad, a, h, h0, grad_a, sum_a, grad_b, grad_h0, blocks, reverse):
    _, length, width = grad.shape
    by_row, by_time = min(1, a.shape[0] - 1), min(1, a.shape[1] - 1)
    for row in range(start, stop):
        i, block = divmod(row, blocks)
        lo, hi = width * block // blocks, width * (block + 1) // blocks
        g = np.zeros_like(h0[i, lo:hi])  # conj(a_{t+1}) g_{t+1}
        for step in range(length - 1, -1, -1):
            t = length - 1 - step if reverse else step
            before = h0[i, lo:hi] if step == 0 else h[i, t + 1 if reverse else t - 1, lo:hi]
            a_t, y_t, b_t = a[i * by_row, t * by_time, lo:hi], grad[i, t, lo:hi], grad_b[i, t, lo:hi]
            # one loop per result: with more arrays in one loop, LLVM gives up proving them distinct, and vectorising
            for d in range(hi - lo):
                b_t[d] = y_t[d] + g[d]
            for d in range(hi - lo):
                g[d] = b_t[d] * np.conj(a_t[d])
            if by_time:
                a_grad = grad_a[i, t, lo:hi]
                for d in range(hi - lo):
                    a_grad[d] = b_t[d] * np.conj(before[d])
            else:
                total = sum_a[i, lo:hi]
                for d in range(hi - lo):
                    total[d] += b_t[d] * np.conj(before[d])
        grad_h0[i, lo:hi] = g


def _arrays(dtype: torch.dtype, *tensors: Tensor) -> list[Any]:
    return [t.detach().to(dtype).contiguous().numpy() for t in tensors]


@torch.library.custom_op("lra::linear_scan", mutates_args=())
def scan(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, triton: bool) -> Tensor:
    if triton:
        from lra.kernels.linear_scan import gpu

        return gpu.forward(a, b, h0, reverse)
    batch, _, width = b.shape
    dtype = torch.promote_types(b.dtype, torch.float32)
    h = torch.empty(b.shape, dtype=dtype)
    start = torch.zeros(batch, width, dtype=dtype) if h0 is None else h0
    blocks = blocks_of(batch, width)
    over_rows(_forward, batch * blocks, *_arrays(dtype, a, b, start), h.numpy(), blocks, reverse)
    return h.to(b.dtype)


@scan.register_fake
def _(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, triton: bool) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.custom_op("lra::linear_scan_backward", mutates_args=())
def scan_backward(
    grad: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h0."""
    if triton:
        from lra.kernels.linear_scan import gpu

        return gpu.backward(grad, a, h, h0, reverse)
    batch, length, width = grad.shape
    dtype = torch.promote_types(h.dtype, torch.float32)
    shared = a.shape[1] == 1
    grad_b = torch.empty(grad.shape, dtype=dtype)
    grad_h0 = torch.empty(batch, width, dtype=dtype)
    # a factor shared over time sums its gradient over every step: in double precision, to keep the digits
    grad_a = torch.empty((0, 0, 0) if shared else (batch, length, width), dtype=dtype)
    sum_a = torch.zeros((batch, width) if shared else (0, 0), dtype=WIDE.get(dtype, dtype))
    start = torch.zeros(batch, width, dtype=dtype) if h0 is None else h0
    blocks = blocks_of(batch, width)
    written = (t.numpy() for t in (grad_a, sum_a, grad_b, grad_h0))
    over_rows(_backward, batch * blocks, *_arrays(dtype, grad, a, h, start), *written, blocks, reverse)
    if shared:
        grad_a = sum_a.unsqueeze(1)
    if a.shape[0] < batch:
        grad_a = grad_a.sum(0, keepdim=True)
    return grad_a.to(a.dtype), grad_b.to(grad.dtype), grad_h0.to(h.dtype)


@scan_backward.register_fake
def _(
    grad: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), grad.new_empty(grad.shape), h.new_empty(h.shape[0], h.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, h0, ctx.reverse, ctx.triton = inputs
    ctx.save_for_backward(a, output, h0)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, h, h0 = ctx.saved_tensors
    grad_a, grad_b, grad_h0 = scan_backward(grad, a, h, h0, ctx.reverse, ctx.triton)
    return grad_a, grad_b, None if h0 is None else grad_h0, None, None


scan = register_autograd(scan, _differentiate, _save)


@register_flop_formula(torch.ops.lra.linear_scan, get_raw=True)
def _flops(a: Tensor, b: Tensor, *rest: Any, **more: Any) -> int:
    return b.numel() * (8 if b.is_complex() else 2)


@register_flop_formula(torch.ops.lra.linear_scan_backward, get_raw=True)
def _backward_flops(grad: Tensor, *rest: Any, **more: Any) -> int:
    return grad.numel() * (14 if grad.is_complex() else 3)
