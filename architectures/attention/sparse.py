"""Sparse Transformer: heads attend to the nearest tokens and to every l-th token, so two steps reach any token.

Child et al. 2019, arXiv:1904.10509. With the stride l near sqrt(L), d = qkv_dim / H, and j <= i when causal:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)
    strided    the first half of the heads sees |i - j| < l, the others l | i - j             section 4.3, figure 3b
    fixed      floor(j / l) = floor(i / l),                                                    section 4.3, figure 3c
               or j mod l in [l - (s + 1) c, l - s c): the summary columns of the head, s = h mod n
    y = concat_h(softmax(Q K' / sqrt(d)) V) W_o + b_o      over the real keys i sees; (B, L, D)

The n stripes of c = `summary` columns, as many as fit and divide the heads, are what the paper finds better than one
for all heads (end of section 4.3). Without `stride`, l = round(sqrt(length)); c = 8 where l allows it, at most l / 4.
Work and memory grow with L sqrt(L), and with L^2 where `stride` is given; no L x L matrix is formed.

Initialisation: Xavier uniform maps and zero biases (see AttentionMixer).

Departures: the paper is autoregressive; both ways the patterns are mirrored (|i - j|, and the columns of later blocks
too). The block is the usual pre-norm one, without the paper's scaled initialisation and recomputation. The LRA code
merges both patterns in every head, always causally, and adds the first column of a block to the summaries.

Checked against: masks and tensors of the authors' code (openai/sparse_attention) and of LRA's layer, which sees the
first columns besides, outputs and gradients; softmax attention under the explicit L x L mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lra.architectures._attention import AttentionMixer, banded
from lra.architectures._attention_stack import AttentionStack
from lra.architectures._checks import at_least, one_of
from lra.encoder import Card
from lra.kernels.band_attention.tiles import pairs

PATTERNS = ("strided", "fixed")


class SparseMixer(AttentionMixer):
    """Strided or fixed factorised attention: (B, L, D) -> (B, L, D). stride: None for the root of `length`."""

    def __init__(
        self, d_model: int, *, n_heads: int, width: int, positions: str, causal: bool, pattern: str, stride: int | None,
        summary: int | None, length: int, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=width, positions=positions, causal=causal, dropout=dropout)
        self.pattern, self.given, self.length = pattern, (stride, summary), length

    def shape(self, length: int) -> tuple[int, int, int]:
        """Stride, summary columns and stripes of a layer built for `length` tokens."""
        stride = self.given[0] or max(1, round(length**0.5))
        summary = self.given[1] or min(8, max(1, stride // 4))
        fit = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0 and n * summary <= stride]
        return stride, summary, fit[-1]

    def stripe(self, j: Tensor, number: int) -> Tensor:
        """Whether positions j are summary columns of stripe `number`."""
        stride, summary, _ = self.shape(self.length)
        after = stride - 1 - j % stride
        return (after >= number * summary) & (after < (number + 1) * summary)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        stride, _, stripes = self.shape(self.length)
        length, near = mask.shape[1], self.n_heads // 2

        def some(heads: slice, window: int, dilation: int = 1, **options: Any) -> Tensor:
            slopes = None if self.slopes is None else self.slopes[heads]
            ahead = 0 if self.causal else window
            given = (t[:, heads] for t in (q, k, v))
            options |= {"causal": self.causal, "slopes": slopes, "dropout": self.rate}
            return banded(*given, mask, (window, ahead), dilation, **options)

        if self.pattern == "strided":
            parts = [some(slice(near), stride - 1), some(slice(near, None), -(-length // stride), stride)]
            return torch.cat(parts, dim=1)
        j = torch.arange(length, device=mask.device)
        columns = (self.stripe(j, s).expand(mask.shape) for s in range(stripes))
        parts = [
            some(slice(s, None, stripes), 0, block=stride, global_mask=shown, mutual=False)
            for s, shown in enumerate(columns)
        ]
        return torch.stack(parts, dim=2).flatten(1, 2)

    def pairs(self, length: int) -> float:
        """Beyond the length the layer was built for: the pairs of one built for that."""
        stride, summary, stripes = self.shape(max(length, self.length))
        if self.pattern == "strided":
            near, ahead = self.n_heads // 2, 0 if self.causal else 1
            count = -(-length // stride)
            bands = pairs(length, stride - 1, ahead * (stride - 1), [1] * near, 0, 0, 1)
            return float(bands + pairs(length, count, ahead * count, [stride] * (self.n_heads - near), 0, 0, 1))
        inside, total = length % stride, 0
        for s in range(stripes):
            tail = min(max(inside - (stride - (s + 1) * summary), 0), summary)
            columns = length // stride * summary + tail
            total += pairs(length, 0, 0, [1] * (self.n_heads // stripes), columns, 0, stride)
        return float(total)

    def sees(self, i: int, j: Tensor) -> Tensor:
        stride, _, stripes = self.shape(self.length)
        if self.pattern == "strided":
            near = self.n_heads // 2
            kinds = (i - j < stride).expand(near, -1), ((i - j) % stride == 0).expand(self.n_heads - near, -1)
            return torch.cat(kinds)
        shown = torch.stack([self.stripe(j, s) for s in range(stripes)])
        return (j // stride == i // stride) | shown.repeat(self.n_heads // stripes, 1)


class Sparse(AttentionStack):
    """pattern: "strided" or "fixed". stride: l, None for round(sqrt(length)). summary: c, the columns of a stripe.
    n_heads: must divide qkv_dim, the width of all heads together, d_model unless given. positions: "sinusoidal",
    "learned", "rope", "alibi", "none". attention_dropout: on the attention weights."""

    gaps = True
    card = Card(
        title="Generating Long Sequences with Sparse Transformers",
        year=2019,
        url="https://arxiv.org/abs/1904.10509",
        scaling="L sqrt L",
        causal=False,
        variants={"fixed": {"pattern": "fixed"}},
        exempt={
            "fixed/exports": "its columns are read from the mask",
        },
    )

    def __init__(
        self,
        *,
        length: int,
        n_heads: int = 4,
        pattern: str = "strided",
        stride: int | None = None,
        summary: int | None = None,
        **attention: Any,
    ) -> None:
        one_of(PATTERNS, pattern=pattern)
        if pattern == "strided" and n_heads == 1:
            raise ValueError("n_heads is 1; at least 2, for strided heads are of two kinds")
        at_least(1, stride=1 if stride is None else stride, summary=1 if summary is None else summary)
        reach = stride or max(1, round(length**0.5))
        if summary is not None and summary > reach:
            raise ValueError(f"summary is {summary}; at most the stride, {reach}")
        self.follows_length = stride is None
        super().__init__(
            lambda _, **heads: SparseMixer(pattern=pattern, stride=stride, summary=summary, length=length, **heads),
            length=length,
            n_heads=n_heads,
            **attention,
        )

    @property
    def scaling(self) -> str:
        return "L sqrt L" if self.follows_length else "L^2"
