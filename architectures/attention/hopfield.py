"""Hopfield: attention as the retrieval of a continuous associative memory, whose update may be repeated.

Ramsauer et al. 2020, arXiv:2008.02217, section 3. Tokens are the stored patterns, the states that retrieve, and what is
read. LN are layer norms of their own, per head of width d = D / H:

    Q, K, V = LN(x) W_q + b_q, LN(x) W_k + b_k, LN(x) W_v + b_v           (B, L, D) -> (B, H, L, d)
    Q, K = LN(Q), LN(K)                                                   only if normalised; one norm for both
    T times:  Q = softmax(beta Q K') K                                    equation 3, a step down the energy
    y = concat_h(softmax(beta Q K') V) W_o + b_o                          equation 10

T = 0 is attention with the scale beta, T = 1 and more a state that first moves to the patterns it is near. A small beta
retrieves an average of many patterns, a large one a single pattern. Causally, tokens after the state are not stored; a
step keeps keys and values. A layer is that of the released encoder: norms after each sum, ReLU.

Initialisation: maps normal of deviation 0.02, biases 0, as released; beta = d^-1/2 unless given.

Departures: T is 1 unless told, where the released layer has 0, which is plain attention. The number of updates is
fixed. The released code also stops a head when the associations of the whole batch change little, by which one sequence
would depend on another.

Checked against: tensors of the released Hopfield layer without and with three updates, normalised, with padding,
gradients of all three inputs; a fixed point for large beta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._attention import checked_dropout, checked_width
from lra.architectures._checks import at_least
from lra.architectures._norm import LayerNorm
from lra.architectures._stack import Block, Stack
from lra.attention import attention_mask, fused_attention, merge_heads, split_heads
from lra.encoder import Card, Cost, Mixer

POSITIONS = ("sinusoidal", "learned", "none")
State = tuple[Tensor, Tensor]


class HopfieldMixer(Mixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, n_heads: int, *, beta: float | None, steps: int, normalised: bool, causal: bool,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.steps, self.causal, self.dropout = n_heads, steps, causal, checked_dropout(dropout)
        self.head = d_model // n_heads
        self.beta = self.head**-0.5 if beta is None else beta
        self.norm_state_pattern, self.norm_stored_pattern = LayerNorm(d_model), LayerNorm(d_model)
        self.norm_pattern_projection = LayerNorm(d_model)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model) for _ in range(3))
        self.p_norm = LayerNorm(self.head) if normalised else nn.Identity()
        self.out_proj = nn.Linear(d_model, d_model)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def heads(self, state: Tensor, stored: Tensor, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V of the equations before any update: (B, L, D), (B, S, D) twice -> (B, H, L or S, d)."""
        q = split_heads(self.q_proj(self.norm_state_pattern(state)), self.n_heads)
        k = split_heads(self.k_proj(self.norm_stored_pattern(stored)), self.n_heads)
        v = split_heads(self.v_proj(self.norm_pattern_projection(projection)), self.n_heads)
        return self.p_norm(q), self.p_norm(k), v

    def retrieve(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        """Updates and read: -> (B, L, D). allowed: (..., L, S) bool, True where a state sees a stored pattern."""
        for _ in range(self.steps):
            q = fused_attention(q, k, k, allowed, scale=self.beta)
        rate = self.dropout if self.training else 0.0
        return self.out_proj(merge_heads(fused_attention(q, k, v, allowed, rate, scale=self.beta)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.retrieve(*self.heads(x, x, x), attention_mask(mask, causal=self.causal))

    def cost(self, length: int) -> Cost:
        d_model, pairs, reads = self.q_proj.in_features, self.n_heads * length**2, self.steps + 1
        norms = 3 * d_model + (0 if isinstance(self.p_norm, nn.Identity) else 2 * d_model)
        maps = Cost.linear(4 * length, d_model, d_model) + Cost(other=5.0 * length * norms)
        return maps + Cost(4.0 * self.head * pairs * reads, 5.0 * pairs * reads)

    def init_state(self, batch: int) -> State:
        empty = self.out_proj.weight.new_zeros(batch, self.n_heads, 0, self.head)
        return empty, empty

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: keys and values, two (B, H, t, d)."""
        q, k, v = self.heads(x, x, x)
        keys, values = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        tokens, known = q.shape[2], keys.shape[2]
        allowed = torch.ones(tokens, known, dtype=torch.bool, device=x.device).tril(known - tokens)
        return self.retrieve(q, keys, values, allowed), (keys, values)


class Hopfield(Stack):
    """n_heads: H, a divisor of d_model. beta: inverse temperature of the retrieval, d^-1/2 unless given. steps: T.
    normalised: layer norm of queries and keys. attention_dropout: on the weights of the read, not of the updates."""

    card = Card(
        title="Hopfield Networks is All You Need",
        year=2020,
        url="https://arxiv.org/abs/2008.02217",
        scaling="L^2",
        causal=False,
        variants={"attention": {"steps": 0}, "normalised": {"normalised": True}},
    )
    block = Block(prenorm=False, ffn="relu")

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        beta: float | None = None,
        steps: int = 1,
        normalised: bool = False,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        checked_width(d_model, n_heads, None, positions, POSITIONS)
        at_least(0, steps=steps)
        if beta is not None and beta <= 0:
            raise ValueError(f"beta is {beta}; more than 0")
        super().__init__(
            lambda _: HopfieldMixer(
                d_model, n_heads, beta=beta, steps=steps, normalised=normalised, causal=direction == "causal",
                dropout=attention_dropout,
            ),
            native=True, d_model=d_model, direction=direction, block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
