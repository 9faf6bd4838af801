"""Log Elman: a gated recurrence with a full matrix whose state is held as logarithm and sign, and never underflows.

After level 5 of the ladder of ekg/elman @ 1b9e1ac, docs/ladder.md; there is no paper. Per token, with h: (B, H), H = D,
held as l = log |h| and s = sign h:

    delta = sigmoid(W_delta x + b_delta)
    W_h h = exp(m) (W_h (s exp(l - m))),  m = max_j l_j                a product in logarithms: nothing underflows
    n = tanh(W_x x + W_h h + b)                                        candidate
    l, s = logarithm and sign of (1 - delta) h + delta n               log(1 - delta) + l and log(delta) + log |n|
    y = softmax of h in groups * silu(W_out h)                         units of a group compete

In exact arithmetic this is step 2 of delta_elman.

Initialisation: W Xavier uniform, W_h orthogonal, b = 0; b_delta = -log(u), u uniform in [1, horizon - 1], the chrono
rule of arXiv:1804.11188.

Departures: the source sums the positive and the negative terms of W_h h apart, each by logsumexp; one common exponent
gives the same number with one matrix product. A pre-norm residual block followed by a feed-forward part around it.

The loop over time is Python's: it would need an operator in logarithms.

Checked against: the same recurrence in linear space as a float64 loop, outputs and every gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._init import chrono
from lra.architectures._logspace import FLOOR, Signed, add, to_linear, to_log
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost


class LogElmanMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). group: units that compete."""

    def __init__(self, d_model: int, group: int, horizon: int) -> None:
        super().__init__()
        self.d_model, self.group = d_model, group
        self.W_x, self.W_delta = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.W_h = nn.Parameter(nn.init.orthogonal_(torch.empty(d_model, d_model)))
        self.W_out = nn.Linear(d_model, d_model, bias=False)
        for part in (self.W_x, self.W_delta, self.W_out):
            nn.init.xavier_uniform_(part.weight)
        nn.init.zeros_(self.W_x.bias)
        chrono(self.W_delta.bias.data, horizon).neg_()

    def chunk(self, x: Tensor, state: Signed) -> tuple[Tensor, Signed]:
        """State: l and s, (B, D) each."""
        h, state = super().chunk(x, state)
        competing = torch.softmax(h.unflatten(-1, (-1, self.group)), dim=-1).flatten(-2)
        return competing * nn.functional.silu(self.W_out(h)), state

    def enter(self, x: Tensor) -> Tensor:
        return torch.cat([self.W_x(x), self.W_delta(x)], dim=-1)

    def weights(self) -> tuple[Tensor, ...]:
        return (self.W_h.T,)

    def advance(self, entering: Tensor, state: Signed, *weights: Tensor) -> tuple[Tensor, Signed]:
        candidate, gate = entering.chunk(2, dim=-1)
        # the exponent cancels, so that no gradient has to pass through it
        top = state[0].detach().amax(-1, keepdim=True)
        turned = torch.exp(top) * (to_linear((state[0] - top, state[1])) @ weights[0])
        log_new, sign_new = to_log(torch.tanh(candidate + turned))
        kept = nn.functional.logsigmoid(-gate) + state[0], state[1]
        state = add(kept, (nn.functional.logsigmoid(gate) + log_new, sign_new))
        return to_linear(state), state

    def cost(self, length: int) -> Cost:
        return 4 * Cost.linear(length, self.d_model, self.d_model) + Cost(other=45.0 * length * self.d_model)

    def init_state(self, batch: int) -> Signed:
        zero = self.zeros(batch, self.d_model)
        return zero + FLOOR, zero + 1


class LogElman(Stack):
    """group: units that compete for the output; a divisor of d_model. horizon: the longest memory, in tokens, that the
    gates start with; `length` unless given, 2 for none."""

    card = Card(
        title="The Elman Ladder: A 7-Level Ablation Study",
        year=2025,
        url="https://github.com/ekg/elman/blob/main/docs/ladder.md",
        scaling="L",
        causal=True,
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(self, *, d_model: int, length: int, group: int = 8, horizon: int | None = None, **stack: Any) -> None:
        reach = length if horizon is None else horizon
        if group < 1 or d_model % group:
            raise ValueError(f"group is {group}; a divisor of d_model, {d_model}")
        if reach < 1:
            raise ValueError(f"horizon is {reach}; at least 1 token")
        super().__init__(lambda _: LogElmanMixer(d_model, group, reach), d_model=d_model, length=length, **stack)
