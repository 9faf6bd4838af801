"""Cauchy sums over conjugate pairs on the unit circle, and their derivative.

    y_a(f) = sum_n v_an / d_n(f) + conj(v_an) / d~_n(f),  d_n = i sine(f) - cosine(f) A_n,  d~ with conj(A_n)

v: (h, M, N), A: (h, N) complex128; sine, cosine: (F,) float64 -> y: (h, M, F) complex128.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from lra.kernels._threads import over_rows

TILE = 256  # frequencies at once: four rows of reciprocals stay in the first-level cache


def sums(v: Tensor, A: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    if A.device.type != "cpu":
        return plain_sums(v, A, sine, cosine)
    y = torch.empty(*v.shape[:2], len(sine), dtype=torch.complex128)
    over_rows(_sums, len(v), *_arrays(v, A, sine, cosine), _floats(y))
    return y


def sums_backward(dy: Tensor, v: Tensor, A: Tensor, sine: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of v and A for dy: (h, M, F)."""
    if A.device.type != "cpu":
        return plain_sums_backward(dy, v, A, sine, cosine)
    dv, dA = torch.empty(v.shape, dtype=v.dtype), torch.empty(A.shape, dtype=A.dtype)
    over_rows(_sums_backward, len(v), *_arrays(v, A, sine, cosine), _floats(dy), _floats(dv), _floats(dA))
    return dv, dA


def plain_sums(v: Tensor, A: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """`sums` in plain torch, any device: lays out (h, N, F)."""
    one, two = _reciprocals(A, sine, cosine)
    return torch.bmm(v, one) + torch.bmm(v.conj_physical(), two)


def plain_sums_backward(dy: Tensor, v: Tensor, A: Tensor, sine: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    one, two = _reciprocals(A, sine, cosine)
    g = dy.conj_physical()
    dv = torch.bmm(dy, one.conj_physical().mT) + torch.bmm(g, two.mT)
    along, across = torch.bmm(v.mT, g), torch.bmm(v.conj_physical().mT, g)
    return dv, (cosine * ((along * one.square()).conj_physical() + across * two.square())).sum(-1)


def _reciprocals(A: Tensor, sine: Tensor, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """1 / d and 1 / d~: (h, N, F)."""
    turn, A = torch.complex(torch.zeros_like(sine), sine), A.unsqueeze(-1)
    return (turn - cosine * A).reciprocal(), (turn - cosine * A.conj_physical()).reciprocal()


def _floats(x: Tensor) -> np.ndarray:
    return torch.view_as_real(x.contiguous()).numpy()


def _arrays(v: Tensor, A: Tensor, sine: Tensor, cosine: Tensor) -> tuple[np.ndarray, ...]:
    return _floats(v), _floats(A), sine.numpy(), cosine.numpy()


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"}, inline="always")
def _pairs(real, imag, sine, cosine, table):  # type: ignore[no-untyped-def]
    """Rows of `table`: Re(u + w), Im(u - w), Im(u + w), Re(u - w) for u = 1 / d, w = 1 / d~."""
    for f in range(len(sine)):
        a, b, c = -cosine[f] * real, sine[f] - cosine[f] * imag, sine[f] + cosine[f] * imag
        u, w = 1 / (a * a + b * b), 1 / (a * a + c * c)
        table[0, f], table[1, f] = a * (u + w), c * w - b * u
        table[2, f], table[3, f] = -b * u - c * w, a * (u - w)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _sums(start, stop, v, A, sine, cosine, y):  # type: ignore[no-untyped-def]
    table, total = np.empty((4, TILE)), np.empty((v.shape[1], 2, TILE))
    for h in range(start, stop):
        for first in range(0, len(sine), TILE):
            size = min(TILE, len(sine) - first)
            total[:] = 0
            for n in range(A.shape[1]):
                _pairs(A[h, n, 0], A[h, n, 1], sine[first : first + size], cosine[first : first + size], table)
                for m in range(v.shape[1]):
                    re, im = v[h, m, n, 0], v[h, m, n, 1]
                    for f in range(size):
                        total[m, 0, f] += re * table[0, f] - im * table[1, f]
                        total[m, 1, f] += re * table[2, f] + im * table[3, f]
            for m in range(v.shape[1]):
                for f in range(size):
                    y[h, m, first + f, 0], y[h, m, first + f, 1] = total[m, 0, f], total[m, 1, f]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def _sums_backward(start, stop, v, A, sine, cosine, dy, dv, dA):  # type: ignore[no-untyped-def]
    table, grad = np.empty((4, TILE)), np.empty((v.shape[1], 2, TILE))
    along, across = np.empty((2, TILE)), np.empty((2, TILE))
    for h in range(start, stop):
        dv[h], dA[h] = 0, 0
        for first in range(0, len(sine), TILE):
            size = min(TILE, len(sine) - first)
            for m in range(v.shape[1]):
                for f in range(size):
                    grad[m, 0, f], grad[m, 1, f] = dy[h, m, first + f, 0], dy[h, m, first + f, 1]
            for n in range(A.shape[1]):
                _pairs(A[h, n, 0], A[h, n, 1], sine[first : first + size], cosine[first : first + size], table)
                along[:], across[:] = 0, 0
                for m in range(v.shape[1]):
                    re, im, real, imag = v[h, m, n, 0], v[h, m, n, 1], 0.0, 0.0
                    for f in range(size):
                        g, k = grad[m, 0, f], grad[m, 1, f]
                        real += g * table[0, f] + k * table[2, f]
                        imag += k * table[3, f] - g * table[1, f]
                        # conj(dy) v and conj(dy) conj(v)
                        along[0, f] += g * re + k * im
                        along[1, f] += g * im - k * re
                        across[0, f] += g * re - k * im
                        across[1, f] -= g * im + k * re
                    dv[h, m, n, 0] += real
                    dv[h, m, n, 1] += imag
                real, imag = 0.0, 0.0
                for f in range(size):
                    u, w = 0.5 * (table[0, f] + table[3, f]), 0.5 * (table[0, f] - table[3, f])
                    p, q = 0.5 * (table[2, f] + table[1, f]), 0.5 * (table[2, f] - table[1, f])
                    c = cosine[first + f]
                    # conj(along (u + i p)^2) + across (w + i q)^2
                    uu, up, ww, wq = u * u - p * p, 2 * u * p, w * w - q * q, 2 * w * q
                    real += c * (along[0, f] * uu - along[1, f] * up + across[0, f] * ww - across[1, f] * wq)
                    imag += c * (across[0, f] * wq + across[1, f] * ww - along[0, f] * up - along[1, f] * uu)
                dA[h, n, 0] += real
                dA[h, n, 1] += imag
