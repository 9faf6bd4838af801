"""fft_conv in plain torch on any device: blocks of channels and batch, nothing complex kept for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd

BLOCK = 1 << 20  # samples transformed at once on a CPU: 4 MiB each for samples, spectrum and product stay in its cache
CHANNELS = 16  # at least: the transposition to channels-first then reads whole cache lines


@cache
def fft_size(least: int) -> int:
    """The smallest even 2^a 3^b 5^c that is at least `least`: FFTs of other sizes are slower."""
    best = 1 << max(1, (least - 1).bit_length())
    for factor in (3**b * 5**c for b in range(12) for c in range(9)):
        size = factor << max(1, math.ceil(math.log2(max(least / factor, 1))))
        if least <= size < best:
            best = size
    return best


def _taps(k: Tensor, length: int, bidirectional: bool) -> tuple[int, int, int]:
    """Taps in use looking back, looking ahead, and the FFT size at which neither wraps onto the other."""
    behind = min(k.shape[-1], length)
    ahead = min(k.shape[-1], length - 1) if bidirectional else 0
    return behind, ahead, fft_size(length + max(behind - 1, ahead))


def _blocks(u: Tensor, size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Channel slices, each with its batch slices."""
    batch, _, channels = u.shape
    budget = BLOCK if u.device.type == "cpu" else BLOCK << 6
    wide = max(1, min(channels, max(CHANNELS, budget // max(1, batch * size))))
    tall = max(1, budget // (wide * size))
    for c in range(0, channels, wide):
        yield slice(c, c + wide), [slice(b, b + tall) for b in range(0, batch, tall)]


def _work(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class _Room:
    """Memory for the samples of a block, channels first, with zeros behind the last step: every block is written over
    the one before, the zeros stay."""

    def __init__(self, u: Tensor, size: int, dtype: torch.dtype) -> None:
        channels, batches = next(_blocks(u, size))
        shape = len(u[batches[0]]), u[0, 0, channels].numel(), size
        self.length, self.samples = u.shape[1], torch.empty(shape, dtype=dtype, device=u.device)
        self.samples[..., self.length :] = 0

    def spectrum(self, x: Tensor, batch: slice, channels: slice) -> Tensor:
        """Transform of a block of x, (B, L, H) -> (b, h, bins)."""
        block = x[batch, :, channels].transpose(1, 2)
        room = self.samples[: block.shape[0], : block.shape[1]]
        room[..., : self.length].copy_(block)
        return torch.fft.rfft(room)


def _spectrum(k: Tensor, channels: slice, behind: int, ahead: int, size: int, dtype: torch.dtype) -> Tensor:
    """Transform of the kernel laid on a circle: tap j at j, the one that looks j ahead at -j."""
    first = (k[0] if k.ndim == 3 else k)[channels, :behind].to(dtype)
    if not ahead:
        return torch.fft.rfft(first, size)
    circle = first.new_zeros(first.shape[0], size)
    circle[:, :behind] = first
    circle[:, size - ahead :] = k[1, channels, :ahead].to(dtype).flip(-1)
    return torch.fft.rfft(circle)


@torch.library.custom_op("lra::fft_conv", mutates_args=())
def convolve(u: Tensor, k: Tensor, D: Tensor | None, bidirectional: bool) -> Tensor:
    length, dtype = u.shape[1], _work(u, k)
    behind, ahead, size = _taps(k, length, bidirectional)
    y, room = torch.empty_like(u, memory_format=torch.contiguous_format), _Room(u, size, dtype)
    for channels, batches in _blocks(u, size):
        kernel = _spectrum(k, channels, behind, ahead, size, dtype)
        for batch in batches:
            product = room.spectrum(u, batch, channels).mul_(kernel)
            y[batch, :, channels] = torch.fft.irfft(product, size)[..., :length].transpose(1, 2)
    if D is not None:
        y.addcmul_(u, D.to(u.dtype))
    return y


@torch.library.custom_op("lra::fft_conv_backward", mutates_args=())
def convolve_backward(
    grad: Tensor, u: Tensor, k: Tensor, D: Tensor | None, bidirectional: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, k and D (empty without D). Both are correlations, so conjugated spectra."""
    length, dtype = u.shape[1], _work(u, k)
    behind, ahead, size = _taps(k, length, bidirectional)
    du, dk = torch.empty_like(u, memory_format=torch.contiguous_format), torch.zeros_like(k)
    lag0, room = torch.empty(u.shape[2], dtype=dtype, device=u.device), _Room(u, size, dtype)
    for channels, batches in _blocks(u, size):
        kernel = _spectrum(k, channels, behind, ahead, size, dtype).conj_physical_()
        total = torch.zeros_like(kernel)
        for batch in batches:
            g = room.spectrum(grad, batch, channels)
            total += room.spectrum(u, batch, channels).conj_physical_().mul_(g).sum(0)
            du[batch, :, channels] = torch.fft.irfft(g.mul_(kernel), size)[..., :length].transpose(1, 2)
        circle = torch.fft.irfft(total, size)
        lag0[channels] = circle[:, 0]
        (dk[0] if bidirectional else dk)[channels, :behind] = circle[:, :behind].to(k.dtype)
        if ahead:
            dk[1, channels, :ahead] = circle[:, size - ahead :].flip(-1).to(k.dtype)
    if D is None:
        return du, dk, u.new_empty(0)
    # the skip weight is one more tap at lag 0
    return du.addcmul_(grad, D.to(u.dtype)), dk, lag0.to(D.dtype)


@convolve.register_fake
def _(u: Tensor, k: Tensor, D: Tensor | None, bidirectional: bool) -> Tensor:
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@convolve_backward.register_fake
def _(grad: Tensor, u: Tensor, k: Tensor, D: Tensor | None, bidirectional: bool) -> tuple[Tensor, Tensor, Tensor]:
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    return du, torch.zeros_like(k), u.new_empty(0) if D is None else torch.empty_like(D)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, k, D, ctx.bidirectional = inputs
    ctx.save_for_backward(u, k, D)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    u, k, D = ctx.saved_tensors
    du, dk, dD = convolve_backward(grad, u, k, D, ctx.bidirectional)
    return du, dk, None if D is None else dD, None


convolve = register_autograd(convolve, _backward, _setup)


def _work_of(u: Any, k: Any, D: Any, bidirectional: bool, transforms: int, products: int) -> int:
    """A real FFT of n samples counts 2.5 n log2 n (half of the usual 5 n log2 n of a complex one), a complex product 6
    per bin. `transforms`, `products`: per channel and example; each kernel adds one transform per channel."""
    batch, length, channels = u
    ahead = min(k[-1], length - 1) if bidirectional else 0
    size = fft_size(length + max(min(k[-1], length) - 1, ahead))
    fft = 2.5 * size * math.log2(size)
    skip = 0 if D is None else 2 * batch * length * channels
    return int(batch * channels * (transforms * fft + products * 3 * size) + channels * fft) + skip


@register_flop_formula(torch.ops.lra.fft_conv)
def _flops(u: Any, k: Any, D: Any, bidirectional: bool, *_: Any, **__: Any) -> int:
    return _work_of(u, k, D, bidirectional, transforms=2, products=1)


@register_flop_formula(torch.ops.lra.fft_conv_backward)
def _flops_backward(_g: Any, u: Any, k: Any, D: Any, bidirectional: bool, *_: Any, **__: Any) -> int:
    once = _work_of(u, k, D, bidirectional, transforms=3, products=2)
    return once + _work_of(u, k, D, bidirectional, transforms=0, products=0)
