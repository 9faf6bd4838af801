"""`wkv` in Triton: each program takes one row and one block of channels through time in tiles, scanning within a tile
and carrying the sums from tile to tile.

Within a tile a stretch of steps is (num, den, top, fall): its sums in units of e^top, and what its steps take off the
exponents of all before it. Two stretches join into one, which is associative. A row of the tile holds the sums after
its step, so that they meet the key and value of the step after it, which are read once more.

Backward goes forward once more, keeping the output, the gradient of its numerator and the exponent of both, and then
back, where what comes later is scanned in the same way. Arithmetic is in float32 (float64 for float64 inputs): an
exponent that is carried is kept as it was when it became the largest, beside the number of steps since, so that
rounding does not add up. Widths come in units of ALIGN numbers. Where rows and blocks are few, time is cut into
segments of `steps` steps (_split.py), one program each: a segment is a sequence of its own, with an initial state and a
gradient of its last one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._dispatch import interpreting
from lra.kernels._launch import alignment
from lra.kernels._split import cut

NOTHING = tl.constexpr(-1e38)  # exponent of an empty sum
FASTEST = 1e30  # a rate beyond which nothing is left after one step, and products with it are finite


@triton.jit
def _shares(a, b):
    """What e^a and e^b are in units of the larger one, and its exponent."""
    small = tl.exp(-tl.abs(a - b))
    return tl.where(a > b, 1.0, small), tl.where(a > b, small, 1.0), tl.maximum(a, b)


@triton.jit
def _join(num1, den1, top1, fall1, num2, den2, top2, fall2):
    past, now, top = _shares(top1 - fall2, top2)
    return past * num1 + now * num2, past * den1 + now * den2, top, fall1 + fall2


@triton.jit
def _join_rates(num1, den1, rate_num1, rate_den1, top1, fall1, num2, den2, rate_num2, rate_den2, top2, fall2):
    """As `_join`, with the derivatives of both sums by w, the logarithm of the rate."""
    past, now, top = _shares(top1 - fall2, top2)
    rate_num = past * (rate_num1 - fall2 * num1) + now * rate_num2
    rate_den = past * (rate_den1 - fall2 * den1) + now * rate_den2
    return past * num1 + now * num2, past * den1 + now * den2, rate_num, rate_den, top, fall1 + fall2


@triton.jit
def _output(num, den, top, shifted, v):
    """Output, its denominator, the shares of the sums and of the step itself in it, and the exponent of all three."""
    past, now, largest = _shares(top, shifted)
    below = past * den + now
    return (past * num + now * v) / below, below, past, now, largest


@triton.jit
def _last(x, rows, T: tl.constexpr):
    return tl.sum(tl.where(rows[:, None] == T - 1, x, 0.0), 0)


@triton.jit
def _rise(top, age, tile_top, steps, rate):
    """The exponent carried past a tile, as it was when it became the largest, and the steps since."""
    older = top - (age + steps) * rate > tile_top
    return tl.where(older, top, tile_top), tl.where(older, age + steps, 0)


@triton.jit
def _sums(state, i, d, width, inside):
    num = tl.load(state + (3 * i) * width + d, inside, 0.0)
    den = tl.load(state + (3 * i + 1) * width + d, inside, 1.0)
    return num, den, tl.load(state + (3 * i + 2) * width + d, inside, 0.0)


@triton.jit
def _put_sums(state, i, d, width, inside, num, den, top):
    tl.store(state + (3 * i) * width + d, num, inside)
    tl.store(state + (3 * i + 1) * width + d, den, inside)
    tl.store(state + (3 * i + 2) * width + d, top, inside)


@triton.jit
def _segment(i):
    """Row of this program in a tensor with one entry per row i and segment."""
    return i * tl.num_programs(2) + tl.program_id(2)


@triton.jit
def _carry(
    left, first, decay, starts, length, steps, width, segments, REVERSE: tl.constexpr, ALIGN: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """What each segment starts from, given what it leaves after a start from nothing."""
    width = width * ALIGN
    i, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    rate = tl.load(decay + d, inside, 0.0)
    num, den, top = _sums(first, i, d, width, inside)
    for n in range(0, segments):
        segment = segments - 1 - n if REVERSE else n
        at = i * segments + segment
        _put_sums(starts, at, d, width, inside, num, den, top)
        more_num, more_den, more_top = _sums(left, at, d, width, inside)
        fall = tl.minimum(length - segment * steps, steps) * rate
        num, den, top, _fall = _join(num, den, top, 0.0, more_num, more_den, more_top, fall)


@triton.jit
def _forward(
    k, v, decay, bonus, state, o, last, length, steps, width, OUTPUT: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """OUTPUT: whether o is wanted, or no more than the state a segment leaves."""
    width = width * ALIGN
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d = tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    first, end = tl.program_id(2) * steps, tl.minimum((tl.program_id(2) + 1) * steps, length)
    rate, u = tl.load(decay + d, inside, 0.0), tl.load(bonus + d, inside, 0.0).to(ACC)
    num, den, top = _sums(state, _segment(i), d, width, inside)
    age = tl.zeros([D], tl.int32)
    if OUTPUT:
        at_0 = (i * length + first) * width + d
        k_0, v_0 = tl.load(k + at_0, inside, 0.0).to(ACC), tl.load(v + at_0, inside, 0.0).to(ACC)
        out_0, _below_0, _past_0, _now_0, _largest_0 = _output(num, den, top, u + k_0, v_0)
        tl.store(o + at_0, out_0, inside)
    for start in tl.range(first, end, T, num_stages=3):
        t = start + rows
        known = (t < end)[:, None] & inside[None, :]
        at = (i * length + t)[:, None] * width + d[None, :]
        k_t, v_t = tl.load(k + at, known, 0.0).to(ACC), tl.load(v + at, known, 0.0).to(ACC)
        k_t = tl.where(known, k_t, NOTHING)
        one, fall = tl.where(known, 1.0, 0.0).to(ACC), tl.where(known, rate[None, :], 0.0)
        nums, dens, tops, falls = tl.associative_scan((v_t, one, k_t, fall), 0, _join)
        now_top = top - age * rate
        num_t, den_t, top_t, _fall = _join(
            num[None, :], den[None, :], now_top[None, :], 0.0, nums, dens, tops, falls
        )  # fmt: skip
        if OUTPUT:
            follows = (t + 1 < end)[:, None] & inside[None, :]
            k_n = tl.load(k + at + width, follows, 0.0).to(ACC)
            v_n = tl.load(v + at + width, follows, 0.0).to(ACC)
            out, _below, _past, _now, _largest = _output(num_t, den_t, top_t, u[None, :] + k_n, v_n)
            tl.store(o + at + width, out, follows)
        num, den = _last(num_t, rows, T), _last(den_t, rows, T)
        top, age = _rise(top, age, _last(tops, rows, T), tl.minimum(end - start, T), rate)
    _put_sums(last, _segment(i), d, width, inside, num, den, top - age * rate)


@triton.jit
def _again(
    grad_o, k, v, decay, bonus, state, outputs, pulls, exponents, last, rates, newest, grad_w, grad_u, length, steps,
    width, ACC: tl.constexpr, ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Forward once more, for what backward reads, the gradient of u and a part of that of w.

    rates: derivatives of the last sums by w; newest: the step whose key is the last exponent, the one before the
    segment where it is that of the state.
    """
    width = width * ALIGN
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d = tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    first, end = tl.program_id(2) * steps, tl.minimum((tl.program_id(2) + 1) * steps, length)
    rate, u = tl.load(decay + d, inside, 0.0), tl.load(bonus + d, inside, 0.0).to(ACC)
    num, den, top = _sums(state, _segment(i), d, width, inside)
    rate_num, rate_den = tl.zeros([D], ACC), tl.zeros([D], ACC)
    age, best = tl.zeros([D], tl.int32), tl.zeros([D], tl.int32) + (first - 1)
    at_0 = (i * length + first) * width + d
    k_0, v_0 = tl.load(k + at_0, inside, 0.0).to(ACC), tl.load(v + at_0, inside, 0.0).to(ACC)
    out_0, below_0, _past_0, now_0, largest_0 = _output(num, den, top, u + k_0, v_0)
    pull_0 = tl.load(grad_o + at_0, inside, 0.0).to(ACC) / below_0
    tl.store(outputs + at_0, out_0, inside)
    tl.store(pulls + at_0, pull_0, inside)
    tl.store(exponents + at_0, largest_0, inside)
    # sums over every step, in double precision to keep the digits
    to_w, to_u = tl.zeros([D], tl.float64), (now_0 * pull_0 * (v_0 - out_0)).to(tl.float64)
    for start in tl.range(first, end, T, num_stages=3):
        t = start + rows
        known, follows = (t < end)[:, None] & inside[None, :], (t + 1 < end)[:, None] & inside[None, :]
        at = (i * length + t)[:, None] * width + d[None, :]
        k_t, v_t = tl.load(k + at, known, 0.0).to(ACC), tl.load(v + at, known, 0.0).to(ACC)
        k_t = tl.where(known, k_t, NOTHING)
        k_n, v_n = tl.load(k + at + width, follows, 0.0).to(ACC), tl.load(v + at + width, follows, 0.0).to(ACC)
        g_n = tl.load(grad_o + at + width, follows, 0.0).to(ACC)
        one, none, fall = tl.where(known, 1.0, 0.0).to(ACC), tl.zeros([T, D], ACC), tl.where(known, rate[None, :], 0.0)
        nums, dens, rate_nums, rate_dens, tops, falls = tl.associative_scan(
            (v_t, one, none, none, k_t, fall), 0, _join_rates
        )
        now_top = top - age * rate
        num_t, den_t, rate_num_t, rate_den_t, top_t, _fall = _join_rates(
            num[None, :], den[None, :], rate_num[None, :], rate_den[None, :], now_top[None, :], 0.0, nums, dens,
            rate_nums, rate_dens, tops, falls,
        )  # fmt: skip
        out, below, past, now, largest = _output(num_t, den_t, top_t, u[None, :] + k_n, v_n)
        pull = g_n / below
        to_u += tl.sum(now * pull * (v_n - out), 0).to(tl.float64)
        to_w += tl.sum(pull * past * (rate_num_t - out * rate_den_t), 0).to(tl.float64)
        tl.store(outputs + at + width, out, follows)
        tl.store(pulls + at + width, pull, follows)
        tl.store(exponents + at + width, largest, follows)
        num, den = _last(num_t, rows, T), _last(den_t, rows, T)
        rate_num, rate_den = _last(rate_num_t, rows, T), _last(rate_den_t, rows, T)
        done = tl.minimum(end - start, T)
        _top, row = tl.max(k_t - (done - 1 - rows)[:, None] * rate[None, :], 0, return_indices=True)
        top, age = _rise(top, age, _last(tops, rows, T), done, rate)
        best = tl.where(age == 0, start + row, best)
    row = _segment(i)
    _put_sums(last, row, d, width, inside, num, den, top - age * rate)
    tl.store(rates + (2 * row) * width + d, rate_num, inside)
    tl.store(rates + (2 * row + 1) * width + d, rate_den, inside)
    tl.store(newest + row * width + d, best, inside)
    tl.store(grad_w + row * width + d, to_w, inside)
    tl.store(grad_u + row * width + d, to_u, inside)


