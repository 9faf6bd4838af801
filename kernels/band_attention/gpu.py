"""The band of band_attention in Triton, forward and backward; global and random keys stay with passes.py.

A program holds a tile of queries (or keys) of one lane of one head, in the lanes of tiles.py, and walks along the
stretch of keys (or queries) it can meet. Scores stay in registers, sums are in float32, nothing is added by atomics;
float32 operands are multiplied as three TF32 products each. Head sizes come in units of EA and VA numbers.
"""

from __future__ import annotations

from itertools import groupby

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._dispatch import interpreting
from lra.kernels._launch import alignment, exact
from lra.kernels.band_attention.tiles import HIDDEN, Pattern


@triton.jit
def _lane(tile, step, blocks, BLOCK: tl.constexpr, T: tl.constexpr):
    """First block of the lane of this tile, the lane's length in positions, and the tile's start in it."""
    first = tile % step
    return first, tl.maximum((blocks - first + step - 1) // step, 0) * BLOCK, tile // step * T


@triton.jit
def _place(i, first, step, BLOCK: tl.constexpr):
    """Position in the sequence of the i-th position of a lane."""
    return (i // BLOCK * step + first) * BLOCK + i % BLOCK


@triton.jit
def _load(x, at, row, size, seen, E: tl.constexpr):
    """Rows `at` (T,) of a (B, L, H, size) tensor whose positions are `row` numbers apart: (T, E), zeros elsewhere."""
    e = tl.arange(0, E)
    return tl.load(x + at[:, None] * row + e[None, :], seen[:, None] & (e < size)[None, :], 0.0)


@triton.jit
def _near(i, j, behind, ahead, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether key j is in the band of query i, both places in a lane: (i, j)."""
    d = (j // BLOCK)[None, :] - (i // BLOCK)[:, None]
    near = (d >= -behind) & (d <= ahead)
    if CAUSAL:
        near = near & (j[None, :] <= i[:, None])
    return near


@triton.jit
def _forward(
    q, k, v, seen, steps, out, lse, length, heads, blocks, behind, ahead, scale, e_size, v_size,
    HIDDEN: tl.constexpr, EA: tl.constexpr, VA: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, T: tl.constexpr, E: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    e_size, v_size = e_size * EA, v_size * VA
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    step = tl.load(steps + h)
    first, lane, start = _lane(tl.program_id(0), step, blocks, BLOCK, T)
    if start < lane:
        i, t = start + tl.arange(0, T), tl.arange(0, T)
        at = _place(i, first, step, BLOCK)
        real = (i < lane) & (at < length)
        head = b * length * heads + h
        q_t = _load(q + head * e_size, at, heads * e_size, e_size, real, E)
        top, total = tl.full([T], HIDDEN, tl.float32), tl.zeros([T], tl.float32)
        acc = tl.zeros([T, V], tl.float32)
        begin = tl.maximum(start // BLOCK - behind, 0) * BLOCK
        end = tl.minimum(((tl.minimum(start + T, lane) - 1) // BLOCK + ahead + 1) * BLOCK, lane)
        for j_start in range(begin, end, T):
            j = j_start + t
            j_at = _place(j, first, step, BLOCK)
            inside = (j < end) & (j_at < length)
            inside = inside & (tl.load(seen + b * length + j_at, inside, 0) != 0)
            k_t = _load(k + head * e_size, j_at, heads * e_size, e_size, inside, E)
            v_t = _load(v + head * v_size, j_at, heads * v_size, v_size, inside, V)
            sees = _near(i, j, behind, ahead, BLOCK, CAUSAL) & inside[None, :]
            s = tl.where(sees, tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION) * scale, HIDDEN)
            now = tl.maximum(top, tl.max(s, 1))
            p = tl.where(sees, tl.exp(s - now[:, None]), 0.0)
            fade = tl.exp(top - now)
            total = total * fade + tl.sum(p, 1)
            acc = acc * fade[:, None] + tl.dot(p.to(v_t.dtype), v_t, input_precision=PRECISION)
            top = now
        any_key = total > 0
        acc = acc / tl.where(any_key, total, 1.0)[:, None]
        log_sum = tl.where(any_key, top + tl.log(tl.where(any_key, total, 1.0)), HIDDEN)
        e = tl.arange(0, V)
        spot = out + head * v_size + at[:, None] * (heads * v_size) + e[None, :]
        tl.store(spot, acc, real[:, None] & (e < v_size)[None, :])
        tl.store(lse + head + at * heads, log_sum, real)


@triton.jit
def _backward_q(
    dout, lse, delta, q, k, v, seen, steps, dq, length, heads, blocks, behind, ahead, scale, e_size, v_size,
    EA: tl.constexpr, VA: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    e_size, v_size = e_size * EA, v_size * VA
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    step = tl.load(steps + h)
    first, lane, start = _lane(tl.program_id(0), step, blocks, BLOCK, T)
    if start < lane:
        i, t = start + tl.arange(0, T), tl.arange(0, T)
        at = _place(i, first, step, BLOCK)
        real = (i < lane) & (at < length)
        head = b * length * heads + h
        q_t = _load(q + head * e_size, at, heads * e_size, e_size, real, E)
        g_t = _load(dout + head * v_size, at, heads * v_size, v_size, real, V)
        log_sum, d_t = tl.load(lse + head + at * heads, real, 0.0), tl.load(delta + head + at * heads, real, 0.0)
        acc = tl.zeros([T, E], tl.float32)
        begin = tl.maximum(start // BLOCK - behind, 0) * BLOCK
        end = tl.minimum(((tl.minimum(start + T, lane) - 1) // BLOCK + ahead + 1) * BLOCK, lane)
        for j_start in range(begin, end, T):
            j = j_start + t
            j_at = _place(j, first, step, BLOCK)
            inside = (j < end) & (j_at < length)
            inside = inside & (tl.load(seen + b * length + j_at, inside, 0) != 0)
            k_t = _load(k + head * e_size, j_at, heads * e_size, e_size, inside, E)
            v_t = _load(v + head * v_size, j_at, heads * v_size, v_size, inside, V)
            sees = _near(i, j, behind, ahead, BLOCK, CAUSAL) & inside[None, :]
            s = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION) * scale
            p = tl.where(sees, tl.exp(tl.where(sees, s, 0.0) - log_sum[:, None]), 0.0)
            dp = tl.dot(g_t, tl.trans(v_t.to(g_t.dtype)), input_precision=PRECISION)
            ds = p * (dp - d_t[:, None])
            acc += tl.dot(ds.to(k_t.dtype), k_t, input_precision=PRECISION)
        e = tl.arange(0, E)
        spot = dq + head * e_size + at[:, None] * (heads * e_size) + e[None, :]
        tl.store(spot, acc * scale, real[:, None] & (e < e_size)[None, :])


@triton.jit
def _backward_kv(
    dout, lse, delta, q, k, v, seen, steps, dk, dv, length, heads, blocks, behind, ahead, scale, e_size, v_size,
    EA: tl.constexpr, VA: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    T: tl.constexpr, E: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    e_size, v_size = e_size * EA, v_size * VA
    b, h = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    step = tl.load(steps + h)
    first, lane, start = _lane(tl.program_id(0), step, blocks, BLOCK, T)
    if start < lane:
        j, t = start + tl.arange(0, T), tl.arange(0, T)
        j_at = _place(j, first, step, BLOCK)
        real = (j < lane) & (j_at < length)
        inside = real & (tl.load(seen + b * length + j_at, real, 0) != 0)
        head = b * length * heads + h
        k_t = _load(k + head * e_size, j_at, heads * e_size, e_size, inside, E)
        v_t = _load(v + head * v_size, j_at, heads * v_size, v_size, inside, V)
        acc_k, acc_v = tl.zeros([T, E], tl.float32), tl.zeros([T, V], tl.float32)
        begin = tl.maximum(start // BLOCK - ahead, 0) * BLOCK
        end = tl.minimum(((tl.minimum(start + T, lane) - 1) // BLOCK + behind + 1) * BLOCK, lane)
        for i_start in range(begin, end, T):
            i = i_start + t
            at = _place(i, first, step, BLOCK)
            asks = (i < end) & (at < length)
            q_t = _load(q + head * e_size, at, heads * e_size, e_size, asks, E)
            g_t = _load(dout + head * v_size, at, heads * v_size, v_size, asks, V)
            log_sum, d_t = tl.load(lse + head + at * heads, asks, 0.0), tl.load(delta + head + at * heads, asks, 0.0)
            sees = _near(i, j, behind, ahead, BLOCK, CAUSAL) & inside[None, :] & asks[:, None]
            s = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION) * scale
            p = tl.where(sees, tl.exp(tl.where(sees, s, 0.0) - log_sum[:, None]), 0.0)
            acc_v += tl.dot(tl.trans(p.to(g_t.dtype)), g_t, input_precision=PRECISION)
            dp = tl.dot(g_t, tl.trans(v_t.to(g_t.dtype)), input_precision=PRECISION)
            ds = p * (dp - d_t[:, None])
            acc_k += tl.dot(tl.trans(ds.to(q_t.dtype)), q_t, input_precision=PRECISION)
        e, f = tl.arange(0, E), tl.arange(0, V)
        spot = dk + head * e_size + j_at[:, None] * (heads * e_size) + e[None, :]
        tl.store(spot, acc_k * scale, real[:, None] & (e < e_size)[None, :])
        spot = dv + head * v_size + j_at[:, None] * (heads * v_size) + f[None, :]
        tl.store(spot, acc_v, real[:, None] & (f < v_size)[None, :])


def _same(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, and of one dtype: float32 unless all are the same half precision."""
    dtypes = {t.dtype for t in tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return [t.to(dtype).contiguous() for t in tensors]


def _launch(q: Tensor, v: Tensor, pattern: Pattern, scale: float) -> tuple[tuple[int, int], tuple, dict]:
    """Grid, and the arguments every kernel ends with."""
    batch, length, heads, size = q.shape
    blocks = -(-length // pattern.block)
    # float32 operands are split in registers: their tiles shrink as heads widen
    widest, single = max(size, v.shape[-1]), q.dtype == torch.float32
    tile = 16 if single and widest > 64 else 32 if interpreting() or single or widest > 64 else 64
    # the longest list of tiles of any head: its lanes, each rounded up
    tiles = max(d * triton.cdiv(-(-blocks // d) * pattern.block, tile) for d in pattern.dilation)
    aligned = {"EA": alignment(size), "VA": alignment(v.shape[-1])}
    of_head = size // aligned["EA"], v.shape[-1] // aligned["VA"]
    sizes = (length, heads, blocks, pattern.behind, pattern.ahead, scale, *of_head)
    powers = {"E": max(16, triton.next_power_of_2(size)), "V": max(16, triton.next_power_of_2(v.shape[-1]))}
    constants = aligned | {"PRECISION": exact(q), "BLOCK": pattern.block, "CAUSAL": pattern.causal, "T": tile, **powers}
    constants |= {"num_warps": 8 if single or widest > 64 else 4, "num_stages": 2}
    return (tiles, batch * heads), sizes, constants


def _steps(pattern: Pattern, device: torch.device) -> Tensor:
    # filled on the device: a copy from the host cannot be part of a CUDA graph
    runs = [(dilation, len(list(run))) for dilation, run in groupby(pattern.dilation)]
    return torch.cat([torch.full((heads,), dilation, dtype=torch.int32, device=device) for dilation, heads in runs])


def band_forward(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, pattern: Pattern, scale: float
) -> tuple[Tensor, Tensor]:
    """seen: (B, L) bool -> output (B, L, H, V) and log-sum-exp (B, L, H, 1), float32, over the keys in the band."""
    q, k, v = _same(q, k, v)
    grid, sizes, constants = _launch(q, v, pattern, scale)
    out = torch.empty(v.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(*q.shape[:3], 1, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _forward[grid](q, k, v, seen.byte(), _steps(pattern, q.device), out, lse, *sizes, HIDDEN=HIDDEN, **constants)
    return out, lse


def band_backward(
    dout: Tensor, lse: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, pattern: Pattern,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v in float32, from the log-sum-exp and delta = dout . out of the whole rows."""
    q, k, v = _same(q, k, v)
    dout, lse, delta = dout.to(q.dtype).contiguous(), lse.contiguous(), delta.contiguous()
    grid, sizes, constants = _launch(q, v, pattern, scale)
    dq, dk, dv = (torch.empty(t.shape, dtype=torch.float32, device=q.device) for t in (q, k, v))
    given = (dout, lse, delta, q, k, v, seen.byte(), _steps(pattern, q.device))
    with torch.cuda.device_of(q):
        _backward_q[grid](*given, dq, *sizes, **constants)
        _backward_kv[grid](*given, dk, dv, *sizes, **constants)
    return dq, dk, dv
