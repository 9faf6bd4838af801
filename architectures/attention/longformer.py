"""Longformer: attention within a sliding window, dilated in some heads, and to and from a few global tokens.

Beltagy et al. 2020, arXiv:2004.05150. With w = `window`, g = `n_global`, D_h the dilation of head h, d = qkv_dim / H:

    Q, K, V = x W + b                                      (B, L, D) -> (B, H, L, d), queries and keys of the window
    i >= g sees j  where  j < g, or j = i + m D_h with |m| <= w     section 3.1
    i < g          softmax(Q_g K_g' / sqrt(d)) V_g over all real j, with projections Q_g, K_g, V_g of its own
    y = concat_h(...) W_o + b_o                            one softmax over global keys and window; (B, L, D)

`window` counts keys on each side; the `attention_window` of Hugging Face's configurations counts both: half of it is
meant. Dilation (`longformer/dilated`): none in the lower half of the layers; in the upper half, on `dilated_heads`
heads, it rises to `dilation`, as in the paper's language models (appendix, table 12). Work and memory grow with L (w +
g); no L x L matrix is formed.

Initialisation: Xavier uniform maps and zero biases (see AttentionMixer); the global projections start as copies of the
others, as the paper does.

Departures: every layer has one window width (the paper widens it upwards in language models). The global tokens are the
first ones, where a classifier's token stands. In the causal direction they see what came before them, with the ordinary
projections: the paper's autoregressive models have none.

Checked against: tensors of Hugging Face's LongformerSelfAttention (a global token, padding) and of the authors' index
rule for dilation, outputs and gradients; softmax attention under the explicit L x L mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, banded, rope
from lra.architectures._attention_stack import AttentionStack
from lra.architectures._checks import at_least
from lra.attention import fused_attention, merge_heads, split_heads
from lra.encoder import Card, Cost
from lra.kernels.band_attention.tiles import pairs


class LongformerMixer(AttentionMixer):
    """Window attention with one dilation per head, and global tokens: (B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, *, n_heads: int, width: int, positions: str, causal: bool, window: int, dilation: list[int],
        n_global: int, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=width, positions=positions, causal=causal, dropout=dropout)
        self.window, self.dilation, self.n_global = (window, 0 if causal else window), dilation, n_global
        self.qkv_global: nn.Linear | None = None
        if n_global and not causal:
            self.qkv_global = nn.Linear(d_model, 3 * width)
            self.qkv_global.load_state_dict(self.qkv.state_dict())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        options = {"causal": self.causal, "mutual": self.causal, "slopes": self.slopes, "dropout": self.rate}
        return banded(q, k, v, mask, self.window, self.dilation, min(self.n_global, q.shape[2]), **options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.attend(*self.heads(x), mask)
        if self.qkv_global is not None:
            y = torch.cat([self.global_rows(x, mask), y[:, :, self.n_global :]], dim=2)
        return self.out(merge_heads(y))

    def global_rows(self, x: Tensor, mask: Tensor) -> Tensor:
        """What the global tokens read with projections of their own: (B, L, D) -> (B, H, g, d)."""
        assert self.qkv_global is not None
        first, width = x[:, : self.n_global], self.widths[0]
        weight, bias = self.qkv_global.weight, self.qkv_global.bias
        q = split_heads(F.linear(first, weight[:width], bias[:width]), self.n_heads)
        k, v = (split_heads(t, self.n_heads) for t in F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1))
        if self.rotary:
            q, k = rope(q), rope(k)
        allowed = mask[:, None, None]
        if self.slopes is not None:
            position = torch.arange(x.shape[1], device=x.device)
            fading = -self.slopes[:, None, None] * (position[: first.shape[1], None] - position).abs()
            allowed = fading.to(q.dtype)[None].masked_fill(~allowed, -torch.inf)
        return fused_attention(q, k, v, allowed, self.rate)

    def pairs(self, length: int) -> float:
        named = min(self.n_global, length) * (2 if self.causal else 1)
        return float(pairs(length, *self.window, self.dilation, named, 0, 1))

    def cost(self, length: int) -> Cost:
        total = super().cost(length)
        if self.qkv_global is None:
            return total
        d_model, width, first = self.out.out_features, self.widths[0], min(self.n_global, length)
        maps = Cost.linear(first, d_model, width) + Cost.linear(length, d_model, 2 * width)
        return total + maps + Cost(4.0 * first * length * width, 5.0 * self.n_heads * first * length)

    def sees(self, i: int, j: Tensor) -> Tensor | None:
        if i < self.n_global:
            return None
        step = torch.tensor(self.dilation, device=j.device)[:, None]
        return ((i - j) % step == 0) & (i - j <= self.window[0] * step) | (j < self.n_global)

    def oldest(self, i: int) -> int:
        return 0 if self.n_global else i - self.window[0] * max(self.dilation)


class Longformer(AttentionStack):
    """window: keys on each side. dilation: the largest, reached in the last layer; dilated_heads: how many heads have
    it. n_global: global tokens, the first ones. n_heads: must divide qkv_dim, the width of all heads together, d_model
    unless given. positions: "sinusoidal", "learned", "rope", "alibi", "none". attention_dropout: on the
    attention weights."""

    gaps = True
    card = Card(
        title="Longformer: The Long-Document Transformer",
        year=2020,
        url="https://arxiv.org/abs/2004.05150",
        scaling="L",
        causal=False,
        variants={"dilated": {"dilation": 4}},
    )

    def __init__(
        self,
        *,
        n_layers: int,
        n_heads: int = 4,
        window: int = 256,
        dilation: int = 1,
        dilated_heads: int = 2,
        n_global: int = 1,
        **attention: Any,
    ) -> None:
        at_least(1, window=window, dilation=dilation)
        at_least(0, dilated_heads=dilated_heads, n_global=n_global)
        stretched, upper = min(dilated_heads, n_heads), n_layers - n_layers // 2

        def mixer(layer: int, **heads: Any) -> LongformerMixer:
            above = max(0, layer + 1 - n_layers // 2)
            steps = [1] * (n_heads - stretched) + [1 - above * (1 - dilation) // upper] * stretched
            return LongformerMixer(window=window, dilation=steps, n_global=n_global, **heads)

        super().__init__(mixer, n_layers=n_layers, n_heads=n_heads, **attention)
