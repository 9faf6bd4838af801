"""The Triton kernels of `decay_attention` that only decays per channel of the key need.

A chunk is cut into blocks of 16 steps. Two different blocks meet through the boundary of the later one, with sums of
log decays on both sides of it; inside a block the steps are taken one key at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lra.kernels.decay_attention.gpu import channels, matrix, product, put, tile

if TYPE_CHECKING:
    from lra.kernels.decay_attention.gpu import Plan

BLOCK = 16


@triton.jit
def _one(x, b, h, t, c, length, heads, width):
    """One step of x, (width,)."""
    # where, not &: Triton 3.9's interpreter makes a number of mask & scalar and refuses it as a mask
    known = tl.where(t < length, c < width, False)
    return tl.load(x + ((b * length + t) * heads + h) * width + c, known, 0.0).to(tl.float32)


@triton.jit
def _scores(
    q, k, g, scores, scale, length, heads, keys, chunks, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    KA: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """(q_i . k_j decayed from j to i) for the R steps i of one block and all steps j <= i of its chunk."""
    keys = keys * KA
    i, n, block = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    b, h, rows, c = i // heads, i % heads, tl.arange(0, R), tl.arange(0, K)
    t = n * T + block * R + rows
    q_t = tile(q, b, h, t, c, length, heads, keys) * scale
    since, _after, _sum = channels(g, b, h, t, c, length, heads, keys, rows, EXACT)
    late, gap = q_t * tl.exp(since), tl.zeros([K], tl.float32)
    out = scores + ((i * chunks + n) * T + block * R + rows[:, None]) * T
    for back in range(0, block):
        other = block - 1 - back
        s = n * T + other * R + rows
        _before, until, whole = channels(g, b, h, s, c, length, heads, keys, rows, EXACT)
        early = tile(k, b, h, s, c, length, heads, keys) * tl.exp(until + gap[None, :])
        tl.store(out + (other * R + rows)[None, :], product(late, tl.trans(early), PRECISION))
        gap += whole
    between = tl.zeros([R, K], tl.float32)
    for back in range(0, R):
        j = R - 1 - back
        s = n * T + block * R + j
        k_j, g_j = _one(k, b, h, s, c, length, heads, keys), _one(g, b, h, s, c, length, heads, keys)
        column = tl.sum(q_t * tl.exp(between) * k_j[None, :], 1)
        tl.store(out + block * R + j, column[:, None], (rows >= j)[:, None])
        between += tl.where((rows >= j)[:, None], g_j[None, :], 0.0)


@triton.jit
def _weights(grad, v, b, h, t, s, length, heads, values, PRECISION: tl.constexpr, R: tl.constexpr, V: tl.constexpr):
    """grad_i . v_j for the steps t (rows) and s (columns)."""
    out = tl.zeros([R, R], tl.float32)
    for first in range(0, values, V):
        d = first + tl.arange(0, V)
        grad_t, v_s = tile(grad, b, h, t, d, length, heads, values), tile(v, b, h, s, d, length, heads, values)
        out += product(grad_t, tl.trans(v_s), PRECISION)
    return out


@triton.jit
def _inside_backward(
    grad, q, k, v, g, grad_q, grad_k, scale, length, heads, keys, values, PRECISION: tl.constexpr,
    EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """Gradients of the q and k of one block through pairs of different steps of its chunk."""
    keys, values = keys * KA, values * VA
    i, n, block = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    b, h, rows, c = i // heads, i % heads, tl.arange(0, R), tl.arange(0, K)
    t = n * T + block * R + rows
    q_t = tile(q, b, h, t, c, length, heads, keys)
    since, until, _sum = channels(g, b, h, t, c, length, heads, keys, rows, EXACT)
    q_grad, k_grad = tl.zeros([R, K], tl.float32), tl.zeros([R, K], tl.float32)
    gap = tl.zeros([K], tl.float32)
    for back in range(0, block):
        s = n * T + (block - 1 - back) * R + rows
        _before, other, whole = channels(g, b, h, s, c, length, heads, keys, rows, EXACT)
        early = tile(k, b, h, s, c, length, heads, keys) * tl.exp(other + gap[None, :])
        weights = _weights(grad, v, b, h, t, s, length, heads, values, PRECISION, R, V)
        q_grad += product(weights, early, PRECISION)
        gap += whole
    q_grad *= tl.exp(since)
    gap = tl.zeros([K], tl.float32)
    for later in range(block + 1, T // R):
        s = n * T + later * R + rows
        other, _after, whole = channels(g, b, h, s, c, length, heads, keys, rows, EXACT)
        late = tile(q, b, h, s, c, length, heads, keys) * tl.exp(other + gap[None, :])
        weights = _weights(grad, v, b, h, s, t, length, heads, values, PRECISION, R, V)
        k_grad += product(tl.trans(weights), late, PRECISION)
        gap += whole
    k_grad *= tl.exp(until)
    weights = _weights(grad, v, b, h, t, t, length, heads, values, PRECISION, R, V)
    between = tl.zeros([R, K], tl.float32)
    for back in range(0, R):
        j = R - 1 - back
        s = n * T + block * R + j
        k_j, g_j = _one(k, b, h, s, c, length, heads, keys), _one(g, b, h, s, c, length, heads, keys)
        weight = tl.sum(tl.where(rows[None, :] == j, weights, 0.0), 1)
        decayed = tl.where(rows > j, weight, 0.0)[:, None] * tl.exp(between)
        q_grad += decayed * k_j[None, :]
        k_grad += tl.where((rows == j)[:, None], tl.sum(decayed * q_t, 0)[None, :], 0.0)
        between += tl.where((rows >= j)[:, None], g_j[None, :], 0.0)
    put(grad_q, b, h, t, c, length, heads, keys, q_grad * scale)
    put(grad_k, b, h, t, c, length, heads, keys, k_grad * scale)


@triton.jit
def _finish(
    grad, q, k, v, g, found, left, grad_q, grad_k, grad_g, scale, length, heads, keys, values, chunks,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, KA: tl.constexpr, VA: tl.constexpr, T: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of q and k what passes the state and what a step gives itself; gather those of g."""
    keys, values = keys * KA, values * VA
    i, n, rows = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.arange(0, T)
    b, h, t, c = i // heads, i % heads, n * T + rows, tl.program_id(0) * K + tl.arange(0, K)
    q_t, k_t = tile(q, b, h, t, c, length, heads, keys), tile(k, b, h, t, c, length, heads, keys)
    from_state, to_state = tl.zeros([T, K], tl.float32), tl.zeros([T, K], tl.float32)
    own, passing = tl.zeros([T], tl.float32), tl.zeros([K], tl.float32)
    for first in range(0, values, V):
        d = first + tl.arange(0, V)
        grad_t, v_t = tile(grad, b, h, t, d, length, heads, values), tile(v, b, h, t, d, length, heads, values)
        S, dS = matrix(found, i * chunks + n, c, d, keys, values), matrix(left, i * chunks + n, c, d, keys, values)
        from_state += product(grad_t, tl.trans(S), PRECISION)
        to_state += product(v_t, tl.trans(dS), PRECISION)
        own += tl.sum(grad_t * v_t, 1)
        passing += tl.sum(S * dS, 1)
    since, until, through = channels(g, b, h, t, c, length, heads, keys, rows, EXACT)
    from_state *= tl.exp(since) * scale
    to_state *= tl.exp(until)
    q_grad, k_grad = tile(grad_q, b, h, t, c, length, heads, keys), tile(grad_k, b, h, t, c, length, heads, keys)
    at_rows, at_columns = (q_grad + from_state) * q_t - k_grad * k_t, to_state * k_t
    later = tl.where(rows[None, :] >= rows[:, None], 1.0, 0.0)
    g_grad = tl.dot(later, at_rows, input_precision=EXACT) + tl.dot(1 - later, at_columns, input_precision=EXACT)
    g_grad += (passing * tl.exp(through))[None, :]
    own = (own * scale)[:, None]
    put(grad_q, b, h, t, c, length, heads, keys, q_grad + from_state + own * k_t)
    put(grad_k, b, h, t, c, length, heads, keys, k_grad + to_state + own * q_t)
    put(grad_g, b, h, t, c, length, heads, keys, g_grad)


