"""SRU: gates computed from the token and, elementwise, from the cell; no matrix between consecutive tokens.

Lei, Zhang, Wang, Dai and Artzi 2017, arXiv:1709.02755, in the form of its last version. Per token, with c: (B, D):

    f = sigmoid(W_f x + v_f * c + b_f)                     forget gate: f = 1 keeps the cell
    r = sigmoid(W_r x + v_r * c + b_r)                     highway gate, of the same old cell
    c = f * c + (1 - f) * (W x)
    y = r * g(c) + (1 - r) * s                             the output, (B, D); g the identity or tanh
    s = a x                                                a = sqrt(1 + 2 exp(b_r)) of the first b_r, then fixed

Variants:
    v1           v_f = v_r = 0, of the paper's first version: the recurrence is one linear scan
    projected    s = W_s x, as the released code has it where input and output differ in width

Parameters as in the released code: `weight` (D, k D), whose column d k + j is feature d of matrix j (W, W_f, W_r, W_s),
`weight_c` = [v_f, v_r], `bias` = [b_f, b_r].

Initialisation as released: weight uniform with variance 1 / D, those of the gates halved in variance; weight_c uniform
with variance 1/2; b_r = 0; W_s times a. But b_f = log(u), u uniform in [1, horizon - 1], the chrono rule of
arXiv:1804.11188, where the code has 0: memories from two tokens to `horizon`.

Departures: that bias; and the surroundings, a pre-norm residual block followed by a feed-forward part.

Checked against: tensors of the authors' code, all three forms, with the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._init import chrono
from lra.architectures._precision import wide
from lra.architectures._recurrence import Recurrence
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost
from lra.kernels.linear_scan import linear_scan

ACTIVATIONS = ("identity", "tanh")


class SRUMixer(Recurrence):
    """(B, L, D) -> (B, L, D). peephole: the gates see the cell."""

    scale_x: Tensor

    def __init__(self, d_model: int, *, horizon: int, peephole: bool, projected: bool, activation: str) -> None:
        super().__init__()
        self.d_model, self.projected, self.activation = d_model, projected, activation
        bound, matrices = (3 / d_model) ** 0.5, 4 if projected else 3
        self.weight = nn.Parameter(torch.empty(d_model, matrices * d_model).uniform_(-bound, bound))
        self.weight_c = nn.Parameter(torch.empty(2 * d_model).uniform_(-(1.5**0.5), 1.5**0.5)) if peephole else None
        self.bias = nn.Parameter(torch.zeros(2 * d_model))
        self.register_buffer("scale_x", torch.tensor(3**0.5))
        by_matrix = self.weight.data.view(d_model, d_model, matrices)
        if peephole:
            by_matrix[..., 1:3] *= 0.5**0.5
        if projected:
            by_matrix[..., 3] *= self.scale_x
        chrono(self.bias.data[:d_model], horizon)

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: c (B, D)."""
        u = wide(x @ self.weight).unflatten(-1, (self.d_model, -1))
        b_f, b_r = self.bias.chunk(2)
        candidate, forget, highway = u[..., 0], u[..., 1] + b_f, u[..., 2] + b_r
        if self.weight_c is None:
            f = torch.sigmoid(forget)
            c = linear_scan(f, (1 - f) * candidate, state)
        else:
            v_f, v_r = self.weight_c.chunk(2)
            c = _gated_by_cell(candidate, forget, v_f, state)
            highway = highway + v_r * torch.cat([state.unsqueeze(1), c[:, :-1]], dim=1)
        skip = u[..., 3] if self.projected else self.scale_x * x
        shown = torch.tanh(c) if self.activation == "tanh" else c
        return (skip + torch.sigmoid(highway) * (shown - skip)).to(x.dtype), c[:, -1]

    def cost(self, length: int) -> Cost:
        return Cost.linear(length, self.d_model, self.weight.shape[1], bias=False) + Cost(
            other=25.0 * length * self.d_model
        )

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


def _gated_by_cell(candidate: Tensor, forget: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """c = f c + (1 - f) candidate with f = sigmoid(forget + v c), a token at a time: (B, C, D), the first c (B, D)."""
    cells = []
    for new, gate in zip(candidate.unbind(1), forget.unbind(1), strict=True):
        c = torch.lerp(new, c.to(new.dtype), torch.sigmoid(torch.addcmul(gate, v.to(gate.dtype), c.to(gate.dtype))))
        cells.append(c)
    return torch.stack(cells, dim=1)


class SRU(Stack):
    """horizon: the longest memory, in tokens, that the forget gates start with; `length` unless given, 2 for none.
    peephole: gates see the cell. projected: the highway carries W_s x. activation: of the cell, of ACTIVATIONS."""

    card = Card(
        title="Simple Recurrent Units for Highly Parallelizable Recurrence",
        year=2017,
        url="https://arxiv.org/abs/1709.02755",
        scaling="L",
        causal=True,
        variants={"v1": {"peephole": False, "activation": "tanh"}, "projected": {"projected": True}},
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        horizon: int | None = None,
        peephole: bool = True,
        projected: bool = False,
        activation: str = "identity",
        **stack: Any,
    ) -> None:
        reach = length if horizon is None else horizon
        if reach < 1:
            raise ValueError(f"horizon is {reach}; at least 1 token")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; one of {', '.join(ACTIVATIONS)}")
        super().__init__(
            lambda _: SRUMixer(d_model, horizon=reach, peephole=peephole, projected=projected, activation=activation),
            d_model=d_model,
            length=length,
            **stack,
        )
