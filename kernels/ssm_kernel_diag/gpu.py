"""ssm_kernel_diag in Triton: two levels of powers as in cpu.py, formed inside the program that multiplies them.

A program holds R M taps of one channel. Exponents are reduced in float64 (l times the angle loses too many digits in
float32), their cosines and exponentials taken in float32, and products as three TF32 ones each. Nothing of size
H N sqrt(length) reaches memory.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._dispatch import interpreting
from lra.kernels._launch import exact

TURN = math.tau
LOG_OF_ZERO = -1e4  # stands for log |x| at x = 0: finite, so that times 0 it is 0, and its exp is 0


@triton.jit
def _power(exponent, log_size, angle, TURN: tl.constexpr):
    """x^exponent from log |x| and arg x in float64: real and imaginary part in float32, broadcast over both."""
    turns = exponent * (angle / TURN)
    turns = turns - tl.floor(turns + 0.5)
    size = tl.exp((exponent * log_size).to(tl.float32))
    phase = (turns * TURN).to(tl.float32)
    return size * tl.cos(phase), size * tl.sin(phase)


@triton.jit
def _forward(
    x_log, x_angle, weights, kernel, width, states, length, TURN: tl.constexpr, PRECISION: tl.constexpr,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """kernel[c, h, l] for R M taps: 2 Re sum_n (w_n x_n^(base + i M)) x_n^j."""
    row = tl.program_id(1).to(tl.int64)  # c H + h
    h = row % width
    base = tl.program_id(0) * R * M
    i, j, n = tl.arange(0, R), tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros([R, M], tl.float32)
    for first in range(0, states, N):
        real = first + n < states
        log_size = tl.load(x_log + h * states + first + n, real, 0.0)
        angle = tl.load(x_angle + h * states + first + n, real, 0.0)
        wr = tl.load(weights + 2 * (row * states + first + n), real, 0.0)
        wi = tl.load(weights + 2 * (row * states + first + n) + 1, real, 0.0)
        pr, pi = _power((base + i * M)[:, None].to(tl.float64), log_size[None, :], angle[None, :], TURN)
        qr, qi = _power(j[None, :].to(tl.float64), log_size[:, None], angle[:, None], TURN)
        left_r, left_i = wr[None, :] * pr - wi[None, :] * pi, wr[None, :] * pi + wi[None, :] * pr
        total += tl.dot(left_r, qr, input_precision=PRECISION) - tl.dot(left_i, qi, input_precision=PRECISION)
    at = base + i[:, None] * M + j[None, :]
    tl.store(kernel + row * length + at, 2 * total, at < length)


@triton.jit
def _backward(
    grad, x_log, x_angle, weights, grad_x, grad_weights, channels, width, states, length, TURN: tl.constexpr,
    PRECISION: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Conjugates of the gradients of x and w for N states of one channel: sums over all taps, so no atomics.

    The derivative of x^(b + j) is P' Q + P Q' with P' = b x^(b - 1) and Q' = j x^(j - 1), which x = 0 does not upset.
    """
    h = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * N + tl.arange(0, N)
    real = n < states
    i, j = tl.arange(0, R), tl.arange(0, M)
    log_size = tl.load(x_log + h * states + n, real, 0.0)
    angle = tl.load(x_angle + h * states + n, real, 0.0)
    qr, qi = _power(j[:, None].to(tl.float64), log_size[None, :], angle[None, :], TURN)
    before = tl.maximum(j - 1, 0)[:, None].to(tl.float64)
    sr, si = _power(before, log_size[None, :], angle[None, :], TURN)
    sr, si = j[:, None] * sr, j[:, None] * si
    xr, xi = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for c in range(channels):
        row = c * width + h
        wr = tl.load(weights + 2 * (row * states + n), real, 0.0)
        wi = tl.load(weights + 2 * (row * states + n) + 1, real, 0.0)
        gwr, gwi = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
        ar, ai = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
        for base in range(0, length, R * M):
            at = base + i[:, None] * M + j[None, :]
            g = tl.load(grad + row * length + at, at < length, 0.0)
            b = base + i * M
            pr, pi = _power(b[:, None].to(tl.float64), log_size[None, :], angle[None, :], TURN)
            back = tl.maximum(b - 1, 0)[:, None].to(tl.float64)
            tr, ti = _power(back, log_size[None, :], angle[None, :], TURN)
            tr, ti = b[:, None] * tr, b[:, None] * ti
            ur, ui = tl.dot(g, qr, input_precision=PRECISION), tl.dot(g, qi, input_precision=PRECISION)
            vr, vi = tl.dot(g, sr, input_precision=PRECISION), tl.dot(g, si, input_precision=PRECISION)
            gwr += tl.sum(ur * pr - ui * pi, 0)
            gwi += tl.sum(ur * pi + ui * pr, 0)
            ar += tl.sum(ur * tr - ui * ti + vr * pr - vi * pi, 0)
            ai += tl.sum(ur * ti + ui * tr + vr * pi + vi * pr, 0)
        tl.store(grad_weights + 2 * (row * states + n), 2 * gwr, real)
        tl.store(grad_weights + 2 * (row * states + n) + 1, -2 * gwi, real)
        xr += wr * ar - wi * ai
        xi += wr * ai + wi * ar
    tl.store(grad_x + 2 * (h * states + n), 2 * xr, real)
    tl.store(grad_x + 2 * (h * states + n) + 1, -2 * xi, real)


def _polar(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.abs().log().clamp(min=LOG_OF_ZERO).contiguous(), x.angle().contiguous()


def _single(x: Tensor) -> Tensor:
    return torch.view_as_real(x.to(torch.complex64).contiguous())


def _tile(length: int) -> int:
    """Rows and columns of taps in a program."""
    return 16 if interpreting() or length <= 1024 else 64


def forward(x: Tensor, weights: Tensor, length: int) -> Tensor:
    """Arguments of `cpu.vandermonde` -> (channels, H, length) float32."""
    channels, width, states = weights.shape
    kernel = torch.empty(channels, width, length, dtype=torch.float32, device=x.device)
    tile = _tile(length)
    grid = (triton.cdiv(length, tile * tile), channels * width)
    arguments = (*_polar(x), _single(weights), kernel, width, states, length)
    with torch.cuda.device_of(weights):
        _forward[grid](
            *arguments, TURN=TURN, PRECISION=exact(weights), R=tile, M=tile, N=16 if states <= 16 else 32, num_warps=4
        )
    return kernel


def backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights, complex128."""
    channels, width, states = weights.shape
    grad_x, grad_weights = (torch.empty_like(_single(t)) for t in (x, weights))
    tile = _tile(grad.shape[-1])
    grid = (triton.cdiv(states, 16), width)
    arguments = (grad.contiguous(), *_polar(x), _single(weights), grad_x, grad_weights)
    sizes = (channels, width, states, grad.shape[-1])
    with torch.cuda.device_of(weights):
        _backward[grid](
            *arguments, *sizes, TURN=TURN, PRECISION=exact(weights), R=tile, M=tile, N=16, num_warps=8, num_stages=1
        )
    return torch.view_as_complex(grad_x).to(x.dtype), torch.view_as_complex(grad_weights).to(x.dtype)
