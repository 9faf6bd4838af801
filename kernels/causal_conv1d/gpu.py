"""`causal_conv1d` in Triton: a program per row, tile of steps and block of channels.

Weights are (K, D) here, so that a tap is one piece of memory; x and the cotangent may be cut from wider tensors.
Backward is one launch: it forms the cotangent of the sum before the activation anew at every tap, and reduces the
gradients of weight and bias per tile (summed afterwards, without atomics). Accumulation is in float32 (float64 for
float64 inputs). Widths and strides come in units of ALIGN numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._launch import alignment


@triton.jit
def _before(
    x, weight, bias, t, d, inside, length, width, step, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """bias + sum_k weight[k] x_{t-K+1+k}."""
    total = tl.zeros([T, D], ACC)
    if HAS_BIAS:
        total += tl.load(bias + d, inside, 0.0).to(ACC)[None, :]
    for k in tl.static_range(K):
        at = t - (K - 1 - k)
        known = ((at >= 0) & (at < length))[:, None] & inside[None, :]
        x_t = tl.load(x + at.to(tl.int64)[:, None] * step + d[None, :], known, 0.0).to(ACC)
        total += tl.load(weight + k * width + d, inside, 0.0).to(ACC)[None, :] * x_t
    return total


@triton.jit
def _forward(
    x, weight, bias, y, length, width, row, step, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, K: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    width, step, i = width * ALIGN, step * ALIGN, tl.program_id(2).to(tl.int64)
    t, d = tl.program_id(1) * T + tl.arange(0, T), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    p = _before(x + i * row * ALIGN, weight, bias, t, d, inside, length, width, step, HAS_BIAS, ACC, K, T, D)
    if SILU:
        p = p / (1 + tl.exp(-p))
    tl.store(y + (i * length + t)[:, None] * width + d[None, :], p, (t < length)[:, None] & inside[None, :])


@triton.jit
def _backward(
    grad, x, weight, bias, grad_x, grad_weight, grad_bias, length, width, grad_row, grad_step, row, step,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, K: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    width, step, grad_step, i = width * ALIGN, step * ALIGN, grad_step * ALIGN, tl.program_id(2).to(tl.int64)
    t, d = tl.program_id(1) * T + tl.arange(0, T), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    x, grad = x + i * row * ALIGN, grad + i * grad_row * ALIGN
    tile = i * tl.num_programs(1) + tl.program_id(1)
    total = tl.zeros([T, D], ACC)
    for k in tl.static_range(K):
        at = t + (K - 1 - k)
        known = (at < length)[:, None] & inside[None, :]
        g = tl.load(grad + at.to(tl.int64)[:, None] * grad_step + d[None, :], known, 0.0).to(ACC)
        if SILU:
            p = _before(x, weight, bias, at, d, inside, length, width, step, HAS_BIAS, ACC, K, T, D)
            gate = 1 / (1 + tl.exp(-p))
            g *= gate * (1 + p * (1 - gate))
        total += tl.load(weight + k * width + d, inside, 0.0).to(ACC)[None, :] * g
        if k == K - 1:
            tl.store(grad_bias + tile * width + d, tl.sum(g, 0), inside)
            for j in tl.static_range(K):
                source = t - (K - 1 - j)
                seen = ((source >= 0) & (source < length))[:, None] & inside[None, :]
                x_t = tl.load(x + source.to(tl.int64)[:, None] * step + d[None, :], seen, 0.0).to(ACC)
                tl.store(grad_weight + (tile * K + j) * width + d, tl.sum(g * x_t, 0), inside)
    tl.store(grad_x + (i * length + t)[:, None] * width + d[None, :], total, (t < length)[:, None] & inside[None, :])


def _rows(x: Tensor) -> Tensor:
    """x itself where its channels lie side by side, else a contiguous copy."""
    return x if x.stride(2) == 1 and min(x.stride()) > 0 else x.contiguous()


def _blocks(*tensors: Tensor) -> tuple[tuple[int, int, int], list[int], dict[str, object]]:
    """Grid; length, width, and the strides of each tensor's rows and steps; constants."""
    batch, length, width = tensors[0].shape
    strides = [stride for t in tensors for stride in t.stride()[:2]]
    align = alignment(width, *strides)
    tile, block = min(32, triton.next_power_of_2(length)), min(64, triton.next_power_of_2(width))
    wide = tl.float64 if tensors[0].dtype == torch.float64 else tl.float32
    grid = triton.cdiv(width, block), triton.cdiv(length, tile), batch
    sizes = [length, width // align, *(stride // align for stride in strides)]
    return grid, sizes, {"T": tile, "D": block, "ACC": wide, "ALIGN": align}


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Arguments as `causal_conv1d`, all of one dtype."""
    x, weight, y = _rows(x), weight.T.contiguous(), x.new_empty(x.shape)
    grid, sizes, blocks = _blocks(x)
    with torch.cuda.device_of(x):
        _forward[grid](
            x, weight, weight if bias is None else bias.contiguous(), y, *sizes,
            SILU=silu, HAS_BIAS=bias is not None, K=len(weight), **blocks,
        )  # fmt: skip
    return y


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    grad, x, weight = _rows(grad), _rows(x), weight.T.contiguous()
    grid, sizes, blocks = _blocks(grad, x)
    (taps, width), tiles, wide = weight.shape, grid[1] * grid[2], torch.promote_types(x.dtype, torch.float32)
    grad_x, grad_bias = x.new_empty(x.shape), x.new_empty(tiles, width, dtype=wide)
    grad_weight = x.new_empty(tiles, taps, width, dtype=wide)
    with torch.cuda.device_of(x):
        _backward[grid](
            grad, x, weight, weight if bias is None else bias.contiguous(), grad_x, grad_weight, grad_bias, *sizes,
            SILU=silu, HAS_BIAS=bias is not None, K=taps, **blocks,
        )  # fmt: skip
    return grad_x, grad_weight.sum(0).T.to(x.dtype).contiguous(), grad_bias.sum(0).to(x.dtype)
