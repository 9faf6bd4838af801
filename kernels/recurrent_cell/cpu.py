"""Compiled time loops of `recurrent_cell`: a thread takes blocks of rows of the batch through time, forward and back.

Gates have their own dimension: x is (B, L, G, H), b (G, H). `kept` (B, L, number, H) holds what the backward needs:
lstm i, f, g, o and c; gru r, z, n and U_n h + b_n; cells that reset first r, z and n; rhn candidate and transform of
each layer. With a time dimension of 1, every step overwrites it. Weights come packed (`product.pack`), transposed for
the way forward.

One short loop per result: with more arrays in one loop, LLVM gives up proving them distinct, and vectorising.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lra.kernels.recurrent_cell.activations import sigmoid, tanh
from lra.kernels.recurrent_cell.product import multiply

BLOCK = 16  # rows that go through time together: they share each read of the weights
RUN = 32  # steps whose terms are added up in the precision of the state
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


@compiled
def _products(rows, packed):
    """Room for the products of `rows` rows; zeros, because the first step backward has nothing behind it."""
    return np.zeros((rows, packed.shape[0] * packed.shape[2]), packed.dtype)


@compiled
def _copy(source, target):
    """target[:] = source, without the checks that cost more than a short row."""
    for d in range(len(target)):
        target[d] = source[d]


@compiled
def elman_forward(start, stop, x, packed, b, h0, h, relu):
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        state, product = h0[lo : lo + rows].copy(), _products(rows, packed)
        for t in range(h.shape[1]):
            multiply(state, packed, product)
            for r in range(rows):
                x_t, s, now, b_0 = x[lo + r, t, 0], product[r], state[r], b[0]
                if relu:
                    for d in range(h.shape[2]):
                        now[d] = max(s[d] + x_t[d] + b_0[d], s.dtype.type(0))
                else:
                    for d in range(h.shape[2]):
                        now[d] = tanh(s[d] + x_t[d] + b_0[d])
                _copy(now, h[lo + r, t])


@compiled
def elman_backward(start, stop, grad, h, packed, grad_x, grad_h0, relu):
    width, one = h.shape[2], h.dtype.type(1)
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        delta, back = np.empty((rows, width), h.dtype), _products(rows, packed)
        for t in range(h.shape[1] - 1, -1, -1):
            for r in range(rows):
                y, h_t, after, own = grad[lo + r, t], h[lo + r, t], back[r], delta[r]
                if relu:
                    for d in range(width):
                        own[d] = (y[d] + after[d]) * (one if h_t[d] > 0 else one - one)
                else:
                    for d in range(width):
                        own[d] = (y[d] + after[d]) * (one - h_t[d] * h_t[d])
                _copy(own, grad_x[lo + r, t, 0])
            multiply(delta, packed, back)
        grad_h0[lo : lo + rows] = back[:, :width]


@compiled
def indrnn_forward(start, stop, x, u, b, h0, h):
    zero = h.dtype.type(0)
    for i in range(start, stop):
        state, b_0 = h0[i].copy(), b[0]
        for t in range(h.shape[1]):
            x_t = x[i, t, 0]
            for d in range(h.shape[2]):
                state[d] = max(x_t[d] + u[d] * state[d] + b_0[d], zero)
            _copy(state, h[i, t])


@compiled
def _flush(run, total):
    for d in range(len(run)):
        total[d] += run[d]
        run[d] = run.dtype.type(0)


@compiled
def indrnn_backward(start, stop, grad, h, u, h0, grad_x, grad_h0, grad_u, grad_b):
    """grad_u and grad_b, by row, are in double precision and take the sums of RUN steps at a time."""
    zero = h.dtype.type(0)
    for i in range(start, stop):
        delta, to_u, to_b = np.zeros_like(u), np.zeros_like(u), np.zeros_like(u)
        for t in range(h.shape[1] - 1, -1, -1):
            y, h_t, to_x = grad[i, t], h[i, t], grad_x[i, t, 0]
            before = h[i, t - 1] if t else h0[i]
            for d in range(h.shape[2]):
                through = y[d] + u[d] * delta[d]
                delta[d] = through if h_t[d] > zero else zero
            for d in range(h.shape[2]):
                to_u[d] += delta[d] * before[d]
            for d in range(h.shape[2]):
                to_x[d] = delta[d]
                to_b[d] += delta[d]
            if t % RUN == 0:
                _flush(to_u, grad_u[i])
                _flush(to_b, grad_b[i])
        for d in range(h.shape[2]):
            grad_h0[i, d] = u[d] * delta[d]


@compiled
def _gate(gate, x, s, b):
    for d in range(len(gate)):
        gate[d] = sigmoid(x[d] + s[d] + b[d])


@compiled
def _candidate(n, x, s, b):
    for d in range(len(n)):
        n[d] = tanh(x[d] + s[d] + b[d])


@compiled
def _peeping_gate(gate, x, s, b, p, c):
    for d in range(len(gate)):
        gate[d] = sigmoid(x[d] + s[d] + b[d] + p[d] * c[d])


@compiled
def lstm_forward(start, stop, x, packed, b, peephole, h0, c0, h, c_last, kept):
    width, gates, steps, one = h.shape[2], x.shape[2], kept.shape[1], h.dtype.type(1)
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        state, cell, product = h0[lo : lo + rows].copy(), c0[lo : lo + rows].copy(), _products(rows, packed)
        for t in range(h.shape[1]):
            multiply(state, packed, product)
            for r in range(rows):
                x_t, now, c, keep = x[lo + r, t], state[r], cell[r], kept[lo + r, t % steps]
                i, f, g, o = keep[0], keep[1], keep[2], keep[3]
                _peeping_gate(i, x_t[0], product[r], b[0], peephole[0], c)
                if gates == 4:
                    _peeping_gate(f, x_t[1], product[r, width:], b[1], peephole[1], c)
                else:
                    for d in range(width):
                        f[d] = one - i[d]
                _candidate(g, x_t[gates - 2], product[r, (gates - 2) * width :], b[gates - 2])
                for d in range(width):
                    c[d] = f[d] * c[d] + i[d] * g[d]
                _peeping_gate(o, x_t[gates - 1], product[r, (gates - 1) * width :], b[gates - 1], peephole[-1], c)
                for d in range(width):
                    now[d] = o[d] * tanh(c[d])
                _copy(c, keep[4])
                _copy(now, h[lo + r, t])
        c_last[lo : lo + rows] = cell


@compiled
def lstm_backward(start, stop, grad, grad_c, kept, packed, peephole, c0, grad_x, grad_h0, grad_c0):
    _, length, gates, width = grad_x.shape
    one, p_i, p_f, p_o = kept.dtype.type(1), peephole[0], peephole[1], peephole[-1]
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        back, to_cell, c_tanh = _products(rows, packed), grad_c[lo : lo + rows].copy(), np.empty(width, kept.dtype)
        delta = np.empty((rows, gates, width), kept.dtype)
        for t in range(length - 1, -1, -1):
            for r in range(rows):
                y, after, keep, to_c = grad[lo + r, t], back[r], kept[lo + r, t], to_cell[r]
                i, f, g, o, c = keep[0], keep[1], keep[2], keep[3], keep[4]
                before = kept[lo + r, t - 1, 4] if t else c0[lo + r]
                to_i, to_f, to_g, to_o = delta[r, 0], delta[r, 1], delta[r, gates - 2], delta[r, gates - 1]
                for d in range(width):
                    c_tanh[d] = tanh(c[d])
                for d in range(width):
                    to_o[d] = (y[d] + after[d]) * c_tanh[d] * o[d] * (one - o[d])
                for d in range(width):
                    to_c[d] += (y[d] + after[d]) * o[d] * (one - c_tanh[d] * c_tanh[d])
                for d in range(width):
                    to_c[d] += to_o[d] * p_o[d]
                if gates == 4:
                    for d in range(width):
                        to_i[d] = to_c[d] * g[d] * i[d] * (one - i[d])
                    for d in range(width):
                        to_f[d] = to_c[d] * before[d] * f[d] * (one - f[d])
                else:
                    for d in range(width):
                        to_i[d] = to_c[d] * (g[d] - before[d]) * i[d] * (one - i[d])
                for d in range(width):
                    to_g[d] = to_c[d] * i[d] * (one - g[d] * g[d])
                for d in range(width):
                    to_c[d] = to_c[d] * f[d] + to_i[d] * p_i[d]
                if gates == 4:
                    for d in range(width):
                        to_c[d] += to_f[d] * p_f[d]
                grad_x[lo + r, t] = delta[r]
            multiply(delta.reshape(rows, gates * width), packed, back)
        grad_h0[lo : lo + rows] = back[:, :width]
        grad_c0[lo : lo + rows] = to_cell


@compiled
def gru_forward(start, stop, x, packed, b, h0, h, kept):
    width, gates, steps, one = h.shape[2], x.shape[2], kept.shape[1], h.dtype.type(1)
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        state, product = h0[lo : lo + rows].copy(), _products(rows, packed)
        for t in range(h.shape[1]):
            multiply(state, packed, product)
            for row in range(rows):
                x_t, now, keep = x[lo + row, t], state[row], kept[lo + row, t % steps]
                r, z, n, m = keep[0], keep[1], keep[2], keep[3]
                x_n, s_n, b_n = x_t[gates - 1], product[row, (gates - 1) * width :], b[gates - 1]
                _gate(z, x_t[gates - 2], product[row, (gates - 2) * width :], b[gates - 2])
                if gates == 3:
                    _gate(r, x_t[0], product[row], b[0])
                else:
                    for d in range(width):
                        r[d] = one - z[d]
                for d in range(width):
                    m[d] = s_n[d] + b_n[d]
                for d in range(width):
                    n[d] = tanh(x_n[d] + r[d] * m[d])
                for d in range(width):
                    now[d] = n[d] + z[d] * (now[d] - n[d])
                _copy(now, h[lo + row, t])


@compiled
def gru_backward(start, stop, grad, h, kept, packed, h0, grad_x, grad_h0):
    _, length, gates, width = grad_x.shape
    one = kept.dtype.type(1)
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        back, delta = _products(rows, packed), np.empty((rows, gates, width), kept.dtype)
        to_state, to_n = np.zeros((rows, width), kept.dtype), np.empty(width, kept.dtype)
        for t in range(length - 1, -1, -1):
            for row in range(rows):
                y, after, keep, to_h = grad[lo + row, t], back[row], kept[lo + row, t], to_state[row]
                r, z, n, m = keep[0], keep[1], keep[2], keep[3]
                before = h[lo + row, t - 1] if t else h0[lo + row]
                to_r, to_z, to_m = delta[row, 0], delta[row, gates - 2], delta[row, gates - 1]
                for d in range(width):
                    to_h[d] += y[d] + after[d]
                for d in range(width):
                    to_n[d] = to_h[d] * (one - z[d]) * (one - n[d] * n[d])
                for d in range(width):
                    to_m[d] = to_n[d] * r[d]
                if gates == 3:
                    for d in range(width):
                        to_r[d] = to_n[d] * m[d] * r[d] * (one - r[d])
                    for d in range(width):
                        to_z[d] = to_h[d] * (before[d] - n[d]) * z[d] * (one - z[d])
                else:
                    for d in range(width):
                        to_z[d] = (to_h[d] * (before[d] - n[d]) - to_n[d] * m[d]) * z[d] * (one - z[d])
                for d in range(width):
                    to_h[d] *= z[d]
                grad_x[lo + row, t, : gates - 1] = delta[row, : gates - 1]
                grad_x[lo + row, t, gates - 1] = to_n
            multiply(delta.reshape(rows, gates * width), packed, back)
        grad_h0[lo : lo + rows] = to_state + back[:, :width]


@compiled
def reset_first_forward(start, stop, x, packed, packed_n, b, h0, h, kept):
    width, gates, steps, one = h.shape[2], x.shape[2], kept.shape[1], h.dtype.type(1)
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        state, product, inner = h0[lo : lo + rows].copy(), _products(rows, packed), _products(rows, packed_n)
        shown = np.empty_like(state)
        for t in range(h.shape[1]):
            multiply(state, packed, product)
            for row in range(rows):
                x_t, now, keep, seen = x[lo + row, t], state[row], kept[lo + row, t % steps], shown[row]
                r, z = keep[0], keep[1]
                _gate(r, x_t[0], product[row], b[0])
                if gates == 3:
                    _gate(z, x_t[1], product[row, width:], b[1])
                else:
                    for d in range(width):
                        z[d] = one - r[d]
                for d in range(width):
                    seen[d] = r[d] * now[d]
            multiply(shown, packed_n, inner)
            for row in range(rows):
                now, keep = state[row], kept[lo + row, t % steps]
                z, n = keep[1], keep[2]
                _candidate(n, x[lo + row, t, gates - 1], inner[row], b[gates - 1])
                for d in range(width):
                    now[d] = n[d] + z[d] * (now[d] - n[d])
                _copy(now, h[lo + row, t])


@compiled
def reset_first_backward(start, stop, grad, h, kept, packed, packed_n, h0, grad_x, grad_h0):
    _, length, gates, width = grad_x.shape
    one = kept.dtype.type(1)
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        back, inner = _products(rows, packed), _products(rows, packed_n)
        delta = np.empty((rows, gates - 1, width), kept.dtype)
        to_state, to_candidate = np.zeros((rows, width), kept.dtype), np.empty((rows, width), kept.dtype)
        for t in range(length - 1, -1, -1):
            for row in range(rows):
                y, after, to_h, to_n = grad[lo + row, t], back[row], to_state[row], to_candidate[row]
                z, n = kept[lo + row, t, 1], kept[lo + row, t, 2]
                for d in range(width):
                    to_h[d] += y[d] + after[d]
                for d in range(width):
                    to_n[d] = to_h[d] * (one - z[d]) * (one - n[d] * n[d])
                grad_x[lo + row, t, gates - 1] = to_n
            multiply(to_candidate, packed_n, inner)
            for row in range(rows):
                keep, to_h, to_seen = kept[lo + row, t], to_state[row], inner[row]
                r, z, n = keep[0], keep[1], keep[2]
                before = h[lo + row, t - 1] if t else h0[lo + row]
                to_r, to_z = delta[row, 0], delta[row, gates - 2]
                if gates == 3:
                    for d in range(width):
                        to_r[d] = to_seen[d] * before[d] * r[d] * (one - r[d])
                    for d in range(width):
                        to_z[d] = to_h[d] * (before[d] - n[d]) * z[d] * (one - z[d])
                else:
                    for d in range(width):
                        to_r[d] = (to_seen[d] * before[d] - to_h[d] * (before[d] - n[d])) * r[d] * z[d]
                for d in range(width):
                    to_h[d] = to_h[d] * z[d] + to_seen[d] * r[d]
                grad_x[lo + row, t, : gates - 1] = delta[row]
            multiply(delta.reshape(rows, (gates - 1) * width), packed, back)
        grad_h0[lo : lo + rows] = to_state + back[:, :width]


@compiled
def rhn_forward(start, stop, x, packed, b, h0, h, kept):
    width, steps = h.shape[2], kept.shape[1]
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        state, product = h0[lo : lo + rows].copy(), _products(rows, packed[0])
        nothing = np.zeros((2, width), h.dtype)
        for t in range(h.shape[1]):
            for layer in range(len(packed)):
                multiply(state, packed[layer], product)
                for r in range(rows):
                    x_t, now, keep = nothing if layer else x[lo + r, t], state[r], kept[lo + r, t % steps]
                    candidate, transform = keep[2 * layer], keep[2 * layer + 1]
                    _candidate(candidate, x_t[0], product[r], b[2 * layer])
                    _gate(transform, x_t[1], product[r, width:], b[2 * layer + 1])
                    for d in range(width):
                        now[d] += transform[d] * (candidate[d] - now[d])
            h[lo : lo + rows, t] = state


@compiled
def rhn_backward(start, stop, grad, h, kept, packed, h0, deltas, grad_h0):
    _, length, width = h.shape
    one, depth = kept.dtype.type(1), len(packed)
    for lo in range(start, stop, BLOCK):
        rows = min(BLOCK, stop - lo)
        states, back = np.empty((depth + 1, rows, width), h.dtype), _products(rows, packed[0])
        to_state, delta = np.zeros((rows, width), h.dtype), np.empty((rows, 2, width), h.dtype)
        for t in range(length - 1, -1, -1):
            for r in range(rows):
                states[0, r] = h[lo + r, t - 1] if t else h0[lo + r]
                for layer in range(depth):
                    before, now = states[layer, r], states[layer + 1, r]
                    candidate, transform = kept[lo + r, t, 2 * layer], kept[lo + r, t, 2 * layer + 1]
                    for d in range(width):
                        now[d] = before[d] + transform[d] * (candidate[d] - before[d])
                y, to_h = grad[lo + r, t], to_state[r]
                for d in range(width):
                    to_h[d] += y[d]
            for layer in range(depth - 1, -1, -1):
                for r in range(rows):
                    before, to_h = states[layer, r], to_state[r]
                    candidate, transform = kept[lo + r, t, 2 * layer], kept[lo + r, t, 2 * layer + 1]
                    to_candidate, to_transform = delta[r, 0], delta[r, 1]
                    for d in range(width):
                        to_candidate[d] = to_h[d] * transform[d] * (one - candidate[d] * candidate[d])
                    for d in range(width):
                        to_transform[d] = to_h[d] * (candidate[d] - before[d]) * transform[d] * (one - transform[d])
                    for d in range(width):
                        to_h[d] *= one - transform[d]
                    deltas[lo + r, t, 2 * layer : 2 * layer + 2] = delta[r]
                multiply(delta.reshape(rows, 2 * width), packed[layer], back)
                to_state += back[:, :width]
        grad_h0[lo : lo + rows] = to_state
