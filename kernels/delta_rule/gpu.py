"""`delta_rule` in Triton. The triangular systems of all chunks are inverted at once; one kernel carries the state from
chunk to chunk, leaving what each chunk finds and the errors it writes. The rest is decayed attention with the errors as
values.

Backward recomputes these and keeps, while it runs, the states and their gradients at the chunk boundaries. Where few
programs carry states, the chunks are cut into segments of `each` chunks (_split.py); what a segment makes of a state is
then a matrix, (K, K), which is what it leaves of the unit matrix where nothing is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._launch import alignment
from lra.kernels._split import cut
from lra.kernels.decay_attention.gpu import (
    Plan,
    factors,
    matrix,
    passing,
    plain,
    product,
    put,
    put_matrix,
    running,
    sums,
    tile,
)

BLOCK = 16


@triton.jit
def _rates(beta, b, h, t, length, heads):
    return tl.load(beta + (b * length + t) * heads + h, t < length, 0.0)


@triton.jit
def _inverse(system, rows, EXACT: tl.constexpr, T: tl.constexpr, R: tl.constexpr):
    """(I + N)^{-1} of a strictly lower triangular N (T, T), T at most 2 R.

    Its blocks of R rows on the diagonal are inverted row by row, both at once; with D these inverses and M = D (N
    without its diagonal blocks), M^2 = 0 and (I + N)^{-1} = (I - M) D. Powers of N itself would overflow where keys
    resemble each other.
    """
    same = rows[:, None] // R == rows[None, :] // R
    inside, block = tl.arange(0, R), tl.arange(0, T // R)
    on_diagonal = (block[:, None] == block[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(on_diagonal, tl.reshape(system, [T // R, R, T // R, R]), 0.0), 2)
    solved = tl.zeros([T // R, R, R], tl.float32) + tl.where(inside[:, None] == inside[None, :], 1.0, 0.0)[None, :, :]
    for row in range(1, R):
        here = (inside == row)[None, :, None]
        coefficients = tl.sum(tl.where(here, blocks, 0.0), 1)
        solved -= tl.where(here, tl.sum(coefficients[:, :, None] * solved, 1)[:, None, :], 0.0)
    diagonal = tl.reshape(tl.where(on_diagonal, solved[:, :, None, :], 0.0), [T, T])
    m = tl.dot(diagonal, tl.where(same, 0.0, system), input_precision=EXACT)
    return diagonal - tl.dot(m, diagonal, input_precision=EXACT)


@triton.jit
def _systems(
    k, v, beta, g, inverse, own, seen, length, heads, keys, values, chunks, EXACT: tl.constexpr, KA: tl.constexpr,
    VA: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """(I + T)^{-1}, and with it U_0 (`own`) and W (`seen`)."""
    keys, values = keys * KA, values * VA
    i, n, rows = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, T)
    b, h, t = i // heads, i % heads, n * T + rows
    rate = _rates(beta, b, h, t, length, heads)
    total, _ = running(g, b, h, t, length, heads)
    alike = tl.zeros([T, T], tl.float32)
    for first in range(0, keys, K):
        k_t = tile(k, b, h, t, first + tl.arange(0, K), length, heads, keys)
        alike += tl.dot(k_t, tl.trans(k_t), input_precision=EXACT)
    system = tl.where(rows[:, None] > rows[None, :], rate[:, None] * alike * factors(total, rows), 0.0)
    solved = _inverse(system, rows, EXACT, T, R)
    put_matrix(inverse, i * chunks + n, rows, rows, T, T, solved)
    for first in range(0, values, V):
        d = first + tl.arange(0, V)
        v_t = tile(v, b, h, t, d, length, heads, values) * rate[:, None]
        put(own, b, h, t, d, length, heads, values, tl.dot(solved, v_t, input_precision=EXACT))
    rate *= tl.exp(total.to(tl.float32))
    for first in range(0, keys, K):
        c = first + tl.arange(0, K)
        k_t = tile(k, b, h, t, c, length, heads, keys) * rate[:, None]
        put(seen, b, h, t, c, length, heads, keys, tl.dot(solved, k_t, input_precision=EXACT))


@triton.jit
def _walk(
    k, g, own, seen, state, found, written, last, length, heads, keys, values, chunks, segments, each,
    WRITES: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """From the state a segment starts from to the one it leaves. WRITES: whether values are written; KEEP: whether the
    states between and the errors are wanted."""
    keys, values = keys * KA, values * VA
    row, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    i, segment = row // segments, (row % segments).to(tl.int32)
    b, h = i // heads, i % heads
    c, d = tl.arange(0, K), tl.program_id(0) * V + tl.arange(0, V)
    S = matrix(state, row, c, d, keys, values)
    for n in range(segment * each, tl.minimum((segment + 1) * each, chunks)):
        t = n * T + rows
        _since, until, through = sums(g, b, h, t, length, heads, rows)
        seen_t = tile(seen, b, h, t, c, length, heads, keys)
        error = -product(seen_t, S, PRECISION)
        if WRITES:
            error += tile(own, b, h, t, d, length, heads, values)
        if KEEP:
            put_matrix(found, i * chunks + n, c, d, keys, values, S)
            put(written, b, h, t, d, length, heads, values, error)
        kept = tile(k, b, h, t, c, length, heads, keys) * tl.exp(until)[:, None]
        S = S * tl.exp(through) + product(tl.trans(kept), error, PRECISION)
    put_matrix(last, row, c, d, keys, values, S)


@triton.jit
def _walk_back(
    grad, q, k, g, seen, state, left, written, first, scale, length, heads, keys, values, chunks, segments, each,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr, T: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """Gradients of the state each chunk leaves and of a segment's first; KEEP: those between are wanted, and what the
    state gives the gradients of the errors is added to them."""
    keys, values = keys * KA, values * VA
    row, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    i, segment = row // segments, (row % segments).to(tl.int32)
    b, h = i // heads, i % heads
    c, d = tl.arange(0, K), tl.program_id(0) * V + tl.arange(0, V)
    S, begin = matrix(state, row, c, d, keys, values), segment * each
    end = tl.minimum(begin + each, chunks)
    for back in range(0, end - begin):
        n = end - 1 - back
        t = n * T + rows
        since, until, through = sums(g, b, h, t, length, heads, rows)
        kept = tile(k, b, h, t, c, length, heads, keys) * tl.exp(until)[:, None]
        error = tile(written, b, h, t, d, length, heads, values) + product(kept, S, PRECISION)
        if KEEP:
            put_matrix(left, i * chunks + n, c, d, keys, values, S)
            put(written, b, h, t, d, length, heads, values, error)
        q_t = tile(q, b, h, t, c, length, heads, keys) * (tl.exp(since) * scale)[:, None]
        grad_t = tile(grad, b, h, t, d, length, heads, values)
        seen_t = tile(seen, b, h, t, c, length, heads, keys)
        S = S * tl.exp(through) + product(tl.trans(q_t), grad_t, PRECISION)
        S -= product(tl.trans(seen_t), error, PRECISION)
    put_matrix(first, row, c, d, keys, values, S)


@triton.jit
def _systems_backward(
    k, v, beta, g, inverse, written, found, grad_written, grad_k, grad_v, grad_beta, grad_g, length, heads, keys,
    values, chunks, PRECISION: tl.constexpr, EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradients of v and beta, and the part of those of k and g that passes the systems, added to what is there.
    Overwrites the gradient of the errors by that of the right-hand sides."""
    keys, values = keys * KA, values * VA
    i, n, rows = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, T)
    b, h, t = i // heads, i % heads, n * T + rows
    rate = _rates(beta, b, h, t, length, heads)
    total, _ = running(g, b, h, t, length, heads)
    since = tl.exp(total.to(tl.float32))
    solved = tl.trans(matrix(inverse, i * chunks + n, rows, rows, T, T))
    to_system, alike = tl.zeros([T, T], tl.float32), tl.zeros([T, T], tl.float32)
    to_rate, at_rows = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
    for first in range(0, values, V):
        d = first + tl.arange(0, V)
        error_grad = tile(grad_written, b, h, t, d, length, heads, values)
        right = tl.dot(solved, error_grad, input_precision=EXACT)
        error = tile(written, b, h, t, d, length, heads, values)
        to_system -= product(right, tl.trans(error), PRECISION)
        to_rate += tl.sum(right * tile(v, b, h, t, d, length, heads, values), 1)
        put(grad_written, b, h, t, d, length, heads, values, right)
        put(grad_v, b, h, t, d, length, heads, values, right * rate[:, None])
    tl.debug_barrier()  # other threads read back what was put into grad_written
    for first in range(0, keys, K):
        k_t = tile(k, b, h, t, first + tl.arange(0, K), length, heads, keys)
        alike += tl.dot(k_t, tl.trans(k_t), input_precision=EXACT)
    to_system = tl.where(rows[:, None] > rows[None, :], to_system, 0.0) * factors(total, rows)
    to_rate += tl.sum(to_system * alike, 1)
    to_system *= rate[:, None]
    both = to_system + tl.trans(to_system)
    for first in range(0, keys, K):
        c = first + tl.arange(0, K)
        k_t, from_state = tile(k, b, h, t, c, length, heads, keys), tl.zeros([T, K], tl.float32)
        for start in range(0, values, V):
            d = start + tl.arange(0, V)
            right = tile(grad_written, b, h, t, d, length, heads, values)
            S = matrix(found, i * chunks + n, c, d, keys, values)
            from_state -= product(right, tl.trans(S), PRECISION)
        from_state *= since[:, None]
        passed = tl.sum(from_state * k_t, 1)
        to_rate += passed
        at_rows += passed * rate
        k_grad = tile(grad_k, b, h, t, c, length, heads, keys) + from_state * rate[:, None]
        k_grad += product(both, k_t, PRECISION)
        put(grad_k, b, h, t, c, length, heads, keys, k_grad)
    at = (b * length + t) * heads + h
    tl.store(grad_beta + at, to_rate, t < length)
    g_grad = passing(to_system * alike, at_rows, tl.zeros([T], tl.float32), rows, EXACT)
    tl.store(grad_g + at, tl.load(grad_g + at, t < length, 0.0) + g_grad, t < length)


