"""MGU: a recurrence with a single gate, which hides the old state from the candidate and mixes the two.

Zhou, Wu, Zhang and Zhou 2016, arXiv:1603.09420, section 3. Per token, with h: (B, H) and H = D:

    f = sigmoid(W_f x + U_f h + b_f)                       forget gate: f = 0 keeps the state
    n = tanh(W_h x + U_h (f * h) + b_h)                    candidate
    h = (1 - f) * h + f * n                                the output, (B, H)

Initialisation: U_f and U_h orthogonal, W Xavier uniform, b_h = 0; b_f = -log(u), u uniform in [1, horizon - 1], the
chrono rule of arXiv:1804.11188: the gate starts with memories from two tokens to `horizon`.

Departures: that initialisation, the paper's being a small Gaussian and b_f = 1; one layer is this recurrence in a
pre-norm residual block followed by a feed-forward part, as the suite's other recurrent networks.

Checked against: tensors of the paper's equations in closed form, with the gradient of x; every other gradient against a
float64 loop over the equations.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lra.architectures._init import chrono
from lra.architectures._recurrence import Recurrence
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost
from lra.kernels.recurrent_cell import recurrent_cell


class MGUMixer(Recurrence):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, horizon: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.input = nn.Linear(d_model, 2 * d_model)  # rows: f, h
        self.U = nn.Parameter(torch.empty(2 * d_model, d_model))
        for w_gate, u_gate in zip(self.input.weight.chunk(2), self.U.chunk(2), strict=True):
            nn.init.xavier_uniform_(w_gate)
            nn.init.orthogonal_(u_gate)
        nn.init.zeros_(self.input.bias)
        chrono(self.input.bias.data[:d_model], horizon).neg_()

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, H)."""
        y = recurrent_cell(self.input(x), self.U, None, "mgu", state, return_state=True)
        return cast(tuple[Tensor, Tensor], y)

    def cost(self, length: int) -> Cost:
        return 2 * Cost.linear(length, self.d_model, 2 * self.d_model) + Cost(other=15.0 * length * self.d_model)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class MGU(Stack):
    """horizon: the longest memory, in tokens, that the gate starts with; `length` unless given, 2 for none."""

    card = Card(
        title="Minimal Gated Unit for Recurrent Neural Networks",
        year=2016,
        url="https://arxiv.org/abs/1603.09420",
        scaling="L",
        causal=True,
    )

    def __init__(self, *, d_model: int, length: int, horizon: int | None = None, **stack: Any) -> None:
        reach = length if horizon is None else horizon
        if reach < 1:
            raise ValueError(f"horizon is {reach}; at least 1 token")
        super().__init__(lambda _: MGUMixer(d_model, reach), d_model=d_model, length=length, **stack)
