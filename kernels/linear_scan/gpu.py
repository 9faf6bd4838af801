"""`linear_scan` in Triton: each program walks one row and one block of channels through time in tiles, scanning within
a tile by a parallel prefix and carrying one state from tile to tile. One read and one write of every tensor.

Steps beyond the end take the identity map (a = 1, b = 0), so the carry after the last tile is the last real state.
Accumulation is in float32 (float64 for float64 inputs), over all steps in float64. A product of factors above 1 may
overflow within a tile; it is not multiplied with what is 0. Widths come in units of ALIGN numbers. Where rows and
blocks are few, time is cut into segments of `steps` steps (_split.py), one program each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._launch import alignment
from lra.kernels._split import cut


@triton.jit
def _times(a, b):
    """a b, and 0 where b is 0, whatever a is."""
    return tl.where(b == 0, 0.0, a * b)


@triton.jit
def _join(a1, b1, a2, b2):
    return a2 * a1, _times(a2, b1) + b2


@triton.jit
def _join_complex(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    ar, ai = ar2 * ar1 - ai2 * ai1, ar2 * ai1 + ai2 * ar1
    return ar, ai, _times(ar2, br1) - _times(ai2, bi1) + br2, _times(ar2, bi1) + _times(ai2, br1) + bi2


@triton.jit
def _last(x, rows, T: tl.constexpr):
    return tl.sum(tl.where(rows[:, None] == T - 1, x, 0.0), 0)


@triton.jit
def _segment(i):
    """Row of this program in a tensor with one entry per row i and segment."""
    return i * tl.num_programs(2) + tl.program_id(2)


@triton.jit
def _here(T: tl.constexpr, D: tl.constexpr):
    """Row of the batch, steps of a tile and channels of this program."""
    return tl.program_id(1).to(tl.int64), tl.arange(0, T), tl.program_id(0) * D + tl.arange(0, D)


@triton.jit
def _factor_at(i, t, a_row, a_time, ALIGN: tl.constexpr):
    """Where the first of the factors of time t stands; i makes it 64 bits wide."""
    return (i * a_row + (i * 0 + t) * a_time) * ALIGN


@triton.jit
def _cells(i, step, d, length, width, a_row, a_time, REVERSE: tl.constexpr, LATE: tl.constexpr, ALIGN: tl.constexpr):
    """Where the steps of a tile stand in b, and in a where each takes the factor of the step walked LATE steps before,
    with masks of what there is."""
    t = length - 1 - step if REVERSE else step
    a_at = _factor_at(i, t + LATE if REVERSE else t - LATE, a_row, a_time, ALIGN)[:, None] + d[None, :]
    mask = (step < length)[:, None] & (d < width)[None, :]
    at = (i * length + t)[:, None] * width + d[None, :]
    return at, mask, a_at, mask & (step >= LATE)[:, None]


@triton.jit
def _totals(
    a, b, decay, left, length, steps, width, a_row, a_time, REVERSE: tl.constexpr, LATE: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The product of a over a segment, and the state a segment leaves that starts from zero; LATE: 1 with the factor
    of the step walked before, as gradients run, or 0."""
    width = width * ALIGN
    i, rows, d = _here(T, D)
    inside = d < width
    total, state = tl.full([D], 1, ACC), tl.zeros([D], ACC)
    first = tl.program_id(2) * steps
    for start in tl.range(first, tl.minimum(first + steps, length), T, num_stages=3):
        at, mask, a_at, known = _cells(i, start + rows, d, length, width, a_row, a_time, REVERSE, LATE, ALIGN)
        a_t = tl.load(a + a_at, known, 1.0).to(ACC)
        b_t = tl.load(b + at, mask, 0.0).to(ACC)
        factor, inner = tl.associative_scan((a_t, b_t), 0, _join)
        factor = _last(factor, rows, T)
        total, state = total * factor, _times(factor, state) + _last(inner, rows, T)
    tl.store(decay + _segment(i) * width + d, total, inside)
    tl.store(left + _segment(i) * width + d, state, inside)


