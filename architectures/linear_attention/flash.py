"""FLASH: gated attention units that are quadratic inside chunks and linear across them.

Hua, Dai, Liu and Le 2022, arXiv:2202.10447, section 3 (mixed chunk attention). As GAU, with chunks of C tokens, n the
length that the encoder is built for, and four copies of z, two of them for linear attention:

    v, u = silu(W_h x + b_h),   z = silu(W_z x + b_z)      (B, L, E) each, (B, L, S)
    q, q', k, k' = gamma * z + beta                        (B, L, S) each       gamma, beta: (4, S)
    A_ij = relu(q_i . k_j / C + bias_{i-j})^2              i, j in one chunk; causal: 0 for j > i
    o_i = sum_j A_ij v_j + q'_i (sum_j k'_j v_j^T) / n     sum over all real j
    causal:  the last sum over the chunks before that of i, divided by C
    out = W_o (u * o) + b_o                                (B, L, D)

A block is the unit alone. A recurrent step keeps the keys and values of its chunk and one sum over those before.

Initialisation: gamma and bias normal with a deviation of 0.02, beta 0; maps are PyTorch's own.

Departures: n is the length the encoder is built for, as in code of fixed shapes. The bias of distances is T5's, 32
buckets, as in the independent implementation, which multiplies it by sqrt(S); that scale is left to the table. S is 64
unless told, where the paper has 128 at a width of 768. C = 256, as in the paper.

Checked against: tensors of lucidrains/FLASH-pytorch's FLASH, with padding, without it and causal, every gradient; its
own steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._gau import GatedUnit, checked_sizes
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost

State = tuple[Tensor, Tensor, Tensor, Tensor]


class FlashMixer(GatedUnit):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, *, qk_dim: int, width: int, chunk: int, length: int, causal: bool) -> None:
        super().__init__(d_model, qk_dim=qk_dim, width=width, copies=4, causal=causal)
        self.chunk_size, self.length = chunk, length

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        # one chunk is a case of its own: torch.export would fix the length for a minimum of both
        size = length if length <= self.chunk_size else self.chunk_size

        def cut(t: Tensor) -> Tensor:
            if length <= self.chunk_size:
                return t.unsqueeze(1)
            return F.pad(t, (0, 0, 0, -length % size)).unflatten(1, (-1, size))  # (B, chunks, size, ...)

        v, gate, copies = self.views(x)
        v, (q, linear_q, k, linear_k) = cut(wide(v)), (cut(t) for t in copies)
        real, place = cut(mask.unsqueeze(-1)), torch.arange(size, device=x.device)
        a = self.weights(q @ k.mT / self.chunk_size, place.unsqueeze(1) - place)
        linear_k = wide(linear_k).masked_fill(~real, 0)
        # padding comes after all real tokens: a causal query does not see it
        a = a if self.causal else a.masked_fill(~real.mT, 0)
        with torch.autocast(x.device.type, enabled=False):
            sums = linear_k.mT @ v  # (B, chunks, S, E)
            if self.causal:
                sums = (sums.cumsum(1) - sums) / self.chunk_size
            else:
                sums = sums.sum(1, keepdim=True) / self.length
            o = a @ v + wide(linear_q) @ sums
        return self.to_out(gate * o.flatten(1, 2)[:, :length])

    def cost(self, length: int) -> Cost:
        size, width, qk_dim = min(self.chunk_size, length), self.to_out.in_features, self.to_qk.out_features
        chunks = -(-length // size)
        products = 2.0 * chunks * size * (size * (qk_dim + width) + 2 * qk_dim * width)
        return self.maps_cost(length) + Cost(products, 4.0 * chunks * (size**2 + qk_dim * width))

    def init_state(self, batch: int) -> State:
        weight, qk_dim = wide(self.to_out.weight), self.to_qk.out_features
        keys, values = (weight.new_zeros(batch, 0, width) for width in (qk_dim, weight.shape[1]))
        sums = weight.new_zeros(batch, qk_dim, weight.shape[1])
        return keys, values, sums, sums.clone()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: keys (B, t, S) and values (B, t, E) of the chunk, the sum of the chunks before, and that of this one,
        two (B, S, E)."""
        keys, values, before, own = state
        v, gate, (q, linear_q, k, linear_k) = self.views(x)
        keys, values = torch.cat([keys, k.unsqueeze(1)], 1), torch.cat([values, wide(v).unsqueeze(1)], 1)
        ago = torch.arange(keys.shape[1] - 1, -1, -1, device=x.device).unsqueeze(0)
        a = self.weights(q.unsqueeze(1) @ keys.mT / self.chunk_size, ago)
        o = (a @ values + wide(linear_q).unsqueeze(1) @ before / self.chunk_size).squeeze(1)
        own = own + linear_k.unsqueeze(-1) * wide(v).unsqueeze(-2)
        if keys.shape[1] == self.chunk_size:
            keys, values, before, own = keys[:, :0], values[:, :0], before + own, torch.zeros_like(own)
        return self.to_out(gate * o), (keys, values, before, own)


class Flash(Stack):
    """qk_dim: S. expand: E over d_model. chunk: C."""

    card = Card(
        title="Transformer Quality in Linear Time",
        year=2022,
        url="https://arxiv.org/abs/2202.10447",
        scaling="L",
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
        chunk: int = 256,
        **stack: Any,
    ) -> None:
        width = checked_sizes(qk_dim, expand, d_model)
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; at least 1 token")
        super().__init__(
            lambda _: FlashMixer(
                d_model, qk_dim=qk_dim, width=width, chunk=chunk, length=length, causal=direction == "causal",
            ),
            native=True, d_model=d_model, length=length, direction=direction, **stack,
        )  # fmt: skip
