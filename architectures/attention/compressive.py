"""Compressive Transformer: Transformer-XL that compresses its oldest memories into a second memory.

Rae et al. 2019, arXiv:1911.05507, section 3. Segments of S tokens; a layer keeps m, the states of the layer below at
the M tokens before the segment, and cm, C compressed ones from before those. Neither passes a gradient. Per segment x:

    y = attention of x to [cm, m, x], causal, as `transformer_xl`            (B, S, D)   algorithm 1
    old = what m = [m, x] holds beyond M tokens
    cm = the last C of [cm, f(old)]                                          f: c memories into one
    loss = mean of (attn(h, old) - attn(h, f(old)))^2,   h = x               algorithm 2

attn is softmax attention with the layer's own heads, without positions or mask; h, old and the maps pass no gradient,
so that the loss trains f alone, and nothing else does. It is a mean over tokens, heads and segments, and a sum over
layers. Compressions f: "conv", a convolution of kernel and stride c; "mean" and "max" of c memories; "most_used", the 1
/ c of them on which the segment's attention was largest, in their order. Only "conv" has parameters and a loss.
Recurrent mode keeps cm, m and the states of the segment.

Initialisation: as `transformer_xl`; the convolution as PyTorch's.

Departures: S is an eighth of the length unless told, M = S and C = S; the paper has 512 of each and c = 4. S and M are
multiples of c, which the released tasks' sizes are.

Checked against: tensors of an independent implementation (output, both memories, the loss and its gradient); the
encoder token by token, compression by compression.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import checked_width
from lra.architectures._checks import at_least, one_of
from lra.architectures._segments import SegmentMixer, checked_segments, shared_biases
from lra.architectures._stack import Block, Stack
from lra.attention import split_heads
from lra.encoder import Card, Cost

COMPRESSIONS = ("conv", "mean", "max", "most_used")
State = tuple[Tensor, ...]


class CompressiveMixer(SegmentMixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, n_heads: int, *, segment: int, memory: int, compressed: int, ratio: int, compression: str,
        biases: tuple[nn.Parameter, nn.Parameter], dropout: float,
    ) -> None:  # fmt: skip
        super().__init__(
            d_model, n_heads, d_model, segment=segment, memory=memory, longest=compressed + memory + segment,
            biases=biases, dropout=dropout,
        )  # fmt: skip
        self.compressed, self.ratio, self.compression = compressed, ratio, compression
        self.conv = nn.Conv1d(d_model, d_model, ratio, stride=ratio) if compression == "conv" else None
        self.loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # the loss holds a graph, which no copy can take along
        return {**self.__dict__, "loss": None}

    def compress(self, old: Tensor, kept: Tensor, compressed: Tensor) -> Tensor:
        """f(old): (B, n c, D) -> (B, n, D). kept: the memory and the last segment, that old begins."""
        if self.conv is not None:
            return self.conv(old.mT).mT
        if self.compression == "most_used":
            older, segment = kept[:, : -self.segment], kept[:, -self.segment :]
            q, k, _ = self.heads(segment, torch.cat([compressed, older], dim=1))
            usage = self.weights(q, k).mean((1, 2))[:, compressed.shape[1] :][:, : old.shape[1]]
            places = usage.topk(old.shape[1] // self.ratio, dim=-1).indices.sort(-1).values
            return old.gather(1, places.unsqueeze(-1).expand(-1, -1, old.shape[2]))
        groups = old.unflatten(1, (-1, self.ratio))
        return groups.mean(2) if self.compression == "mean" else groups.amax(2)

    def forget(self, kept: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """After a whole segment: the memory, the compressed memory, and the squared error of attention at each token of
        the segment, (B, S), where there is anything to learn."""
        old, memory = kept[:, : -self.memory].detach(), kept[:, -self.memory :].detach()
        if not old.shape[1]:
            return memory, compressed, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.conv is not None):
            new = self.compress(old, kept.detach(), compressed)
        error = None
        if self.training and self.conv is not None:
            error = self.reconstruction(kept[:, -self.segment :].detach(), old, new)
        return memory, torch.cat([compressed, new.detach()], dim=1)[:, -self.compressed :], error

    def reconstruction(self, h: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Squared differences of what h reads from old and from new: (B, S, D), (B, n c, D), (B, n, D) -> (B, S)."""
        of_q, of_k, of_v = self.qkv_net.weight.detach().chunk(3)

        def heads(x: Tensor, weight: Tensor) -> Tensor:
            return split_heads(F.linear(x, weight), self.n_heads)

        q = heads(h, of_q)
        one, two = (F.scaled_dot_product_attention(q, heads(m, of_k), heads(m, of_v)) for m in (old, new))
        return (one - two).square().mean((1, 3))

    def advance(
        self, x: Tensor, kept: Tensor, compressed: Tensor, now: int, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, and the memories after x, whose first token stands at `now`. A mask (B, L), from 0 on, sets the loss."""
        outputs, errors, weights = [], [], []
        for piece in self.pieces(x, now):
            if now and now % self.segment == 0:
                kept, compressed, error = self.forget(kept, compressed)
                if error is not None and mask is not None:
                    errors.append(error)
                    weights.append(mask[:, now - self.segment : now])
            outputs.append(self.read(piece, torch.cat([compressed, kept], dim=1)))
            kept, now = torch.cat([kept, piece], dim=1), now + piece.shape[1]
        if errors:
            real = torch.cat(weights, dim=1)
            self.loss = (torch.cat(errors, dim=1) * real).sum() / real.sum().clamp_min(1)
        return torch.cat(outputs, dim=1), kept, compressed

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.loss = None
        return self.advance(x, x[:, :0], x[:, :0], 0, mask)[0]

    def aux_loss(self) -> Tensor | None:
        return self.loss

    def cost(self, length: int) -> Cost:
        total, memory, compressed = Cost(), 0, 0
        for start in range(0, length, self.segment):
            if start:
                keys, old = compressed + memory + self.segment, max(0, memory + self.segment - self.memory)
                total += self.forget_cost(keys, old)
                memory += self.segment - old
                compressed = min(self.compressed, compressed + old // self.ratio)
            tokens = min(self.segment, length - start)
            total += self.read_cost(tokens, compressed + memory + tokens)
        return total

    def forget_cost(self, keys: int, old: int) -> Cost:
        """Work of `forget` where so many memories leave, after a segment that has read so many keys."""
        d_model, new = self.o_net.out_features, old // self.ratio
        if self.compression == "most_used" and old:
            maps = Cost.linear(self.segment + 2 * keys, d_model, d_model, bias=False)
            maps += Cost.linear(keys, d_model, d_model, bias=False).per_batch
            return maps + Cost(4.0 * self.segment * keys * d_model, 8.0 * self.segment * keys * self.n_heads)
        if self.conv is None or not old:
            return Cost()
        total = Cost.linear(new, self.ratio * d_model, d_model)
        if self.training:
            total += Cost.linear(self.segment + 2 * (old + new), d_model, d_model, bias=False)
            pairs = float(self.segment * (old + new))
            total += Cost(4.0 * pairs * d_model, 5.0 * pairs * self.n_heads)
        return total

    def init_state(self, batch: int) -> State:
        weight = self.o_net.weight
        empty = weight.new_zeros(batch, 0, len(weight))
        return empty, empty, torch.zeros((), dtype=torch.int64, device=weight.device)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the inputs of the memory and of the segment (B, t, D), the compressed memory (B, n, D), the time."""
        kept, compressed, time = state
        y, kept, compressed = self.advance(x, kept, compressed, int(time))
        return y, (kept, compressed, time + x.shape[1])


class Compressive(Stack):
    """segment: S. memory: M. compressed: C, at most. ratio: c. compression: "conv", "mean", "max" or "most_used".
    n_heads: H, a divisor of d_model. attention_dropout: on the attention weights."""

    card = Card(
        title="Compressive Transformers for Long-Range Sequence Modelling",
        year=2019,
        url="https://arxiv.org/abs/1911.05507",
        scaling="L^2",
        causal=True,
        variants={
            "mean": {"compression": "mean"},
            "max": {"compression": "max"},
            "most_used": {"compression": "most_used"},
        },
        exempt={
            "exports": "each segment reads what was compressed after the one before: a loop as long as the sequence"
        },
        recall={"memory": 32},
    )
    block = Block(prenorm=False, ffn="relu")

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        segment: int | None = None,
        memory: int | None = None,
        compressed: int | None = None,
        ratio: int = 4,
        compression: str = "conv",
        n_heads: int = 4,
        attention_dropout: float = 0.0,
        **stack: Any,
    ) -> None:
        checked_width(d_model, n_heads, None, "none")
        at_least(1, ratio=ratio)
        one_of(COMPRESSIONS, compression=compression)
        size, kept = checked_segments(length, segment, memory, ratio)
        most = size if compressed is None else compressed
        at_least(1, compressed=most)
        biases = shared_biases(n_heads, d_model // n_heads)
        super().__init__(
            lambda _: CompressiveMixer(
                d_model, n_heads, segment=size, memory=kept, compressed=most, ratio=ratio, compression=compression,
                biases=biases, dropout=attention_dropout,
            ),
            d_model=d_model, length=length, **stack,
        )  # fmt: skip
        self.fixed = segment is not None

    @property
    def scaling(self) -> str:
        return "L" if self.fixed else self.card.scaling