def _carried(passed: Tensor, left: Tensor, first: Tensor, reverse: bool = False) -> Tensor:
    """The state each segment starts from, (rows, segments, K, V), of segments that multiply a state by `passed` and add
    `left`; in double precision, which no setting of PyTorch's products shortens."""
    starts, state = torch.empty_like(left), first.reshape(left[:, 0].shape).double()
    segments = range(left.shape[1])
    for n in reversed(segments) if reverse else segments:
        starts[:, n] = state
        state = torch.baddbmm(left[:, n].double(), passed[:, n].double(), state)
    return starts


class _Walked:
    """What forward and backward share: the errors the chunks write, and the states they find."""

    def __init__(self, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, chunk: int) -> None:
        # the inverse of a larger system spills from registers; what is written is a difference, which bfloat16 would
        # leave with few digits
        self.plan = plan = Plan(k, v, min(chunk, 2 * BLOCK), channel=False, half=False)
        length, heads, _, keys, values, chunks = plan.sizes
        self.sizes = length, heads, keys, values, chunks
        # a walk needs the whole key at once; narrow values, to have more of them side by side
        self.whole = {
            "PRECISION": plan.precision, "T": plan.size, "K": max(16, triton.next_power_of_2(plan.keys)),
            "V": max(16, min(32, plan.value_block // 2)), "num_warps": 8, "num_stages": 1, **plan.aligned,
        }  # fmt: skip
        programs = triton.cdiv(plan.values, self.whole["V"]) * plan.rows
        self.segments, steps = cut(programs, plan.length, plan.size, v.device)
        self.cut = self.segments, steps // plan.size
        self.inverse = plan.squares(v)
        self.seen, own = torch.empty_like(k, dtype=torch.float32), torch.empty_like(v, dtype=torch.float32)
        self.found, self.written = plan.boundaries(v), torch.empty_like(own)
        _systems[(plan.chunks, plan.rows)](
            k, v, beta, g, self.inverse, own, self.seen, *self.sizes, EXACT=plan.exact, T=plan.size,
            R=BLOCK, K=plan.key_block, V=plan.value_block, num_warps=4, num_stages=1, **plan.aligned,
        )  # fmt: skip
        read = k, g, own, self.seen
        if self.segments > 1:
            unit = torch.eye(plan.keys, device=v.device).expand(*self.rows(plan.keys)[:2], -1, -1).contiguous()
            self.passed = self.walk(*read, unit, WRITES=False, KEEP=False)
            left = self.walk(*read, state.new_zeros(self.rows(plan.values)), WRITES=True, KEEP=False)
            state = _carried(self.passed, left, state)
        self.last = self.walk(*read, state, WRITES=True, KEEP=True)[:, -1].contiguous()

    def rows(self, values: int) -> tuple[int, int, int, int]:
        """Shape of one state per segment."""
        return self.plan.rows, self.segments, self.plan.keys, values

    def grid(self, values: int) -> tuple[int, int]:
        return triton.cdiv(values, self.whole["V"]), self.plan.rows * self.segments

    def walk(self, k: Tensor, g: Tensor, own: Tensor, seen: Tensor, start: Tensor, **options: bool) -> Tensor:
        """The states the segments leave."""
        values = start.shape[-1]
        last, (length, heads, keys, _, chunks) = start.new_empty(self.rows(values)), self.sizes
        aligned = alignment(values)
        _walk[self.grid(values)](
            k, g, own, seen, start, self.found, self.written, last, length, heads, keys, values // aligned, chunks,
            *self.cut, **options, **self.whole | {"VA": aligned},
        )  # fmt: skip
        return last

    def walk_back(
        self, grad: Tensor, q: Tensor, k: Tensor, g: Tensor, last: Tensor, written: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the states the chunks leave, and of the first one; those of the errors are completed."""
        left, first = self.plan.boundaries(grad), last.new_empty(self.rows(self.plan.values))

        def walk(start: Tensor, keep: bool) -> None:
            _walk_back[self.grid(self.plan.values)](
                grad, q, k, g, self.seen, start, left, written, first, scale, *self.sizes, *self.cut, KEEP=keep,
                **self.whole,
            )  # fmt: skip

        if self.segments > 1:
            walk(torch.zeros_like(first), keep=False)
            last = _carried(self.passed.mT, first, last, reverse=True)
        walk(last, keep=True)
        return left, first[:, 0].contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, chunk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments as `delta_rule`; beta, log_decay (B, L, H, 1) and the state in float32."""
    q, k, v, beta, g, state = plain(q, k, v, beta, log_decay, state)
    with torch.cuda.device_of(v):
        walked = _Walked(k, v, beta, g, state, chunk)
        written = walked.written
        o = walked.plan.outputs(q, k, written, g, written, walked.found, scale, torch.empty_like(v))
    return o, walked.last.view_as(state)


def backward(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor,
    chunk: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, log_decay and the initial state."""
    grad, grad_state, q, k, v, beta, g, state = plain(grad, grad_state, q, k, v, beta, log_decay, state)
    with torch.cuda.device_of(v):
        walked = _Walked(k, v, beta, g, state, chunk)
        plan, written, found = walked.plan, walked.written, walked.found
        grad_written = plan.values_backward(grad, q, k, g, written, None, scale, torch.empty_like(written))
        left, first = walked.walk_back(grad, q, k, g, grad_state, grad_written, scale)
        grad_q, grad_k, grad_g = plan.keys_backward(grad, q, k, written, g, found, left, scale)
        grad_v, grad_beta = torch.empty_like(v), torch.empty_like(beta)
        _systems_backward[(plan.chunks, plan.rows)](
            k, v, beta, g, walked.inverse, written, found, grad_written, grad_k, grad_v, grad_beta, grad_g,
            *walked.sizes, **plan.blocks | {"num_warps": 8},
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_beta, grad_g, first.view_as(state)
