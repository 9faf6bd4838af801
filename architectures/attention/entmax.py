"""Entmax: attention whose weights are exactly zero at most tokens, by a map between softmax and sparsemax.

Peters, Niculae and Martins 2019, arXiv:1905.05702. With scores s = q k' / sqrt(d) + bias, alpha above 1 and at most 2:

    p_j = [(alpha - 1) s_j - tau]_+^(1 / (alpha - 1)),   tau such that sum_j p_j = 1            equations 9, 10
    dp = (diag(r) - r r' / sum(r)) ds,                   r = p^(2 - alpha) where p > 0, else 0  proposition 2
    y = concat_h(P V) W_o + b_o                          (B, L, D); the rest as `transformer`

alpha towards 1 is softmax; 2 is sparsemax (Martins and Astudillo 2016, arXiv:1602.02068; `entmax/sparsemax`). tau is
exact after a sort for alpha 1.5 and 2 (algorithm 2), and found by bisection otherwise (algorithm 1). Gradients are
exact for the p that was found; a token without weight receives none.

The sort over all scores takes most of the time: an operator that bisects tau tile by tile would not store them.

Initialisation: that of `transformer`. A step keeps keys and values.

Departures: the paper attends over the states of LSTMs. Within a Transformer it is arXiv:1909.00015, whose alpha is
learned; here it is an argument.

Checked against: tensors of the authors' sparsemax, entmax15 and entmax_bisect, outputs and gradients; the dense layer
from its definition; softmax as the limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, alibi_bias
from lra.architectures._attention_stack import AttentionStack
from lra.architectures._precision import wide
from lra.attention import attention_mask
from lra.encoder import Card, Cost

FIRST = 64
"""Values that are sorted first: more than have weight in most rows."""


def threshold(x: Tensor, alpha: float) -> Tensor:
    """tau for x = (alpha - 1) s whose largest value is 0: (..., N) -> (..., 1), from -1 up to 0.

    On a CPU the largest values alone are sorted, and more of them in rows whose smallest of these has weight.
    """
    find = sorted_threshold if alpha in (1.5, 2.0) else bisected
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or x.device.type != "cpu":
        return find(x.sort(dim=-1, descending=True).values, alpha)
    x, shape = x.flatten(0, -2), x.shape[:-1]
    tau, rows, size = x.new_zeros(x.shape[0], 1), torch.arange(x.shape[0]), min(FIRST, x.shape[-1])
    while True:
        largest = (x[rows] if len(rows) < len(x) else x).topk(size, dim=-1).values
        tau[rows] = find(largest, alpha)
        rows = rows[(largest[:, -1:] > tau[rows]).squeeze(1)]
        if size == x.shape[-1] or not len(rows):
            return tau.view(*shape, 1)
        size = min(4 * size, x.shape[-1])


def sorted_threshold(x: Tensor, alpha: float) -> Tensor:
    """For alpha 1.5 or 2 and values from the largest down: each number of values has its tau, and the right number is
    the largest whose last value is not below its own."""
    # what lies below -1 has no weight, whatever tau is; an infinite value would spoil the sums
    x = x.clamp_min(-2)
    count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    mean = x.cumsum(-1) / count
    if alpha == 2:
        candidates = mean - 1 / count
    else:
        spread = x.square().cumsum(-1) / count - mean.square()
        candidates = mean - (1 / count - spread).clamp_min(0).sqrt()
    last = (candidates <= x).sum(dim=-1, keepdim=True) - 1
    return candidates.gather(-1, last)


def bisected(x: Tensor, alpha: float) -> Tensor:
    """For any alpha, by halving the interval that holds tau to the precision of x."""
    power = 1 / (alpha - 1)
    low, width = x.new_full((*x.shape[:-1], 1), -1.0), 1.0
    for _ in range(60 if x.dtype == torch.float64 else 30):
        width /= 2
        low = torch.where((x - low - width).clamp_min(0).pow(power).sum(-1, keepdim=True) >= 1, low + width, low)
    return low


class _Entmax(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, alpha: float) -> Tensor:
        x = (scores - scores.amax(dim=-1, keepdim=True)).mul_(alpha - 1)
        p = (x - threshold(x, alpha)).clamp_min_(0).pow_(1 / (alpha - 1))
        return p.div_(p.sum(dim=-1, keepdim=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.alpha = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        r = torch.where(p > 0, p, 1).pow(2 - ctx.alpha).where(p > 0, 0)
        flow = grads[0] * r
        return flow - flow.sum(dim=-1, keepdim=True) / r.sum(dim=-1, keepdim=True) * r, None


def entmax(scores: Tensor, alpha: float) -> Tensor:
    """alpha-entmax over the last dimension: (..., N), -inf where there is nothing to choose -> (..., N)."""
    p: Tensor = _Entmax.apply(wide(scores), alpha)
    return p


class EntmaxMixer(AttentionMixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, n_heads: int, *, width: int, positions: str, causal: bool, alpha: float, dropout: float
    ) -> None:
        super().__init__(d_model, n_heads, width=width, positions=positions, causal=causal, dropout=dropout)
        self.alpha = alpha

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        allowed = attention_mask(mask, causal=self.causal)
        bias = 0.0 if self.slopes is None else alibi_bias(self.slopes, mask.shape[1], False)
        return self.read(q, k, v, torch.where(allowed, bias, -torch.inf))

    def read(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        p = entmax(wide(q @ k.mT) * self.head**-0.5 + bias, self.alpha)
        return F.dropout(p, self.rate).to(v.dtype) @ v

    def pairs(self, length: int) -> float:
        return float(self.n_heads * length**2)

    def cost(self, length: int) -> Cost:
        of_threshold = 12.0 if self.alpha in (1.5, 2.0) else 150.0
        return super().cost(length) + Cost(other=of_threshold * self.pairs(length))


class Entmax(AttentionStack):
    """alpha: above 1, at most 2; larger is sparser. n_heads: must divide qkv_dim. qkv_dim: width of all heads together,
    d_model unless given. positions: "sinusoidal", "learned", "rope", "alibi" or "none". attention_dropout: on the
    attention weights."""

    card = Card(
        title="Sparse Sequence-to-Sequence Models",
        year=2019,
        url="https://arxiv.org/abs/1905.05702",
        scaling="L^2",
        causal=False,
        variants={"sparsemax": {"alpha": 2.0}},
    )

    def __init__(self, *, alpha: float = 1.5, **attention: Any) -> None:
        if not 1 < alpha <= 2:
            raise ValueError(f"alpha is {alpha}; above 1 (softmax: `transformer`), at most 2 (sparsemax)")
        super().__init__(lambda _, **heads: EntmaxMixer(alpha=alpha, **heads), **attention)
