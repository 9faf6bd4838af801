"""ssm_kernel_diag in plain torch on any device: two levels of powers, so that the work is matrix products.

With l = i M + j, Abar^l = P_i Q_j where P_i = Abar^(i M), Q_j = Abar^j, and
K[i, j] = Re sum_n (2 C_n P_in) Q_jn, a real matrix product over 2 N columns.
Tables are built in float64 by repeated squaring and rounded once, just before the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd

BLOCK = 1 << 23  # bytes of tables at once on a CPU


def discretized(A: Tensor, C: Tensor, dt: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """Abar: (H, N) and C Bbar: (channels, H, N), complex128."""
    A, C, step = A.to(torch.complex128), C.to(torch.complex128), dt.to(torch.float64).unsqueeze(-1)
    z = step * A
    if discretization == "bilinear":
        return (1 + z / 2) / (1 - z / 2), C * (step / (1 - z / 2))
    if discretization == "none":
        return torch.exp(z), C
    # (exp(z) - 1) / z has a removable pole: a series near 0, the quotient elsewhere
    near = z.abs() < 1e-3
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    apart = torch.where(near, 1, z)
    return torch.exp(z), C * (step * torch.where(near, series, torch.expm1(apart) / apart))


def _split(channels: int, length: int) -> tuple[int, int]:
    """I and M with I M >= length, and the two tables (channels I and M rows) of about the same size."""
    columns = 1 << max(0, round((channels * length - 1).bit_length() / 2))
    return -(-length // columns), columns


def _powers(x: Tensor, count: int) -> Tensor:
    """x^0 .. x^(count - 1): (h, N) -> (h, count, N)."""
    table = x.new_ones(x.shape[0], count, x.shape[1])
    done = 1
    while done < count:
        more = min(done, count - done)
        table[:, done : done + more] = table[:, :more] * x.unsqueeze(1)
        x, done = x * x, 2 * done
    return table


def _tables(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """P: (h, I, N) and Q: (h, M, N) of the module docstring. M is a power of two."""
    stride = x
    for _ in range(columns.bit_length() - 1):
        stride = stride * stride
    return _powers(stride, rows), _powers(x, columns)


def _real(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Complex (..., N) -> real (..., 2 N), interleaved, in `dtype`. Denormals become 0: products with them are slow."""
    return torch.nn.functional.hardshrink(torch.view_as_real(x).flatten(-2).to(dtype), torch.finfo(dtype).tiny)


def _blocks(weights: Tensor, rows: int, columns: int) -> Iterator[slice]:
    channels, width, states = weights.shape
    bytes_each = 32 * states * ((channels + 1) * rows + 2 * columns)
    step = max(1, (BLOCK if weights.device.type == "cpu" else BLOCK << 6) // bytes_each)
    for h in range(0, width, step):
        yield slice(h, h + step)


@torch.library.custom_op("lra::ssm_kernel_diag", mutates_args=())
def vandermonde(x: Tensor, weights: Tensor, length: int, dtype: torch.dtype, gpu: bool) -> Tensor:
    """2 Re sum_n weights_n x_n^l: x: (H, N), weights: (channels, H, N), complex128 -> (channels, H, length)."""
    channels, width, _ = weights.shape
    if gpu:
        from lra.kernels.ssm_kernel_diag import gpu as kernels

        return kernels.forward(x, weights, length)
    rows, columns = _split(channels, length)
    kernel = torch.empty(channels, width, length, dtype=dtype, device=x.device)
    for h in _blocks(weights, rows, columns):
        P, Q = _tables(x[h], rows, columns)
        left = _real((2 * weights[:, h].transpose(0, 1).unsqueeze(2) * P.unsqueeze(1)).flatten(1, 2), dtype)
        right = _real(Q.conj_physical(), dtype)
        block = torch.bmm(left, right.transpose(1, 2)).view(-1, channels, rows * columns)
        kernel[:, h] = block[..., :length].transpose(0, 1)
    return kernel


@torch.library.custom_op("lra::ssm_kernel_diag_backward", mutates_args=())
def vandermonde_backward(grad: Tensor, x: Tensor, weights: Tensor, gpu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights, complex128.

    sum_j grad_ij Q_j and sum_j grad_ij Q'_j (the derivative j x^(j-1)) are one matrix product; what is left is a sum
    over i, with P'_i = i M x^(i M - 1) = i M P_(i-1) Q_(M-1).
    """
    if gpu:
        from lra.kernels.ssm_kernel_diag import gpu as kernels

        return kernels.backward(grad, x, weights)
    channels, _, states = weights.shape
    length = grad.shape[-1]
    rows, columns = _split(channels, length)
    dx, dweights = torch.empty_like(x), torch.empty_like(weights)
    row, column = (torch.arange(n, device=x.device, dtype=torch.float64).unsqueeze(-1) for n in (rows, columns))
    for h in _blocks(weights, rows, columns):
        P, Q = _tables(x[h], rows, columns)
        slope_P = row * columns * P.roll(1, dims=1) * Q[:, -1:]
        slope_Q = column * Q.roll(1, dims=1)
        padded = torch.nn.functional.pad(grad[:, h].transpose(0, 1), (0, rows * columns - length))
        right = torch.cat([_real(Q, grad.dtype), _real(slope_Q, grad.dtype)], dim=-1)
        sums = torch.bmm(padded.reshape(-1, channels * rows, columns), right).to(torch.float64)
        over_Q, over_slope = torch.view_as_complex(sums.view(-1, channels, rows, 2, states, 2)).unbind(3)
        dweights[:, h] = 2 * (over_Q * P.unsqueeze(1)).sum(2).transpose(0, 1).conj_physical()
        slopes = (over_Q * slope_P.unsqueeze(1) + over_slope * P.unsqueeze(1)).sum(2)
        dx[h] = 2 * (slopes * weights[:, h].transpose(0, 1)).sum(1).conj_physical()
    return dx, dweights


@vandermonde.register_fake
def _(x: Tensor, weights: Tensor, length: int, dtype: torch.dtype, gpu: bool) -> Tensor:
    return torch.empty(*weights.shape[:2], length, dtype=dtype, device=x.device)


@vandermonde_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, gpu: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.gpu = inputs[4]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *vandermonde_backward(grad, *ctx.saved_tensors, ctx.gpu), None, None, None


vandermonde = register_autograd(vandermonde, _backward, _setup)


@register_flop_formula(torch.ops.lra.ssm_kernel_diag)
def _flops(x: Any, weights: Any, length: int, *_: Any, **__: Any) -> int:
    channels, width, states = weights
    return 4 * channels * width * states * length


@register_flop_formula(torch.ops.lra.ssm_kernel_diag_backward)
def _flops_backward(grad: Any, x: Any, weights: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(x, weights, grad[-1])
