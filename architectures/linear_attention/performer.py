"""Performer: softmax attention estimated without bias by random features, in time and memory linear in length.

Choromanski et al. 2020, arXiv:2009.14794, FAVOR+. With d = qkv_dim / H, x' = x / d^(1/4), W: (m, d) and per head:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)
    phi(x) = exp(W x' - |x'|^2 / 2 - c) + 1e-4             (B, H, L, m)    positive features, lemma 1
    y_i = phi(Q_i) S / (phi(Q_i) z)                        S = sum_j phi(K_j) V_j' (m, d),  z = sum_j phi(K_j) (m,)
    out = concat_h(y) W_o + b_o                            (B, L, D)

E[phi(q) . phi(k)] is exp(q . k / sqrt(d)) up to factors that cancel (and the 1e-4). W: blocks of d orthogonal rows,
each row with the length of an independent Gaussian vector (section 2.4). `relu`: phi(x) = max(W x', 0) + 1e-3.
`deterministic`: phi(x) = max(x, 0) + 1e-3, without W (m = d), the default of the LRA code.

c keeps exponents at or below 0: the largest of W x' in a row for queries, over all real tokens for keys, as in the
authors' code; here it is a constant in the gradient. It cancels but for the 1e-4. Causally, keys take the largest so
far, and the sums shrink when it grows: the code takes the largest of the whole sequence, through which (and the 1e-4)
the future leaks.

n_features is m, d ln d unless given (theorem 4). W is stored with the weights. While training it is drawn anew every
`redraw` forward passes (section 4.2; 0: never), from a seed drawn with the weights: a resumed run draws the same.

Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o and zero biases; the LRA code has no biases.

Departures: norms come before each part, as in the LRA code; orthogonal blocks are uniform over all rotations (the code
leaves the signs of LAPACK's QR).

Checked against: tensors of performer-pytorch, features, outputs and gradients, both directions; the explicit L x L
matrix of the same features; softmax attention, to which the error falls as 1 / sqrt(m).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, checked_width, drop_keys
from lra.architectures._linear_attention import divided, summed, summed_chunk, summed_step, sums_cost
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.attention import merge_heads
from lra.encoder import Card, Cost

State = tuple[Tensor, Tensor, Tensor]
FEATURE_MAPS = ("softmax", "relu", "deterministic")
POSITIONS = ("sinusoidal", "learned", "none")


def orthogonal_features(features: int, width: int, generator: torch.Generator) -> Tensor:
    """W: (m, d), float32, from blocks of at most d orthogonal rows."""
    blocks = []
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    for start in range(0, features, width):
        q, r = torch.linalg.qr(torch.randn(width, width, **kind))
        blocks.append((q * r.diagonal().sign()).T[: features - start])
    lengths = torch.randn(features, width, **kind).norm(dim=1, keepdim=True)
    return (torch.cat(blocks) * lengths).float()


class PerformerMixer(AttentionMixer):
    """(B, L, D) -> (B, L, D)."""

    projection: Tensor

    def __init__(
        self, d_model: int, *, n_heads: int, qkv_dim: int, feature_map: str, causal: bool, n_features: int, redraw: int,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=qkv_dim, positions="none", causal=causal, dropout=dropout)
        self.feature_map, self.redraw = feature_map, 0 if feature_map == "deterministic" else redraw
        self.eps = 1e-4 if feature_map == "softmax" else 1e-3
        self.seed, self.passes = int(torch.randint(2**31, (), device="cpu")), 0
        self.register_buffer("projection", self._drawn(n_features).to(self.out.weight.device))

    def _drawn(self, features: int) -> Tensor:
        if self.feature_map == "deterministic":
            return torch.eye(self.head) * self.head**0.25  # W x' = x
        draws = self.passes // self.redraw if self.redraw else 0
        generator = torch.Generator().manual_seed(self.seed + draws)
        return orthogonal_features(features, self.head, generator)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.seed, self.passes])

    def set_extra_state(self, state: Tensor) -> None:
        self.seed, self.passes = (int(number) for number in state)

    def _redraw(self) -> None:
        self.passes += 1
        if self.redraw and self.passes % self.redraw == 0:
            self.projection = self._drawn(len(self.projection)).to(self.projection)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W x' and |x'|^2 / 2: (B, H, L, d) -> (B, H, L, m), (B, H, L, 1), in float32 at least."""
        x, scale = wide(x), self.head**-0.25
        with torch.autocast(x.device.type, enabled=False):
            return x @ (scale * self.projection.to(x.dtype)).T, x.square().sum(-1, keepdim=True) * (scale**2 / 2)

    def features(self, projected: tuple[Tensor, Tensor], largest: Tensor) -> Tensor:
        """phi (B, H, L, m) from the above; largest: c, of any shape that fits, for softmax alone."""
        if self.feature_map != "softmax":
            return F.relu(projected[0]) + self.eps
        return (projected[0] - (projected[1] + largest)).exp_() + self.eps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if self.training:
            self._redraw()
        return self._sums(self.projected(q), self.projected(k), drop_keys(v, self.rate), mask)

    def largest_key(self, dots: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """c of each key, (B, H, L, 1), from W x' (B, H, L, m), and how much the sums shrink as it grows, (B, L, H)."""
        top = dots.detach().amax(-1, keepdim=True)
        if not self.causal:
            padding = ~mask[:, None, :, None]
            # padding may exceed the largest real key: left out of the sums, its features must stay finite
            return top.masked_fill(padding, -torch.inf).amax(2, keepdim=True).masked_fill(padding, torch.inf), None
        top = top.cummax(2).values
        if self.feature_map != "softmax":
            return top, None
        return top, -top.diff(dim=2, prepend=top[:, :, :1]).squeeze(-1).transpose(1, 2)

    def _sums(self, q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: Tensor, mask: Tensor) -> Tensor:
        top_k, decay = self.largest_key(k[0], mask)
        top_q = q[0].detach().amax(-1, keepdim=True)
        top, bottom = summed(self.features(q, top_q), self.features(k, top_k), v, mask, self.causal, decay)
        return divided(top, bottom)

    def pairs(self, length: int) -> float:
        return 0.0

    def cost(self, length: int) -> Cost:
        qkv_dim, features = self.out.in_features, len(self.projection)
        total = super().cost(length) + sums_cost(length, self.n_heads, features, self.head, self.causal)
        total += Cost(4.0 * length * qkv_dim * features, 6.0 * length * qkv_dim)
        return total + Cost(other=10.0 * length * self.n_heads * features)

    def init_state(self, batch: int) -> State:
        sums = self.out.weight.new_zeros(batch, self.n_heads, len(self.projection), self.head)
        return sums.new_full((batch, self.n_heads, 1), -torch.inf), sums, sums[..., 0]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: c of the keys so far (B, H, 1), and in its scale S (B, H, m, d) and z (B, H, m)."""
        before, S, z = state
        query, key, v = self.heads(x.unsqueeze(1))
        q, k = self.projected(query), self.projected(key)
        top_k = torch.maximum(before, k[0].amax(-1))
        if self.feature_map == "softmax":
            shrunk = (before - top_k).exp()
            S, z = S * shrunk.unsqueeze(-1), z * shrunk
        phi_q = self.features(q, q[0].amax(-1, keepdim=True)).squeeze(2)
        phi_k = self.features(k, top_k.unsqueeze(-1)).squeeze(2)
        top, bottom, S, z = summed_step(phi_q, phi_k, v.squeeze(2), S, z)
        return self.out((top / bottom).flatten(1)), (top_k, S, z)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        before, S, z = state
        query, key, v = self.heads(x)
        q, k, v = self.projected(query), self.projected(key), drop_keys(v, self.rate)
        top_k = torch.maximum(before.unsqueeze(2), k[0].detach().amax(-1, keepdim=True).cummax(2).values)
        decay = None
        if self.feature_map == "softmax":
            decay = -top_k.diff(dim=2, prepend=before.unsqueeze(2)).squeeze(-1).transpose(1, 2)
        phi_q = self.features(q, q[0].detach().amax(-1, keepdim=True))
        top, bottom, S, z = summed_chunk(phi_q, self.features(k, top_k), v, (S, z), decay)
        return self.out(merge_heads(top / bottom)), (top_k[:, :, -1], S, z)


class Performer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. feature_map: one of
    FEATURE_MAPS. n_features: m, d ln d unless given; not for deterministic. redraw: forward passes in training between
    draws of W. attention_dropout: on weights that are never formed: a key is left out for all queries of a head."""

    card = Card(
        title="Rethinking Attention with Performers",
        year=2020,
        url="https://arxiv.org/abs/2009.14794",
        scaling="L",
        causal=False,
        variants={"relu": {"feature_map": "relu"}},
    )

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        feature_map: str = "softmax",
        n_features: int | None = None,
        redraw: int = 1000,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, "none")
        for name, value, known in (("feature_map", feature_map, FEATURE_MAPS), ("positions", positions, POSITIONS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; one of {', '.join(known)}")
        head = width // n_heads
        if feature_map == "deterministic" and n_features is not None:
            raise ValueError(f"n_features is {n_features}; feature_map 'deterministic' has those of a head, {head}")
        features = max(1, int(head * math.log(head))) if n_features is None else n_features
        if features < 1 or redraw < 0:
            raise ValueError(f"n_features is {features} and redraw {redraw}; at least 1 and at least 0")
        causal = direction == "causal"
        super().__init__(
            lambda _: PerformerMixer(
                d_model, n_heads=n_heads, qkv_dim=width, feature_map=feature_map, causal=causal, n_features=features,
                redraw=redraw, dropout=attention_dropout,
            ),
            native=True, d_model=d_model, direction=direction, block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
