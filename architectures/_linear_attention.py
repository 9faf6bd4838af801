"""Shared by attention through feature maps: sums over keys in place of an L x L matrix.

With features phi(q_i), phi(k_j) of width M, y_i = phi(q_i) S / (phi(q_i) z) where S = sum_j phi(k_j) v_j' (M, d) and
z = sum_j phi(k_j) (M,), over all real keys, or over j <= i when causal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lra.architectures._precision import wide
from lra.encoder import Cost
from lra.kernels.decay_attention import decay_attention

CHUNK = 64


class _Sums(torch.autograd.Function):
    """`summed` over all real keys, (B, H, L, ...) in float32 at least: each input is laid out once, and the gradients
    of both sums are formed together."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (torch.empty(t.shape, dtype=wide(t[:0]).dtype, device=t.device).copy_(t) for t in (q, k, v))
        _clear(k, mask)
        _clear(v, mask)
        S, z = k.mT @ v, k.sum(2).unsqueeze(-1)
        return q @ S, q @ z, q, k, v, S, z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:], inputs[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, S, z, mask = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            to_top, to_bottom = (g.contiguous() for g in grads[:2])
            to_S, to_z = q.mT @ to_top, q.mT @ to_bottom
            to_q = (to_top @ S.mT).addcmul_(to_bottom, z.mT)
            to_k, to_v = (v @ to_S.mT).add_(to_z.mT), k @ to_S
        _clear(to_k, mask)
        return to_q, to_k, to_v, None


def _clear(x: Tensor, mask: Tensor) -> None:
    """Zeros at padding, x: (B, H, L, ...)."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        x.masked_fill_(~mask[:, None, :, None], 0)
    else:  # a fill by mask visits every number by itself
        x.transpose(1, 2)[~mask] = 0


class _Ratio(torch.autograd.Function):
    """top (..., d) / bottom (..., 1), whose gradients share one division."""

    @staticmethod
    def forward(top: Tensor, bottom: Tensor) -> Tensor:
        return top / bottom

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, bottom = ctx.saved_tensors
        to_top = grads[0] / bottom
        return to_top, (to_top * y).sum(-1, keepdim=True).neg_()


def divided(top: Tensor, bottom: Tensor) -> Tensor:
    """The sums of values over those of their weights: top (..., d) / bottom (..., 1) -> (..., d)."""
    return _Ratio.apply(top, bottom)


def summed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """phi(q_i) S (B, H, L, d) and phi(q_i) z (B, H, L, 1): features q, k: (B, H, L, M), v: (B, H, L, d), mask: (B, L).

    log_decay: (B, L, H), by which causal sums shrink before a key is added; for features whose scale moves along.
    Padding comes after all real tokens: the causal sums need no mask.
    """
    if causal:
        top, bottom, _, _ = summed_chunk(q, k, v, None, log_decay)
        return top, bottom
    with torch.autocast(q.device.type, enabled=False):
        top, bottom, *_ = _Sums.apply(q, k, v, mask)
        return top, bottom


def summed_chunk(
    q: Tensor, k: Tensor, v: Tensor, sums: tuple[Tensor, Tensor] | None, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Causal `summed` that starts from sums, S: (B, H, M, d) and z: (B, H, M), zero where None; returns both products
    and the S and z after the last token."""
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    h0 = None if sums is None else torch.cat([sums[0], sums[1].unsqueeze(-1)], dim=-1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, _with_ones(v)))
    o, state = decay_attention(q, k, v, log_decay, CHUNK, scale=1.0, h0=h0, return_state=True)
    o = o.transpose(1, 2)
    return o[..., :-1], o[..., -1:], state[..., :-1], state[..., -1]


def _with_ones(v: Tensor) -> Tensor:
    """A last value of 1 makes the sum of the keys a column of S."""
    return F.pad(v, (0, 1), value=1.0)


def summed_step(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token of `summed`: q, k: (B, H, M), v: (B, H, d), S: (B, H, M, d), z: (B, H, M), without this token; returns
    both products and the new S and z."""
    S, z = S + k.unsqueeze(-1) * v.unsqueeze(-2), z + k
    return torch.einsum("bhm,bhmd->bhd", q, S), (q * z).sum(-1, keepdim=True), S, z


def sums_cost(length: int, heads: int, features: int, width: int, causal: bool) -> Cost:
    """Work of `summed`."""
    if causal:
        inside = CHUNK * (features + width + 1) + 2 * features * (width + 1)
        return Cost(other=2.0 * length * heads * inside)
    # z is a sum, and only reading it a product
    return Cost(2.0 * length * heads * features * (2 * width + 1), length * heads * (2.0 * width + features))
