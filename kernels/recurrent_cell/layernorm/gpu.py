"""`lstm_layernorm` in Triton, built as the other cells in `recurrent_cell/gpu.py`; `kept`, `norm` as in `cpu.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._launch import alignment
from lra.kernels.recurrent_cell.gpu import ROWS, _product, _tanh, tiles

EPSILON = tl.constexpr(1e-5)


@triton.jit
def _row(x, d, inside):
    return tl.load(x + d, inside, 0.0)[None, :]


@triton.jit
def _back_through(q, normal, rate, mean, along):
    """Gradient of what was normalised; q: that of the normalised, mean and along: means of q and of q times it."""
    return rate[:, None] * (q - mean[:, None] - normal * along[:, None])


@triton.jit
def _forward(
    x, weights, b, norm, h0, c0, h, c_last, kept, batch, length, width, kept_row, kept_time, weights_time,
    CARRIED: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    width, kept_row, kept_time = width * ALIGN, kept_row * ALIGN, kept_time * ALIGN
    row, d = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.arange(0, H)
    inside = d < width
    real = row < batch
    mask = real[:, None] & inside[None, :]
    state = tl.load(h0 + row[:, None] * width + d[None, :], mask, 0.0)
    cell = tl.load(c0 + row[:, None] * width + d[None, :], mask, 0.0)
    for t in range(length):
        # weights_time is 0: the weights are read at every step, not held in registers they would spill from
        x_t = x + (row * length + t)[:, None] * (4 * width) + d[None, :]
        at = kept + row * kept_row + t * kept_time
        keep = at[:, None] + d[None, :]
        weights += weights_time
        i, f = _product(state, weights, 0, d), _product(state, weights, 1, d)
        g, o = _product(state, weights, 2, d), _product(state, weights, 3, d)
        mean = tl.sum(i + f + g + o, 1) / (4 * width)
        i, f = tl.where(inside[None, :], i - mean[:, None], 0.0), tl.where(inside[None, :], f - mean[:, None], 0.0)
        g, o = tl.where(inside[None, :], g - mean[:, None], 0.0), tl.where(inside[None, :], o - mean[:, None], 0.0)
        rate = 1 / tl.sqrt(tl.sum(i * i + f * f + g * g + o * o, 1) / (4 * width) + EPSILON)
        i, f, g, o = i * rate[:, None], f * rate[:, None], g * rate[:, None], o * rate[:, None]
        tl.store(keep + 6 * width, i, mask)
        tl.store(keep + 7 * width, f, mask)
        tl.store(keep + 8 * width, g, mask)
        tl.store(keep + 9 * width, o, mask)
        tl.store(at + 10 * width, rate, real)
        i = i * _row(norm, d, inside) + _row(b, d, inside) + tl.load(x_t, mask, 0.0)
        f = f * _row(norm + width, d, inside) + _row(b + width, d, inside) + tl.load(x_t + width, mask, 0.0)
        g = g * _row(norm + 2 * width, d, inside) + _row(b + 2 * width, d, inside) + tl.load(x_t + 2 * width, mask, 0.0)
        o = o * _row(norm + 3 * width, d, inside) + _row(b + 3 * width, d, inside) + tl.load(x_t + 3 * width, mask, 0.0)
        i, f, g, o = tl.sigmoid(i), tl.sigmoid(f), _tanh(g), tl.sigmoid(o)
        cell = f * cell + i * g
        even = tl.where(inside[None, :], cell - (tl.sum(cell, 1) / width)[:, None], 0.0)
        rate = 1 / tl.sqrt(tl.sum(even * even, 1) / width + EPSILON)
        even *= rate[:, None]
        shown = even * _row(norm + 4 * width, d, inside) + _row(norm + 5 * width, d, inside)
        if CARRIED:
            cell = shown
        state = o * _tanh(shown)
        tl.store(keep, i, mask)
        tl.store(keep + width, f, mask)
        tl.store(keep + 2 * width, g, mask)
        tl.store(keep + 3 * width, o, mask)
        tl.store(keep + 4 * width, cell, mask)
        tl.store(keep + 5 * width, even, mask)
        tl.store(at + 10 * width + 1, rate, real)
        tl.store(h + (row * length + t)[:, None] * width + d[None, :], state, mask)
    tl.store(c_last + row[:, None] * width + d[None, :], cell, mask)


@triton.jit
def _backward(
    grad, grad_c, weights, norm, c0, kept, delta, through, grad_h0, grad_c0, grad_gain, grad_offset, batch,
    length, width, weights_time, CARRIED: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    width = width * ALIGN
    row, d = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.arange(0, H)
    inside = d < width
    real = row < batch
    mask = real[:, None] & inside[None, :]
    first = row[:, None] * width + d[None, :]
    back, behind = tl.zeros([R, H], tl.float32), tl.load(grad_c + first, mask, 0.0)
    of_gain, of_offset = tl.zeros([R, H], tl.float64), tl.zeros([R, H], tl.float64)
    for step in range(length):
        t = length - 1 - step
        at = kept + (row * length + t) * (11 * width)
        keep, own = at[:, None] + d[None, :], delta + (row * length + t)[:, None] * (4 * width) + d[None, :]
        weights += weights_time
        i, f = tl.load(keep, mask, 0.0), tl.load(keep + width, mask, 0.0)
        g, o = tl.load(keep + 2 * width, mask, 0.0), tl.load(keep + 3 * width, mask, 0.0)
        earlier, start = tl.where(t > 0, mask, False), tl.where(t == 0, mask, False)
        before = tl.load(keep - 7 * width, earlier, 0.0) + tl.load(c0 + first, start, 0.0)
        even = tl.load(keep + 5 * width, mask, 0.0)
        gain = _row(norm + 4 * width, d, inside)
        shown = _tanh(even * gain + _row(norm + 5 * width, d, inside))
        to_h = back + tl.load(grad + (row * length + t)[:, None] * width + d[None, :], mask, 0.0)
        to_o = to_h * shown * o * (1 - o)
        to_shown = to_h * o * (1 - shown * shown)
        if CARRIED:
            to_shown += behind
        of_gain += (to_shown * even).to(tl.float64)
        of_offset += to_shown.to(tl.float64)
        q = to_shown * gain
        rate = tl.load(at + 10 * width + 1, real, 0.0)
        to_c = _back_through(q, even, rate, tl.sum(q, 1) / width, tl.sum(q * even, 1) / width)
        if not CARRIED:
            to_c += behind
        to_i, to_f = to_c * g * i * (1 - i), to_c * before * f * (1 - f)
        to_g = to_c * i * (1 - g * g)
        behind = to_c * f
        tl.store(own, to_i, mask)
        tl.store(own + width, to_f, mask)
        tl.store(own + 2 * width, to_g, mask)
        tl.store(own + 3 * width, to_o, mask)
        to_i, to_f = to_i * _row(norm, d, inside), to_f * _row(norm + width, d, inside)
        to_g, to_o = to_g * _row(norm + 2 * width, d, inside), to_o * _row(norm + 3 * width, d, inside)
        i, f = tl.load(keep + 6 * width, mask, 0.0), tl.load(keep + 7 * width, mask, 0.0)
        g, o = tl.load(keep + 8 * width, mask, 0.0), tl.load(keep + 9 * width, mask, 0.0)
        mean = tl.sum(to_i + to_f + to_g + to_o, 1) / (4 * width)
        along = tl.sum(to_i * i + to_f * f + to_g * g + to_o * o, 1) / (4 * width)
        rate = tl.load(at + 10 * width, real, 0.0)
        # columns past the width meet zero weights
        i, f = _back_through(to_i, i, rate, mean, along), _back_through(to_f, f, rate, mean, along)
        g, o = _back_through(to_g, g, rate, mean, along), _back_through(to_o, o, rate, mean, along)
        own = through + (row * length + t)[:, None] * (4 * width) + d[None, :]
        tl.store(own, i, mask)
        tl.store(own + width, f, mask)
        tl.store(own + 2 * width, g, mask)
        tl.store(own + 3 * width, o, mask)
        back = _product(i, weights, 0, d) + _product(f, weights, 1, d)
        back += _product(g, weights, 2, d) + _product(o, weights, 3, d)
    tl.store(grad_h0 + first, back, mask)
    tl.store(grad_c0 + first, behind, mask)
    tl.store(grad_gain + first, of_gain, mask)
    tl.store(grad_offset + first, of_offset, mask)


def _options(batch: int, width: int, cell: str) -> tuple[tuple[int], dict[str, int]]:
    tile = max(16, triton.next_power_of_2(width))
    # one stage, as in recurrent_cell/gpu.py
    options = {"R": ROWS, "H": tile, "num_warps": 8, "num_stages": 1, "CARRIED": cell.endswith("carried")}
    options["ALIGN"] = alignment(width)
    return (triton.cdiv(batch, ROWS),), options


def forward(
    x: Tensor, U: Tensor, b: Tensor, norm: Tensor, h0: Tensor, c0: Tensor, h: Tensor, c_last: Tensor, kept: Tensor,
    cell: str,
) -> None:  # fmt: skip
    """Fill h, c_last and kept. x: (B, L, 4, H); kept: (B, L or 1, 11, H). All contiguous, float32."""
    batch, length, width = h.shape
    grid, options = _options(batch, width, cell)
    weights = tiles(U.view(-1, width, width).mT, options["H"])
    strides = kept.stride(0), kept.stride(1) if kept.shape[1] > 1 else 0
    units = [size // options["ALIGN"] for size in (width, *strides)]
    with torch.cuda.device_of(x):
        _forward[grid](x, weights, b, norm, h0, c0, h, c_last, kept, batch, length, *units, 0, **options)


def backward(
    grad: Tensor, grad_c: Tensor, U: Tensor, norm: Tensor, h0: Tensor, c0: Tensor, h: Tensor, kept: Tensor,
    delta: Tensor, grad_h0: Tensor, grad_c0: Tensor, sums: Tensor, cell: str,
) -> None:  # fmt: skip
    """Fill delta (2, B, L, 4, H), gradients behind and before the norm of U h, grad_h0, grad_c0 and sums (6, B, H),
    gradients of `norm` by row."""
    batch, length, width = grad.shape
    grid, options = _options(batch, width, cell)
    weights = tiles(U.view(-1, width, width), options["H"])
    with torch.cuda.device_of(grad):
        _backward[grid](
            grad, grad_c, weights, norm, c0, kept, *delta, grad_h0, grad_c0, *sums[4:], batch, length,
            width // options["ALIGN"], 0, **options,
        )  # fmt: skip
    sums[:4] = (delta[0] * kept[:, :, 6:10]).sum(1).transpose(0, 1)
