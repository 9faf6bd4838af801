"""`wkv` in Triton: each program processes one row and one block of channels in tiles of steps, with a scan within a
tile, and carries the sums from tile to tile.

Within a tile a range of steps is (num, den, key, lead, rate): its sums in units of their largest exponential, that of
the key of step `lead`, decayed since then. Joining two ranges is associative. Exponents are differences of keys minus
the decay between them, so large keys lose no digits. A row of the tile holds the sums after its step; its output is
that of the next step, whose key and value are read for it.

The backward pass repeats the forward pass, storing the output, the gradient of its numerator and the gap between each
key and the exponent of the sums before it. Then it runs from the last step to the first as a linear recurrence, whose
factors are the shares of the older sums. Arithmetic is in float32 (float64 for float64 inputs). Widths are passed in
units of ALIGN numbers. If rows and blocks are few, time is divided into segments of `steps` steps (_split.py), one
program each. A segment is an independent sequence with an initial state and a gradient of its last state. Between
segments a state is (num, den, key, age), where age is the number of steps since that of the key.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lra.kernels._launch import alignment
from lra.kernels._split import cut
from lra.kernels.linear_scan.gpu import carried

NOTHING = tl.constexpr(-1e38)  # exponent of an empty sum
FASTEST = 1e30  # a rate beyond which nothing is left after one step, and products with it are finite


@triton.jit
def _gap(key1, lead1, key2, lead2, rate):
    """The second of two exponents minus the first."""
    return key2 - key1 + (lead2 - lead1) * rate


@triton.jit
def _shares(gap):
    """An older and a newer exponential in units of the larger one; gap: exponent of the newer minus the older."""
    small = tl.exp(-tl.abs(gap))
    return tl.where(gap > 0, small, 1.0), tl.where(gap > 0, 1.0, small)


@triton.jit
def _join(num1, den1, key1, lead1, rate1, num2, den2, key2, lead2, rate2):
    gap = _gap(key1, lead1, key2, lead2, rate2)
    past, now = _shares(gap)
    key, lead = tl.where(gap > 0, key2, key1), tl.where(gap > 0, lead2, lead1)
    return past * num1 + now * num2, past * den1 + now * den2, key, lead, rate2


@triton.jit
def _join_moments(num1, den1, of_num1, of_den1, key1, lead1, rate1, num2, den2, of_num2, of_den2, key2, lead2, rate2):
    """As `_join`, with the first moments of both sums over the steps, counted from `lead`, at least from -1."""
    gap = _gap(key1, lead1, key2, lead2, rate2)
    past, now = _shares(gap)
    moved = tl.maximum(lead2, -1.0) - tl.maximum(lead1, -1.0)
    back, on = tl.where(gap > 0, moved, 0.0), tl.where(gap > 0, 0.0, moved)
    of_num = past * (of_num1 - back * num1) + now * (of_num2 + on * num2)
    of_den = past * (of_den1 - back * den1) + now * (of_den2 + on * den2)
    key, lead = tl.where(gap > 0, key2, key1), tl.where(gap > 0, lead2, lead1)
    return past * num1 + now * num2, past * den1 + now * den2, of_num, of_den, key, lead, rate2


@triton.jit
def _join_gradients(factor1, above1, below1, factor2, above2, below2):
    return factor1 * factor2, factor2 * above1 + above2, factor2 * below1 + below2


@triton.jit
def _output(num, den, gap, v):
    """Output, its denominator, and the shares of the sums and of the step itself in it."""
    past, now = _shares(gap)
    below = past * den + now
    return (past * num + now * v) / below, below, past, now


@triton.jit
def _last(x, rows, T: tl.constexpr):
    return tl.sum(tl.where(rows[:, None] == T - 1, x, 0.0), 0)


@triton.jit
def _sums(state, i, d, width, inside):
    num = tl.load(state + (4 * i) * width + d, inside, 0.0)
    den = tl.load(state + (4 * i + 1) * width + d, inside, 1.0)
    key = tl.load(state + (4 * i + 2) * width + d, inside, 0.0)
    return num, den, key, tl.load(state + (4 * i + 3) * width + d, inside, 0.0)


@triton.jit
def _put_sums(state, i, d, width, inside, num, den, key, age):
    tl.store(state + (4 * i) * width + d, num, inside)
    tl.store(state + (4 * i + 1) * width + d, den, inside)
    tl.store(state + (4 * i + 2) * width + d, key, inside)
    tl.store(state + (4 * i + 3) * width + d, age, inside)


@triton.jit
def _pair(x, i, d, width, inside):
    return tl.load(x + (2 * i) * width + d, inside, 0.0), tl.load(x + (2 * i + 1) * width + d, inside, 0.0)


@triton.jit
def _put_pair(x, i, d, width, inside, a, b):
    tl.store(x + (2 * i) * width + d, a, inside)
    tl.store(x + (2 * i + 1) * width + d, b, inside)


@triton.jit
def _segment(i):
    """Row of this program in a tensor with one entry per row i and segment."""
    return i * tl.num_programs(2) + tl.program_id(2)


@triton.jit
def _carry(left, first, decay, starts, length, steps, width, segments, ALIGN: tl.constexpr, D: tl.constexpr):
    """The initial state of each segment. left: last states of segments that start from the empty state."""
    width = width * ALIGN
    i, d = tl.program_id(1).to(tl.int64), tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    rate = tl.load(decay + d, inside, 0.0)
    num, den, key, age = _sums(first, i, d, width, inside)
    for n in range(0, segments):
        at, newest = i * segments + n, tl.minimum(length - n * steps, steps) - 1
        _put_sums(starts, at, d, width, inside, num, den, key, age)
        more_num, more_den, more_key, more_age = _sums(left, at, d, width, inside)
        num, den, key, lead, _rate = _join(
            num, den, key, -1 - age, rate, more_num, more_den, more_key, newest - more_age, rate
        )
        age = newest - lead


@triton.jit
def _forward(
    k, v, decay, bonus, state, o, last, length, steps, width, OUTPUT: tl.constexpr, ACC: tl.constexpr,
    ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """OUTPUT: whether o is computed, or only the last state of each segment."""
    width = width * ALIGN
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d = tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    first, end = tl.program_id(2) * steps, tl.minimum((tl.program_id(2) + 1) * steps, length)
    rate, u = tl.load(decay + d, inside, 0.0), tl.load(bonus + d, inside, 0.0).to(ACC)
    rates = tl.broadcast_to(rate[None, :], T, D)
    num, den, key, age = _sums(state, _segment(i), d, width, inside)
    lead = -1 - age
    if OUTPUT:
        at_0 = (i * length + first) * width + d
        k_0, v_0 = tl.load(k + at_0, inside, 0.0).to(ACC), tl.load(v + at_0, inside, 0.0).to(ACC)
        out_0, _below_0, _past_0, _now_0 = _output(num, den, u + _gap(key, lead, k_0, -1, rate), v_0)
        tl.store(o + at_0, out_0, inside)
    for start in tl.range(first, end, T, num_stages=3):
        t = start + rows
        known = (t < end)[:, None] & inside[None, :]
        at = (i * length + t)[:, None] * width + d[None, :]
        k_t, v_t = tl.load(k + at, known, 0.0).to(ACC), tl.load(v + at, known, 0.0).to(ACC)
        step = tl.broadcast_to((t - first).to(ACC)[:, None], T, D)
        nums, dens, keys, leads, _rates = tl.associative_scan(
            (v_t, tl.where(known, 1.0, 0.0).to(ACC), tl.where(known, k_t, NOTHING), step, rates), 0, _join
        )
        num_t, den_t, key_t, lead_t, _rate = _join(
            num[None, :], den[None, :], key[None, :], lead[None, :], rates, nums, dens, keys, leads, rates
        )
        if OUTPUT:
            follows = (t + 1 < end)[:, None] & inside[None, :]
            k_n = tl.load(k + at + width, follows, 0.0).to(ACC)
            v_n = tl.load(v + at + width, follows, 0.0).to(ACC)
            gap = u[None, :] + _gap(key_t, lead_t, k_n, step, rates)
            out, _below, _past, _now = _output(num_t, den_t, gap, v_n)
            tl.store(o + at + width, out, follows)
        num, den = _last(num_t, rows, T), _last(den_t, rows, T)
        key, lead = _last(key_t, rows, T), _last(lead_t, rows, T)
    _put_sums(last, _segment(i), d, width, inside, num, den, key, (end - first - 1) - lead)


@triton.jit
def _again(
    grad_o, k, v, decay, bonus, state, outputs, pulls, gaps, last, ages, newest, grad_rate, grad_u, length, steps,
    width, ACC: tl.constexpr, ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Repeats the forward pass and stores what the backward pass reads; also the gradient of u and a part of that of
    the rate.

    ages: the last sums with each term multiplied by the number of steps since then (minus their derivatives by the
    rate); newest: the step whose key is the last exponent, or the step before the segment if it is that of the state.
    """
    width = width * ALIGN
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d = tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    first, end = tl.program_id(2) * steps, tl.minimum((tl.program_id(2) + 1) * steps, length)
    rate, u = tl.load(decay + d, inside, 0.0), tl.load(bonus + d, inside, 0.0).to(ACC)
    rates = tl.broadcast_to(rate[None, :], T, D)
    num, den, key, age = _sums(state, _segment(i), d, width, inside)
    lead, of_num, of_den = -1 - age, tl.zeros([D], ACC), tl.zeros([D], ACC)
    at_0 = (i * length + first) * width + d
    k_0, v_0 = tl.load(k + at_0, inside, 0.0).to(ACC), tl.load(v + at_0, inside, 0.0).to(ACC)
    gap_0 = _gap(key, lead, k_0, -1, rate)
    out_0, below_0, _past_0, now_0 = _output(num, den, u + gap_0, v_0)
    pull_0 = tl.load(grad_o + at_0, inside, 0.0).to(ACC) / below_0
    tl.store(outputs + at_0, out_0, inside)
    tl.store(pulls + at_0, pull_0, inside)
    tl.store(gaps + at_0, gap_0, inside)
    # sums over every step, in double precision to keep the digits
    to_rate, to_u = tl.zeros([D], tl.float64), (now_0 * pull_0 * (v_0 - out_0)).to(tl.float64)
    for start in tl.range(first, end, T, num_stages=3):
        t = start + rows
        known, follows = (t < end)[:, None] & inside[None, :], (t + 1 < end)[:, None] & inside[None, :]
        at = (i * length + t)[:, None] * width + d[None, :]
        k_t, v_t = tl.load(k + at, known, 0.0).to(ACC), tl.load(v + at, known, 0.0).to(ACC)
        k_n, v_n = tl.load(k + at + width, follows, 0.0).to(ACC), tl.load(v + at + width, follows, 0.0).to(ACC)
        g_n = tl.load(grad_o + at + width, follows, 0.0).to(ACC)
        step, none = tl.broadcast_to((t - first).to(ACC)[:, None], T, D), tl.zeros([T, D], ACC)
        one, k_t = tl.where(known, 1.0, 0.0).to(ACC), tl.where(known, k_t, NOTHING)
        nums, dens, of_nums, of_dens, keys, leads, _rates = tl.associative_scan(
            (v_t, one, none, none, k_t, step, rates), 0, _join_moments
        )
        num_t, den_t, of_num_t, of_den_t, key_t, lead_t, _rate = _join_moments(
            num[None, :], den[None, :], of_num[None, :], of_den[None, :], key[None, :], lead[None, :], rates, nums,
            dens, of_nums, of_dens, keys, leads, rates,
        )  # fmt: skip
        gap = _gap(key_t, lead_t, k_n, step, rates)
        out, below, past, now = _output(num_t, den_t, u[None, :] + gap, v_n)
        pull, age_t = g_n / below, step - tl.maximum(lead_t, -1.0)
        to_u += tl.sum(now * pull * (v_n - out), 0).to(tl.float64)
        aged = age_t * num_t - of_num_t - out * (age_t * den_t - of_den_t)
        to_rate -= tl.sum(pull * past * aged, 0).to(tl.float64)
        tl.store(outputs + at + width, out, follows)
        tl.store(pulls + at + width, pull, follows)
        tl.store(gaps + at + width, gap, follows)
        num, den = _last(num_t, rows, T), _last(den_t, rows, T)
        of_num, of_den = _last(of_num_t, rows, T), _last(of_den_t, rows, T)
        key, lead = _last(key_t, rows, T), _last(lead_t, rows, T)
    row, final = _segment(i), end - first - 1
    _put_sums(last, row, d, width, inside, num, den, key, final - lead)
    lead = tl.maximum(lead, -1.0)
    _put_pair(ages, row, d, width, inside, (final - lead) * num - of_num, (final - lead) * den - of_den)
    tl.store(newest + row * width + d, first + lead.to(tl.int32), inside)
    tl.store(grad_rate + row * width + d, to_rate, inside)
    tl.store(grad_u + row * width + d, to_u, inside)


