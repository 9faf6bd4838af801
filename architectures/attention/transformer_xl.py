"""Transformer-XL: attention within a segment and to the previous segment, with relative positions.

Dai et al. 2019, arXiv:1901.02860. The sequence is cut into segments of S tokens. A token attends, causally, to those of
its segment and to the M tokens before the segment, whose states of the layer below are cached and pass no gradient:

    h = [stop_gradient(M states before the segment), x]                      (B, M + S, D)      section 3.2
    q, k, v = x W_q, h W_k, h W_v                                            (B, H, S or M + S, d)
    A_ij = softmax_j of [(q_i + u) . k_j + (q_i + v) . W_r R_{i-j}] / sqrt(d)                   section 3.3
    y = concat_h(A V) W_o,   x = norm(x + y);  x = norm(x + ffn(x))          (B, S, D)

R_n: sinusoids of the distance n. u, v: (H, d), shared by the layers. After N layers a token depends on N M + S tokens
at most. The mixer is in `_segments.py`. Recurrent mode keeps the states of the segment and of the memory.

Initialisation: everything in the mixer normal of deviation 0.02, as the authors'.

Departures: S is an eighth of the length unless told, M = S; the paper has 128 to 512. The norms' gains start at 1,
where the authors add noise of 0.02. All segments of a layer are computed at once, which gives the same numbers.

Checked against: tensors of the authors' RelPartialLearnableMultiHeadAttn, with memory and without, norm before and
after, every gradient; the encoder segment by segment, with the gradients that its memory stops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._attention import checked_width
from lra.architectures._segments import SegmentMixer, checked_segments, shared_biases
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost

State = tuple[Tensor, ...]


class TransformerXLMixer(SegmentMixer):
    """(B, L, D) -> (B, L, D)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        own = F.pad(x, (0, 0, 0, -length % self.segment)).unflatten(1, (-1, self.segment))
        segments = own.shape[1]
        # padding before the first token has no place among the keys
        before = F.pad(x.detach(), (0, 0, self.memory, 0))[:, : self.memory + (segments - 1) * self.segment]
        before = before.unfold(1, self.memory, self.segment).transpose(2, 3).flatten(0, 1)
        place = torch.arange(-self.memory, 0, device=x.device)
        known = place + torch.arange(segments, device=x.device).unsqueeze(1) * self.segment >= 0
        y = self.read(own.flatten(0, 1), before, known.repeat(batch, 1))
        return y.unflatten(0, (batch, segments)).flatten(1, 2)[:, :length]

    def cost(self, length: int) -> Cost:
        segments = -(-length // self.segment)
        one = self.read_cost(self.segment, self.memory + self.segment)
        return Cost(segments * one.matmul, segments * one.other, one.batch_matmul, one.batch_other)

    def init_state(self, batch: int) -> State:
        weight = self.o_net.weight
        empty = weight.new_zeros(batch, 0, len(weight))
        return empty, torch.zeros((), dtype=torch.int64, device=weight.device)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the inputs of the memory and of the segment, (B, t, D), and the time."""
        (kept, time), outputs = state, []
        now = int(time)
        for piece in self.pieces(x, now):
            if now % self.segment == 0:
                kept = kept[:, -self.memory :].detach()
            outputs.append(self.read(piece, kept))
            kept, now = torch.cat([kept, piece], dim=1), now + piece.shape[1]
        return torch.cat(outputs, dim=1), (kept, time + x.shape[1])


class TransformerXL(Stack):
    """segment: S. memory: M. n_heads: H, must divide qkv_dim. qkv_dim: width of all heads together, d_model unless
    given. attention_dropout: on the attention weights."""

    card = Card(
        title="Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
        year=2019,
        url="https://arxiv.org/abs/1901.02860",
        scaling="L^2",
        causal=True,
        variants={"prenorm": {"block": {"prenorm": True}}},
        exempt={"exports": "sizes of 1 are compiled apart, so that one segment and several are different graphs"},
        recall={"memory": 256},  # section 4.5: the memory is as long as what a token is to look back on
    )
    block = Block(prenorm=False, ffn="relu")

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        segment: int | None = None,
        memory: int | None = None,
        n_heads: int = 4,
        qkv_dim: int | None = None,
        attention_dropout: float = 0.0,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, "none")
        size, kept = checked_segments(length, segment, memory)
        biases = shared_biases(n_heads, width // n_heads)
        super().__init__(
            lambda _: TransformerXLMixer(
                d_model, n_heads, width, segment=size, memory=kept, longest=kept + size, biases=biases,
                dropout=attention_dropout,
            ),
            d_model=d_model, length=length, **stack,
        )  # fmt: skip
        self.fixed = segment is not None

    @property
    def scaling(self) -> str:
        return "L" if self.fixed else self.card.scaling
