"""Linformer: softmax attention over k learned mixtures of the positions, in place of L keys and values.

Wang et al. 2020, arXiv:2006.04768. With d = qkv_dim / H, E, F: (length, k) and per head:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)
    K' = E' K,  V' = F' V                                  (B, H, k, d)    equation 7
    y = softmax(Q K'' / sqrt(d)) V'                        (B, H, L, d)
    out = concat_h(y) W_o + b_o                            (B, L, D)

sharing (section 4): "head": E and F, each for all heads of a layer; "key-value": E = F as well; "layer": one E for
keys, values, heads and layers; "none": E and F of their own for every head. L tokens use the first L rows.
The default is "layer", which did as well as the others in the paper and has the fewest parameters;
their code's is "head".

Padding adds nothing to any mixture. Where E is for all heads, E' (x W + b) is computed as (E' x) W + (E' 1) b. A
mixture spans the whole sequence: there is no causal form.

Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o, zero biases; E and F Xavier uniform of gain 2^-1/2, as
the layer of the authors' fairseq code, whose RoBERTa model then draws all maps anew, normal of deviation 0.02.

Departures: norms come before each part, as in the LRA code, which leaves out the padding mask.

Checked against: tensors of the linformer package ("head", "key-value") and of LRA's layer, outputs and gradients;
softmax attention at k = L with identity projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, checked_width
from lra.architectures._checks import at_least, one_of
from lra.architectures._stack import Stack
from lra.attention import fused_attention, merge_heads, split_heads
from lra.encoder import Card, Cost

POSITIONS = ("sinusoidal", "learned", "none")
SHARING = ("head", "key-value", "layer", "none")


def length_map(*shape: int) -> nn.Parameter:
    """E or F: (length, k), or (H, length, k)."""
    weight = torch.empty(shape)
    for part in weight.view(-1, *shape[-2:]):
        nn.init.xavier_uniform_(part, gain=2**-0.5)
    return nn.Parameter(weight)


class LinformerMixer(AttentionMixer):
    """(B, L, D) -> (B, L, D). proj_k, proj_v: E and F, the same parameter where they are shared."""

    def __init__(
        self, d_model: int, *, n_heads: int, qkv_dim: int, proj_k: nn.Parameter, proj_v: nn.Parameter,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=qkv_dim, positions="none", causal=False, dropout=dropout)
        self.proj_k, self.proj_v = proj_k, proj_v

    def _shortened(self, x: Tensor, mask: Tensor, mixture: Tensor, linear: tuple[Tensor, Tensor]) -> Tensor:
        """E' (x W + b) over real tokens: (B, L, D), 0 at padding -> (B, H, k, d)."""
        weight, bias = linear
        mixture = mixture[..., : x.shape[1], :]
        reached = mask.to(x.dtype) @ mixture  # (B, k) or (H, B, k): what E makes of a 1 at every real token
        if mixture.dim() == 3:
            shortened = mixture.mT @ split_heads(F.linear(x, weight), self.n_heads)
            return shortened + reached.transpose(0, 1).unsqueeze(-1) * bias.view(self.n_heads, 1, -1)
        # E' (x W) = (E' x) W: the map sees k rows in place of L
        mixed = torch.bmm(mixture.T.expand(x.shape[0], -1, -1), x)
        return split_heads(F.linear(mixed, weight) + reached.unsqueeze(-1) * bias, self.n_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.shape[1] > self.proj_k.shape[-2]:
            raise ValueError(f"length {x.shape[1]} exceeds the {self.proj_k.shape[-2]} positions of E and F")
        of_q, of_k, of_v = zip(self.qkv.weight.split(self.widths), self.qkv.bias.split(self.widths), strict=True)
        q = split_heads(F.linear(x, *of_q), self.n_heads)
        k, v = self._shortened(x, mask, self.proj_k, of_k), self._shortened(x, mask, self.proj_v, of_v)
        return self.out(merge_heads(self.attend(q, k, v, mask)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return fused_attention(q, k, v, dropout=self.rate)

    def pairs(self, length: int) -> float:
        return float(self.n_heads * length * self.proj_k.shape[-1])

    def cost(self, length: int) -> Cost:
        d_model, k, width = self.out.out_features, self.proj_k.shape[-1], self.out.in_features
        own = self.proj_k.dim() == 3
        rows, mixed = (length, width) if own else (k, d_model)
        total = Cost.linear(length, d_model, width) + Cost.linear(length, width, d_model)
        total += 2 * (
            Cost.linear(rows, d_model, width) + Cost(2.0 * length * k * (mixed + (self.n_heads if own else 1)))
        )
        return total + Cost(4.0 * self.head * self.pairs(length), 5.0 * self.pairs(length))


class Linformer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. k: mixtures of
    positions. sharing: one of SHARING. attention_dropout: on the attention weights."""

    card = Card(
        title="Linformer: Self-Attention with Linear Complexity",
        year=2020,
        url="https://arxiv.org/abs/2006.04768",
        scaling="L",
        causal=False,
        variants={
            "head": {"sharing": "head"},
            "key-value": {"sharing": "key-value"},
            "unshared": {"sharing": "none"},
        },
        exempt={
            "unshared/exports": "torch.export makes a case of its own of the full length",
        },
    )
    refuses_causal = True

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        k: int = 128,
        sharing: str = "layer",
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, "none")
        one_of(SHARING, sharing=sharing)
        one_of(POSITIONS, positions=positions)
        at_least(1, k=k)
        if direction != "bidirectional":
            raise ValueError(f"direction is {direction!r}; bidirectional, mixtures of positions see the future")
        shape = (n_heads, length, k) if sharing == "none" else (length, k)
        of_all = length_map(*shape) if sharing == "layer" else None

        def make(_: int) -> LinformerMixer:
            proj_k = length_map(*shape) if of_all is None else of_all
            proj_v = length_map(*shape) if sharing in ("head", "none") else proj_k
            return LinformerMixer(
                d_model, n_heads=n_heads, qkv_dim=width, proj_k=proj_k, proj_v=proj_v, dropout=attention_dropout
            )

        super().__init__(
            make,
            native=True, d_model=d_model, length=length, direction=direction,
            block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
