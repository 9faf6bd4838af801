"""The products of `expert_mlp` in Triton: all experts in one launch, no group sizes read back.

Rows are sorted by expert; ends (E,) is where each expert's rows stop, rows past the last of them belong to none.
Accumulation is in float32; float32 operands are multiplied as three TF32 products each. Widths and strides come in
units of IA, WA and RA numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._launch import alignment, exact


@triton.jit
def _grouped(
    a, w, ends, out, rows, experts, inner, width, w_expert, w_row, ALONG_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    IA: tl.constexpr, WA: tl.constexpr, RA: tl.constexpr, E: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    inner, width, w_row = inner * IA, width * WA, w_row * RA
    e, n = tl.arange(0, E), tl.program_id(1) * N + tl.arange(0, N)
    begin = tl.load(ends + e - 1, (e > 0) & (e < experts), 0)
    count = tl.load(ends + e, e < experts, 0) - begin
    count = tl.where(e < experts, count, 0)
    tiles = (count + M - 1) // M
    # tiles of rows are numbered through the experts: mine is how many experts come before this one's
    tile = tl.program_id(0)
    mine = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    total = tl.zeros([M, N], tl.float32)
    if mine < experts:
        before = e < mine
        r = tl.sum(tl.where(before, count, 0), 0) + (tile - tl.sum(tl.where(before, tiles, 0), 0)) * M + tl.arange(0, M)
        stop = tl.sum(tl.where(e <= mine, count, 0), 0)
        known = (r < stop)[:, None]
        weights = w + mine.to(tl.int64) * w_expert * RA
        r = r.to(tl.int64)[:, None]
        for first in range(0, inner, K):
            k = first + tl.arange(0, K)
            a_t = tl.load(a + r * inner + k[None, :], known & (k < inner)[None, :], 0.0)
            if ALONG_WIDTH:
                at = k.to(tl.int64)[:, None] * w_row + n[None, :]
            else:
                at = n.to(tl.int64)[None, :] * w_row + k[:, None]
            w_t = tl.load(weights + at, (k < inner)[:, None] & (n < width)[None, :], 0.0)
            total += tl.dot(a_t, w_t, input_precision=PRECISION)
    else:
        # tiles past those of the experts: rows of none are 0
        r = (tl.sum(count, 0) + (tile - tl.sum(tiles, 0)) * M + tl.arange(0, M)).to(tl.int64)[:, None]
        known = r < rows
    tl.store(out + r * width + n[None, :], total.to(out.dtype.element_ty), known & (n < width)[None, :])


@triton.jit
def _outer(
    a, b, ends, out, inner, width, PRECISION: tl.constexpr, IA: tl.constexpr, WA: tl.constexpr, M: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    inner, width = inner * IA, width * WA
    e = tl.program_id(2).to(tl.int64)
    k, n = tl.program_id(1) * K + tl.arange(0, K), tl.program_id(0) * N + tl.arange(0, N)
    begin, end = tl.load(ends + e - 1, e > 0, 0), tl.load(ends + e)
    total = tl.zeros([K, N], tl.float32)
    for first in range(begin, end, M):
        r = (first + tl.arange(0, M)).to(tl.int64)
        known = r < end
        a_t = tl.load(a + r[:, None] * inner + k[None, :], known[:, None] & (k < inner)[None, :], 0.0)
        b_t = tl.load(b + r[:, None] * width + n[None, :], known[:, None] & (n < width)[None, :], 0.0)
        total += tl.dot(tl.trans(a_t), b_t, input_precision=PRECISION)
    at = (e * inner + k[:, None]) * width + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), (k < inner)[:, None] & (n < width)[None, :])


def _constants(a: Tensor, rows: int, inner: int, width: int, summed: str) -> dict[str, Any]:
    """Precision, alignment and tiles M of rows, K of inner and N of width; summed: the name of the tile of the sum.

    float32 operands are split in registers, which leaves room for half the tile in each direction.
    """
    single, sizes = a.dtype == torch.float32, {"M": rows, "K": inner, "N": width}
    most = {name: (64 if single else 128) // (2 if name == summed else 1) for name in sizes}
    tiles = {name: max(16, min(most[name], triton.next_power_of_2(size))) for name, size in sizes.items()}
    aligned = {"IA": alignment(inner), "WA": alignment(width)}
    return {"PRECISION": exact(a), "num_warps": 4 if single else 8, "num_stages": 3, **aligned, **tiles}


def grouped(a: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Row r of `a` (R, K) times the matrix of its expert, w (E, K, N) in any layout: (R, N), 0 for rows of none."""
    (rows, inner), (experts, _, width) = a.shape, w.shape
    w = w if 1 in w.stride()[1:] else w.contiguous()
    along_width = w.stride(2) == 1
    row = w.stride(1 if along_width else 2)
    constants, of_row = _constants(a, rows, inner, width, "K"), alignment(row, w.stride(0))
    out = a.new_empty(rows, width)
    # tiles of rows first: only that side of a grid may be longer than 65,535; every expert may leave one part empty
    grid = triton.cdiv(rows, constants["M"]) + min(experts + 1, rows), triton.cdiv(width, constants["N"])
    with torch.cuda.device_of(a):
        _grouped[grid](
            a.contiguous(), w, ends, out, rows, experts, inner // constants["IA"], width // constants["WA"],
            w.stride(0) // of_row, row // of_row, ALONG_WIDTH=along_width, RA=of_row,
            E=triton.next_power_of_2(experts), **constants,
        )  # fmt: skip
    return out


def outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a^T b over the rows of each expert: (E, K, N) from a (R, K) and b (R, N)."""
    inner, width = a.shape[1], b.shape[1]
    out, constants = a.new_empty(len(ends), inner, width), _constants(a, len(a), inner, width, "M")
    grid = triton.cdiv(width, constants["N"]), triton.cdiv(inner, constants["K"]), len(ends)
    with torch.cuda.device_of(a):
        _outer[grid](
            a.contiguous(), b.contiguous(), ends, out, inner // constants["IA"], width // constants["WA"], **constants
        )
    return out