@triton.jit
def _backward(
    later, to_tops, v, decay, bonus, outputs, pulls, gaps, newest, grad_k, grad_v, grad_sums, factor, length, steps,
    width, OUTPUT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """From the last step to the first; a row holds the gradients of the sums after its step.

    later: gradients of the last sums; to_tops: remaining gradient of their exponent. OUTPUT: whether gradients of keys
    and values are computed, or only those of the sums before the segment and the factor of `later` in them.
    """
    width = width * ALIGN
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    d = tl.program_id(0) * D + tl.arange(0, D)
    inside = d < width
    first, end = tl.program_id(2) * steps, tl.minimum((tl.program_id(2) + 1) * steps, length)
    rate, u = tl.load(decay + d, inside, 0.0), tl.load(bonus + d, inside, 0.0).to(ACC)
    segment, total = _segment(i), tl.full([D], 1, ACC)
    above, below = _pair(later, segment, d, width, inside)
    if OUTPUT:
        best = tl.load(newest + segment * width + d, inside, 0)
        to_top = tl.load(to_tops + segment * width + d, inside, 0.0)
    for start in tl.range(0, end - first, T, num_stages=3):
        step = start + rows
        t = end - 1 - step
        known = (t >= first)[:, None] & inside[None, :]
        follows = known & (step > 0)[:, None]
        at = (i * length + t)[:, None] * width + d[None, :]
        o_n, pull_n = tl.load(outputs + at + width, follows, 0.0), tl.load(pulls + at + width, follows, 0.0)
        gap_n = tl.load(gaps + at + width, follows, 0.0)
        kept, _new = _shares(gap_n + rate[None, :])
        shown, _own = _shares(gap_n + u[None, :])
        factors, aboves, belows = tl.associative_scan(
            (tl.where(follows, kept, 1.0), shown * pull_n, -shown * pull_n * o_n), 0, _join_gradients
        )
        above_t, below_t = factors * above[None, :] + aboves, factors * below[None, :] + belows
        if OUTPUT:
            v_t, o_t = tl.load(v + at, known, 0.0).to(ACC), tl.load(outputs + at, known, 0.0)
            pull, gap = tl.load(pulls + at, known, 0.0), tl.load(gaps + at, known, 0.0)
            _old, taken = _shares(gap + rate[None, :])
            _before, own = _shares(gap + u[None, :])
            to_v = own * pull
            to_k = to_v * (v_t - o_t) + taken * (v_t * above_t + below_t)
            to_k += tl.where(t[:, None] == best[None, :], to_top[None, :], 0.0)
            tl.store(grad_v + at, to_v + taken * above_t, known)
            tl.store(grad_k + at, to_k, known)
        above, below, total = _last(above_t, rows, T), _last(below_t, rows, T), total * _last(factors, rows, T)
    at_0 = (i * length + first) * width + d
    o_0, pull_0 = tl.load(outputs + at_0, inside, 0.0), tl.load(pulls + at_0, inside, 0.0)
    gap_0 = tl.load(gaps + at_0, inside, 0.0)
    kept_0, _new_0 = _shares(gap_0 + rate)
    shown_0, _own_0 = _shares(gap_0 + u)
    pull_0 *= shown_0
    _put_pair(grad_sums, segment, d, width, inside, kept_0 * above + pull_0, kept_0 * below - pull_0 * o_0)
    if not OUTPUT:
        tl.store(factor + segment * width + d, total * kept_0, inside)


class _Plan:
    """Blocks, tiles and segments of one call."""

    def __init__(self, k: Tensor, w: Tensor, state: Tensor) -> None:
        self.batch, self.length, self.width = k.shape
        block, wide = min(32, triton.next_power_of_2(self.width)), state.dtype == torch.float64
        tile = 16 if wide else 32
        self.grid = triton.cdiv(self.width, block), self.batch
        self.segments, self.steps = cut(self.grid[0] * self.batch, self.length, tile, k.device)
        self.options: dict[str, Any] = {"ALIGN": alignment(self.width), "D": block, "num_warps": 4}
        self.tiles = {"ACC": tl.float64 if wide else tl.float32, "T": tile}
        self.sizes = self.length, self.steps, self.width // self.options["ALIGN"]
        self.exact_rate = w.detach().double().exp().clamp(max=FASTEST)
        self.rate = self.exact_rate.to(state.dtype)

    def launch(self, kernel: Any, *arguments: Tensor, **options: Any) -> None:
        with torch.cuda.device_of(self.rate):
            kernel[*self.grid, self.segments](*arguments, *self.sizes, **self.tiles | self.options | options)

    def room(self, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for `rows` numbers per channel of each segment."""
        return self.rate.new_empty(self.batch, self.segments, rows, self.width, dtype=dtype)

    def starts(self, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> Tensor:
        """The state each segment starts from; the first one from `state`, of age 0."""
        state = F.pad(state, (0, 0, 0, 1))
        if self.segments == 1:
            return state
        nothing, left, starts = torch.zeros_like(self.room(4)), self.room(4), self.room(4)
        nothing[:, :, 2] = NOTHING.value
        self.launch(_forward, k, v, self.rate, u, nothing, v, left, OUTPUT=False)
        with torch.cuda.device_of(self.rate):
            _carry[self.grid](left, state, self.rate, starts, *self.sizes, self.segments, **self.options)
        return starts

    def final(self, last: Tensor) -> Tensor:
        """The state (num, den, top), of what the segments leave."""
        num, den, key, age = last[:, -1].unbind(1)
        return torch.stack([num, den, (key - age * self.exact_rate).to(num.dtype)], dim=1)


def forward(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments as `wkv`, k and v of one dtype, the state in that of accumulation."""
    k, v, u, state = (x.detach().contiguous() for x in (k, v, u, state))
    plan = _Plan(k, w, state)
    o, last = torch.empty_like(v), plan.room(4)
    plan.launch(_forward, k, v, plan.rate, u, plan.starts(k, v, u, state), o, last, OUTPUT=True)
    return o, plan.final(last)


def backward(
    grad_o: Tensor, grad_last: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w, u and the initial state."""
    grad_o, grad_last, k, v, u, state = (x.detach().contiguous() for x in (grad_o, grad_last, k, v, u, state))
    plan = _Plan(k, w, state)
    grad_k, grad_v, grad_sums, factor = torch.empty_like(k), torch.empty_like(v), plan.room(2), plan.room(1)
    grad_rate, grad_u = plan.room(1, torch.float64), plan.room(1, torch.float64)
    kept = [torch.empty_like(k, dtype=state.dtype) for _ in range(3)]
    last, ages, newest = plan.room(4), plan.room(2), plan.room(1, torch.int32)
    given = v, plan.rate, u
    # this kernel holds the most values per step; longer tiles spill registers
    plan.launch(
        _again, grad_o, k, *given, plan.starts(k, v, u, state), *kept, last, ages, newest, grad_rate, grad_u, T=16
    )
    later, to_top = grad_last[:, :2], grad_last[:, 2] - (grad_last[:, :2] * last[:, -1, :2]).sum(1)
    # the gradient of the last exponent passes through segments in which the exponent was not raised
    begins = torch.arange(plan.segments, device=k.device)[:, None] * plan.steps
    passed = (newest[:, :, 0] < begins).to(to_top.dtype).flip(1).cumprod(1).flip(1)
    to_tops = torch.cat([passed[:, 1:], torch.ones_like(passed[:, :1])], dim=1) * to_top[:, None]
    read = *given, *kept, newest, grad_k, grad_v, grad_sums, factor
    if plan.segments > 1:
        plan.launch(_backward, torch.zeros_like(grad_sums), to_tops, *read, OUTPUT=False)
        left = grad_sums.flatten(2)
        later = carried(factor.expand_as(grad_sums).flatten(2), left, later.flatten(1), reverse=True)
    later = later.reshape(grad_sums.shape).contiguous()
    plan.launch(_backward, later, to_tops, *read, OUTPUT=True)
    steps = (begins + plan.steps).clamp(max=plan.length) - 1 - newest[:, :, 0]
    grad_rate = grad_rate.sum((0, 1, 2)) - (later * ages.double()).sum((0, 1, 2))
    grad_rate -= (to_tops * steps.double()).sum((0, 1))
    to_first = (grad_sums[:, 0] * state[:, :2]).sum(1) + passed[:, 0] * to_top
    return (
        grad_k,
        grad_v,
        (grad_rate * plan.exact_rate).to(w.dtype),
        grad_u.sum((0, 1, 2)).to(u.dtype),
        torch.cat([grad_sums[:, 0], to_first[:, None]], dim=1),
    )
