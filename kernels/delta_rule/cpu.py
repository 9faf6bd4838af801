"""`delta_rule` as a PyTorch operator, with the chunked path (Yang et al. 2024, arXiv:2406.06484; gated 2412.06464).

The rule is decayed attention whose value is the error it writes, u_t = beta_t (v_t - e^{g_t} S_{t-1}^T k_t). Inside a
chunk that found the state S, with P_i the decay through step i and D_ij that from step j to step i, the errors solve

    (I + T) U = beta (V - P K S),      T_ij = beta_i (k_i . k_j) D_ij for j < i, 0 elsewhere.

So U = U_0 - W S with one triangular solve for U_0 and W in all chunks at once; only U and S go from chunk to chunk.
Backward finds the states again, walks back with the gradient of the state, and solves with the transpose: with
R = (I + T)^{-T} dU, the right-hand side has the gradient R and T has -R U^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lra.kernels._autograd import register_autograd
from lra.kernels.decay_attention.chunks import accumulator, chunk_size, cut, paste, pieces
from lra.kernels.decay_attention.cpu import chunked_flops, state_or_zeros
from lra.kernels.decay_attention.decays import PerHead


@dataclass
class Errors:
    """What the chunks of a piece write, as far as it does not depend on the states they find."""

    decay: PerHead
    alike: Tensor  # k_i . k_j D_ij
    system: Tensor  # T
    own: Tensor  # U_0
    seen: Tensor  # W
    kept: Tensor  # k_j decayed to the end of the chunk

    @staticmethod
    def of(k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Errors:
        decay = PerHead(log_decay)
        alike = (k @ k.mT).mul_(decay.steps)
        system = (beta * alike).tril_(-1)
        right = torch.cat([beta * v, beta * decay.since * k], -1)
        # unitriangular: the diagonal of I + T is implied
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        own, seen = solved.split([v.shape[-1], k.shape[-1]], -1)
        return Errors(decay, alike, system, own, seen, k * decay.until)

    def walk(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states the chunks find, the errors they write, and the last state."""
        found, written = self.own.new_empty(*self.own.shape[:3], *state.shape[2:]), torch.empty_like(self.own)
        for c in range(self.own.shape[2]):
            found[:, :, c] = state
            written[:, :, c] = error = self.own[:, :, c] - self.seen[:, :, c] @ state
            state = torch.addcmul(self.kept[:, :, c].mT @ error, self.decay.since[:, :, c, -1:], state)
        return found, written, state

    def walk_back(self, written: Tensor, update: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states the chunks leave, and of the first state. written, update: those of the errors and of
        the states found, through the outputs; state: of the last. Adds what the states give the errors to `written`."""
        left = torch.empty_like(update)
        for c in reversed(range(update.shape[2])):
            left[:, :, c] = state
            written[:, :, c] += self.kept[:, :, c] @ state
            state = torch.addcmul(update[:, :, c], self.decay.since[:, :, c, -1:], state)
            state = state - self.seen[:, :, c].mT @ written[:, :, c]
        return left, state


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, chunk: int, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = v.shape
    o, size = torch.empty_like(v, memory_format=torch.contiguous_format), chunk_size(chunk, length)
    for piece in pieces(batch * heads, length, size, max(width, k.shape[-1])):
        q_, k_, v_, beta_, g = (cut(x, piece, size, state.dtype) for x in (q, k, v, beta, log_decay))
        errors, q_ = Errors.of(k_, v_, beta_, g), q_ * scale
        found, written, state = errors.walk(state)
        paste(errors.decay.attend(q_, k_, written).add_((q_ * errors.decay.since) @ found), piece, o)
    return o, state


def _backward(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor,
    chunk: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, length, heads, width = v.shape
    size = chunk_size(chunk, length)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta, log_decay)]
    starts = []
    plan = pieces(batch * heads, length, size, max(width, k.shape[-1]))
    for piece in plan:
        starts.append(state)
        state = Errors.of(*(cut(x, piece, size, state.dtype) for x in (k, v, beta, log_decay))).walk(state)[2]
    for piece, state in zip(reversed(plan), reversed(starts), strict=True):
        o_, q_, k_, v_, beta_, g = (cut(x, piece, size, state.dtype) for x in (grad, q, k, v, beta, log_decay))
        errors, q_ = Errors.of(k_, v_, beta_, g), q_ * scale
        decay = errors.decay
        found, written, _ = errors.walk(state)
        grad_u = (q_ @ k_.mT).mul_(decay.steps).mT @ o_
        left, grad_state = errors.walk_back(grad_u, (q_ * decay.since).mT @ o_, grad_state)
        right = torch.linalg.solve_triangular(errors.system.mT, grad_u, upper=True, unitriangular=True)
        grad_system = (right @ written.mT).tril_(-1).neg_()
        from_state, to_state = (o_ @ found.mT).mul_(decay.since), (written @ left.mT).mul_(decay.until)
        from_error = (right @ found.mT).mul_(decay.since).mul_(-beta_)
        rows, columns = from_state * q_ + from_error * k_, to_state * k_
        # what passes the whole chunk, at the last step of `since`
        rows[..., -1:, :] += (found * left).sum(-1).unsqueeze(-2) * decay.since[..., -1:, :]
        grad_q, grad_k, _, grad_g = decay.backward(o_, q_, k_, written, rows, columns)
        pairs = grad_system * beta_ * decay.steps
        grad_beta = (right * (v_ - decay.since * (k_ @ found))).sum(-1, keepdim=True)
        grad_beta += (grad_system * errors.alike).sum(-1, keepdim=True)
        found_grads = (
            (grad_q + from_state) * scale,
            grad_k + to_state + from_error + pairs @ k_ + pairs.mT @ k_,
            beta_ * right,
            grad_beta,
            grad_g + decay.crossing(grad_system * errors.system),
        )
        for x, target in zip(found_grads, grads, strict=True):
            paste(x, piece, target)
    return *grads, grad_state


@torch.library.custom_op("lra::delta_rule", mutates_args=())
def write(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, h0: Tensor | None, chunk: int,
    scale: float, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and the final state, in float32 or float64. q, k: (B, L, H, K); v: (B, L, H, V); beta, log_decay:
    (B, L, H, 1); h0: (B, H, K, V)."""
    state = state_or_zeros(h0, k, v)
    if triton:
        from lra.kernels.delta_rule.gpu import forward

        return forward(q, k, v, beta, log_decay, state, chunk, scale)
    with torch.autocast(v.device.type, enabled=False):
        return _forward(q, k, v, beta, log_decay, state, chunk, scale)


@write.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, h0: Tensor | None, chunk: int,
    scale: float, triton: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = v.shape[0], v.shape[2], k.shape[3], v.shape[3]
    return v.new_empty(v.shape), v.new_empty(shape, dtype=accumulator(v.dtype))


@torch.library.custom_op("lra::delta_rule_backward", mutates_args=())
def write_backward(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor,
    h0: Tensor | None, chunk: int, scale: float, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, beta, log_decay and the initial state."""
    state = state_or_zeros(h0, k, v)
    if triton:
        from lra.kernels.delta_rule.gpu import backward

        return backward(grad, grad_state, q, k, v, beta, log_decay, state, chunk, scale)
    with torch.autocast(v.device.type, enabled=False):
        grads = _backward(grad, grad_state, q, k, v, beta, log_decay, state, chunk, scale)
    return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]


@write_backward.register_fake
def _(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor,
    h0: Tensor | None, chunk: int, scale: float, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = (q, k, v, beta, log_decay, grad_state)
    return tuple(x.new_empty(x.shape) for x in like)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk, ctx.scale, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, h0 = ctx.saved_tensors  # read once: checkpointing refuses a second reading
    *grads, grad_h0 = write_backward(grad, grad_state, *tensors, h0, ctx.chunk, ctx.scale, ctx.triton)
    of_state = None if h0 is None else grad_h0.to(h0.dtype)
    return *grads, of_state, None, None, None


write = register_autograd(write, _differentiate, _save)


@register_flop_formula(torch.ops.lra.delta_rule, get_raw=True)
def _flops(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Any, chunk: int, *_: Any, **__: Any
) -> int:
    """Over decayed attention: k k^T and a triangular solve of K + V columns, W S, and U decayed into the state."""
    return chunked_flops(k, v, chunk, 2.0, 3)


@register_flop_formula(torch.ops.lra.delta_rule_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, grad_state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Any,
    chunk: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return chunked_flops(k, v, chunk, 5.5, 12)
