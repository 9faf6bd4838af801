"""`causal_conv1d` in Triton: a program per row, tile of steps and block of channels.

Backward in two launches: the first turns the cotangent into that of the sum before the activation and reduces the
gradients of weight and bias per tile (summed afterwards, without atomics), the second runs the same convolution
backwards in time. Accumulation is in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _taps(
    x, weight, base, t, d, mask, inside, length, width,
    REVERSE: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """sum_k weight[:, k] x_{t-K+1+k}, or x_{t+K-1-k} in reverse."""
    total = tl.zeros([T, D], ACC)
    for k in tl.static_range(K):
        at = t + (K - 1 - k) if REVERSE else t - (K - 1 - k)
        known = mask & ((at >= 0) & (at < length))[:, None]
        x_t = tl.load(x + (base + at)[:, None] * width + d[None, :], known, 0.0).to(ACC)
        total += tl.load(weight + d * K + k, inside, 0.0).to(ACC)[None, :] * x_t
    return total


@triton.jit
def _convolve(
    x, weight, bias, y, length, width,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(2).to(tl.int64) * length
    t, d = tl.program_id(1) * T + tl.arange(0, T), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    mask = (t < length)[:, None] & inside[None, :]
    p = _taps(x, weight, base, t, d, mask, inside, length, width, REVERSE, ACC, K, T, D)
    if HAS_BIAS:
        p += tl.load(bias + d, inside, 0.0).to(ACC)[None, :]
    if SILU:
        p = p / (1 + tl.exp(-p))
    tl.store(y + (base + t)[:, None] * width + d[None, :], p, mask)


@triton.jit
def _reduce(
    grad, x, weight, bias, inner, grad_weight, grad_bias, length, width,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(2).to(tl.int64) * length
    t, d = tl.program_id(1) * T + tl.arange(0, T), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    mask = (t < length)[:, None] & inside[None, :]
    at = (base + t)[:, None] * width + d[None, :]
    g = tl.load(grad + at, mask, 0.0).to(ACC)
    if SILU:
        p = _taps(x, weight, base, t, d, mask, inside, length, width, False, ACC, K, T, D)
        if HAS_BIAS:
            p += tl.load(bias + d, inside, 0.0).to(ACC)[None, :]
        gate = 1 / (1 + tl.exp(-p))
        g = g * gate * (1 + p * (1 - gate))
        tl.store(inner + at, g, mask)
    tile = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    tl.store(grad_bias + tile * width + d, tl.sum(g, 0), inside)
    for k in tl.static_range(K):
        source = t - (K - 1 - k)
        x_t = tl.load(x + (base + source)[:, None] * width + d[None, :], mask & (source >= 0)[:, None], 0.0).to(ACC)
        tl.store(grad_weight + (tile * width + d) * K + k, tl.sum(g * x_t, 0), inside)


def _blocks(x: Tensor) -> tuple[tuple[int, int, int], dict[str, object]]:
    batch, length, width = x.shape
    tile, block = min(32, triton.next_power_of_2(length)), min(64, triton.next_power_of_2(width))
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    return (triton.cdiv(width, block), triton.cdiv(length, tile), batch), {"T": tile, "D": block, "ACC": wide}


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Arguments as `causal_conv1d`, all of one dtype."""
    x, weight, y = x.contiguous(), weight.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    grid, blocks = _blocks(x)
    with torch.cuda.device_of(x):
        _convolve[grid](
            x, weight, weight if bias is None else bias.contiguous(), y, x.shape[1], x.shape[2],
            SILU=silu, HAS_BIAS=bias is not None, REVERSE=False, K=weight.shape[1], **blocks,
        )  # fmt: skip
    return y


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    _, length, width = x.shape
    grid, blocks = _blocks(x)
    taps, tiles, wide = weight.shape[1], grid[1] * grid[2], torch.promote_types(x.dtype, torch.float32)
    # what the second launch reads: rounded once more only where there is an activation
    inner = x.new_empty(x.shape, dtype=wide) if silu else grad
    grad_x, grad_weight = torch.empty_like(x), x.new_empty(tiles, width, taps, dtype=wide)
    grad_bias = x.new_empty(tiles, width, dtype=wide)
    with torch.cuda.device_of(x):
        _reduce[grid](
            grad, x, weight, weight if bias is None else bias.contiguous(), inner, grad_weight, grad_bias,
            length, width,
            SILU=silu, HAS_BIAS=bias is not None, K=taps, **blocks,
        )  # fmt: skip
        _convolve[grid](
            inner, weight, weight, grad_x, length, width,
            SILU=False, HAS_BIAS=False, REVERSE=True, K=taps, **blocks,
        )  # fmt: skip
    return grad_x, grad_weight.sum(0).to(x.dtype), grad_bias.sum(0).to(x.dtype)
