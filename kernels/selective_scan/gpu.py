"""`selective_scan` in Triton: each program walks one row and one block of channels through time in tiles of GPU_CHUNK
steps, scanning a (steps, channels, N) tile by a parallel prefix and carrying the (channels, N) state.

Backward walks the tiles from the last to the first, each from the state saved before it (README.md has the formulas).
Gradients of B and C are reduced per block of channels and summed afterwards, without atomics. Accumulation is in
float32 (float64 for float64 inputs), of the gradients of A and D over all steps in float64. Steps beyond the end have
delta = 0, which leaves the state as it is. Widths and state sizes come in units of DA and NA numbers. Where rows and
blocks are few, time is cut into segments of `tiles` tiles (_split.py), one program each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._launch import alignment
from lra.kernels._split import cut, totals
from lra.kernels.linear_scan.gpu import carried
from lra.kernels.selective_scan.cpu import GPU_CHUNK


@triton.jit
def _join(a1, b1, a2, b2):
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _row(x, rows, row: tl.constexpr):
    """One step of a (T, D, N) tile."""
    return tl.sum(tl.where(rows[:, None, None] == row, x, 0.0), 0)


@triton.jit
def _segment(i):
    """Row of this program in a tensor with one entry per row i and segment."""
    return i * tl.num_programs(2) + tl.program_id(2)


@triton.jit
def _forward(
    u, delta, A, B, C, skip, z, h0, y, last, saved, length, width, size, chunks, tiles,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_H0: tl.constexpr, SAVE: tl.constexpr, OUTPUT: tl.constexpr,
    ACC: tl.constexpr, DA: tl.constexpr, NA: tl.constexpr, T: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """OUTPUT: whether y is wanted, or no more than the state a segment leaves."""
    width, size = width * DA, size * NA
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d, n = tl.program_id(0) * D + tl.arange(0, D), tl.arange(0, N)
    inside, known = d < width, (d < width)[:, None] & (n < size)[None, :]
    rate = tl.load(A + d[:, None] * size + n[None, :], known, 0.0).to(ACC)
    cell = n[None, :] * width + d[:, None]
    h = tl.zeros([D, N], ACC)
    if HAS_H0:
        h += tl.load(h0 + _segment(i) * size * width + cell, known, 0.0).to(ACC)
    first = tl.program_id(2) * tiles * T
    for start in tl.range(first, tl.minimum(first + tiles * T, length), T, num_stages=3):
        if SAVE:
            tl.store(saved + (i * chunks + start // T) * size * width + cell, h, known)
        t = start + rows
        mask, maps = (t < length)[:, None] & inside[None, :], (t < length)[:, None] & (n < size)[None, :]
        at, map_at = (i * length + t)[:, None] * width + d[None, :], (i * length + t)[:, None] * size + n[None, :]
        u_t, delta_t = tl.load(u + at, mask, 0.0).to(ACC), tl.load(delta + at, mask, 0.0).to(ACC)
        B_t = tl.load(B + map_at, maps, 0.0).to(ACC)
        decay = tl.exp(delta_t[:, :, None] * rate[None, :, :])
        decay, inner = tl.associative_scan((decay, (delta_t * u_t)[:, :, None] * B_t[:, None, :]), 0, _join)
        states = decay * h[None, :, :] + inner
        if OUTPUT:
            C_t = tl.load(C + map_at, maps, 0.0).to(ACC)
            out = tl.sum(states * C_t[:, None, :], 2)
            if HAS_D:
                out += tl.load(skip + d, inside, 0.0).to(ACC)[None, :] * u_t
            if HAS_Z:
                z_t = tl.load(z + at, mask, 0.0).to(ACC)
                out *= z_t / (1 + tl.exp(-z_t))
            tl.store(y + at, out, mask)
        h = _row(states, rows, T - 1)
    tl.store(last + _segment(i) * size * width + cell, h, known)


@triton.jit
def _adjoints(
    grad_y, delta, A, C, z, left, length, width, size, chunks, tiles, HAS_Z: tl.constexpr, ACC: tl.constexpr,
    DA: tl.constexpr, NA: tl.constexpr, T: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, of its own outputs alone."""
    width, size = width * DA, size * NA
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d, n = tl.program_id(0) * D + tl.arange(0, D), tl.arange(0, N)
    inside, known = d < width, (d < width)[:, None] & (n < size)[None, :]
    rate = tl.load(A + d[:, None] * size + n[None, :], known, 0.0).to(ACC)
    carry = tl.zeros([D, N], ACC)
    first = tl.program_id(2) * tiles
    end = tl.minimum(first + tiles, chunks)
    for back in tl.range(0, end - first, num_stages=3):
        t = (end - 1 - back) * T + (T - 1 - rows)
        mask, maps = (t < length)[:, None] & inside[None, :], (t < length)[:, None] & (n < size)[None, :]
        at = (i * length + t)[:, None] * width + d[None, :]
        delta_t, g = tl.load(delta + at, mask, 0.0).to(ACC), tl.load(grad_y + at, mask, 0.0).to(ACC)
        C_t = tl.load(C + (i * length + t)[:, None] * size + n[None, :], maps, 0.0).to(ACC)
        if HAS_Z:
            z_t = tl.load(z + at, mask, 0.0).to(ACC)
            g *= z_t / (1 + tl.exp(-z_t))
        decay = tl.exp(delta_t[:, :, None] * rate[None, :, :])
        decay, inner = tl.associative_scan((decay, decay * g[:, :, None] * C_t[:, None, :]), 0, _join)
        carry = _row(decay * carry[None, :, :] + inner, rows, T - 1)
    tl.store(left + _segment(i) * size * width + n[None, :] * width + d[:, None], carry, known)


