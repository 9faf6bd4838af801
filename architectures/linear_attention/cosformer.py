"""cosFormer: attention whose weights are products of rectified queries and keys, reduced with their distance.

Qin et al. 2022, arXiv:2202.08791. With d = qkv_dim / H, M = `span` and per head:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)
    a_ij = relu(Q_i) . relu(K_j) cos(pi (i - j) / (2 M))   at least 0, as i - j stays below M
    y_i = sum_j a_ij V_j / max(sum_j a_ij, 1e-6)           (B, H, L, d)    over real j, j <= i when causal
    out = concat_h(y) W_o + b_o                            (B, L, D)

As cos(s - t) = cos s cos t + sin s sin t, a_ij is a product of features, and sums replace L x L:

    phi_i(x) = [relu(x) cos(pi i / (2 M)), relu(x) sin(pi i / (2 M))]      (B, H, L, 2 d)
    y_i = phi_i(Q_i) S / max(phi_i(Q_i) z, 1e-6)           S = sum_j phi_j(K_j) V_j' (2 d, d),  z = sum_j phi_j(K_j)

A query that no key meets gets 0.

Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o and zero biases, as the other attention here; the authors
leave PyTorch's.

Departures: M is the encoder's length unless given, where the authors' code takes the padded length of the batch, on
which outputs would then hang; the paper asks for at least the length. Norms come before each part, as in the LRA code.

Checked against: tensors of the authors' CosformerAttention, both directions and with keys from elsewhere, outputs and
gradients; the first equations with their L x L matrix, every gradient, with padding; the recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, checked_width, drop_keys
from lra.architectures._checks import at_least, one_of
from lra.architectures._linear_attention import divided, summed, summed_chunk, summed_step, sums_cost
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.attention import merge_heads
from lra.encoder import Card, Cost

POSITIONS = ("sinusoidal", "learned", "none")
LEAST = 1e-6
State = tuple[Tensor, Tensor, Tensor]


class CosformerMixer(AttentionMixer):
    """(B, L, D) -> (B, L, D). span: M."""

    def __init__(
        self, d_model: int, *, n_heads: int, qkv_dim: int, causal: bool, span: int, dropout: float = 0.0
    ) -> None:
        super().__init__(d_model, n_heads, width=qkv_dim, positions="none", causal=causal, dropout=dropout)
        self.span = span

    def features(self, x: Tensor, start: int = 0) -> Tensor:
        """phi: (B, H, L, d), the first of whose tokens stands at `start` -> (B, H, L, 2 d)."""
        stop = start + x.shape[2]
        if stop > self.span:
            raise ValueError(f"length {stop} exceeds the span {self.span}: weights would turn negative")
        angle = torch.arange(start, stop, device=x.device, dtype=torch.float64)[:, None] * (math.pi / 2 / self.span)
        x = wide(F.relu(x))
        return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        top, bottom = summed(self.features(q), self.features(k), drop_keys(v, self.rate), mask, self.causal)
        return divided(top, bottom.clamp(min=LEAST))

    def pairs(self, length: int) -> float:
        return 0.0

    def cost(self, length: int) -> Cost:
        sums = sums_cost(length, self.n_heads, 2 * self.head, self.head, self.causal)
        return super().cost(length) + sums + Cost(other=9.0 * length * self.out.in_features)

    def init_state(self, batch: int) -> State:
        sums = self.out.weight.new_zeros(batch, self.n_heads, 2 * self.head, self.head)
        return torch.zeros((), dtype=torch.int64, device=sums.device), sums, sums[..., 0]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the position, S (B, H, 2 d, d) and z (B, H, 2 d)."""
        q, k, v = self.heads(x.unsqueeze(1))
        time = int(state[0])
        q, k, v = (part.squeeze(2) for part in (self.features(q, time), self.features(k, time), v))
        top, bottom, S, z = summed_step(q, k, v, state[1], state[2])
        return self.out((top / bottom.clamp(min=LEAST)).flatten(1)), (state[0] + 1, S, z)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = self.heads(x)
        time, v = int(state[0]), drop_keys(v, self.rate)
        top, bottom, S, z = summed_chunk(self.features(q, time), self.features(k, time), v, state[1:])
        return self.out(merge_heads(top / bottom.clamp(min=LEAST))), (state[0] + x.shape[1], S, z)


class Cosformer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. span: M, the distance
    at which weights would reach 0, `length` unless given. attention_dropout:
    on weights that are never formed: a key is left out for all queries of a head."""

    card = Card(
        title="cosFormer: Rethinking Softmax in Attention",
        year=2022,
        url="https://arxiv.org/abs/2202.08791",
        scaling="L",
        causal=False,
    )

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        span: int | None = None,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, "none")
        one_of(POSITIONS, positions=positions)
        reach = length if span is None else span
        at_least(length, span=reach)
        causal = direction == "causal"
        super().__init__(
            lambda _: CosformerMixer(
                d_model, n_heads=n_heads, qkv_dim=width, causal=causal, span=reach, dropout=attention_dropout,
            ),
            native=True, d_model=d_model, length=length, direction=direction,
            block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
