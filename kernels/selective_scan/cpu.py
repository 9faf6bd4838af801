"""`selective_scan` as a PyTorch operator, with the compiled CPU path. README.md derives the backward.

A thread takes one row and one block of channels through time, with its (N, channels) state in the first cache; in the
backward it recomputes CHUNK states at a time, from the one saved at the chunk's start, and walks back over them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels._exp import exp
from lra.kernels._threads import blocks_of, over_rows

# a block's recomputed states, 2 x CHUNK x N x BLOCK numbers, fit the second cache at N = 16
BLOCK = 128
CHUNK = 32
GPU_CHUNK = 16


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _forward(start, stop, u, delta, A, B, C, D, z, h0, y, last, saved, blocks):
    _, length, width = u.shape
    size = A.shape[0]
    for row in range(start, stop):
        i, block = divmod(row, blocks)
        lo, hi = width * block // blocks, width * (block + 1) // blocks
        state = h0[i, :, lo:hi].copy()
        x = np.empty_like(D[lo:hi])
        for t in range(length):
            if saved.size and t % CHUNK == 0:
                saved[i, t // CHUNK, :, lo:hi] = state
            u_t, delta_t, out, skip = u[i, t, lo:hi], delta[i, t, lo:hi], y[i, t, lo:hi], D[lo:hi]
            for d in range(hi - lo):
                x[d] = delta_t[d] * u_t[d]
                out[d] = skip[d] * u_t[d]
            for n in range(size):
                b, c, rate, h = B[i, t, n], C[i, t, n], A[n, lo:hi], state[n]
                for d in range(hi - lo):
                    h[d] = exp(delta_t[d] * rate[d]) * h[d] + x[d] * b
                    out[d] += h[d] * c
            if z.size:
                z_t = z[i, t, lo:hi]
                for d in range(hi - lo):
                    out[d] *= z_t[d] / (1 + exp(-z_t[d]))
        last[i, :, lo:hi] = state


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _recompute(i, first, end, lo, hi, u, delta, A, B, states, decays, x):
    """States after each step of a chunk, states[0] being the one before it, and the decays that led to them.

    Takes whole arrays: a block of a matrix would not be known to be contiguous, and its loops not vectorised.
    """
    for t in range(first, end):
        u_t, delta_t = u[i, t, lo:hi], delta[i, t, lo:hi]
        for d in range(hi - lo):
            x[d] = delta_t[d] * u_t[d]
        for n in range(A.shape[0]):
            b, rate, decay = B[i, t, n], A[n], decays[t - first, n]
            h, after = states[t - first, n], states[t - first + 1, n]
            for d in range(hi - lo):
                decay[d] = exp(delta_t[d] * rate[d])
            for d in range(hi - lo):
                after[d] = decay[d] * h[d] + x[d] * b


# reassociation lets the two sums over channels run in vector lanes
@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _step(g, x, delta, A, B, C, before, after, decay, adjoint, grad_A, grad_B, grad_C, to_input, to_delta, q):
    """One step back for every state: `adjoint` comes in as the gradient of h_t from later steps, leaves as that of
    h_{t-1}. Few arrays in one loop, or LLVM gives up proving them distinct, and vectorising."""
    for n in range(A.shape[0]):
        b, c, rate, lam, h, earlier, e, to_rate = B[n], C[n], A[n], adjoint[n], after[n], before[n], decay[n], grad_A[n]
        zero = x[0] * 0
        sum_b, sum_c = zero, zero
        for d in range(x.size):
            now = lam[d] + g[d] * c
            lam[d] = now
            to_input[d] += now * b
            sum_b += now * x[d]
            sum_c += g[d] * h[d]
        grad_B[n], grad_C[n] = sum_b, sum_c
        for d in range(x.size):
            lam[d] = lam[d] * e[d]
            q[d] = lam[d] * earlier[d]
        for d in range(x.size):
            to_rate[d] += q[d] * delta[d]
            to_delta[d] += q[d] * rate[d]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _gate(grad, u, D, z, C, after, g, grad_z):
    """Turn the gradient of the gated output into that of the ungated one, g, and of z."""
    for d in range(g.size):
        g[d] = D[d] * u[d]
    for n in range(C.size):
        h = after[n]
        for d in range(g.size):
            g[d] += h[d] * C[n]
    for d in range(g.size):
        open_ = 1 / (1 + exp(-z[d]))
        grad_z[d] = grad[d] * g[d] * open_ * (1 + z[d] * (1 - open_))
        g[d] = grad[d] * z[d] * open_


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _backward(
    start, stop, grad_y, grad_last, u, delta, A, B, C, D, z, saved,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_h0, blocks,
):  # fmt: skip
    _, length, width = u.shape
    size, chunks = A.shape[0], saved.shape[1]
    for row in range(start, stop):
        i, block = divmod(row, blocks)
        lo, hi = width * block // blocks, width * (block + 1) // blocks
        rates, skip = A[:, lo:hi].copy(), D[lo:hi]
        adjoint, sum_A = grad_last[i, :, lo:hi].copy(), np.empty_like(rates)
        states = np.empty((CHUNK + 1, size, hi - lo), rates.dtype)
        decays = np.empty((CHUNK, size, hi - lo), rates.dtype)
        x, g, q = np.empty_like(skip), np.empty_like(skip), np.empty_like(skip)
        to_input, to_delta = np.empty_like(skip), np.empty_like(skip)
        for chunk in range(chunks - 1, -1, -1):
            first, end = chunk * CHUNK, min(length, (chunk + 1) * CHUNK)
            states[0] = saved[i, chunk, :, lo:hi]
            _recompute(i, first, end, lo, hi, u, delta, rates, B, states, decays, x)
            sum_A[:] = 0
            for t in range(end - 1, first - 1, -1):
                s = t - first
                u_t, delta_t = u[i, t, lo:hi], delta[i, t, lo:hi]
                if z.size:
                    y_t, z_t, to_z = grad_y[i, t, lo:hi], z[i, t, lo:hi], grad_z[i, t, lo:hi]
                    _gate(y_t, u_t, skip, z_t, C[i, t], states[s + 1], g, to_z)
                else:
                    g[:] = grad_y[i, t, lo:hi]
                for d in range(hi - lo):
                    x[d] = delta_t[d] * u_t[d]
                to_input[:], to_delta[:] = 0, 0
                _step(
                    g, x, delta_t, rates, B[i, t], C[i, t], states[s], states[s + 1], decays[s], adjoint,
                    sum_A, grad_B[block, i, t], grad_C[block, i, t], to_input, to_delta, q,
                )  # fmt: skip
                to_u, to_step, to_skip = grad_u[i, t, lo:hi], grad_delta[i, t, lo:hi], grad_D[i, lo:hi]
                for d in range(hi - lo):
                    to_u[d] = delta_t[d] * to_input[d] + g[d] * skip[d]
                for d in range(hi - lo):
                    to_step[d] = to_delta[d] + u_t[d] * to_input[d]
                for d in range(hi - lo):
                    to_skip[d] += g[d] * u_t[d]
            grad_A[i, :, lo:hi] += sum_A
        grad_h0[i, :, lo:hi] = adjoint


def _arrays(dtype: torch.dtype, *tensors: Tensor) -> list[Any]:
    return [t.detach().to(dtype).contiguous().numpy() for t in tensors]


def _blocks(batch: int, width: int) -> int:
    """Blocks of channels per row: none wider than BLOCK, and enough of them for every thread."""
    return max(-(-width // BLOCK), blocks_of(batch, width, smallest=16))


def _chunks(length: Any, save: bool, triton: bool) -> Any:
    chunk = GPU_CHUNK if triton else CHUNK
    return (length + chunk - 1) // chunk if save else 0


@torch.library.custom_op("lra::selective_scan", mutates_args=())
def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, h0: Tensor | None,
    save: bool, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y: (batch, L, D); last state: (batch, N, D); with `save`, the state before each chunk: (batch, chunks, N, D)."""
    if triton:
        from lra.kernels.selective_scan import gpu

        return gpu.forward(u, delta, A, B, C, D, z, h0, save)
    (batch, length, width), size, dtype = u.shape, A.shape[1], A.dtype
    y, last = torch.empty(u.shape, dtype=dtype), torch.empty(batch, size, width, dtype=dtype)
    saved = torch.empty(batch, _chunks(length, save, triton), size, width, dtype=dtype)
    D = A.new_zeros(width) if D is None else D
    z = A.new_empty(0, 0, 0) if z is None else z
    start = torch.zeros_like(last) if h0 is None else h0.mT
    blocks = _blocks(batch, width)
    read = _arrays(dtype, u, delta, A.T, B, C, D, z, start)
    over_rows(_forward, batch * blocks, *read, y.numpy(), last.numpy(), saved.numpy(), blocks)
    return y.to(u.dtype), last, saved


