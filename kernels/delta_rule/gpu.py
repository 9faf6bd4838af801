"""`delta_rule` in Triton. The triangular systems of all chunks are inverted at once, row by row (powers of the matrix
would overflow where keys resemble each other); one kernel carries the state from chunk to chunk, leaving what each
chunk finds and the errors it writes. The rest is decayed attention with the errors as values.

Backward recomputes these and keeps, while it runs, the states and their gradients at the chunk boundaries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels.decay_attention.gpu import Plan, factors, matrix, passing, plain, put, put_matrix, running, tile


@triton.jit
def _rates(beta, b, h, t, length, heads):
    return tl.load(beta + (b * length + t) * heads + h, t < length, 0.0)


@triton.jit
def _systems(
    k, v, beta, g, inverse, own, seen, length, heads, keys, values, chunks, PRECISION: tl.constexpr, T: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """(I + T)^{-1}, and with it U_0 (`own`) and W (`seen`)."""
    i, n, rows = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, T)
    b, h, t = i // heads, i % heads, n * T + rows
    rate = _rates(beta, b, h, t, length, heads)
    total, _ = running(g, b, h, t, length, heads)
    alike = tl.zeros([T, T], tl.float32)
    for first in range(0, keys, K):
        k_t = tile(k, b, h, t, first + tl.arange(0, K), length, heads, keys)
        alike += tl.dot(k_t, tl.trans(k_t), input_precision=PRECISION)
    system = tl.where(rows[:, None] > rows[None, :], rate[:, None] * alike * factors(total, rows), 0.0)
    solved = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for row in range(1, T):
        here = (rows == row)[:, None]
        coefficients = tl.sum(tl.where(here, system, 0.0), 0)
        solved -= tl.where(here, tl.sum(coefficients[:, None] * solved, 0)[None, :], 0.0)
    put_matrix(inverse, i * chunks + n, rows, rows, T, T, solved)
    for first in range(0, values, V):
        d = first + tl.arange(0, V)
        v_t = tile(v, b, h, t, d, length, heads, values) * rate[:, None]
        put(own, b, h, t, d, length, heads, values, tl.dot(solved, v_t, input_precision=PRECISION))
    rate *= tl.exp(total.to(tl.float32))
    for first in range(0, keys, K):
        c = first + tl.arange(0, K)
        k_t = tile(k, b, h, t, c, length, heads, keys) * rate[:, None]
        put(seen, b, h, t, c, length, heads, keys, tl.dot(solved, k_t, input_precision=PRECISION))


@triton.jit
def _walk(
    k, g, own, seen, state, found, written, last, length, heads, keys, values, chunks, PRECISION: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    b, h = i // heads, i % heads
    c, d = tl.arange(0, K), tl.program_id(0) * V + tl.arange(0, V)
    S = matrix(state, i, c, d, keys, values)
    for n in range(0, chunks):
        t = n * T + rows
        put_matrix(found, i * chunks + n, c, d, keys, values, S)
        total, whole = running(g, b, h, t, length, heads)
        seen_t = tile(seen, b, h, t, c, length, heads, keys)
        error = tile(own, b, h, t, d, length, heads, values) - tl.dot(seen_t, S, input_precision=PRECISION)
        put(written, b, h, t, d, length, heads, values, error)
        kept = tile(k, b, h, t, c, length, heads, keys) * tl.exp((whole - total).to(tl.float32))[:, None]
        S = S * tl.exp(whole.to(tl.float32)) + tl.dot(tl.trans(kept), error, input_precision=PRECISION)
    put_matrix(last, i, c, d, keys, values, S)


@triton.jit
def _walk_back(
    grad, q, k, g, seen, state, left, written, first, scale, length, heads, keys, values, chunks,
    PRECISION: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradients of the state each chunk leaves and of the first; adds what the state gives those of the errors."""
    i, rows = tl.program_id(1).to(tl.int64), tl.arange(0, T)
    b, h = i // heads, i % heads
    c, d = tl.arange(0, K), tl.program_id(0) * V + tl.arange(0, V)
    S = matrix(state, i, c, d, keys, values)
    for back in range(0, chunks):
        n = chunks - 1 - back
        t = n * T + rows
        put_matrix(left, i * chunks + n, c, d, keys, values, S)
        total, whole = running(g, b, h, t, length, heads)
        kept = tile(k, b, h, t, c, length, heads, keys) * tl.exp((whole - total).to(tl.float32))[:, None]
        error = tile(written, b, h, t, d, length, heads, values) + tl.dot(kept, S, input_precision=PRECISION)
        put(written, b, h, t, d, length, heads, values, error)
        q_t = tile(q, b, h, t, c, length, heads, keys) * (tl.exp(total.to(tl.float32)) * scale)[:, None]
        grad_t = tile(grad, b, h, t, d, length, heads, values)
        seen_t = tile(seen, b, h, t, c, length, heads, keys)
        S = S * tl.exp(whole.to(tl.float32)) + tl.dot(tl.trans(q_t), grad_t, input_precision=PRECISION)
        S -= tl.dot(tl.trans(seen_t), error, input_precision=PRECISION)
    put_matrix(first, i, c, d, keys, values, S)


