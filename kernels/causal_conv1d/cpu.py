"""`causal_conv1d` as a PyTorch operator, with the compiled CPU path: one pass over memory each way.

Backward, with p_t the sum before the activation f: g_t = y'_t f'(p_t); x_{t-K+1+k} receives w_k g_t, w_k receives
x_{t-K+1+k} g_t, and the bias g_t.
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
from lra.kernels._threads import blocks_of, over_rows

RUN = 32  # steps whose terms are added up in the precision of x


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _before_activation(i, t, lo, hi, x, weight, bias, out):
    """Takes whole arrays: a block of a matrix would not be known to be contiguous, and its loops not vectorised."""
    taps = weight.shape[0]
    out[:] = bias[lo:hi]
    for k in range(max(0, taps - 1 - t), taps):
        tap, source = weight[k, lo:hi], x[i, t - taps + 1 + k, lo:hi]
        for d in range(hi - lo):
            out[d] += tap[d] * source[d]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _forward(start, stop, x, weight, bias, y, blocks, silu):
    _, length, width = x.shape
    for row in range(start, stop):
        i, block = divmod(row, blocks)
        lo, hi = width * block // blocks, width * (block + 1) // blocks
        for t in range(length):
            out = y[i, t, lo:hi]
            _before_activation(i, t, lo, hi, x, weight, bias, out)
            if silu:
                for d in range(hi - lo):
                    out[d] = out[d] / (1 + exp(-out[d]))


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _backward(start, stop, grad, x, weight, bias, grad_x, sums, blocks, silu):
    """sums: (batch, taps + 1, width), gradients of the taps and the bias by row, in double precision."""
    _, length, width = x.shape
    taps = weight.shape[0]
    for row in range(start, stop):
        i, block = divmod(row, blocks)
        lo, hi = width * block // blocks, width * (block + 1) // blocks
        g, run = bias[lo:hi].copy(), np.zeros((taps + 1, hi - lo), x.dtype)
        for t in range(length):
            y_t = grad[i, t, lo:hi]
            if silu:
                _before_activation(i, t, lo, hi, x, weight, bias, g)
                for d in range(hi - lo):
                    gate = 1 / (1 + exp(-g[d]))
                    g[d] = y_t[d] * gate * (1 + g[d] * (1 - gate))
            else:
                g[:] = y_t
            to_bias = run[taps]
            for d in range(hi - lo):
                to_bias[d] += g[d]
            grad_x[i, t, lo:hi] = 0
            for k in range(max(0, taps - 1 - t), taps):
                at = t - taps + 1 + k
                tap, source = weight[k, lo:hi], x[i, at, lo:hi]
                to_x, to_tap = grad_x[i, at, lo:hi], run[k]
                for d in range(hi - lo):
                    to_x[d] += tap[d] * g[d]
                for d in range(hi - lo):
                    to_tap[d] += source[d] * g[d]
            if t % RUN == RUN - 1 or t == length - 1:
                for k in range(taps + 1):
                    part, total = run[k], sums[i, k, lo:hi]
                    for d in range(hi - lo):
                        total[d] += part[d]
                run[:] = 0


def _arrays(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Any]:
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return [t.detach().to(dtype).contiguous().numpy() for t in (x, weight.mT, bias)]


@torch.library.custom_op("lra::causal_conv1d", mutates_args=())
def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, triton: bool) -> Tensor:
    if triton:
        from lra.kernels.causal_conv1d import gpu

        return gpu.forward(x, weight, bias, silu)
    batch, _, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty(x.shape, dtype=dtype)
    blocks = blocks_of(batch, width)
    over_rows(_forward, batch * blocks, *_arrays(dtype, x, weight, bias), y.numpy(), blocks, silu)
    return y.to(x.dtype)


@convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, triton: bool) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lra::causal_conv1d_backward", mutates_args=())
def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    if triton:
        from lra.kernels.causal_conv1d import gpu

        return gpu.backward(grad, x, weight, bias, silu)
    batch, _, width = x.shape
    taps = weight.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty(x.shape, dtype=dtype)
    # sums over every step: runs of them in double precision, to keep the digits
    sums = torch.zeros(batch, taps + 1, width, dtype=torch.float64)
    blocks = blocks_of(batch, width)
    read = [grad.to(dtype).contiguous().numpy(), *_arrays(dtype, x, weight, bias)]
    over_rows(_backward, batch * blocks, *read, grad_x.numpy(), sums.numpy(), blocks, silu)
    total = sums.sum(0).to(x.dtype)
    return grad_x.to(x.dtype), total[:taps].T.contiguous(), total[taps].clone()


@convolve_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.silu, ctx.triton = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = convolve_backward(grad, x, weight, bias, ctx.silu, ctx.triton)
    return grad_x, grad_weight, None if bias is None else grad_bias, None, None


convolve = register_autograd(convolve, _differentiate, _save)


@register_flop_formula(torch.ops.lra.causal_conv1d, get_raw=True)
def _flops(x: Tensor, weight: Tensor, *rest: Any, **more: Any) -> int:
    return 2 * x.numel() * weight.shape[1]


@register_flop_formula(torch.ops.lra.causal_conv1d_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, *rest: Any, **more: Any
) -> int:
    return (6 if silu else 4) * x.numel() * weight.shape[1]
