"""`recurrent_cell` in Triton: one program takes ROWS rows of the batch through all steps, its state in registers, and
reads the recurrent weights from the cache at every step. H is at most 128: the weights of a gate are one tile.

The layout of `kept` and `delta` is that of `cpu.py`; the gradients of the weights follow from them outside, in one
matrix product. Arithmetic is in float32, products as three TF32 ones each. Widths, and strides of `kept`, come in units
of ALIGN numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lra.kernels._launch import alignment

ROWS = 16  # the fewest a tile product takes
ELMAN, RELU, LSTM, GRU, RESET_FIRST, RHN = (tl.constexpr(n) for n in range(6))
FAMILIES = {
    "elman": ELMAN, "elman_relu": RELU, "lstm": LSTM, "lstm_coupled": LSTM, "gru": GRU, "gru_coupled": GRU,
    "gru_reset_first": RESET_FIRST, "mgu": RESET_FIRST, "rhn": RHN,
}  # fmt: skip


@triton.jit
def _tanh(x):
    # near 0 the quotient loses digits: polynomial of the Cephes library for |x| < 0.625
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    size = tl.abs(x)
    far = 1 - 2 / (tl.exp(2 * tl.minimum(size, 40.0)) + 1)
    return tl.where(size < 0.625, p * square * x + x, tl.where(x < 0, -far, far))


@triton.jit
def _product(v, weights, gate, d):
    """v (R, H) times the gate's (H, H) matrix, of which at most 64 rows are held in registers at once."""
    R: tl.constexpr = v.shape[0]
    H: tl.constexpr = v.shape[1]
    if H <= 64:
        at = (gate * H + d[:, None]) * H + d[None, :]
        total = tl.dot(v, tl.load(weights + at), input_precision="tf32x3")
    else:
        low, high = tl.split(tl.trans(tl.reshape(v, [R, 2, H // 2]), (0, 2, 1)))
        rows, total = tl.arange(0, H // 2), tl.zeros([R, H], tl.float32)
        for half in range(0, 2):  # a loop, so that the compiler does not read both halves at once
            at = (gate * H + half * (H // 2) + rows[:, None]) * H + d[None, :]
            part = tl.where(half == 0, low, high)
            total += tl.dot(part, tl.load(weights + at), input_precision="tf32x3")
    return total


@triton.jit
def _sum(v, x_t, weights, b, gate, width, d, inside, mask):
    """What gate `gate` is of: x + U v + b."""
    bias = tl.load(b + gate * width + d, inside, 0.0)[None, :]
    return tl.load(x_t + gate * width, mask, 0.0) + _product(v, weights, gate, d) + bias


@triton.jit
def _forward(
    x, weights, b, peephole, h0, c0, h, c_last, kept, batch, length, width, kept_row, kept_time, weights_time,
    FAMILY: tl.constexpr, G: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    width, kept_row, kept_time = width * ALIGN, kept_row * ALIGN, kept_time * ALIGN
    row, d = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.arange(0, H)
    inside = d < width
    mask = (row < batch)[:, None] & inside[None, :]
    state = tl.load(h0 + row[:, None] * width + d[None, :], mask, 0.0)
    cell = state
    if FAMILY == LSTM:
        cell = tl.load(c0 + row[:, None] * width + d[None, :], mask, 0.0)
        p_i = tl.load(peephole + d, inside, 0.0)[None, :]
        p_f = tl.load(peephole + width + d, inside, 0.0)[None, :]
        p_o = tl.load(peephole + (G - 2) * width + d, inside, 0.0)[None, :]
    inputs = 2 if FAMILY == RHN else G
    for t in range(length):
        x_t = x + (row * length + t)[:, None] * (inputs * width) + d[None, :]
        keep = kept + (row * kept_row + t * kept_time)[:, None] + d[None, :]
        weights += weights_time
        if FAMILY == ELMAN:
            state = _tanh(_sum(state, x_t, weights, b, 0, width, d, inside, mask))
        elif FAMILY == RELU:
            state = tl.maximum(_sum(state, x_t, weights, b, 0, width, d, inside, mask), 0.0)
        elif FAMILY == LSTM:
            i = tl.sigmoid(_sum(state, x_t, weights, b, 0, width, d, inside, mask) + p_i * cell)
            f = 1 - i
            if G == 4:
                f = tl.sigmoid(_sum(state, x_t, weights, b, 1, width, d, inside, mask) + p_f * cell)
            g = _tanh(_sum(state, x_t, weights, b, G - 2, width, d, inside, mask))
            cell = f * cell + i * g
            o = tl.sigmoid(_sum(state, x_t, weights, b, G - 1, width, d, inside, mask) + p_o * cell)
            state = o * _tanh(cell)
            tl.store(keep, i, mask)
            tl.store(keep + width, f, mask)
            tl.store(keep + 2 * width, g, mask)
            tl.store(keep + 3 * width, o, mask)
            tl.store(keep + 4 * width, cell, mask)
        elif FAMILY == GRU:
            z = tl.sigmoid(_sum(state, x_t, weights, b, G - 2, width, d, inside, mask))
            r = 1 - z
            if G == 3:
                r = tl.sigmoid(_sum(state, x_t, weights, b, 0, width, d, inside, mask))
            bias = tl.load(b + (G - 1) * width + d, inside, 0.0)[None, :]
            m = _product(state, weights, G - 1, d) + bias
            n = _tanh(tl.load(x_t + (G - 1) * width, mask, 0.0) + r * m)
            state = n + z * (state - n)
            tl.store(keep, r, mask)
            tl.store(keep + width, z, mask)
            tl.store(keep + 2 * width, n, mask)
            tl.store(keep + 3 * width, m, mask)
        elif FAMILY == RESET_FIRST:
            r = tl.sigmoid(_sum(state, x_t, weights, b, 0, width, d, inside, mask))
            z = 1 - r
            if G == 3:
                z = tl.sigmoid(_sum(state, x_t, weights, b, 1, width, d, inside, mask))
            n = _tanh(_sum(r * state, x_t, weights, b, G - 1, width, d, inside, mask))
            state = n + z * (state - n)
            tl.store(keep, r, mask)
            tl.store(keep + width, z, mask)
            tl.store(keep + 2 * width, n, mask)
        else:
            for layer in tl.static_range(0, G, 2):
                seen = mask & (layer == 0)
                shift = x_t - layer * width
                a = _tanh(_sum(state, shift, weights, b, layer, width, d, inside, seen))
                s = tl.sigmoid(_sum(state, shift, weights, b, layer + 1, width, d, inside, seen))
                state += s * (a - state)
                tl.store(keep + layer * width, a, mask)
                tl.store(keep + (layer + 1) * width, s, mask)
        tl.store(h + (row * length + t)[:, None] * width + d[None, :], state, mask)
    if FAMILY == LSTM:
        tl.store(c_last + row[:, None] * width + d[None, :], cell, mask)


@triton.jit
def _backward(
    grad, grad_c, weights, peephole, h0, c0, h, kept, delta, grad_h0, grad_c0, batch, length, width, numbers,
    weights_time, FAMILY: tl.constexpr, G: tl.constexpr, ALIGN: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    width = width * ALIGN
    row, d = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.arange(0, H)
    inside = d < width
    mask = (row < batch)[:, None] & inside[None, :]
    first = row[:, None] * width + d[None, :]
    back = tl.zeros([R, H], tl.float32)
    to_c = back
    if FAMILY == LSTM:
        to_c = tl.load(grad_c + first, mask, 0.0)
        p_i = tl.load(peephole + d, inside, 0.0)[None, :]
        p_f = tl.load(peephole + width + d, inside, 0.0)[None, :]
        p_o = tl.load(peephole + (G - 2) * width + d, inside, 0.0)[None, :]
    for step in range(length):
        t = length - 1 - step
        at = (row * length + t)[:, None]
        keep = kept + at * (numbers * width) + d[None, :]
        own = delta + at * (G * width) + d[None, :]
        to_h = back + tl.load(grad + at * width + d[None, :], mask, 0.0)
        # where, not &: Triton 3.9's interpreter makes a number of mask & scalar and refuses it as a mask
        earlier, start = tl.where(t > 0, mask, False), tl.where(t == 0, mask, False)
        weights += weights_time
        if FAMILY != LSTM:
            before = tl.load(h + (at - 1) * width + d[None, :], earlier, 0.0)
            before += tl.load(h0 + first, start, 0.0)
        if FAMILY == ELMAN:
            now = tl.load(h + at * width + d[None, :], mask, 0.0)
            to_s = to_h * (1 - now * now)
            tl.store(own, to_s, mask)
            back = _product(to_s, weights, 0, d)
        elif FAMILY == RELU:
            to_s = tl.where(tl.load(h + at * width + d[None, :], mask, 0.0) > 0, to_h, 0.0)
            tl.store(own, to_s, mask)
            back = _product(to_s, weights, 0, d)
        elif FAMILY == LSTM:
            i, f = tl.load(keep, mask, 0.0), tl.load(keep + width, mask, 0.0)
            g, o = tl.load(keep + 2 * width, mask, 0.0), tl.load(keep + 3 * width, mask, 0.0)
            c = _tanh(tl.load(keep + 4 * width, mask, 0.0))
            before = tl.load(keep + 4 * width - numbers * width, earlier, 0.0)
            before += tl.load(c0 + first, start, 0.0)
            to_o = to_h * c * o * (1 - o)
            to_c += to_h * o * (1 - c * c) + to_o * p_o
            to_g = to_c * i * (1 - g * g)
            to_i = to_c * (g if G == 4 else g - before) * i * (1 - i)
            back = _product(to_i, weights, 0, d)
            back += _product(to_g, weights, G - 2, d)
            back += _product(to_o, weights, G - 1, d)
            tl.store(own, to_i, mask)
            tl.store(own + (G - 2) * width, to_g, mask)
            tl.store(own + (G - 1) * width, to_o, mask)
            if G == 4:
                to_f = to_c * before * f * (1 - f)
                back += _product(to_f, weights, 1, d)
                tl.store(own + width, to_f, mask)
                to_c = to_c * f + to_i * p_i + to_f * p_f
            else:
                to_c = to_c * f + to_i * p_i
        elif FAMILY == RHN:
            back = to_h
            for layer in tl.static_range(G - 2, -1, -2):
                state = before
                for below in tl.static_range(0, layer, 2):
                    a, s = tl.load(keep + below * width, mask, 0.0), tl.load(keep + (below + 1) * width, mask, 0.0)
                    state += s * (a - state)
                a, s = tl.load(keep + layer * width, mask, 0.0), tl.load(keep + (layer + 1) * width, mask, 0.0)
                to_a, to_s = back * s * (1 - a * a), back * (a - state) * s * (1 - s)
                tl.store(own + layer * width, to_a, mask)
                tl.store(own + (layer + 1) * width, to_s, mask)
                back = back * (1 - s) + _product(to_a, weights, layer, d)
                back += _product(to_s, weights, layer + 1, d)
        else:
            r, z = tl.load(keep, mask, 0.0), tl.load(keep + width, mask, 0.0)
            n = tl.load(keep + 2 * width, mask, 0.0)
            to_n = to_h * (1 - z) * (1 - n * n)
            to_z = to_h * (before - n)
            back = to_h * z
            if FAMILY == GRU:
                to_r = to_n * tl.load(keep + 3 * width, mask, 0.0)
                back += _product(to_n * r, weights, G - 1, d)
            else:
                to_shown = _product(to_n, weights, G - 1, d)
                to_r = to_shown * before
                back += to_shown * r
            if G == 3:
                to_r, to_z = to_r * r * (1 - r), to_z * z * (1 - z)
                tl.store(own, to_r, mask)
                tl.store(own + width, to_z, mask)
                back += _product(to_r, weights, 0, d)
                back += _product(to_z, weights, 1, d)
            else:
                # one gate: z of a gru, r of a cell that resets first; the other is 1 minus it
                to_gate = (to_z - to_r if FAMILY == GRU else to_r - to_z) * r * z
                tl.store(own, to_gate, mask)
                back += _product(to_gate, weights, 0, d)
            tl.store(own + (G - 1) * width, to_n, mask)
    tl.store(grad_h0 + first, back, mask)
    if FAMILY == LSTM:
        tl.store(grad_c0 + first, to_c, mask)


@triton.jit
def _diagonal_forward(x, u, b, h0, h, length, width, ALIGN: tl.constexpr, D: tl.constexpr):
    width = width * ALIGN
    i, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    factor, bias = tl.load(u + d, inside, 0.0), tl.load(b + d, inside, 0.0)
    state = tl.load(h0 + i * width + d, inside, 0.0)
    for t in range(length):
        at = (i * length + t) * width + d
        state = tl.maximum(tl.load(x + at, inside, 0.0) + factor * state + bias, 0.0)
        tl.store(h + at, state, inside)


@triton.jit
def _diagonal_backward(
    grad, u, h0, h, delta, grad_h0, to_u, to_b, length, width, ALIGN: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    width = width * ALIGN
    i, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    factor = tl.load(u + d, inside, 0.0)
    now = tl.load(h + (i * length + length - 1) * width + d, inside, 0.0)
    carry, of_u, of_b = tl.zeros([D], tl.float32), tl.zeros([D], tl.float64), tl.zeros([D], tl.float64)
    for step in range(length):
        t = length - 1 - step
        at = (i * length + t) * width + d
        earlier, start = tl.where(t > 0, inside, False), tl.where(t == 0, inside, False)
        before = tl.load(h + at - width, earlier, 0.0) + tl.load(h0 + i * width + d, start, 0.0)
        to_s = tl.where(now > 0, tl.load(grad + at, inside, 0.0) + carry, 0.0)
        tl.store(delta + at, to_s, inside)
        of_u += (to_s * before).to(tl.float64)
        of_b += to_s.to(tl.float64)
        carry, now = to_s * factor, before
    tl.store(grad_h0 + i * width + d, carry, inside)
    tl.store(to_u + i * width + d, of_u, inside)
    tl.store(to_b + i * width + d, of_b, inside)


def tiles(weights: Tensor, size: int) -> Tensor:
    """Matrices (G, H, H) with zeros up to whole tiles, which are read in wide pieces whatever H is."""
    missing = size - weights.shape[-1]
    return F.pad(weights, (0, missing, 0, missing)).contiguous()


def _options(cell: str, gates: int, batch: int, width: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    tile = max(16, triton.next_power_of_2(width))
    # one stage: weights read ahead, 64 KiB a gate, would not fit into shared memory
    options = {"FAMILY": FAMILIES[cell], "G": gates, "R": ROWS, "H": tile, "num_warps": 8 if tile > 32 else 4}
    options |= {"num_stages": 1, "ALIGN": alignment(width)}
    return (triton.cdiv(batch, ROWS),), options


def _diagonal_options(batch: int, width: int) -> tuple[tuple[int, ...], dict[str, Any]]:
    block = min(128, triton.next_power_of_2(width))
    return (triton.cdiv(width, block), batch), {"ALIGN": alignment(width), "D": block, "num_warps": 4}


def forward(
    x: Tensor, U: Tensor, b: Tensor, peephole: Tensor, h0: Tensor, c0: Tensor, h: Tensor, c_last: Tensor, kept: Tensor,
    cell: str,
) -> None:  # fmt: skip
    """Fill h, c_last and kept. x: (B, L, G, H); kept: (B, L or 1, numbers, H). All contiguous, float32."""
    batch, length, width = h.shape
    with torch.cuda.device_of(x):
        if cell == "indrnn":
            grid, options = _diagonal_options(batch, width)
            _diagonal_forward[grid](x, U, b, h0, h, length, width // options["ALIGN"], **options)
            return
        grid, options = _options(cell, len(U) // width, batch, width)
        # contiguous along the outputs, so that a row of the tile is one piece of memory
        weights = tiles(U.view(-1, width, width).mT, options["H"])
        strides = kept.stride(0), kept.stride(1) if kept.shape[1] > 1 else 0
        units = [size // options["ALIGN"] for size in (width, *strides)]
        _forward[grid](x, weights, b, peephole, h0, c0, h, c_last, kept, batch, length, *units, 0, **options)


def backward(
    grad: Tensor, grad_c: Tensor, U: Tensor, peephole: Tensor, h0: Tensor, c0: Tensor, h: Tensor, kept: Tensor,
    delta: Tensor, grad_h0: Tensor, grad_c0: Tensor, sums: Tensor, cell: str,
) -> None:  # fmt: skip
    """Fill delta (B, L, G, H), grad_h0, grad_c0 and, for indrnn, sums (2, B, H): gradients of U and b by row."""
    batch, length, width = h.shape
    with torch.cuda.device_of(h):
        if cell == "indrnn":
            grid, options = _diagonal_options(batch, width)
            _diagonal_backward[grid](
                grad, U, h0, h, delta, grad_h0, *sums, length, width // options["ALIGN"], **options
            )  # fmt: skip
            return
        grid, options = _options(cell, delta.shape[2], batch, width)
        weights = tiles(U.view(-1, width, width), options["H"])
        _backward[grid](
            grad, grad_c, weights, peephole, h0, c0, h, kept, delta, grad_h0, grad_c0, batch, length,
            width // options["ALIGN"], kept.shape[2], 0, **options,
        )  # fmt: skip
