"""The products of `expert_mlp` in Triton: all experts in one launch, no group sizes read back.

Rows are sorted by expert; ends (E,) is where each expert's rows stop, rows past the last of them belong to none.
Accumulation is in float32; float32 operands are multiplied as three TF32 products each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _grouped(
    a, w, ends, out, experts, inner, width, w_expert, w_inner, w_width, PRECISION: tl.constexpr, E: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, E)
    begin = tl.load(ends + e - 1, (e > 0) & (e < experts), 0)
    count = tl.load(ends + e, e < experts, 0) - begin
    count = tl.where(e < experts, count, 0)
    tiles = (count + M - 1) // M
    # tiles of rows are numbered through the experts: mine is how many experts come before this one's
    tile = tl.program_id(0)
    mine = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if mine < experts:
        before = e < mine
        r = tl.sum(tl.where(before, count, 0), 0) + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * M + tl.arange(0, M)
        known = (r < tl.sum(tl.where(e <= mine, count, 0), 0))[:, None]
        n = tl.program_id(1) * N + tl.arange(0, N)
        weights = w + mine.to(tl.int64) * w_expert
        r = r.to(tl.int64)[:, None]
        total = tl.zeros([M, N], tl.float32)
        for first in range(0, inner, K):
            k = first + tl.arange(0, K)
            a_t = tl.load(a + r * inner + k[None, :], known & (k < inner)[None, :], 0.0)
            at = k.to(tl.int64)[:, None] * w_inner + n.to(tl.int64)[None, :] * w_width
            w_t = tl.load(weights + at, (k < inner)[:, None] & (n < width)[None, :], 0.0)
            total += tl.dot(a_t, w_t, input_precision=PRECISION)
        tl.store(out + r * width + n[None, :], total.to(out.dtype.element_ty), known & (n < width)[None, :])


@triton.jit
def _outer(
    a, b, ends, out, inner, width, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(2).to(tl.int64)
    k, n = tl.program_id(1) * K + tl.arange(0, K), tl.program_id(0) * N + tl.arange(0, N)
    begin, end = tl.load(ends + e - 1, e > 0, 0), tl.load(ends + e)
    total = tl.zeros([K, N], tl.float32)
    for first in range(begin, end, M):
        r = (first + tl.arange(0, M)).to(tl.int64)
        known = r < end
        a_t = tl.load(a + r[None, :] * inner + k[:, None], known[None, :] & (k < inner)[:, None], 0.0)
        b_t = tl.load(b + r[:, None] * width + n[None, :], known[:, None] & (n < width)[None, :], 0.0)
        total += tl.dot(a_t, b_t, input_precision=PRECISION)
    at = (e * inner + k[:, None]) * width + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), (k < inner)[:, None] & (n < width)[None, :])


def _tile(size: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(size)))


def _precision(a: Tensor) -> str:
    return "tf32x3" if a.dtype == torch.float32 else "tf32"


def grouped(a: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Row r of `a` (R, K) times the matrix of its expert, w (E, K, N) in any layout: (R, N), 0 for rows of none."""
    (rows, inner), (experts, _, width) = a.shape, w.shape
    # what no expert owns is written by no program
    out = a.new_zeros(rows, width)
    m, n = _tile(rows, 64), _tile(width, 64)
    # tiles of rows first: only that side of a grid may be longer than 65,535
    grid = triton.cdiv(rows, m) + min(experts, rows), triton.cdiv(width, n)
    with torch.cuda.device_of(a):
        _grouped[grid](
            a.contiguous(), w, ends, out, experts, inner, width, *w.stride(), PRECISION=_precision(a),
            E=triton.next_power_of_2(experts), M=m, K=_tile(inner, 32), N=n,
        )  # fmt: skip
    return out


def outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a^T b over the rows of each expert: (E, K, N) from a (R, K) and b (R, N)."""
    inner, width = a.shape[1], b.shape[1]
    out = a.new_empty(len(ends), inner, width)
    k, n = _tile(inner, 64), _tile(width, 64)
    with torch.cuda.device_of(a):
        _outer[triton.cdiv(width, n), triton.cdiv(inner, k), len(ends)](
            a.contiguous(), b.contiguous(), ends, out, inner, width, PRECISION=_precision(a),
            M=_tile(len(a), 32), K=k, N=n,
        )  # fmt: skip
    return out
