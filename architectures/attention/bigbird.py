"""BigBird: each block of tokens attends to its neighbours, to the first and last block, and to a few random blocks.

Zaheer et al. 2020, arXiv:2007.14062, the block form of appendix D (BigBird-ITC: the global tokens are the sequence's
own). With blocks of W = `size` tokens, u the block of query i and v that of key j, d = qkv_dim / H:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)
    i sees j  where  |u - v| <= 1                          window
                 or  u or v is the first or the last block global
                 or  v is among R[h, u]                    random: n_random blocks, drawn once per layer, head and u
    y = concat_h(softmax(Q K' / sqrt(d)) V) W_o + b_o      over the real keys i sees, each once; (B, L, D)

R is drawn without replacement from the blocks of `length` tokens that the window and the first and last block leave,
by torch's generator when the layer is built, and saved with its weights (buffer `random_blocks`, -1 where none is
left). Blocks beyond a shorter sequence are not seen. Work and memory grow with L W; no L x L matrix is formed.

Initialisation: Xavier uniform maps and zero biases (see AttentionMixer).

Departures: the last block is that of each row's last real token, so that padding moves nothing. In the causal
direction only the first block is global, and R holds earlier blocks. The published code draws anew for each layer from
a seed of its own and, at some lengths, by another rule.

Checked against: tensors of Hugging Face's BigBirdBlockSparseAttention with its random blocks copied, outputs and
gradients; softmax attention under the explicit L x L mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, banded
from lra.architectures._attention_stack import AttentionStack
from lra.architectures._checks import at_least
from lra.encoder import Card, lengths_of
from lra.kernels.band_attention.tiles import pairs


class BigBirdMixer(AttentionMixer):
    """Window, global and random blocks: (B, L, D) -> (B, L, D)."""

    random_blocks: Tensor

    def __init__(
        self, d_model: int, *, n_heads: int, width: int, positions: str, causal: bool, size: int, n_random: int,
        length: int, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=width, positions=positions, causal=causal, dropout=dropout)
        self.size = size
        self.register_buffer("random_blocks", drawn(n_heads, -(-length // size), n_random, causal))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        block = torch.arange(mask.shape[1], device=mask.device) // self.size
        last = None if self.causal else block == (lengths_of(mask).unsqueeze(1) - 1) // self.size
        count = -(-mask.shape[1] // self.size)
        chosen = self.random_blocks[:, :count]
        chosen = chosen.masked_fill(chosen >= count, -1)
        first = min(self.size, mask.shape[1])
        return banded(
            q, k, v, mask, (1, 0 if self.causal else 1), 1, first, chosen if chosen.numel() else None,
            # ahead of the first block there is nothing it could see besides itself
            global_mask=last, mutual=not self.causal, block=self.size, causal=self.causal, slopes=self.slopes,
            dropout=self.rate,
        )  # fmt: skip

    def keep(self, units: Tensor) -> None:
        super().keep(units)
        self.random_blocks = self.random_blocks[units]

    def pairs(self, length: int) -> float:
        first = min(self.size, length)
        last = 0 if self.causal or length <= self.size else (length - 1) % self.size + 1
        named = (first + last) * (1 if self.causal else 2)
        behind, ahead, random = 1, 0 if self.causal else 1, self.random_blocks.shape[2]
        return float(pairs(length, behind, ahead, [1] * self.n_heads, named, random, self.size))

    def sees(self, i: int, j: Tensor) -> Tensor:
        block, own = j // self.size, i // self.size
        chosen = (self.random_blocks[:, own, :, None] == block).any(dim=1)
        return (block >= own - 1) | (block == 0) | chosen


def drawn(heads: int, blocks: int, n_random: int, causal: bool) -> Tensor:
    """(H, blocks, n_random) block numbers, distinct in each row, -1 where too few are left."""
    u = torch.arange(blocks)
    free = (u - u[:, None]).abs() > 1
    free &= u > 0
    if causal:
        free &= u < u[:, None]
    else:
        free &= (u < blocks - 1) & (u[:, None] > 0) & (u[:, None] < blocks - 1)
    luck, order = torch.rand(heads, blocks, blocks).masked_fill(~free, -1).topk(min(n_random, blocks), dim=-1)
    return F.pad(order.masked_fill(luck < 0, -1), (0, n_random - order.shape[-1]), value=-1)


class BigBird(AttentionStack):
    """size: tokens in a block. n_random: random blocks for each block. n_heads: must divide qkv_dim, the width of all
    heads together, d_model unless given. positions: "sinusoidal", "learned", "rope", "alibi", "none".
    attention_dropout: on the attention weights."""

    card = Card(
        title="Big Bird: Transformers for Longer Sequences",
        year=2020,
        url="https://arxiv.org/abs/2007.14062",
        scaling="L",
        causal=False,
        exempt={"exports": "the operator reads which blocks were drawn"},
    )

    def __init__(self, *, length: int, size: int = 64, n_random: int = 3, **attention: Any) -> None:
        at_least(1, size=size, length=length)
        at_least(0, n_random=n_random)
        super().__init__(
            lambda _, **heads: BigBirdMixer(size=size, n_random=n_random, length=length, **heads),
            length=length,
            **attention,
        )
