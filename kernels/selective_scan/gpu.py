"""`selective_scan` in Triton: each program walks one row and one block of channels through time in tiles of GPU_CHUNK
steps, scanning a (steps, channels, N) tile by a parallel prefix and carrying the (channels, N) state.

Backward walks the tiles from the last to the first, each from the state saved before it (README.md has the formulas).
Gradients of B and C are reduced per block of channels and summed afterwards, without atomics. Accumulation is in
float32 (float64 for float64 inputs), of the gradients of A and D over all steps in float64. Steps beyond the end have
delta = 0, which leaves the state as it is. Widths and state sizes come in units of DA and NA numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._launch import alignment
from lra.kernels.selective_scan.cpu import GPU_CHUNK


@triton.jit
def _join(a1, b1, a2, b2):
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _row(x, rows, row: tl.constexpr):
    """One step of a (T, D, N) tile."""
    return tl.sum(tl.where(rows[:, None, None] == row, x, 0.0), 0)


@triton.jit
def _forward(
    u, delta, A, B, C, skip, z, h0, y, last, saved, length, width, size, chunks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_H0: tl.constexpr, SAVE: tl.constexpr, ACC: tl.constexpr,
    DA: tl.constexpr, NA: tl.constexpr, T: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    width, size = width * DA, size * NA
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d, n = tl.program_id(0) * D + tl.arange(0, D), tl.arange(0, N)
    inside, known = d < width, (d < width)[:, None] & (n < size)[None, :]
    rate = tl.load(A + d[:, None] * size + n[None, :], known, 0.0).to(ACC)
    cell = n[None, :] * width + d[:, None]
    h = tl.zeros([D, N], ACC)
    if HAS_H0:
        h += tl.load(h0 + i * size * width + cell, known, 0.0).to(ACC)
    for start in tl.range(0, length, T, num_stages=3):
        if SAVE:
            tl.store(saved + (i * chunks + start // T) * size * width + cell, h, known)
        t = start + rows
        mask, maps = (t < length)[:, None] & inside[None, :], (t < length)[:, None] & (n < size)[None, :]
        at, map_at = (i * length + t)[:, None] * width + d[None, :], (i * length + t)[:, None] * size + n[None, :]
        u_t, delta_t = tl.load(u + at, mask, 0.0).to(ACC), tl.load(delta + at, mask, 0.0).to(ACC)
        B_t, C_t = tl.load(B + map_at, maps, 0.0).to(ACC), tl.load(C + map_at, maps, 0.0).to(ACC)
        decay = tl.exp(delta_t[:, :, None] * rate[None, :, :])
        decay, inner = tl.associative_scan((decay, (delta_t * u_t)[:, :, None] * B_t[:, None, :]), 0, _join)
        states = decay * h[None, :, :] + inner
        out = tl.sum(states * C_t[:, None, :], 2)
        if HAS_D:
            out += tl.load(skip + d, inside, 0.0).to(ACC)[None, :] * u_t
        if HAS_Z:
            z_t = tl.load(z + at, mask, 0.0).to(ACC)
            out *= z_t / (1 + tl.exp(-z_t))
        tl.store(y + at, out, mask)
        h = _row(states, rows, T - 1)
    tl.store(last + i * size * width + cell, h, known)


@triton.jit
def _backward(
    grad_y, grad_last, u, delta, A, B, C, skip, z, saved,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_h0, length, width, size, chunks,
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
    carry = tl.load(grad_last + i * size * width + cell, known, 0.0).to(ACC)
    sum_A, sum_D, skip_d = tl.zeros([D, N], tl.float64), tl.zeros([D], tl.float64), tl.zeros([D], ACC)
    if HAS_D:
        skip_d += tl.load(skip + d, inside, 0.0).to(ACC)
    for back in tl.range(0, chunks, num_stages=2):
        chunk = chunks - 1 - back
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
    tl.store(grad_A + i * size * width + cell, sum_A, known)
    tl.store(grad_h0 + i * size * width + cell, carry, known)
    tl.store(grad_D + i * width + d, sum_D, inside)


def _blocks(u: Tensor, A: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    batch, _, width = u.shape
    states = triton.next_power_of_2(A.shape[1])
    # tiles of 16 KiB: 16 registers each in 8 warps
    block = min(max(1, 16384 // A.element_size() // (GPU_CHUNK * states)), triton.next_power_of_2(width))
    wide = tl.float64 if A.dtype == torch.float64 else tl.float32
    options = {"T": GPU_CHUNK, "D": block, "N": states, "ACC": wide, "num_warps": 8}
    options |= {"DA": alignment(width), "NA": alignment(A.shape[1])}
    return (triton.cdiv(width, block), batch), options


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, h0: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y: (batch, L, D); last state: (batch, N, D); states before each tile: (batch, tiles, N, D)."""
    (batch, length, width), size = u.shape, A.shape[1]
    grid, options = _blocks(u, A)
    chunks = triton.cdiv(length, GPU_CHUNK) if save else 0
    y, last = u.new_empty(u.shape), A.new_empty(batch, size, width)
    saved = A.new_empty(batch, chunks, size, width)
    flags = {"HAS_D": D is not None, "HAS_Z": z is not None, "HAS_H0": h0 is not None, "SAVE": save}
    given = [u, delta, A, B, C, A if D is None else D, u if z is None else z, A if h0 is None else h0.mT]
    with torch.cuda.device_of(u):
        _forward[grid](
            *(t.contiguous() for t in given), y, last, saved, length, width // options["DA"], size // options["NA"],
            chunks, **flags, **options,
        )  # fmt: skip
    return y, last, saved


def backward(
    grad_y: Tensor, grad_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z (empty where z is None) and h0."""
    (batch, length, width), size = u.shape, A.shape[1]
    grid, options = _blocks(u, A)
    grad_u, grad_delta = u.new_empty(u.shape), u.new_empty(u.shape)
    grad_z = u.new_empty(0, 0, 0) if z is None else u.new_empty(u.shape)
    grad_A, grad_h0 = A.new_empty(batch, size, width), A.new_empty(batch, size, width)
    grad_B, grad_C = (A.new_empty(grid[0], batch, length, size) for _ in range(2))
    grad_D = A.new_empty(batch, width)
    given = [grad_y, grad_last, u, delta, A, B, C, A if D is None else D, u if z is None else z, saved]
    with torch.cuda.device_of(u):
        _backward[grid](
            *(t.contiguous() for t in given), grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_h0,
            length, width // options["DA"], size // options["NA"], saved.shape[1], HAS_D=D is not None,
            HAS_Z=z is not None, **options,
        )  # fmt: skip
    return (
        grad_u, grad_delta, grad_A.sum(0).T.contiguous(), grad_B.sum(0).to(u.dtype), grad_C.sum(0).to(u.dtype),
        grad_D.sum(0), grad_z, grad_h0.mT.contiguous(),
    )  # fmt: skip
