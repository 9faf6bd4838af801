"""Compiled time loops of `lstm_layernorm`, laid out as those of `recurrent_cell/cpu.py`.

`kept` (B, L, 11, H): i, f, g, o, the c that is carried, the normalised c, the normalised U h of each gate, and a row
that starts with 1 / deviation of U h and of c. `norm` (6, H): gains of i, f, g, o, gain and offset of c.

Backward of n = (v - mean) / deviation, for the gradient q of n: (q - mean(q) - n mean(q n)) / deviation.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lra.kernels.recurrent_cell.activations import sigmoid, tanh
from lra.kernels.recurrent_cell.cpu import BLOCK, RUN, _copy, _flush, compiled
from lra.kernels.recurrent_cell.product import multiply

EPSILON = 1e-5
# a sum in the order written would be one addition after the other
summed = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})


@summed
def _sum(v):
    total = v.dtype.type(0)
    for d in range(len(v)):
        total += v[d]
    return total


@summed
def _squares(v, mean):
    total = v.dtype.type(0)
    for d in range(len(v)):
        total += (v[d] - mean) * (v[d] - mean)
    return total


@summed
def _dot(v, w):
    total = v.dtype.type(0)
    for d in range(len(v)):
        total += v[d] * w[d]
    return total


@compiled
def _normalise(v, out):
    """out = (v - mean) / deviation; returns 1 / deviation."""
    number = v.dtype.type
    mean = _sum(v) / number(len(v))
    rate = number(1) / np.sqrt(_squares(v, mean) / number(len(v)) + number(EPSILON))
    for d in range(len(v)):
        out[d] = (v[d] - mean) * rate
    return rate


@compiled
def _backward_of_norm(q, normal, rate, out):
    number = q.dtype.type
    mean, along = _sum(q) / number(len(q)), _dot(q, normal) / number(len(q))
    for d in range(len(q)):
        out[d] = rate * (q[d] - mean - normal[d] * along)


@compiled
def _gate(gate, x, normal, gain, b):
    for d in range(len(gate)):
        gate[d] = sigmoid(x[d] + gain[d] * normal[d] + b[d])


@compiled
def lstm_forward(start, stop, x, packed, b, norm, h0, c0, h, c_last, kept, carried):
    width, steps = h.shape[2], kept.shape[1]
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        state, cell = h0[lo : lo + rows].copy(), c0[lo : lo + rows].copy()
        product = np.zeros((rows, packed.shape[0] * packed.shape[2]), h.dtype)
        normal = np.empty(4 * width, h.dtype)
        for t in range(h.shape[1]):
            multiply(state, packed, product)
            for r in range(rows):
                x_t, now, c, keep = x[lo + r, t], state[r], cell[r], kept[lo + r, t % steps]
                i, f, g, o, even = keep[0], keep[1], keep[2], keep[3], keep[5]
                keep[10, 0] = _normalise(product[r, : 4 * width], normal)
                for gate in range(4):
                    _copy(normal[gate * width :], keep[6 + gate])
                _gate(i, x_t[0], keep[6], norm[0], b[0])
                _gate(f, x_t[1], keep[7], norm[1], b[1])
                _gate(o, x_t[3], keep[9], norm[3], b[3])
                x_g, s_g, gain, b_g = x_t[2], keep[8], norm[2], b[2]
                for d in range(width):
                    g[d] = tanh(x_g[d] + gain[d] * s_g[d] + b_g[d])
                for d in range(width):
                    c[d] = f[d] * c[d] + i[d] * g[d]
                keep[10, 1] = _normalise(c, even)
                gain, offset, shown = norm[4], norm[5], normal[:width]
                for d in range(width):
                    shown[d] = gain[d] * even[d] + offset[d]
                if carried:
                    _copy(shown, c)
                for d in range(width):
                    now[d] = o[d] * tanh(shown[d])
                _copy(c, keep[4])
                _copy(now, h[lo + r, t])
        c_last[lo : lo + rows] = cell


@compiled
def _gather(to, with_, run):
    for d in range(len(run)):
        run[d] += to[d] * with_[d]


@compiled
def lstm_backward(
    start, stop, grad, grad_c, kept, packed, norm, c0, grad_x, to_product, grad_h0, grad_c0, grad_norm, carried
):
    """grad_x, to_product (B, L, 4, H): gradients behind and before the norm of U h; grad_norm (6, B, H), by row."""
    _, length, gates, width = grad_x.shape
    one, whole = kept.dtype.type(1), gates * width
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        back = np.zeros((rows, packed.shape[0] * packed.shape[2]), kept.dtype)
        through, to_cell = np.empty((rows, whole), kept.dtype), grad_c[lo : lo + rows].copy()
        q, normal = np.empty(whole, kept.dtype), np.empty(whole, kept.dtype)
        runs = np.zeros((rows, 6, width), kept.dtype)
        shown, to_shown, to_c = np.empty(width, kept.dtype), np.empty(width, kept.dtype), np.empty(width, kept.dtype)
        for t in range(length - 1, -1, -1):
            for r in range(rows):
                y, after, keep, behind = grad[lo + r, t], back[r], kept[lo + r, t], to_cell[r]
                i, f, g, o, even, run = keep[0], keep[1], keep[2], keep[3], keep[5], runs[r]
                before, gain, offset = kept[lo + r, t - 1, 4] if t else c0[lo + r], norm[4], norm[5]
                delta = grad_x[lo + r, t]
                to_i, to_f, to_g, to_o = delta[0], delta[1], delta[2], delta[3]
                for d in range(width):
                    shown[d] = tanh(gain[d] * even[d] + offset[d])
                for d in range(width):
                    to_o[d] = (y[d] + after[d]) * shown[d] * o[d] * (one - o[d])
                for d in range(width):
                    to_shown[d] = (y[d] + after[d]) * o[d] * (one - shown[d] * shown[d])
                if carried:
                    for d in range(width):
                        to_shown[d] += behind[d]
                _gather(to_shown, even, run[4])
                for d in range(width):
                    run[5, d] += to_shown[d]
                for d in range(width):
                    to_shown[d] *= gain[d]
                _backward_of_norm(to_shown, even, keep[10, 1], to_c)
                if not carried:
                    for d in range(width):
                        to_c[d] += behind[d]
                for d in range(width):
                    to_i[d] = to_c[d] * g[d] * i[d] * (one - i[d])
                for d in range(width):
                    to_f[d] = to_c[d] * before[d] * f[d] * (one - f[d])
                for d in range(width):
                    to_g[d] = to_c[d] * i[d] * (one - g[d] * g[d])
                for d in range(width):
                    behind[d] = to_c[d] * f[d]
                for gate in range(gates):
                    own, gain, at = delta[gate], norm[gate], gate * width
                    _gather(own, keep[6 + gate], run[gate])
                    _copy(keep[6 + gate], normal[at : at + width])
                    for d in range(width):
                        q[at + d] = own[d] * gain[d]
                _backward_of_norm(q, normal, keep[10, 0], through[r])
                for gate in range(gates):
                    _copy(through[r, gate * width :], to_product[lo + r, t, gate])
                if t % RUN == 0:
                    for row in range(6):
                        _flush(run[row], grad_norm[row, lo + r])
            multiply(through, packed, back)
        grad_h0[lo : lo + rows] = back[:, :width]
        grad_c0[lo : lo + rows] = to_cell
