"""Local attention: softmax attention within blocks of the sequence, and none between blocks.

The local baseline of Tay et al. 2020, arXiv:2011.04006 (section 3.1). With W = `size` and d = qkv_dim / H:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)
    i sees j  where  -before <= floor(j / W) - floor(i / W) <= after, and j is real
    y = concat_h(softmax(Q K' / sqrt(d)) V) W_o + b_o      softmax over the keys i sees; (B, L, D)

before = after = 0 is the baseline: nothing passes between blocks in any number of layers, so a label that needs two
blocks is out of its reach. `local/overlap` also sees the block on each side; after n layers a token then knows of those
up to n blocks away. Work and memory grow with L W. No L x L matrix is formed.

Initialisation: Xavier uniform maps and zero biases (see AttentionMixer).

Departures: the released code of the paper reshapes to (W, L / W) where it means (L / W, W), so that its "blocks" are
the positions equal modulo L / W, and reads the padding mask in the other order; here blocks are runs of W tokens. The
causal direction looks ahead nowhere. The default W = 50 is the code's; its image and Pathfinder recipes use 64.

Checked against: tensors of the package local-attention (LocalAttention with own block, one back, one on each side), of
the paper's own layer, its positions put in order, and of the local layer of Hugging Face's Reformer; outputs and
gradients; softmax attention under the explicit L x L mask.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lra.architectures._attention import (  # fmt: skip
    SPARE,
    AttentionMixer,
    attend,
    banded,
)
from lra.architectures._attention_stack import AttentionStack
from lra.architectures._checks import at_least
from lra.encoder import Card, Cost
from lra.kernels.band_attention.tiles import pairs


class LocalMixer(AttentionMixer):
    """Attention to the own block, `before` blocks back and `after` ahead: (B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, *, n_heads: int, width: int, positions: str, causal: bool, size: int, before: int,
        after: int, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=width, positions=positions, causal=causal, dropout=dropout)
        self.size, self.window = size, (before, 0 if causal else after)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if any(self.window):
            options = {"causal": self.causal, "slopes": self.slopes, "dropout": self.rate}
            return banded(q, k, v, mask, self.window, block=self.size, **options)
        # blocks that see themselves alone are sequences of their own
        length, missing = mask.shape[1], -mask.shape[1] % self.size
        q, k, v = (self.apart(F.pad(t, (0, 0, 0, missing))) for t in (q, k, v))
        real = F.pad(mask, (0, missing)).unflatten(1, (-1, self.size)).flatten(0, 1)
        # one of padding alone sees itself: its rows are not read, but must not be a softmax over nothing
        real = real | ~real.any(dim=1, keepdim=True)
        y = attend(q, k, v, real, causal=self.causal, slopes=self.slopes, dropout=self.rate)
        return y.transpose(1, 2).unflatten(0, (mask.shape[0], -1)).flatten(1, 2).transpose(1, 2)[:, :, :length]

    def apart(self, x: Tensor) -> Tensor:
        """(B, H, L, d) -> (B blocks, H, size, d)."""
        return x.transpose(1, 2).unflatten(1, (-1, self.size)).flatten(0, 1).transpose(1, 2)

    def pairs(self, length: int) -> float:
        return float(pairs(length, *self.window, [1] * self.n_heads, 0, 0, self.size))

    def cost(self, length: int) -> Cost:
        spare = 0 if self.slopes is None or self.causal or any(self.window) else SPARE
        return super().cost(length) + Cost(4.0 * self.pairs(length) * spare)

    def sees(self, i: int, j: Tensor) -> Tensor:
        return (j >= self.oldest(i))[None]

    def oldest(self, i: int) -> int:
        return (i // self.size - self.window[0]) * self.size


class Local(AttentionStack):
    """size: tokens in a block. before, after: blocks looked at besides the own one. n_heads: must divide qkv_dim,
    the width of all heads together, d_model unless given. positions: "sinusoidal", "learned", "rope", "alibi", "none".
    attention_dropout: on the attention weights."""

    gaps = True
    card = Card(
        title="Long Range Arena: A Benchmark for Efficient Transformers",
        year=2020,
        url="https://arxiv.org/abs/2011.04006",
        scaling="L",
        causal=False,
        variants={"overlap": {"before": 1, "after": 1}},
        exempt={
            "exports": "the number of blocks follows the length",
        },
        no_recall="tokens attend within their block only, and the first token is in another block than the last",
    )

    def __init__(self, *, size: int = 50, before: int = 0, after: int = 0, **attention: Any) -> None:
        at_least(1, size=size)
        at_least(0, before=before, after=after)
        super().__init__(lambda _, **heads: LocalMixer(size=size, before=before, after=after, **heads), **attention)
