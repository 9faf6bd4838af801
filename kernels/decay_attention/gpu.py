"""`decay_attention` in Triton, in chunks of 16 to 64 steps: one kernel carries the state from chunk to chunk and leaves
what each chunk finds; the others take all chunks at once. What only decays per channel need is in channel/gpu.py.

Backward keeps the states and their gradients at the chunk boundaries, (B, H, chunks, K, V) each, while it runs, in
bfloat16 for bfloat16 inputs, else in float32. Products accumulate in float32, from bfloat16 operands for bfloat16
inputs, TF32 operands for float16, and three TF32 products for float32. Where running sums of log decays are subtracted
from each other they are in float64, to keep their digits. Steps beyond the end have zero keys and decay 1. Keys and
values come in units of KA and VA numbers. Where few programs carry states, the chunks are cut into segments of `each`
chunks (_split.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels._dispatch import interpreting
from lra.kernels._launch import alignment, exact
from lra.kernels._split import cut, totals
from lra.kernels.decay_attention.chunks import chunk_size, per_group
from lra.kernels.linear_scan.gpu import carried

NO_MEMORY = tl.constexpr(-1000.0)


@triton.jit
def tile(x, b, h, t, c, length, heads, width):
    """Steps t and columns c of x[b, :, h], in float32; x: (B, L, heads, width)."""
    at = ((b * length + t)[:, None] * heads + h) * width + c[None, :]
    return tl.load(x + at, (t < length)[:, None] & (c < width)[None, :], 0.0).to(tl.float32)


@triton.jit
def put(x, b, h, t, c, length, heads, width, value):
    at = ((b * length + t)[:, None] * heads + h) * width + c[None, :]
    tl.store(x + at, value, (t < length)[:, None] & (c < width)[None, :])


@triton.jit
def matrix(x, i, r, c, rows, columns):
    """Rows r and columns c of x[i]; x: (n, rows, columns)."""
    at = (i * rows + r[:, None]) * columns + c[None, :]
    return tl.load(x + at, (r < rows)[:, None] & (c < columns)[None, :], 0.0).to(tl.float32)


@triton.jit
def put_matrix(x, i, r, c, rows, columns, value):
    known = (r < rows)[:, None] & (c < columns)[None, :]
    tl.store(x + (i * rows + r[:, None]) * columns + c[None, :], value, known)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """x y in float32, from bfloat16 operands or by one of the precisions of tl.dot."""
    if PRECISION == "bf16":
        total = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))
    else:
        total = tl.dot(x, y, input_precision=PRECISION)
    return total


@triton.jit
def _steps(g, b, h, t, length, heads):
    """Log decays per head, (B, L, heads), of the steps t."""
    return tl.maximum(tl.load(g + (b * length + t) * heads + h, t < length, 0.0).to(tl.float32), NO_MEMORY)


@triton.jit
def running(g, b, h, t, length, heads):
    """Log decays per head: running sum through each of the steps t, and the sum of all, in float64."""
    step = _steps(g, b, h, t, length, heads).to(tl.float64)
    return tl.cumsum(step, 0), tl.sum(step, 0)


@triton.jit
def sums(g, b, h, t, length, heads, rows):
    """Sums of log decays per head: from the first of the steps t through each, after each to the last, of all.

    The second is no difference, which would lose digits in float32.
    """
    step = _steps(g, b, h, t, length, heads)
    return tl.cumsum(step, 0), tl.sum(tl.where(rows[None, :] > rows[:, None], step[None, :], 0.0), 1), tl.sum(step, 0)


@triton.jit
def factors(total, rows):
    """Decay from step j, column, to step i >= j, row; 0 above the diagonal."""
    lower = rows[:, None] >= rows[None, :]
    return tl.where(lower, tl.exp(tl.where(lower, total[:, None] - total[None, :], 0.0).to(tl.float32)), 0.0)


@triton.jit
def channels(g, b, h, t, c, length, heads, width, rows, EXACT: tl.constexpr):
    """Sums of log decays per channel: from the first of the steps t through each, after each to the last, of all.

    The second is a product with ones: Triton's scans from the last row to the first have had faults.
    """
    step = tl.maximum(tile(g, b, h, t, c, length, heads, width), NO_MEMORY)
    after = tl.dot(tl.where(rows[None, :] > rows[:, None], 1.0, 0.0), step, input_precision=EXACT)
    return tl.cumsum(step, 0), after, tl.sum(step, 0)


@triton.jit
def passing(pairs, at_rows, at_columns, rows, EXACT: tl.constexpr):
    """What passes each step: pairs from j < t, column, to i >= t, row; at_rows i >= t, at_columns j < t."""
    upper = rows[None, :] >= rows[:, None]
    crossing = tl.dot(tl.where(upper, 1.0, 0.0), pairs, input_precision=EXACT)
    crossing = tl.sum(tl.where(rows[None, :] < rows[:, None], crossing, 0.0), 1)
    return (
        crossing
        + tl.sum(tl.where(upper, at_rows[None, :], 0.0), 1)
        + tl.sum(tl.where(upper, 0.0, at_columns[None, :]), 1)
    )


@triton.jit
def _states(
    x, y, g, state, found, last, scale, length, heads, groups, keys, values, chunks, segments, each,
    CHANNEL: tl.constexpr, REVERSE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    KA: tl.constexpr, VA: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """From the state a segment of `each` chunks starts from to the one it leaves; KEEP: those between are wanted."""
    keys, values = keys * KA, values * VA
    row, rows = tl.program_id(2).to(tl.int64), tl.arange(0, T)
    i, segment = row // segments, (row % segments).to(tl.int32)
    b, h = i // heads, i % heads
    group = h // (heads // groups)
    c, d = tl.program_id(1) * K + tl.arange(0, K), tl.program_id(0) * V + tl.arange(0, V)
    first, end = segment * each, tl.minimum((segment + 1) * each, chunks)
    S = matrix(state, row, c, d, keys, values)
    for step in range(0, end - first):
        n = end - 1 - step if REVERSE else first + step
        t = n * T + rows
        if KEEP:
            put_matrix(found, i * chunks + n, c, d, keys, values, S)
        x_t, y_t = tile(x, b, group, t, c, length, groups, keys), tile(y, b, h, t, d, length, heads, values)
        if CHANNEL:
            since, until, through = channels(g, b, h, t, c, length, heads, keys, rows, EXACT)
            x_t *= tl.exp(since if REVERSE else until) * scale
            S *= tl.exp(through)[:, None]
        else:
            since, until, through = sums(g, b, h, t, length, heads, rows)
            y_t *= (tl.exp(since if REVERSE else until) * scale)[:, None]
            S *= tl.exp(through)
        S += product(tl.trans(x_t), y_t, PRECISION)
    put_matrix(last, row, c, d, keys, values, S)


@triton.jit
def _outputs(
    q, k, v, g, scores, found, o, scale, length, heads, groups, keys, values, chunks, CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr, T: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    keys, values = keys * KA, values * VA
    i, n, rows = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.arange(0, T)
    b, h, t = i // heads, i % heads, n * T + rows
    group, d = h // (heads // groups), tl.program_id(0) * V + tl.arange(0, V)
    out, inner = tl.zeros([T, V], tl.float32), tl.zeros([T, T], tl.float32)
    for first in range(0, keys, K):
        c = first + tl.arange(0, K)
        q_t = tile(q, b, group, t, c, length, groups, keys)
        if CHANNEL:
            since, _after, _sum = channels(g, b, h, t, c, length, heads, keys, rows, EXACT)
            q_t *= tl.exp(since) * scale
        else:
            k_t = tile(k, b, group, t, c, length, groups, keys)
            inner += product(q_t, tl.trans(k_t), PRECISION)
        out += product(q_t, matrix(found, i * chunks + n, c, d, keys, values), PRECISION)
    if CHANNEL:
        inner = tl.where(rows[:, None] >= rows[None, :], matrix(scores, i * chunks + n, rows, rows, T, T), 0.0)
    else:
        total, _ = running(g, b, h, t, length, heads)
        inner *= factors(total, rows) * scale
        out *= (tl.exp(total.to(tl.float32)) * scale)[:, None]
    out += product(inner, tile(v, b, h, t, d, length, heads, values), PRECISION)
    put(o, b, h, t, d, length, heads, values, out)


@triton.jit
def _values_backward(
    grad, q, k, g, scores, left, grad_v, scale, length, heads, groups, keys, values, chunks, CHANNEL: tl.constexpr,
    INSIDE_ONLY: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    keys, values = keys * KA, values * VA
    """Gradient of v; INSIDE_ONLY: without what reaches it through the state the chunk leaves."""
    i, n, rows = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.arange(0, T)
    b, h, t = i // heads, i % heads, n * T + rows
    group, d = h // (heads // groups), tl.program_id(0) * V + tl.arange(0, V)
    out, inner = tl.zeros([T, V], tl.float32), tl.zeros([T, T], tl.float32)
    for first in range(0, keys, K):
        c = first + tl.arange(0, K)
        k_t = tile(k, b, group, t, c, length, groups, keys)
        if CHANNEL:
            _before, until, _sum = channels(g, b, h, t, c, length, heads, keys, rows, EXACT)
            k_t *= tl.exp(until)
        else:
            q_t = tile(q, b, group, t, c, length, groups, keys)
            inner += product(q_t, tl.trans(k_t), PRECISION)
        if not INSIDE_ONLY:
            out += product(k_t, matrix(left, i * chunks + n, c, d, keys, values), PRECISION)
    if CHANNEL:
        inner = tl.where(rows[:, None] >= rows[None, :], matrix(scores, i * chunks + n, rows, rows, T, T), 0.0)
    else:
        total, whole = running(g, b, h, t, length, heads)
        inner *= factors(total, rows) * scale
        out *= tl.exp((whole - total).to(tl.float32))[:, None]
    grad_t = tile(grad, b, h, t, d, length, heads, values)
    out += product(tl.trans(inner), grad_t, PRECISION)
    put(grad_v, b, h, t, d, length, heads, values, out)


@triton.jit
def _keys_backward(
    grad, q, k, v, g, found, left, grad_q, grad_k, grad_g, scale, length, heads, groups, keys, values, chunks,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr, T: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    keys, values = keys * KA, values * VA
    """Gradients of q and k, per head, and of the log decays per head."""
    i, n, rows = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, T)
    b, h, t = i // heads, i % heads, n * T + rows
    group = h // (heads // groups)
    total, whole = running(g, b, h, t, length, heads)
    since, until = tl.exp(total.to(tl.float32)), tl.exp((whole - total).to(tl.float32))
    steps = factors(total, rows)
    scores, weights = tl.zeros([T, T], tl.float32), tl.zeros([T, T], tl.float32)
    for first in range(0, keys, K):
        c = first + tl.arange(0, K)
        q_t, k_t = tile(q, b, group, t, c, length, groups, keys), tile(k, b, group, t, c, length, groups, keys)
        scores += product(q_t, tl.trans(k_t), PRECISION)
    for first in range(0, values, V):
        d = first + tl.arange(0, V)
        grad_t, v_t = tile(grad, b, h, t, d, length, heads, values), tile(v, b, h, t, d, length, heads, values)
        weights += product(grad_t, tl.trans(v_t), PRECISION)
    weights *= steps * scale
    at_rows, at_columns, through = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32), 0.0
    for first in range(0, keys, K):
        c = first + tl.arange(0, K)
        q_t, k_t = tile(q, b, group, t, c, length, groups, keys), tile(k, b, group, t, c, length, groups, keys)
        from_state, to_state = tl.zeros([T, K], tl.float32), tl.zeros([T, K], tl.float32)
        for start in range(0, values, V):
            d = start + tl.arange(0, V)
            grad_t, v_t = tile(grad, b, h, t, d, length, heads, values), tile(v, b, h, t, d, length, heads, values)
            S, dS = (
                matrix(found, i * chunks + n, c, d, keys, values),
                matrix(left, i * chunks + n, c, d, keys, values),
            )
            from_state += product(grad_t, tl.trans(S), PRECISION)
            to_state += product(v_t, tl.trans(dS), PRECISION)
            through += tl.sum(S * dS)
        from_state *= (since * scale)[:, None]
        to_state *= until[:, None]
        at_rows += tl.sum(from_state * q_t, 1)
        at_columns += tl.sum(to_state * k_t, 1)
        q_grad = from_state + product(weights, k_t, PRECISION)
        k_grad = to_state + product(tl.trans(weights), q_t, PRECISION)
        put(grad_q, b, h, t, c, length, heads, keys, q_grad)
        put(grad_k, b, h, t, c, length, heads, keys, k_grad)
    g_grad = passing(weights * scores, at_rows, at_columns, rows, EXACT) + through * tl.exp(whole.to(tl.float32))
    tl.store(grad_g + (b * length + t) * heads + h, g_grad, t < length)


class Plan:
    """Block sizes and shapes of one call. half: bfloat16 inputs are multiplied, and states kept, in bfloat16."""

    def __init__(self, q: Tensor, v: Tensor, chunk: int, channel: bool, half: bool = True) -> None:
        self.batch, self.length, self.heads, self.values = v.shape
        self.groups, self.keys, self.channel = q.shape[2], q.shape[3], channel
        self.exact = exact(v)
        # Triton's interpreter would multiply the bits of bfloat16 numbers
        self.half = half and v.dtype == torch.bfloat16 and not interpreting()
        single = v.dtype == torch.float32
        self.precision = "bf16" if self.half else self.exact if single or self.exact == "ieee" else "tf32"
        # operands of three TF32 products take twice the registers, and so do sums of log decays per channel; a walk
        # holds whole keys of all steps
        widest = 32 if self.precision == self.exact else 64
        steps = 32 if channel or self.keys > 128 else widest
        self.size = max(16, min(steps, chunk_size(chunk, self.length)))
        self.key_block = max(16, min(widest, triton.next_power_of_2(self.keys)))
        self.value_block = max(16, min(widest, triton.next_power_of_2(self.values)))
        self.rows, self.chunks = self.batch * self.heads, triton.cdiv(self.length, self.size)
        self.walks = triton.cdiv(self.values, self.value_block), triton.cdiv(self.keys, self.key_block)
        programs = self.walks[0] * self.walks[1] * self.rows
        self.segments, steps = cut(programs, self.length, self.size, v.device)
        self.each = steps // self.size

    @property
    def sizes(self) -> tuple[int, ...]:
        of_keys, of_values = self.aligned["KA"], self.aligned["VA"]
        return self.length, self.heads, self.groups, self.keys // of_keys, self.values // of_values, self.chunks

    @property
    def aligned(self) -> dict[str, int]:
        return {"KA": alignment(self.keys), "VA": alignment(self.values)}

    @property
    def blocks(self) -> dict[str, Any]:
        return {
            "PRECISION": self.precision, "EXACT": self.exact, "T": self.size, "K": self.key_block,
            "V": self.value_block, "num_warps": 4, "num_stages": 1, **self.aligned,
        }  # fmt: skip

    @property
    def by_value(self) -> tuple[int, int, int]:
        return triton.cdiv(self.values, self.value_block), self.chunks, self.rows

    def boundaries(self, v: Tensor) -> Tensor:
        """Room for a state per chunk."""
        dtype = torch.bfloat16 if self.half else torch.float32
        return v.new_empty(self.rows, self.chunks, self.keys, self.values, dtype=dtype)

    def squares(self, v: Tensor) -> Tensor:
        """Room for a number per pair of steps of a chunk."""
        return v.new_empty(self.rows, self.chunks, self.size, self.size, dtype=torch.float32)

    def states(
        self, x: Tensor, y: Tensor, g: Tensor, state: Tensor, scale: float = 1.0, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The states the chunks find, and the last one; reverse: their gradients, from queries x and gradients y."""
        whole, found, rows = state, self.boundaries(y), (self.rows, self.segments, self.keys, self.values)
        last = state.new_empty(rows)
        grid = *self.walks, self.rows * self.segments

        def walk(start: Tensor, keep: bool) -> None:
            _states[grid](
                x, y, g, start, found, last, scale, *self.sizes, self.segments, self.each, CHANNEL=self.channel,
                REVERSE=reverse, KEEP=keep, **self.blocks | {"num_stages": 2},
            )  # fmt: skip

        if self.segments > 1:
            walk(torch.zeros_like(last), keep=False)
            decay = totals(g.clamp(min=NO_MEMORY.value), self.segments, self.each * self.size).exp()
            decay = decay.to(last.dtype).movedim(1, 2).unsqueeze(-1).expand(self.batch, self.heads, *rows[1:])
            first = state.reshape(self.rows, -1)
            state = carried(decay.reshape(self.rows, self.segments, -1), last.flatten(2), first, reverse)
        walk(state, keep=True)
        return found, last[:, 0 if reverse else -1].contiguous().view_as(whole)

    def outputs(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scores: Tensor, found: Tensor, scale: float, o: Tensor
    ) -> Tensor:
        _outputs[self.by_value](q, k, v, g, scores, found, o, scale, *self.sizes, CHANNEL=self.channel, **self.blocks)
        return o

    def values_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, g: Tensor, scores: Tensor, left: Tensor | None, scale: float,
        grad_v: Tensor,
    ) -> Tensor:  # fmt: skip
        _values_backward[self.by_value](
            grad, q, k, g, scores, grad if left is None else left, grad_v, scale, *self.sizes, CHANNEL=self.channel,
            INSIDE_ONLY=left is None, **self.blocks,
        )  # fmt: skip
        return grad_v

    def keys_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, found: Tensor, left: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q and k, per head, in float32 where a group sums several, and of g."""
        dtype = q.dtype if self.groups == self.heads else torch.float32
        shape = self.batch, self.length, self.heads, self.keys
        grad_q, grad_k = q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=dtype)
        grad_g = torch.empty_like(g)
        # the most tiles at once of all these kernels: twice the warps, and narrower tiles of split operands
        split = {"num_warps": 8} | ({"K": 16, "V": 16} if self.precision == self.exact else {})
        _keys_backward[(self.chunks, self.rows)](
            grad, q, k, v, g, found, left, grad_q, grad_k, grad_g, scale, *self.sizes, **self.blocks | split
        )
        return grad_q, grad_k, grad_g


def plain(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().contiguous() for t in tensors]


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments as `decay_attention`, log_decay (B, L, H, 1 or K), the state in float32."""
    from lra.kernels.decay_attention.channel import gpu as channel

    q, k, v, g, state = plain(q, k, v, log_decay, state)
    plan = Plan(q, v, chunk, g.shape[-1] > 1)
    with torch.cuda.device_of(v):
        found, last = plan.states(k, v, g, state)
        scores = channel.scores(plan, q, k, g, scale) if plan.channel else v
        return plan.outputs(q, k, v, g, scores, found, scale, torch.empty_like(v)), last


def backward(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, chunk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay and the initial state."""
    from lra.kernels.decay_attention.channel import gpu as channel

    grad, grad_state, q, k, v, g, state = plain(grad, grad_state, q, k, v, log_decay, state)
    plan = Plan(q, v, chunk, g.shape[-1] > 1)
    with torch.cuda.device_of(v):
        found, _ = plan.states(k, v, g, state)
        left, grad_state = plan.states(q, grad, g, grad_state, scale, reverse=True)
        scores = channel.scores(plan, q, k, g, scale) if plan.channel else v
        grad_v = plan.values_backward(grad, q, k, g, scores, left, scale, torch.empty_like(v))
        if plan.channel:
            grad_q, grad_k, grad_g = channel.keys_backward(plan, grad, q, k, v, g, found, left, scale)
        else:
            grad_q, grad_k, grad_g = plan.keys_backward(grad, q, k, v, g, found, left, scale)
    grad_q, grad_k = (per_group(x.transpose(1, 2), plan.groups).transpose(1, 2).to(q.dtype) for x in (grad_q, grad_k))
    return grad_q.contiguous(), grad_k.contiguous(), grad_v, grad_g, grad_state
