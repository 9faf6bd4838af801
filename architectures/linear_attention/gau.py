"""GAU: one head of attention with a squared ReLU in place of the softmax, inside a gated feed-forward part.

Hua, Dai, Liu and Le 2022, arXiv:2202.10447, section 2. With values of width E = expand D, a shared z of width S and n,
the length that the encoder is built for:

    v, u = silu(W_h x + b_h)                               (B, L, E) each
    z = silu(W_z x + b_z)                                  (B, L, S)
    q, k = gamma_q * z + beta_q, gamma_k * z + beta_k      (B, L, S) each
    A_ij = relu(q_i . k_j / n + bias_{i-j})^2              0 where j is padding; causal: 0 for j > i
    out = W_o (u * A v) + b_o                              (B, L, D)

A block is the unit alone: gate and values do what the feed-forward part does. A recurrent step keeps keys and values.

Initialisation: gamma and bias normal with a deviation of 0.02, beta 0; maps are PyTorch's own.

Departures: n is the length the encoder is built for, as in code of fixed shapes, so that neither padding nor the length
of a sequence moves its outputs. The bias of distances is T5's, 32 buckets, as in the independent implementation, where
the paper has Toeplitz or rotary ones; that implementation divides it by the length too and multiplies it by sqrt(D),
which a scale of the table undoes. S is 64 unless told, where the paper has 128 at a width of 768.

Checked against: tensors of lucidrains/FLASH-pytorch's GAU, with padding, without it and causal, every gradient; its own
steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lra.architectures._gau import GatedUnit, checked_sizes
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost

State = tuple[Tensor, Tensor]


class GAUMixer(GatedUnit):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, *, qk_dim: int, width: int, length: int, causal: bool) -> None:
        super().__init__(d_model, qk_dim=qk_dim, width=width, copies=2, causal=causal)
        self.length = length

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        v, gate, (q, k) = self.views(x)
        place = torch.arange(x.shape[1], device=x.device)
        a = self.weights(q @ k.mT / self.length, place.unsqueeze(1) - place)
        if not self.causal:
            a = a.masked_fill(~mask.unsqueeze(1), 0)
        return self.to_out(gate * (a @ wide(v)))

    def cost(self, length: int) -> Cost:
        pairs, width = float(length**2), self.to_out.in_features + self.to_qk.out_features
        return self.maps_cost(length) + Cost(2 * pairs * width, 4 * pairs)

    def init_state(self, batch: int) -> State:
        weight = self.to_out.weight
        return weight.new_zeros(batch, 0, self.to_qk.out_features), weight.new_zeros(batch, 0, weight.shape[1])

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: keys (B, t, S) and values (B, t, E)."""
        v, gate, (q, k) = self.views(x)
        keys, values = torch.cat([state[0], k.unsqueeze(1)], 1), torch.cat([state[1], v.unsqueeze(1)], 1)
        ago = torch.arange(keys.shape[1] - 1, -1, -1, device=x.device).unsqueeze(0)
        a = self.weights(q.unsqueeze(1) @ keys.mT / self.length, ago)
        return self.to_out(gate * (a @ wide(values)).squeeze(1)), (keys, values)


class GAU(Stack):
    """qk_dim: S. expand: E over d_model."""

    card = Card(
        title="Transformer Quality in Linear Time",
        year=2022,
        url="https://arxiv.org/abs/2202.10447",
        scaling="L^2",
        causal=False,
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        direction: str = "bidirectional",
        qk_dim: int = 64,
        expand: float = 2.0,
        **stack: Any,
    ) -> None:
        width = checked_sizes(qk_dim, expand, d_model)
        super().__init__(
            lambda _: GAUMixer(d_model, qk_dim=qk_dim, width=width, length=length, causal=direction == "causal"),
            native=True, d_model=d_model, length=length, direction=direction, **stack,
        )  # fmt: skip
