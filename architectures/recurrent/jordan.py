"""Jordan network: the state is the network's own output, fed back together with the next input.

Jordan 1986, "Serial Order: A Parallel Distributed Processing Approach", ICS report 8604, in the usual form of two
equations. Per token, with h: (B, H), y: (B, D), y_0 = 0:

    h = tanh(W x + U y + b_h)                              y of the token before
    y = g(V h + b_y)                                       the output, (B, D); g = tanh, or the identity

Variant linear: g is the identity. Then U y is (U V) h + U b_y of the token before: an Elman network with a product for
its recurrent matrix, which is how it is computed.

Initialisation: W Xavier uniform, U and V orthogonal, biases 0: the fed-back output fades as slowly as tanh allows.

Departures: the paper's state units also decay by themselves, y + mu * state; plan units are the input here. A pre-norm
residual block followed by a feed-forward part around the recurrence.

With g = tanh the loop over time is Python's: `recurrent_cell` would need a cell of two products a step.

Checked against: tensors of the two equations in closed form, both g, with the gradient of x.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost
from lra.kernels.recurrent_cell import recurrent_cell

OUTPUTS = ("tanh", "linear")


class JordanMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). hidden: width H; output: g, of OUTPUTS."""

    def __init__(self, d_model: int, hidden: int, output: str) -> None:
        super().__init__()
        self.d_model, self.hidden, self.output = d_model, hidden, output
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(hidden, d_model)))
        self.U = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden, d_model)))
        self.b_h = nn.Parameter(torch.zeros(hidden))
        self.V = nn.Parameter(nn.init.orthogonal_(torch.empty(d_model, hidden)))
        self.b_y = nn.Parameter(torch.zeros(d_model))

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: y (B, D)."""
        if self.output == "tanh":
            return super().chunk(x, state)
        fed_back = torch.cat([(state - self.b_y).unsqueeze(1), torch.zeros_like(x[:, 1:])], dim=1) @ self.U.T
        entering = self.enter(x) + self.U @ self.b_y + fed_back
        h = cast(Tensor, recurrent_cell(entering, self.U @ self.V, None, "elman"))
        y = nn.functional.linear(h, self.V, self.b_y)
        return y, y[:, -1]

    def enter(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.W, self.b_h)

    def weights(self) -> tuple[Tensor, ...]:
        return self.U.T, self.V.T, self.b_y

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        U, V, b_y = weights
        y = torch.tanh(torch.addmm(b_y, torch.tanh(torch.addmm(entering, state, U)), V))
        return y, y

    def cost(self, length: int) -> Cost:
        width, hidden = self.d_model, self.hidden
        work = Cost.linear(length, width, hidden) + Cost.linear(length, hidden, width)
        if self.output == "tanh":
            return work + Cost.linear(length, width, hidden) + Cost(other=5.0 * length * (width + hidden))
        # U V and U b_y, made once for a batch
        product = Cost(2.0 * hidden * hidden * width + 2.0 * hidden * width).per_batch + Cost(
            other=5.0 * length * hidden
        )
        return work + Cost.linear(length, hidden, hidden) + Cost.linear(length, width, hidden, bias=False) + product

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class Jordan(Stack):
    """output: g, of OUTPUTS. hidden: width of h over d_model."""

    card = Card(
        title="Serial Order: A Parallel Distributed Processing Approach",
        year=1986,
        url="https://doi.org/10.1016/S0166-4115(97)80111-2",
        scaling="L",
        causal=True,
        variants={"linear": {"output": "linear"}},
        no_recall="its output passes through two tanh at every step, so the gradient of the first token vanishes",
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(self, *, d_model: int, output: str = "tanh", hidden: float = 1.0, **stack: Any) -> None:
        if output not in OUTPUTS:
            raise ValueError(f"output is {output!r}; one of {', '.join(OUTPUTS)}")
        if round(hidden * d_model) < 1:
            raise ValueError(f"hidden is {hidden}; at least one unit, hidden * d_model")
        super().__init__(lambda _: JordanMixer(d_model, round(hidden * d_model), output), d_model=d_model, **stack)