@triton.jit
def _backward(
    grad_y, grad_last, u, delta, A, B, C, skip, z, saved,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_h0, length, width, size, chunks, tiles,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, ACC: tl.constexpr, DA: tl.constexpr, NA: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    width, size = width * DA, size * NA
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d, n = tl.program_id(0) * D + tl.arange(0, D), tl.arange(0, N)
    inside, known = d < width, (d < width)[:, None] & (n < size)[None, :]
    rate = tl.load(A + d[:, None] * size + n[None, :], known, 0.0).to(ACC)
    cell = n[None, :] * width + d[:, None]
    partial = (tl.program_id(0) * tl.num_programs(1) + i) * length
    # carry: gradient of the state before the tile that comes later in time
    carry = tl.load(grad_last + _segment(i) * size * width + cell, known, 0.0).to(ACC)
    sum_A, sum_D, skip_d = tl.zeros([D, N], tl.float64), tl.zeros([D], tl.float64), tl.zeros([D], ACC)
    if HAS_D:
        skip_d += tl.load(skip + d, inside, 0.0).to(ACC)
    first = tl.program_id(2) * tiles
    end = tl.minimum(first + tiles, chunks)
    for back in tl.range(0, end - first, num_stages=2):
        chunk = end - 1 - back
        t = chunk * T + rows
        mask, maps = (t < length)[:, None] & inside[None, :], (t < length)[:, None] & (n < size)[None, :]
        at, map_at = (i * length + t)[:, None] * width + d[None, :], (i * length + t)[:, None] * size + n[None, :]
        u_t, delta_t = tl.load(u + at, mask, 0.0).to(ACC), tl.load(delta + at, mask, 0.0).to(ACC)
        B_t, C_t = tl.load(B + map_at, maps, 0.0).to(ACC), tl.load(C + map_at, maps, 0.0).to(ACC)
        # states before each step: the scan of the steps one earlier, the first row of the tile standing still
        moved = (rows > 0)[:, None]
        u_e = tl.load(u + at - width, mask & moved, 0.0).to(ACC)
        delta_e = tl.load(delta + at - width, mask & moved, 0.0).to(ACC)
        B_e = tl.load(B + map_at - size, maps & moved, 0.0).to(ACC)
        decay_e = tl.exp(delta_e[:, :, None] * rate[None, :, :])
        decay_e, inner = tl.associative_scan((decay_e, (delta_e * u_e)[:, :, None] * B_e[:, None, :]), 0, _join)
        h = tl.load(saved + (i * chunks + chunk) * size * width + cell, known, 0.0).to(ACC)
        before = decay_e * h[None, :, :] + inner
        decay, x_t = tl.exp(delta_t[:, :, None] * rate[None, :, :]), delta_t * u_t
        after = decay * before + x_t[:, :, None] * B_t[:, None, :]
        g = tl.load(grad_y + at, mask, 0.0).to(ACC)
        if HAS_Z:
            z_t = tl.load(z + at, mask, 0.0).to(ACC)
            gate = 1 / (1 + tl.exp(-z_t))
            p = tl.sum(after * C_t[:, None, :], 2) + skip_d[None, :] * u_t
            tl.store(grad_z + at, g * p * gate * (1 + z_t * (1 - gate)), mask)
            g *= z_t * gate
        # gradients of the states: a scan from the last step (scans of Triton in reverse have had faults) with the decay
        # of the step one later, the first row standing still
        s = chunk * T + (T - 1 - rows)
        late, late_maps = (s < length)[:, None] & inside[None, :], (s < length)[:, None] & (n < size)[None, :]
        s_at = (i * length + s)[:, None] * width + d[None, :]
        C_s = tl.load(C + (i * length + s)[:, None] * size + n[None, :], late_maps, 0.0).to(ACC)
        g_s = tl.load(grad_y + s_at, late, 0.0).to(ACC)
        if HAS_Z:
            z_s = tl.load(z + s_at, late, 0.0).to(ACC)
            g_s *= z_s / (1 + tl.exp(-z_s))
        delta_s = tl.load(delta + s_at + width, late & ((rows > 0) & (s + 1 < length))[:, None], 0.0).to(ACC)
        decay_s = tl.exp(delta_s[:, :, None] * rate[None, :, :])
        decay_s, inner = tl.associative_scan((decay_s, g_s[:, :, None] * C_s[:, None, :]), 0, _join)
        adjoint = tl.flip(decay_s * carry[None, :, :] + inner, 0)
        q = adjoint * decay * before
        tl.store(grad_B + partial * size + t[:, None] * size + n[None, :], tl.sum(adjoint * x_t[:, :, None], 1), maps)
        tl.store(grad_C + partial * size + t[:, None] * size + n[None, :], tl.sum(g[:, :, None] * after, 1), maps)
        to_input = tl.sum(adjoint * B_t[:, None, :], 2)
        tl.store(grad_u + at, delta_t * to_input + g * skip_d[None, :], mask)
        tl.store(grad_delta + at, u_t * to_input + tl.sum(q * rate[None, :, :], 2), mask)
        sum_A += tl.sum(q * delta_t[:, :, None], 0).to(tl.float64)
        sum_D += tl.sum(g * u_t, 0).to(tl.float64)
        carry = _row(decay * adjoint, rows, 0)
    tl.store(grad_A + _segment(i) * size * width + cell, sum_A, known)
    tl.store(grad_h0 + _segment(i) * size * width + cell, carry, known)
    tl.store(grad_D + _segment(i) * width + d, sum_D, inside)


class _Plan:
    """Blocks, tiles and segments of one call."""

    def __init__(self, u: Tensor, A: Tensor) -> None:
        (self.batch, self.length, self.width), self.size = u.shape, A.shape[1]
        states = triton.next_power_of_2(self.size)
        # tiles of 16 KiB: 16 registers each in 8 warps
        block = min(max(1, 16384 // A.element_size() // (GPU_CHUNK * states)), triton.next_power_of_2(self.width))
        wide = tl.float64 if A.dtype == torch.float64 else tl.float32
        self.options = {"T": GPU_CHUNK, "D": block, "N": states, "ACC": wide, "num_warps": 8}
        self.options |= {"DA": alignment(self.width), "NA": alignment(self.size)}
        self.blocks = triton.cdiv(self.width, block)
        self.segments, self.steps = cut(self.blocks * self.batch, self.length, GPU_CHUNK, u.device)
        self.grid = self.blocks, self.batch, self.segments
        self.chunks = triton.cdiv(self.length, GPU_CHUNK)
        units = self.width // self.options["DA"], self.size // self.options["NA"]
        self.sizes = self.length, *units, self.chunks, self.steps // GPU_CHUNK

    def states(self, like: Tensor) -> Tensor:
        """Room for one state per segment."""
        return like.new_empty(self.batch, self.segments, self.size, self.width)

    def carried(self, left: Tensor, delta: Tensor, A: Tensor, first: Tensor | None, reverse: bool = False) -> Tensor:
        """What each segment starts from, given what it leaves after a start from zero."""
        spent = totals(delta, self.segments, self.steps).unsqueeze(2)
        decay = (spent * A.mT).exp().to(left.dtype)
        start = None if first is None else first.flatten(1)
        return carried(decay.flatten(2), left.flatten(2), start, reverse).view_as(left)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, h0: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y: (batch, L, D); last state: (batch, N, D); states before each tile: (batch, tiles, N, D)."""
    plan = _Plan(u, A)
    y, last = u.new_empty(u.shape), plan.states(A)
    saved = A.new_empty(plan.batch, plan.chunks if save else 0, plan.size, plan.width)
    flags = {"HAS_D": D is not None, "HAS_Z": z is not None}
    given = [u, delta, A, B, C, A if D is None else D, u if z is None else z]
    given = [t.contiguous() for t in given]
    start = None if h0 is None else h0.mT.contiguous()
    with torch.cuda.device_of(u):
        if plan.segments > 1:
            _forward[plan.grid](
                *given, A, y, last, saved, *plan.sizes, **flags, HAS_H0=False, SAVE=False, OUTPUT=False,
                **plan.options,
            )  # fmt: skip
            start = plan.carried(last, delta, A, start)
        _forward[plan.grid](
            *given, A if start is None else start, y, last, saved, *plan.sizes, **flags, HAS_H0=start is not None,
            SAVE=save, OUTPUT=True, **plan.options,
        )  # fmt: skip
    return y, last[:, -1].contiguous(), saved


def backward(
    grad_y: Tensor, grad_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z (empty where z is None) and h0."""
    plan = _Plan(u, A)
    grad_u, grad_delta = u.new_empty(u.shape), u.new_empty(u.shape)
    grad_z = u.new_empty(0, 0, 0) if z is None else u.new_empty(u.shape)
    grad_A, grad_h0 = plan.states(A), plan.states(A)
    grad_B, grad_C = (A.new_empty(plan.blocks, plan.batch, plan.length, plan.size) for _ in range(2))
    grad_D = A.new_empty(plan.batch, plan.segments, plan.width)
    given = [grad_y, grad_last, u, delta, A, B, C, A if D is None else D, u if z is None else z, saved]
    grad_y, grad_last, *given = (t.contiguous() for t in given)
    gates = {"HAS_Z": z is not None}
    with torch.cuda.device_of(u):
        if plan.segments > 1:
            left = plan.states(A)
            _, steps, rates, _, maps, _, gate, _ = given
            _adjoints[plan.grid](grad_y, steps, rates, maps, gate, left, *plan.sizes, **gates, **plan.options)
            grad_last = plan.carried(left, delta, A, grad_last, reverse=True)
        _backward[plan.grid](
            grad_y, grad_last, *given, grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_h0,
            *plan.sizes, HAS_D=D is not None, **gates, **plan.options,
        )  # fmt: skip
    return (
        grad_u, grad_delta, grad_A.sum((0, 1)).T.contiguous(), grad_B.sum(0).to(u.dtype), grad_C.sum(0).to(u.dtype),
        grad_D.sum((0, 1)), grad_z, grad_h0[:, 0].mT.contiguous(),
    )  # fmt: skip
