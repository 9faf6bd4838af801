"""Delta Elman: the plain recurrence, to which a gate, a selective output and a diagonal matrix are added in steps.

The ladder of ekg/elman @ 1b9e1ac, docs/ladder.md, levels 0 to 4; there is no paper. Per token, h: (B, H) and H = D:

    step 0       h = tanh(W_x x + W_h h + b),  y = h                   Elman 1990
    step 1       delta = sigmoid(W_delta x + b_delta)
                 h = (1 - delta) * h + delta * tanh(W_x x + W_h h + b),  y = h
    step 2       y = softmax of h in groups * silu(W_out h)            units of a group compete
    step 3       r_h * h in place of W_h h                             each unit remembers itself alone
    step 4       step 3 with h held as (log |h|, sign h), which cannot underflow

Each step has all of those before it. The default is step 2; every step is a variant, step0 to step4.

Initialisation: W Xavier uniform, W_h orthogonal, r_h uniform in [0, 1], b = 0; b_delta = -log(u), u uniform in
[1, horizon - 1], the chrono rule of arXiv:1804.11188: memories from two tokens to `horizon`.

Departures: that initialisation; the surroundings, a pre-norm residual block followed by a feed-forward part.

Steps 1 to 3 are the operator's cell `rhn` of depth 1 with no recurrent part in its gate: twice the work of W_h alone,
and for step 3 a matrix that is diagonal. Step 4 is a Python loop: it would need an operator in logarithms.

Checked against: float64 loops over the equations, with every gradient; torch.nn.RNN (step 0); step 4 against step 3.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lra.architectures._init import chrono
from lra.architectures._logspace import FLOOR, add, to_linear, to_log
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost
from lra.kernels.recurrent_cell import recurrent_cell

STEPS = (0, 1, 2, 3, 4)


class DeltaElmanMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). group: units that compete."""

    def __init__(self, d_model: int, step: int, group: int, horizon: int) -> None:
        super().__init__()
        self.d_model, self.ladder, self.group = d_model, step, group
        self.W_x = nn.Linear(d_model, d_model)
        self.W_h = nn.Parameter(nn.init.orthogonal_(torch.empty(d_model, d_model))) if step < 3 else None
        self.r_h = nn.Parameter(torch.rand(d_model)) if step >= 3 else None
        self.W_delta = nn.Linear(d_model, d_model) if step >= 1 else None
        self.W_out = nn.Linear(d_model, d_model, bias=False) if step >= 2 else None
        for part in (self.W_x, self.W_delta, self.W_out):
            if part is not None:
                nn.init.xavier_uniform_(part.weight)
        nn.init.zeros_(self.W_x.bias)
        if self.W_delta is not None:
            chrono(self.W_delta.bias.data, horizon).neg_()

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """State: h (B, D); in step 4 log |h| and the sign of h, (B, D) each."""
        if self.ladder == 4:
            h, state = super().chunk(x, state)
        else:
            h, state = self._operator(x, state)
        if self.W_out is None:
            return h, state
        competing = torch.softmax(h.unflatten(-1, (-1, self.group)), dim=-1).flatten(-2)
        return competing * nn.functional.silu(self.W_out(h)), state

    def _operator(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        U = torch.diag(self.r_h) if self.r_h is not None else cast(Tensor, self.W_h)
        cell = "elman"
        if self.W_delta is not None:
            cell, U = "rhn", torch.cat([U, torch.zeros_like(U)])
        return cast(tuple[Tensor, Tensor], recurrent_cell(self.enter(x), U, None, cell, state, return_state=True))

    def enter(self, x: Tensor) -> Tensor:
        return self.W_x(x) if self.W_delta is None else torch.cat([self.W_x(x), self.W_delta(x)], dim=-1)

    def weights(self) -> tuple[Tensor, ...]:
        return (cast(Tensor, self.r_h),)

    def advance(self, entering: Tensor, state: Any, *weights: Tensor) -> tuple[Tensor, Any]:
        candidate, gate = entering.chunk(2, dim=-1)
        log_new, sign_new = to_log(torch.tanh(candidate + weights[0] * to_linear(state)))
        kept = nn.functional.logsigmoid(-gate) + state[0], state[1]
        state = add(kept, (nn.functional.logsigmoid(gate) + log_new, sign_new))
        return to_linear(state), state

    def cost(self, length: int) -> Cost:
        width = self.d_model
        maps = Cost.linear(length, width, width) * (1 + (self.ladder >= 1) + (self.ladder >= 2))
        recurrent = {0: 2.0, 1: 4.0, 2: 4.0, 3: 4.0, 4: 0.0}[self.ladder] * length * width**2
        return maps + Cost(recurrent, (40.0 if self.ladder == 4 else 15.0) * length * width)

    def init_state(self, batch: int) -> Any:
        zero = self.zeros(batch, self.d_model)
        return (zero + FLOOR, zero + 1) if self.ladder == 4 else zero


class DeltaElman(Stack):
    """step: of the ladder, 0 to 4. group: units that compete for the output; a divisor of d_model. horizon: the longest
    memory, in tokens, that the gates start with; `length` unless given, 2 for none."""

    card = Card(
        title="The Elman Ladder: A 7-Level Ablation Study",
        year=2025,
        url="https://github.com/ekg/elman",
        scaling="L",
        causal=True,
        variants={
            "step0": {"step": 0},
            "step1": {"step": 1},
            "step2": {"step": 2},
            "step3": {"step": 3},
            "step4": {"step": 4},
        },
        exempt={"step4/exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(
        self, *, d_model: int, length: int, step: int = 2, group: int = 8, horizon: int | None = None, **stack: Any
    ) -> None:
        reach = length if horizon is None else horizon
        if step not in STEPS:
            raise ValueError(f"step is {step}; from 0 to 4")
        if group < 1 or d_model % group:
            raise ValueError(f"group is {group}; a divisor of d_model, {d_model}")
        if reach < 1:
            raise ValueError(f"horizon is {reach}; at least 1 token")
        super().__init__(
            lambda _: DeltaElmanMixer(d_model, step, group, reach), d_model=d_model, length=length, **stack
        )
