"""RHN: several highway layers within every step of a recurrence.

Zilly, Srivastava, Koutnik and Schmidhuber 2016, arXiv:1607.03474, with the carry gate coupled, c = 1 - t. Per token,
with s: (B, H) and H = D, s_0 the output of the step before, for l = 1..depth:

    a_l = tanh(U_l s_{l-1} + b_l + [l = 1] W_h x)          candidate
    t_l = sigmoid(V_l s_{l-1} + e_l + [l = 1] W_t x)       transform gate: t = 0 carries the state
    s_l = t_l * a_l + (1 - t_l) * s_{l-1}
    y = s_depth                                            the output and the next s_0, (B, H)

Variant hierarchical: y = W_o [s_1, ..., s_depth] + b_o reads every level, after arXiv:1806.00685, whose decoder reads
the states of all highway layers of its encoder. That paper weighs each level over time by attention; here a token reads
its own levels alone, so that the network stays a recurrence.

Parameters: `input` holds W_h and W_t, `U` (2 H depth, H) and `b` hold U_1, V_1, U_2, ... and b_1, e_1, b_2, ...

Initialisation: U_l and V_l orthogonal, W and W_o Xavier uniform, b = 0; e_l = -log(u), u uniform in
[1, depth horizon - 1]: after the chrono rule of arXiv:1804.11188, with depth gates a token, memories from a token to
`horizon`.

Departures: that initialisation, the released code having one negative number for e; no dropout inside the recurrence;
a pre-norm residual block followed by a feed-forward part around it.

Checked against: tensors of the authors' cell with three layers, with the gradient of x; every other gradient, and the
hierarchical form, against a float64 loop over the equations.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lra.architectures._checks import at_least
from lra.architectures._init import chrono
from lra.architectures._recurrence import Recurrence
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost
from lra.kernels.recurrent_cell import recurrent_cell


class RHNMixer(Recurrence):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, depth: int, horizon: int, hierarchical: bool = False) -> None:
        super().__init__()
        self.d_model, self.depth = d_model, depth
        self.input = nn.Linear(d_model, 2 * d_model, bias=False)  # rows: h, t
        self.U = nn.Parameter(torch.empty(2 * depth * d_model, d_model))
        self.b = nn.Parameter(torch.zeros(2 * depth * d_model))
        self.out = nn.Linear(depth * d_model, d_model) if hierarchical else None
        for weight in self.input.weight.chunk(2):
            nn.init.xavier_uniform_(weight)
        for weight in self.U.chunk(2 * depth):
            nn.init.orthogonal_(weight)
        for bias in self.b.data.chunk(2 * depth)[1::2]:
            chrono(bias, depth * horizon).neg_()
        if self.out is not None:
            nn.init.xavier_uniform_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: s (B, H)."""
        entering = self.input(x)
        y, last = cast(tuple[Tensor, Tensor], recurrent_cell(entering, self.U, self.b, "rhn", state, return_state=True))
        if self.out is None:
            return y, last
        # every step's first state is known by now, so that the levels of all steps follow side by side
        s = torch.cat([state.to(y.dtype).unsqueeze(1), y[:, :-1]], dim=1)
        levels = []
        for u, b in zip(self.U.chunk(self.depth)[:-1], self.b.chunk(self.depth)[:-1], strict=True):
            candidate, transform = (nn.functional.linear(s, u, b) + entering).chunk(2, dim=-1)
            s, entering = s + torch.sigmoid(transform) * (torch.tanh(candidate) - s), torch.zeros_like(entering)
            levels.append(s)
        return self.out(torch.cat([*levels, y], dim=-1)), last

    def cost(self, length: int) -> Cost:
        width = self.d_model
        layer = Cost.linear(length, width, 2 * width) + Cost(other=12.0 * length * width)
        work = Cost.linear(length, width, 2 * width, bias=False) + layer * self.depth
        if self.out is None:
            return work
        return work + layer * (self.depth - 1) + Cost.linear(length, self.depth * width, width)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class RHN(Stack):
    """depth: highway layers in a step. horizon: the longest memory, in tokens, that the gates start with; `length`
    unless given. hierarchical: the output reads every layer."""

    card = Card(
        title="Recurrent Highway Networks",
        year=2016,
        url="https://arxiv.org/abs/1607.03474",
        scaling="L",
        causal=True,
        variants={"hierarchical": {"hierarchical": True}},
    )

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        depth: int = 3,
        horizon: int | None = None,
        hierarchical: bool = False,
        **stack: Any,
    ) -> None:
        reach = length if horizon is None else horizon
        at_least(1, depth=depth, horizon=reach)
        super().__init__(
            lambda _: RHNMixer(d_model, depth, reach, hierarchical), d_model=d_model, length=length, **stack
        )
