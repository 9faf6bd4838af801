"""Recurrent encoder with attention: every state of a GRU attends to all earlier states, as in sequence decoders.

Bahdanau, Cho and Bengio 2014, arXiv:1409.0473; Luong, Pham and Manning 2015, arXiv:1508.04025. With h = GRU(x) as
torch.nn.GRU has it, (B, L, D), for every token t over the states j <= t:

    score_tj     additive    v . tanh(W_q h_t + W_k h_j + b)             Bahdanau, appendix A.1.2
                 dot         h_t . h_j                                   Luong, equation 8
                 general     h_t . W_a h_j
    alpha_t      softmax of score_t, no scale
    context_t    sum_j alpha_tj h_j
    y_t          tanh(W_c [context_t, h_t])                              Luong, equation 5; the output, (B, D)

Luong's concat score is the additive one with b = 0 and W_a = [W_q, W_k].

Initialisation: maps Xavier uniform, v too, recurrent matrices orthogonal, biases 0 but that of the GRU's update gate,
log(u), u uniform in [1, length - 1], as gru.

Departures: the papers' decoder is a second network that reads an encoder of the whole source; a classifier has no
target sequence, so each state queries the states that came before it, and reads itself too. Backwards too where the
encoder is bidirectional, as Bahdanau's. A pre-norm residual block followed by a feed-forward part around it.

Additive scores are made for blocks of queries and made again in the backward pass: L^2 D numbers never stand in memory.
Their B L^2 D tanh take most of the time: an operator would fuse them with the softmax, and need as many.

Checked against: tensors of the papers' equations in closed form, four scores, with the gradient of the states; the
states against gru's operator in torch.nn.GRU.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lra.architectures._checks import at_least, one_of
from lra.architectures._init import chrono
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.recurrent_cell import recurrent_cell

SCORES = ("additive", "dot", "general")
LARGEST = 2**24
"""Numbers that a block of additive scores takes at most, where a single query does not take more."""
State = tuple[Tensor, Tensor]


class Seq2SeqAttentionMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed. units: width of additive scores."""

    def __init__(self, d_model: int, score: str, units: int, horizon: int) -> None:
        super().__init__()
        self.d_model, self.score, self.units = d_model, score, units
        self.input = nn.Linear(d_model, 3 * d_model)  # rows: r, z, n
        self.U = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.c = nn.Parameter(torch.zeros(3 * d_model))
        for w_gate, u_gate in zip(self.input.weight.chunk(3), self.U.chunk(3), strict=True):
            nn.init.xavier_uniform_(w_gate)
            nn.init.orthogonal_(u_gate)
        nn.init.zeros_(self.input.bias)
        chrono(self.input.bias.data.chunk(3)[1], horizon)

        def matrix(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, columns)))

        additive = score == "additive"
        self.W_q, self.W_k = (matrix(units, d_model) if additive else None for _ in range(2))
        self.b = nn.Parameter(torch.zeros(units)) if additive else None
        self.v = nn.Parameter(matrix(1, units).data.squeeze(0)) if additive else None
        self.W_a = matrix(d_model, d_model) if score == "general" else None
        self.W_c = matrix(d_model, 2 * d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = cast(Tensor, recurrent_cell(self.input(x), self.U, self.c, "gru"))
        return self.read(h, h)

    def read(self, query: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """y (B, T, D) of queries (B, T, D) and states (B, L, D). allowed: (B, L) bool, which states any query sees;
        None: query t sees states 0 to t."""
        with torch.autocast(query.device.type, enabled=False):  # scores have no scale: bfloat16 would be off by much
            q, h = wide(query), wide(memory)
            if self.score == "additive":
                context = self._additive(q, h, allowed)
            else:
                keys = h if self.W_a is None else F.linear(h, wide(self.W_a))
                mask = None if allowed is None else allowed[:, None, None]
                context = F.scaled_dot_product_attention(
                    q.unsqueeze(1), keys.unsqueeze(1), h.unsqueeze(1), mask, is_causal=allowed is None, scale=1.0
                ).squeeze(1)
            y = torch.tanh(F.linear(torch.cat([context, q], dim=-1), wide(self.W_c)))
        return y.to(query.dtype)

    def _additive(self, query: Tensor, memory: Tensor, allowed: Tensor | None) -> Tensor:
        W_q, W_k, b, v = (wide(cast(Tensor, part)) for part in (self.W_q, self.W_k, self.b, self.v))
        q, k = F.linear(query, W_q), F.linear(memory, W_k, b)
        rows = max(1, LARGEST // (k.numel() or 1))
        contexts = []
        for start in range(0, q.shape[1], rows):
            stop = min(start + rows, q.shape[1])
            last = stop if allowed is None else k.shape[1]  # causal: no query of the block sees further
            if allowed is None:
                token = torch.arange(last, device=q.device)
                seen = (token <= token[start:, None]).unsqueeze(0)
            else:
                seen = allowed.unsqueeze(1)
            given = q[:, start:stop], k[:, :last], v, memory[:, :last], seen
            contexts.append(
                cast(Tensor, checkpoint(_read_block, *given, use_reentrant=False, preserve_rng_state=False))
            )
        return torch.cat(contexts, dim=1)

    def _pairs(self, length: int) -> float:
        """Pairs of a query and a memory that blocks of queries look at, in one causal sequence."""
        rows = max(1, LARGEST // (length * self.units))
        starts = range(0, length, rows)
        return float(sum((min(start + rows, length) - start) * min(start + rows, length) for start in starts))

    def cost(self, length: int) -> Cost:
        width, units, pairs = self.d_model, self.units, float(length) ** 2
        work = 2 * Cost.linear(length, width, 3 * width) + Cost.linear(length, 2 * width, width, bias=False)
        work = work + Cost(other=25.0 * length * width)
        if self.score == "additive":
            maps = 2 * Cost.linear(length, width, units, bias=False)
            read = self._pairs(length)
            return work + maps + Cost(2.0 * read * width, read * (6.0 * units + 5.0))
        if self.score == "general":
            work = work + Cost.linear(length, width, width, bias=False)
        return work + Cost(4.0 * pairs * width, 5.0 * pairs)

    def init_state(self, batch: int) -> State:
        start = wide(self.U.new_zeros(batch, self.d_model))
        return start, start.new_zeros(batch, 0, self.d_model)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: h (B, D), and all states so far (B, t, D)."""
        gates = self.input(x).unsqueeze(1)
        h = cast(Tensor, recurrent_cell(gates, self.U, self.c, "gru", state[0].to(gates.dtype)))
        memory = torch.cat([state[1], h.to(state[1].dtype)], dim=1)
        everything = torch.ones(memory.shape[:2], dtype=torch.bool, device=h.device)
        return self.read(h, memory, everything).squeeze(1), (h[:, 0], memory)


def _read_block(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
    """Contexts (B, T, D) of additive scores; seen: bool, broadcast to (B, T, L)."""
    scores = (torch.tanh(q.unsqueeze(2) + k.unsqueeze(1)) * v).sum(-1)
    return torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1) @ memory


class Seq2SeqAttention(Stack):
    """score: of SCORES. units: width of the additive score, `d_model` unless given."""

    card = Card(
        title="Neural Machine Translation by Jointly Learning to Align and Translate",
        year=2014,
        url="https://arxiv.org/abs/1409.0473",
        scaling="L^2",
        causal=True,
        variants={
            "additive": {"score": "additive"},
            "dot": {"score": "dot"},
            "general": {"score": "general"},
        },
        exempt={
            "functional": "its blocks are checkpointed, and torch.func supports no saved-tensor hooks",
            "exports": "the blocks of queries follow the batch and the length",
        },
    )

    def __init__(
        self, *, d_model: int, length: int, score: str = "additive", units: int | None = None, **stack: Any
    ) -> None:
        one_of(SCORES, score=score)
        at_least(1, units=units)
        super().__init__(
            lambda _: Seq2SeqAttentionMixer(d_model, score, units or d_model, length),
            d_model=d_model, length=length, **stack,
        )  # fmt: skip
