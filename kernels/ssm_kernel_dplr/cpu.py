"""ssm_kernel_dplr: Cauchy sums (Numba on a CPU, plain torch elsewhere), Woodbury identity, inverse FFT.

With a unit step, theta = 2 pi k / length and z = exp(-i theta), the factor exp(-i theta / 2) taken out of numerator and
denominator leaves nothing singular at z = -1:

    d_n = 2 i sin(theta / 2) - cos(theta / 2) A_n         y(v) = sum_n v_n / d_n + conj(v_n) / d~_n  (d~: with conj A_n)
    K^(z) = exp(i theta / 2) (y_CB - c y_CP (I + c y_PP)^-1 y_PB)      c = cos(theta / 2), y_PP from conj(P_r) P_s
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels.ssm_kernel_dplr import cauchy

BLOCK = 1 << 23  # bytes of Cauchy sums at once on a CPU


def _blocks(C: Tensor, rank: int, length: int) -> Iterator[slice]:
    channels, width, states = C.shape
    sums = (channels + rank) * (1 + rank)
    # plain torch lays out both reciprocals and their squares
    numbers, budget = (sums, BLOCK) if C.device.type == "cpu" else (sums + 4 * states, BLOCK << 5)
    step = max(1, budget // (16 * (length // 2 + 1) * numbers))
    for h in range(0, width, step):
        yield slice(h, h + step)


def _frequencies(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """2 sin(theta / 2), cos(theta / 2), exp(i theta / 2) for the first half of the circle."""
    half = torch.arange(length // 2 + 1, dtype=torch.float64, device=device) * (math.pi / length)
    return 2 * half.sin(), half.cos(), torch.polar(torch.ones_like(half), half)


def _sides(P: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """[C, conj P]: (h, channels + rank, N) and [B, P]: (h, 1 + rank, N)."""
    left = torch.cat([C, P.conj_physical()]).transpose(0, 1)
    return left, torch.cat([B.unsqueeze(0), P]).transpose(0, 1)


def _woodbury(y: Tensor, c: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """y: (h, channels + rank, 1 + rank, F) -> the bracket of K^: (h, channels, F), and for its derivative
    y_CP (I + c y_PP)^-1: (h, channels, rank, F) and (I + c y_PP)^-1 y_PB: (h, rank, F)."""
    core = c * y[:, channels:, 1:]
    rank = core.shape[1]
    core = core + torch.eye(rank, dtype=core.dtype, device=core.device).unsqueeze(-1)
    inverse = core.reciprocal() if rank == 1 else torch.linalg.inv(core.movedim(-1, 1)).movedim(1, -1)
    left = (y[:, :channels, 1:, None] * inverse.unsqueeze(1)).sum(2)
    right = (inverse * y[:, None, channels:, 0]).sum(2)
    return y[:, :channels, 0] - c * (left * y[:, None, channels:, 0]).sum(2), left, right


@torch.library.custom_op("lra::ssm_kernel_dplr", mutates_args=())
def cauchy_kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """A, B: (H, N), P: (rank, H, N), C (I - Abar^length): (channels, H, N), complex128, unit step
    -> (channels, H, length) float64."""
    channels, width, _ = C.shape
    sine, cosine, phase = _frequencies(length, A.device)
    kernel = torch.empty(channels, width, length, dtype=torch.float64, device=A.device)
    for h in _blocks(C, len(P), length):
        left, right = _sides(P[:, h], B[h], C[:, h])
        y = cauchy.sums((left.unsqueeze(2) * right.unsqueeze(1)).flatten(1, 2), A[h], sine, cosine)
        bracket, _, _ = _woodbury(y.view(*left.shape[:2], right.shape[1], -1), cosine, channels)
        kernel[:, h] = torch.fft.irfft(bracket.mul_(phase), length).transpose(0, 1)
    return kernel


@torch.library.custom_op("lra::ssm_kernel_dplr_backward", mutates_args=())
def cauchy_kernel_backward(
    grad: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of A, P, B, C; the Cauchy sums are computed again."""
    channels, length = grad.shape[0], grad.shape[-1]
    sine, cosine, phase = _frequencies(length, A.device)
    dA, dP, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (A, P, B, C))
    # the derivative of irfft: frequencies off the real axis stand for themselves and their conjugates
    weight = torch.full_like(cosine, 2 / length)
    weight[0] = 1 / length
    if length % 2 == 0:
        weight[-1] = 1 / length
    back = weight * phase.conj_physical()
    for h in _blocks(C, len(P), length):
        left, right = _sides(P[:, h], B[h], C[:, h])
        products = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1, 2)
        shape = (*left.shape[:2], right.shape[1], -1)
        _, outer, inner = _woodbury(cauchy.sums(products, A[h], sine, cosine).view(shape), cosine, channels)
        outer, inner = outer.conj_physical_(), inner.conj_physical_()
        g = torch.fft.rfft(grad[:, h].transpose(0, 1).to(torch.float64)).mul_(back)
        over = -cosine * (outer * g.unsqueeze(2)).sum(1)
        dy = g.new_empty(*left.shape[:2], right.shape[1], g.shape[-1])
        dy[:, :channels, 0] = g
        dy[:, :channels, 1:] = -cosine * g.unsqueeze(2) * inner.unsqueeze(1)
        dy[:, channels:, 0] = over
        dy[:, channels:, 1:] = -cosine * over.unsqueeze(2) * inner.unsqueeze(1)
        dproducts, dA[h] = cauchy.sums_backward(dy.flatten(1, 2), products, A[h], sine, cosine)
        dproducts = dproducts.view(*left.shape[:2], right.shape[1], -1)
        dleft = (dproducts * right.conj_physical().unsqueeze(1)).sum(2).transpose(0, 1)
        dright = (dproducts * left.conj_physical().unsqueeze(2)).sum(1).transpose(0, 1)
        dC[:, h], dB[h] = dleft[:channels], dright[0]
        dP[:, h] = dright[1:] + dleft[channels:].conj_physical()
    return dA, dP, dB, dC


@cauchy_kernel.register_fake
def _(A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    return torch.empty(*C.shape[:2], length, dtype=torch.float64, device=A.device)


@cauchy_kernel_backward.register_fake
def _(grad: Tensor, A: Tensor, P: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dA, dP, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (A, P, B, C))
    return dA, dP, dB, dC


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *cauchy_kernel_backward(grad, *ctx.saved_tensors), None


cauchy_kernel = register_autograd(cauchy_kernel, _backward, _setup)


def _flops_of(P: Any, C: Any, length: int, each: int, transforms: int) -> int:
    """Per state and frequency: 18 for the two reciprocals and their sums, `each` per product of sides; then the FFT
    (2.5 n log2 n, real)."""
    (channels, width, states), rank = C, P[0]
    products = (channels + rank) * (1 + rank)
    fft = transforms * channels * 2.5 * length * math.log2(max(length, 2))
    return int(width * (states * (length // 2 + 1) * (18 + each * products) + fft))


@register_flop_formula(torch.ops.lra.ssm_kernel_dplr)
def _flops(A: Any, P: Any, B: Any, C: Any, length: int, *_: Any, **__: Any) -> int:
    return _flops_of(P, C, length, each=8, transforms=1)


@register_flop_formula(torch.ops.lra.ssm_kernel_dplr_backward)
def _flops_backward(grad: Any, A: Any, P: Any, B: Any, C: Any, *_: Any, **__: Any) -> int:
    """The sums once more, then 8 per product for its gradient and 8 for that of A."""
    return _flops_of(P, C, grad[-1], each=8, transforms=0) + _flops_of(P, C, grad[-1], each=16, transforms=1)