@triton.jit
def _forward(
    a, b, h0, h, length, steps, width, a_row, a_time, REVERSE: tl.constexpr, HAS_H0: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    width = width * ALIGN
    i, rows, d = _here(T, D)
    inside = d < width
    state = tl.zeros([D], ACC)
    if HAS_H0:
        state += tl.load(h0 + _segment(i) * width + d, inside, 0.0).to(ACC)
    first = tl.program_id(2) * steps
    for start in tl.range(first, tl.minimum(first + steps, length), T, num_stages=3):
        at, mask, a_at, _known = _cells(i, start + rows, d, length, width, a_row, a_time, REVERSE, 0, ALIGN)
        a_t = tl.load(a + a_at, mask, 1.0).to(ACC)
        b_t = tl.load(b + at, mask, 0.0).to(ACC)
        decay, inner = tl.associative_scan((a_t, b_t), 0, _join)
        now = _times(decay, state[None, :]) + inner
        tl.store(h + at, now, mask)
        state = _last(now, rows, T)


@triton.jit
def _backward(
    grad, a, h, h0, later_grad, grad_a, grad_b, grad_h0, length, steps, width, a_row, a_time, SHARED: tl.constexpr,
    REVERSE: tl.constexpr, HAS_H0: tl.constexpr, HAS_LATER: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """REVERSE: whether the gradients run from the last step to the first, which the states then do not."""
    width = width * ALIGN
    i, rows, d = _here(T, D)
    inside = d < width
    carry, total = tl.zeros([D], ACC), tl.zeros([D], tl.float64)
    if HAS_LATER:
        carry += tl.load(later_grad + _segment(i) * width + d, inside, 0.0)
    begin = tl.program_id(2) * steps
    for start in tl.range(begin, tl.minimum(begin + steps, length), T, num_stages=3):
        step = start + rows
        at, mask, a_at, known = _cells(i, step, d, length, width, a_row, a_time, REVERSE, 1, ALIGN)
        a_t = tl.load(a + a_at, known, 1.0).to(ACC)
        y_t = tl.load(grad + at, mask, 0.0).to(ACC)
        decay, inner = tl.associative_scan((a_t, y_t), 0, _join)
        g = _times(decay, carry[None, :]) + inner
        h_at = at - width if REVERSE else at + width
        h_t = tl.load(h + h_at, mask & (step < length - 1)[:, None], 0.0).to(ACC)
        if HAS_H0:
            first = (step == length - 1)[:, None] & inside[None, :]
            h_t += tl.load(h0 + i * width + d[None, :] + 0 * rows[:, None], first, 0.0).to(ACC)
        tl.store(grad_b + at, g, mask)
        if SHARED:
            total += tl.sum(g * h_t, 0).to(tl.float64)
        else:
            tl.store(grad_a + at, g * h_t, mask)
        carry = _last(g, rows, T)
    if SHARED:
        tl.store(grad_a + _segment(i) * width + d, total, inside)
    a_1 = tl.load(a + _factor_at(i, 0 if REVERSE else length - 1, a_row, a_time, ALIGN) + d, inside, 0.0).to(ACC)
    tl.store(grad_h0 + _segment(i) * width + d, a_1 * carry, inside)


@triton.jit
def _pair(x, at, mask):
    """Real and imaginary parts of the complex numbers at `at`, 0 where masked; read side by side."""
    return tl.split(tl.load(x + 2 * at[:, :, None] + tl.arange(0, 2)[None, None, :], mask[:, :, None], 0.0))


@triton.jit
def _put_pair(x, at, mask, re, im):
    tl.store(x + 2 * at[:, :, None] + tl.arange(0, 2)[None, None, :], tl.join(re, im), mask[:, :, None])


@triton.jit
def _totals_complex(
    a, b, decay, left, length, steps, width, a_row, a_time, REVERSE: tl.constexpr, LATE: tl.constexpr,
    ACC: tl.constexpr, ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    width = width * ALIGN
    i, rows, d = _here(T, D)
    inside = d < width
    total_re, total_im, re, im = tl.full([D], 1, ACC), tl.zeros([D], ACC), tl.zeros([D], ACC), tl.zeros([D], ACC)
    first = tl.program_id(2) * steps
    for start in tl.range(first, tl.minimum(first + steps, length), T, num_stages=3):
        at, mask, a_at, known = _cells(i, start + rows, d, length, width, a_row, a_time, REVERSE, LATE, ALIGN)
        ar, ai = _pair(a, a_at, known)
        br, bi = _pair(b, at, mask)
        ar = tl.where(known, ar, 1.0)
        ar, ai, br, bi = tl.associative_scan((ar, -ai if LATE else ai, br, bi), 0, _join_complex)
        ar, ai, br, bi = _last(ar, rows, T), _last(ai, rows, T), _last(br, rows, T), _last(bi, rows, T)
        total_re, total_im, re, im = _join_complex(total_re, total_im, re, im, ar, ai, br, bi)
    row = 2 * (_segment(i) * width + d)
    tl.store(decay + row, total_re, inside)
    tl.store(decay + row + 1, total_im, inside)
    tl.store(left + row, re, inside)
    tl.store(left + row + 1, im, inside)


@triton.jit
def _forward_complex(
    a, b, h0, h, length, steps, width, a_row, a_time, REVERSE: tl.constexpr, HAS_H0: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    width = width * ALIGN
    i, rows, d = _here(T, D)
    inside = d < width
    re, im = tl.zeros([D], ACC), tl.zeros([D], ACC)
    if HAS_H0:
        re += tl.load(h0 + 2 * (_segment(i) * width + d), inside, 0.0)
        im += tl.load(h0 + 2 * (_segment(i) * width + d) + 1, inside, 0.0)
    first = tl.program_id(2) * steps
    for start in tl.range(first, tl.minimum(first + steps, length), T, num_stages=3):
        at, mask, a_at, _known = _cells(i, start + rows, d, length, width, a_row, a_time, REVERSE, 0, ALIGN)
        ar, ai = _pair(a, a_at, mask)
        br, bi = _pair(b, at, mask)
        ar = tl.where(mask, ar, 1.0)
        ar, ai, br, bi = tl.associative_scan((ar, ai, br, bi), 0, _join_complex)
        now_re = _times(ar, re[None, :]) - _times(ai, im[None, :]) + br
        now_im = _times(ar, im[None, :]) + _times(ai, re[None, :]) + bi
        _put_pair(h, at, mask, now_re, now_im)
        re, im = _last(now_re, rows, T), _last(now_im, rows, T)


@triton.jit
def _backward_complex(
    grad, a, h, h0, later_grad, grad_a, grad_b, grad_h0, length, steps, width, a_row, a_time, SHARED: tl.constexpr,
    REVERSE: tl.constexpr, HAS_H0: tl.constexpr, HAS_LATER: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    width = width * ALIGN
    i, rows, d = _here(T, D)
    inside = d < width
    re, im = tl.zeros([D], ACC), tl.zeros([D], ACC)
    total_re, total_im = tl.zeros([D], tl.float64), tl.zeros([D], tl.float64)
    if HAS_LATER:
        re += tl.load(later_grad + 2 * (_segment(i) * width + d), inside, 0.0)
        im += tl.load(later_grad + 2 * (_segment(i) * width + d) + 1, inside, 0.0)
    begin = tl.program_id(2) * steps
    for start in tl.range(begin, tl.minimum(begin + steps, length), T, num_stages=3):
        step = start + rows
        at, mask, a_at, known = _cells(i, step, d, length, width, a_row, a_time, REVERSE, 1, ALIGN)
        ar, ai = _pair(a, a_at, known)
        yr, yi = _pair(grad, at, mask)
        ar = tl.where(known, ar, 1.0)
        ar, ai, yr, yi = tl.associative_scan((ar, -ai, yr, yi), 0, _join_complex)
        gr = _times(ar, re[None, :]) - _times(ai, im[None, :]) + yr
        gi = _times(ar, im[None, :]) + _times(ai, re[None, :]) + yi
        h_at = at - width if REVERSE else at + width
        hr, hi = _pair(h, h_at, mask & (step < length - 1)[:, None])
        if HAS_H0:
            first = (step == length - 1)[:, None] & inside[None, :]
            h0_at = 2 * (i * width + d[None, :] + 0 * rows[:, None])
            hr += tl.load(h0 + h0_at, first, 0.0)
            hi += tl.load(h0 + h0_at + 1, first, 0.0)
        _put_pair(grad_b, at, mask, gr, gi)
        if SHARED:
            total_re += tl.sum(gr * hr + gi * hi, 0).to(tl.float64)
            total_im += tl.sum(gi * hr - gr * hi, 0).to(tl.float64)
        else:
            _put_pair(grad_a, at, mask, gr * hr + gi * hi, gi * hr - gr * hi)
        re, im = _last(gr, rows, T), _last(gi, rows, T)
    row = 2 * (_segment(i) * width + d)
    if SHARED:
        tl.store(grad_a + row, total_re, inside)
        tl.store(grad_a + row + 1, total_im, inside)
    first = a + 2 * (_factor_at(i, 0 if REVERSE else length - 1, a_row, a_time, ALIGN) + d)
    ar, ai = tl.load(first, inside, 0.0), -tl.load(first + 1, inside, 0.0)
    tl.store(grad_h0 + row, ar * re - ai * im, inside)
    tl.store(grad_h0 + row + 1, ar * im + ai * re, inside)


def _plain(t: Tensor) -> Tensor:
    """Contiguous, complex numbers as pairs of real ones."""
    t = t.detach().contiguous()
    return torch.view_as_real(t) if t.is_complex() else t


class _Plan:
    """Blocks, tiles and segments for a recurrence over `like`, (B, L, D)."""

    def __init__(self, a: Tensor, like: Tensor) -> None:
        batch, length, width = like.shape
        self.like, wide = like, like.dtype in (torch.float64, torch.complex128)
        block = min(32, triton.next_power_of_2(width))
        # 256 bytes of steps fill the memory pipeline and leave registers free
        tile = max(16, min(64, 256 // like.element_size()))
        programs = triton.cdiv(width, block), batch
        self.segments, steps = cut(programs[0] * batch, length, tile, like.device)
        self.grid = *programs, self.segments
        align = alignment(width)
        units = width // align
        a_row, a_time = (units * a.shape[1] if a.shape[0] > 1 else 0), (units if a.shape[1] > 1 else 0)
        self.sizes = length, steps, units, a_row, a_time
        self.options = {"ALIGN": align, "ACC": tl.float64 if wide else tl.float32, "T": tile, "D": block}

    def launch(self, kernels: tuple[Any, Any], *tensors: Tensor, **options: int) -> None:
        """Run the real or the complex kernel over one program per row, block of channels and segment."""
        kernel = kernels[self.like.is_complex()]
        with torch.cuda.device_of(self.like):
            kernel[self.grid](*map(_plain, tensors), *self.sizes, **self.options, **options, num_warps=4)

    def starts(self, a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, late: int) -> Tensor | None:
        """The state each segment starts from, (B, segments, D); `h0` where there is one segment."""
        if self.segments == 1:
            return h0
        batch, _, width = b.shape
        dtype = torch.promote_types(b.dtype, torch.float32)
        decay, left = (b.new_empty(batch, self.segments, width, dtype=dtype) for _ in range(2))
        self.launch((_totals, _totals_complex), a, b, decay, left, REVERSE=reverse, LATE=late)
        return carried(decay, left, h0)


def carried(decay: Tensor, left: Tensor, first: Tensor | None, reverse: bool = False) -> Tensor:
    """The state each segment starts from, (B, segments, D).

    decay, left: (B, segments, D), the total decay of a segment and the state it leaves after a start from zero.
    first: (B, D), what the first one, in reverse the last one, starts from; zeros where None.
    """
    start = (torch.zeros_like(left[:, 0]) if first is None else first.to(left.dtype)).unsqueeze(1)
    others = slice(1, None) if reverse else slice(None, -1)
    after = forward(decay[:, others], left[:, others], start[:, 0], reverse)
    return torch.cat([after, start] if reverse else [start, after], dim=1)


def forward(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """Arguments as `linear_scan`, all of one dtype."""
    h, plan = b.new_empty(b.shape), _Plan(a, b)
    start = plan.starts(a, b, h0, reverse, late=0)
    tensors = a, b, b if start is None else start, h
    plan.launch((_forward, _forward_complex), *tensors, REVERSE=reverse, HAS_H0=start is not None)
    return h


def backward(grad: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h0."""
    (batch, length, width), plan = h.shape, _Plan(a, h)
    later = plan.starts(a, grad, None, not reverse, late=1)
    grad_b, grad_h0 = h.new_empty(h.shape), h.new_empty(batch, plan.segments, width)
    wide = torch.promote_types(a.dtype, torch.float32)
    shared = a.shape[1] == 1
    summed = shared or a.shape[0] < batch
    grad_a = h.new_empty(batch, plan.segments if shared else length, width, dtype=wide if summed else a.dtype)
    plan.launch(
        (_backward, _backward_complex), grad, a, h, h if h0 is None else h0, h if later is None else later, grad_a,
        grad_b, grad_h0, REVERSE=not reverse, HAS_H0=h0 is not None, HAS_LATER=later is not None, SHARED=shared,
    )  # fmt: skip
    if shared:
        grad_a = grad_a.sum(1, keepdim=True)
    if a.shape[0] < batch:
        grad_a = grad_a.sum(0, keepdim=True)
    return grad_a.to(a.dtype), grad_b, grad_h0[:, -1].contiguous()