@triton.jit
def _backward(
    later, to_tops, k, v, decay, bonus, state, outputs, pulls, exponents, last, rates, newest, grad_k, grad_v,
    grad_state, grad_w, length, steps, width, OUTPUT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """From the last step to the first; a row holds what the sums after its step get from the steps after it.

    later: what the last sums get, as sums of gradients in units of an exponential; to_tops: what their exponent gets
    beside. OUTPUT: whether gradients are wanted, or no more than such sums before the segment, in grad_state.
    """
    width = width * ALIGN
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d = tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    first, end = tl.program_id(2) * steps, tl.minimum((tl.program_id(2) + 1) * steps, length)
    rate, u = tl.load(decay + d, inside, 0.0), tl.load(bonus + d, inside, 0.0).to(ACC)
    segment = _segment(i)
    above, below, top = _sums(later, segment, d, width, inside)
    age = tl.zeros([D], tl.int32)
    if OUTPUT:
        _num, _den, last_top = _sums(last, segment, d, width, inside)
        best, to_top = (
            tl.load(newest + segment * width + d, inside, 0),
            tl.load(to_tops + segment * width + d, inside, 0.0),
        )
        rate_num = tl.load(rates + (2 * segment) * width + d, inside, 0.0)
        rate_den = tl.load(rates + (2 * segment + 1) * width + d, inside, 0.0)
        to_w = tl.exp(top + last_top) * (above * rate_num + below * rate_den) - to_top * (end - 1 - best) * rate
        total = tl.load(grad_w + segment * width + d, inside, 0.0)
        tl.store(grad_w + segment * width + d, total + to_w.to(tl.float64), inside)
    for start in tl.range(0, end - first, T, num_stages=3):
        step = start + rows
        t = end - 1 - step
        known = (t >= first)[:, None] & inside[None, :]
        follows = known & (step > 0)[:, None]
        at = (i * length + t)[:, None] * width + d[None, :]
        o_n, pull_n = tl.load(outputs + at + width, follows, 0.0), tl.load(pulls + at + width, follows, 0.0)
        top_n = tl.load(exponents + at + width, follows, -NOTHING)
        fall = tl.where(follows, rate[None, :], 0.0)
        aboves, belows, tops, falls = tl.associative_scan((pull_n, -pull_n * o_n, -top_n, fall), 0, _join)
        now_top = top - age * rate
        above_t, below_t, top_t, _fall = _join(
            above[None, :], below[None, :], now_top[None, :], 0.0, aboves, belows, tops, falls
        )  # fmt: skip
        if OUTPUT:
            k_t, v_t = tl.load(k + at, known, 0.0).to(ACC), tl.load(v + at, known, 0.0).to(ACC)
            o_t, pull = tl.load(outputs + at, known, 0.0), tl.load(pulls + at, known, 0.0)
            largest = tl.load(exponents + at, known, 0.0)
            weight = tl.exp(tl.where(known, k_t, NOTHING) + top_t)
            to_v = tl.exp(tl.where(known, u[None, :] + k_t - largest, 0.0)) * pull
            to_k = to_v * (v_t - o_t) + weight * (v_t * above_t + below_t)
            to_k += tl.where(t[:, None] == best[None, :], to_top[None, :], 0.0)
            tl.store(grad_v + at, to_v + weight * above_t, known)
            tl.store(grad_k + at, to_k, known)
        above, below = _last(above_t, rows, T), _last(below_t, rows, T)
        # the first of all rows takes nothing off
        done = tl.minimum(end - first - start, T) - tl.where(start == 0, 1, 0)
        top, age = _rise(top, age, _last(tops, rows, T), done, rate)
    at_0 = (i * length + first) * width + d
    o_0, pull_0 = tl.load(outputs + at_0, inside, 0.0), tl.load(pulls + at_0, inside, 0.0)
    top_0 = -tl.load(exponents + at_0, inside, 0.0)
    above, below, top, _fall_0 = _join(above, below, top - age * rate, 0.0, pull_0, -pull_0 * o_0, top_0, rate)
    if OUTPUT:
        num, den, before = _sums(state, segment, d, width, inside)
        above, below = tl.exp(top + before) * above, tl.exp(top + before) * below
        top = tl.where(best < first, to_top, 0.0) + above * num + below * den
    _put_sums(grad_state, segment, d, width, inside, above, below, top)


class _Plan:
    """Blocks, tiles and segments of one call."""

    def __init__(self, k: Tensor, w: Tensor, state: Tensor) -> None:
        self.batch, self.length, self.width = k.shape
        block = min(32, triton.next_power_of_2(self.width))
        wide = state.dtype == torch.float64
        # the interpreter scans element by element
        tile = 16 if wide or interpreting() else 32
        self.grid = triton.cdiv(self.width, block), self.batch
        self.segments, steps = cut(self.grid[0] * self.batch, self.length, tile, k.device)
        self.options: dict[str, Any] = {"ALIGN": alignment(self.width), "D": block, "num_warps": 4}
        self.tiles = {"ACC": tl.float64 if wide else tl.float32, "T": tile}
        self.sizes = self.length, steps, self.width // self.options["ALIGN"]
        self.rate = w.detach().double().exp().clamp(max=FASTEST).to(state.dtype)

    def launch(self, kernel: Any, *arguments: Tensor, **options: bool) -> None:
        with torch.cuda.device_of(self.rate):
            kernel[*self.grid, self.segments](*arguments, *self.sizes, **options, **self.tiles, **self.options)

    def room(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for `rows` numbers per channel of each segment."""
        return self.rate.new_empty(self.batch, self.segments, rows, self.width, dtype=dtype)

    def carried(self, left: Tensor, first: Tensor, reverse: bool = False) -> Tensor:
        starts = torch.empty_like(left)
        with torch.cuda.device_of(self.rate):
            _carry[self.grid](
                left, first, self.rate, starts, *self.sizes, self.segments, REVERSE=reverse, **self.options
            )  # fmt: skip
        return starts

    def starts(self, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> Tensor:
        """The state each segment starts from."""
        if self.segments == 1:
            return state
        nothing, left = self.nothing(), self.room(3)
        self.launch(_forward, k, v, self.rate, u, nothing, v, left, OUTPUT=False)
        return self.carried(left, state)

    def nothing(self) -> Tensor:
        """Empty sums for each segment."""
        state = torch.zeros_like(self.room(3))
        state[:, :, 2] = NOTHING.value
        return state


def forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments as `wkv`, k and v of one dtype, the state in that of accumulation."""
    k, v, u, state = (x.detach().contiguous() for x in (k, v, u, state))
    plan = _Plan(k, w, state)
    o, last = torch.empty_like(v), plan.room(3)
    plan.launch(_forward, k, v, plan.rate, u, plan.starts(k, v, u, state), o, last, OUTPUT=True)
    return o, last[:, -1].contiguous()


def backward(
    grad_o: Tensor, grad_last: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial state."""
    grad_o, grad_last, k, v, u, state = (x.detach().contiguous() for x in (grad_o, grad_last, k, v, u, state))
    plan = _Plan(k, w, state)
    grad_k, grad_v, grad_state = torch.empty_like(k), torch.empty_like(v), plan.room(3)
    grad_w, grad_u = plan.room(1, torch.float64), plan.room(1, torch.float64)
    kept = [torch.empty_like(k, dtype=state.dtype) for _ in range(3)]
    last, rates, newest = plan.room(3), plan.room(2), plan.room(1, torch.int32)
    starts = plan.starts(k, v, u, state)
    given = k, v, plan.rate, u, starts
    plan.launch(_again, grad_o, *given, *kept, last, rates, newest, grad_w, grad_u)
    num, den, top = last[:, -1].unbind(1)
    to_num, to_den, to_top = grad_last.unbind(1)
    to_top = to_top - to_num * num - to_den * den
    later = torch.stack([to_num, to_den, -top], dim=1)
    to_tops = to_top.expand(plan.segments, *to_top.shape).movedim(0, 1)
    if plan.segments > 1:
        read = k, v, plan.rate, u, starts, *kept, last, rates, newest, grad_k, grad_v
        nothing, left = plan.nothing(), plan.room(3)
        plan.launch(_backward, nothing, to_tops, *read, left, grad_w, OUTPUT=False)
        later = plan.carried(left, later, reverse=True)
        # the last exponent passes the segments it was not raised in
        begins = torch.arange(plan.segments, device=k.device)[:, None] * plan.sizes[1]
        passed = (newest[:, :, 0] < begins)[:, 1:].flip(1).cumprod(1).flip(1)
        to_tops = torch.cat([to_tops[:, :-1] * passed, to_tops[:, -1:]], dim=1)
    plan.launch(
        _backward, later, to_tops.contiguous(), *given, *kept, last, rates, newest, grad_k, grad_v, grad_state,
        grad_w, OUTPUT=True,
    )  # fmt: skip
    return (
        grad_k,
        grad_v,
        grad_w.sum((0, 1, 2)).to(w.dtype),
        grad_u.sum((0, 1, 2)).to(u.dtype),
        grad_state[:, 0].contiguous(),
    )