@scan.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, h0: Tensor | None,
    save: bool, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, length, width), size = u.shape, A.shape[1]
    saved = A.new_empty(batch, _chunks(length, save, triton), size, width)
    return u.new_empty(u.shape), A.new_empty(batch, size, width), saved


@torch.library.custom_op("lra::selective_scan_backward", mutates_args=())
def scan_backward(
    grad_y: Tensor, grad_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, saved: Tensor, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z (empty where z is None) and h0."""
    if triton:
        from lra.kernels.selective_scan import gpu

        return gpu.backward(grad_y, grad_last, u, delta, A, B, C, D, z, saved)
    (batch, length, width), size, dtype = u.shape, A.shape[1], A.dtype
    blocks = _blocks(batch, width)
    grad_u, grad_delta = torch.empty(u.shape, dtype=dtype), torch.empty(u.shape, dtype=dtype)
    grad_z = torch.empty((0, 0, 0) if z is None else u.shape, dtype=dtype)
    grad_B, grad_C = (torch.empty(blocks, batch, length, size, dtype=dtype) for _ in range(2))
    grad_h0 = torch.empty(batch, size, width, dtype=dtype)
    # sums over every step: in double precision, to keep the digits
    grad_A = torch.zeros(batch, size, width, dtype=torch.float64)
    grad_D = torch.zeros(batch, width, dtype=torch.float64)
    skip = A.new_zeros(width) if D is None else D
    gate = A.new_empty(0, 0, 0) if z is None else z
    read = _arrays(dtype, grad_y, grad_last, u, delta, A.T, B, C, skip, gate, saved)
    written = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_h0)
    over_rows(_backward, batch * blocks, *read, *(t.numpy() for t in written), blocks)
    narrow = u.dtype
    return (
        grad_u.to(narrow), grad_delta.to(narrow), grad_A.sum(0).T.to(dtype).contiguous(), grad_B.sum(0).to(narrow),
        grad_C.sum(0).to(narrow), grad_D.sum(0).to(dtype), grad_z.to(narrow), grad_h0.mT.contiguous(),
    )  # fmt: skip


@scan_backward.register_fake
def _(
    grad_y: Tensor, grad_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, saved: Tensor, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, _, width), size = u.shape, A.shape[1]
    grad_z = u.new_empty(0, 0, 0) if z is None else u.new_empty(u.shape)
    return (
        u.new_empty(u.shape), u.new_empty(u.shape), A.new_empty(A.shape), u.new_empty(B.shape), u.new_empty(C.shape),
        A.new_empty(width), grad_z, A.new_empty(batch, width, size),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, h0, _, ctx.triton = inputs
    # zeros as large as the saved states would be made for them otherwise
    ctx.set_materialize_grads(False)
    ctx.has_h0 = h0 is not None
    ctx.save_for_backward(*given, output[2])


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, z, saved = ctx.saved_tensors
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    grad_last = A.new_zeros(u.shape[0], A.shape[1], A.shape[0]) if grad_last is None else grad_last
    grads = scan_backward(grad_y, grad_last, u, delta, A, B, C, D, z, saved, ctx.triton)
    wanted = (True, True, True, True, True, D is not None, z is not None, ctx.has_h0)
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), None, None


scan = register_autograd(scan, _differentiate, _save)


@register_flop_formula(torch.ops.lra.selective_scan, get_raw=True)
def _flops(u: Tensor, delta: Tensor, A: Tensor, *rest: Any, **more: Any) -> int:
    return 7 * u.numel() * A.shape[1]


@register_flop_formula(torch.ops.lra.selective_scan_backward, get_raw=True)
def _backward_flops(
    grad_y: Tensor, grad_last: Tensor, u: Tensor, delta: Tensor, A: Tensor, *rest: Any, **more: Any
) -> int:
    return 19 * u.numel() * A.shape[1]