@triton.jit
def _systems_backward(
    k, v, beta, g, inverse, written, found, grad_written, grad_k, grad_v, grad_beta, grad_g, length, heads, keys,
    values, chunks, EXACT: tl.constexpr, PRECISION: tl.constexpr, T: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Gradients of v and beta, and the part of those of k and g that passes the systems, added to what is there.
    Overwrites the gradient of the errors by that of the right-hand sides."""
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
        to_system -= tl.dot(right, tl.trans(error), input_precision=PRECISION)
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
            from_state -= tl.dot(right, tl.trans(S), input_precision=PRECISION)
        from_state *= since[:, None]
        passed = tl.sum(from_state * k_t, 1)
        to_rate += passed
        at_rows += passed * rate
        k_grad = tile(grad_k, b, h, t, c, length, heads, keys) + from_state * rate[:, None]
        k_grad += tl.dot(both, k_t, input_precision=PRECISION)
        put(grad_k, b, h, t, c, length, heads, keys, k_grad)
    at = (b * length + t) * heads + h
    tl.store(grad_beta + at, to_rate, t < length)
    g_grad = passing(to_system * alike, at_rows, tl.zeros([T], tl.float32), rows, PRECISION)
    tl.store(grad_g + at, tl.load(grad_g + at, t < length, 0.0) + g_grad, t < length)


class _Walked:
    """What forward and backward share: the errors the chunks write, and the states they find."""

    def __init__(self, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor, chunk: int) -> None:
        self.plan = plan = Plan(k, v, chunk, channel=False)
        self.sizes = plan.length, plan.heads, plan.keys, plan.values, plan.chunks
        # a walk needs the whole key at once; narrow values, to have more of them side by side
        self.whole = {
            "PRECISION": plan.precision, "T": plan.size, "K": max(16, triton.next_power_of_2(plan.keys)),
            "V": max(16, min(32, plan.value_block // 2)), "num_warps": 8, "num_stages": 1,
        }  # fmt: skip
        self.grid = triton.cdiv(plan.values, self.whole["V"]), plan.rows
        self.inverse = plan.squares(v)
        self.seen, own = torch.empty_like(k, dtype=torch.float32), torch.empty_like(v, dtype=torch.float32)
        self.found, self.written, self.last = plan.boundaries(v), torch.empty_like(own), torch.empty_like(state)
        _systems[(plan.chunks, plan.rows)](
            k, v, beta, g, self.inverse, own, self.seen, *self.sizes, PRECISION=plan.exact, T=plan.size,
            K=plan.key_block, V=plan.value_block, num_warps=8, num_stages=1,
        )  # fmt: skip
        _walk[self.grid](k, g, own, self.seen, state, self.found, self.written, self.last, *self.sizes, **self.whole)


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, chunk: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments as `delta_rule`; beta, log_decay (B, L, H, 1) and the state in float32."""
    q, k, v, beta, g, state = plain(q, k, v, beta, log_decay, state)
    with torch.cuda.device_of(v):
        walked = _Walked(k, v, beta, g, state, chunk)
        written = walked.written
        o = walked.plan.outputs(q, k, written, g, written, walked.found, scale, torch.empty_like(v))
    return o, walked.last


def backward(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor,
    chunk: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, log_decay and the initial state."""
    grad, grad_state, q, k, v, beta, g, state = plain(grad, grad_state, q, k, v, beta, log_decay, state)
    with torch.cuda.device_of(v):
        walked = _Walked(k, v, beta, g, state, chunk)
        plan, written, found = walked.plan, walked.written, walked.found
        left, first = plan.boundaries(v), torch.empty_like(state)
        grad_written = plan.values_backward(grad, q, k, g, written, None, scale, torch.empty_like(written))
        _walk_back[walked.grid](
            grad, q, k, g, walked.seen, grad_state, left, grad_written, first, scale, *walked.sizes, **walked.whole
        )
        grad_q, grad_k, grad_g = plan.keys_backward(grad, q, k, written, g, found, left, scale)
        grad_v, grad_beta = torch.empty_like(v), torch.empty_like(beta)
        _systems_backward[(plan.chunks, plan.rows)](
            k, v, beta, g, walked.inverse, written, found, grad_written, grad_k, grad_v, grad_beta, grad_g,
            *walked.sizes, EXACT=plan.exact, **plan.blocks | {"num_warps": 8},
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_beta, grad_g, first
