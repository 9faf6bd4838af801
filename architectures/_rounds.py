"""Attention over sorted chunks in several rounds, one softmax over what all rounds see of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class UnionOfRounds(torch.autograd.Function):
    """y_i = sum over rounds s and keys j of exp(q_si . k_sj + bias_sij) v_sj, over the same sum without v.

    q: (B, H, r, chunks, m, d); k, v: (B, H, r, chunks, n, d), the keys a chunk sees, in the type of q; bias:
    (..., m, n), finite for one key of each row at least, without a gradient; order, place: (B, H, r, L), the token at
    each sorted row, and its inverse. Returns (B, H, L, d) in the order of the tokens. The softmax of
    each round, in the type of `bias`, is all that is kept of the size of the scores.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, order: Tensor, place: Tensor) -> Tensor:
        scores = torch.matmul(q, k.mT).to(bias.dtype).add_(bias)
        p, high = scores.softmax(dim=-1), scores.amax(dim=-1)
        # the log-sum-exp from what is there: p of the highest score is exp(high - lse)
        lse = high - p.amax(dim=-1).log()
        weight = lse.flatten(3).gather(3, place).softmax(dim=2).gather(3, order).unsqueeze(-1)
        y = taken(torch.matmul(p.to(v.dtype), v).flatten(3, 4) * weight.to(v.dtype), place).sum(dim=2)
        ctx.save_for_backward(q, k, v, p, weight, y, order)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, weight, y, order = ctx.saved_tensors
        chunks = q.shape[3:5]
        grad = grad.to(p.dtype)
        # softmax's own term, grad . y, is sorted as one more column beside grad
        inside = torch.cat([grad, (grad * y).sum(dim=-1, keepdim=True)], dim=-1).unsqueeze(2)
        inside = (taken(inside, order) * weight).unflatten(3, chunks)
        rows, own = inside[..., :-1].to(v.dtype), inside[..., -1:]
        d_scores = torch.matmul(rows, v.mT).to(p.dtype).sub_(own).mul_(p).to(q.dtype)
        d_v = torch.matmul(p.to(v.dtype).mT, rows)
        return torch.matmul(d_scores, k), torch.matmul(d_scores.mT, q), d_v, None, None, None


class Reordered(torch.autograd.Function):
    """x: (B, H, 1, L, d) -> (B, H, r, L, d), row t of each round taken from row index[t]. `inverse` undoes it, so that
    going back gathers too instead of adding rows up one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return taken(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return taken(grad, ctx.saved_tensors[0]).sum(dim=2, keepdim=True), None, None


def taken(x: Tensor, index: Tensor) -> Tensor:
    """x: (B, H, r or 1, L, d), index: (B, H, r, L) -> (B, H, r, L, d): row t of a round taken from row index[t]."""
    first = torch.arange(x.shape[0] * x.shape[1] * x.shape[2], device=x.device).view(*x.shape[:3], 1) * x.shape[3]
    return x.reshape(-1, x.shape[-1]).index_select(0, (first + index).flatten()).view(*index.shape, -1)