def _blocks(plan: Plan) -> dict[str, Any]:
    """Block sizes and launch settings of the kernels that hold a whole key."""
    size = max(16, triton.next_power_of_2(plan.keys))
    precisions = {"PRECISION": plan.precision, "EXACT": plan.exact}
    return {**precisions, "T": plan.size, "R": BLOCK, "K": size, "num_warps": 8 if size > 64 else 4, "num_stages": 1}


def scores(plan: Plan, q: Tensor, k: Tensor, g: Tensor, scale: float) -> Tensor:
    """(B H, chunks, T, T), nothing above the diagonal."""
    out = plan.squares(q)
    _scores[(plan.size // BLOCK, plan.chunks, plan.rows)](
        q, k, g, out, scale, plan.length, plan.heads, plan.keys // plan.aligned["KA"], plan.chunks,
        **_blocks(plan) | {"KA": plan.aligned["KA"]},
    )  # fmt: skip
    return out


def keys_backward(
    plan: Plan, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, found: Tensor, left: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and g, in float32."""
    grad_q, grad_k, grad_g = (torch.empty_like(x, dtype=torch.float32) for x in (q, k, g))
    sizes = plan.length, plan.heads, plan.keys // plan.aligned["KA"], plan.values // plan.aligned["VA"]
    _inside_backward[(plan.size // BLOCK, plan.chunks, plan.rows)](
        grad, q, k, v, g, grad_q, grad_k, scale, *sizes, **_blocks(plan) | plan.aligned, V=plan.value_block,
    )  # fmt: skip
    blocks = plan.blocks | {"num_warps": 8, "K": min(32, plan.key_block)}
    _finish[(triton.cdiv(plan.keys, blocks["K"]), plan.chunks, plan.rows)](
        grad, q, k, v, g, found, left, grad_q, grad_k, grad_g, scale, *sizes, plan.chunks,
        **blocks,
    )  # fmt: skip
    return grad_q, grad_k, grad_g
