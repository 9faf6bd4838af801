"""Antisymmetric RNN: Euler steps of a stable differential equation with an antisymmetric matrix.

Chang, Chen, Haber and Chi 2019, arXiv:1902.09689, equations 10 and 12 to 14. Per token, with h: (B, H), H = D, h_0 = 0:

    W = C - C^T - gamma I                                  eigenvalues -gamma + i omega: (H, H)
    h = h + eps * tanh(W h + V x + b)                      the output, (B, H)

Variant gated: h = h + eps * z * tanh(W h + V x + b), with z = sigmoid(W h + V_z x + b_z) of the same W.

Parameters as in the code of arXiv:2006.12070, which runs this network too: `C`, and E and E_gate for V and V_z. That
code multiplies by W on the right; here, as in the papers, on the left.

Initialisation: C Gaussian with variance 1 / D, V Xavier uniform, biases 0; eps = 0.01, gamma = 0.001, of the values the
paper searches over. With so small an eps a unit moves over some 1 / eps tokens.

Departures: a pre-norm residual block followed by a feed-forward part around the recurrence; C is a full matrix whose
symmetric half has no effect, where the paper stores its upper triangle.

The loop over time is Python's: `recurrent_cell` would need this cell.

Checked against: tensors of the plain form from the code of arXiv:2006.12070, with the gradient of x; the gated form
against that code's gated Lipschitz network without its linear term.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost


class AntisymmetricMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, eps: float, gamma: float, gated: bool) -> None:
        super().__init__()
        self.d_model, self.eps, self.gamma = d_model, eps, gamma
        self.C = nn.Parameter(torch.randn(d_model, d_model) / d_model**0.5)
        self.E = nn.Linear(d_model, d_model)
        self.E_gate = nn.Linear(d_model, d_model) if gated else None
        for part in (self.E, self.E_gate):
            if part is not None:
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def enter(self, x: Tensor) -> Tensor:
        return self.E(x) if self.E_gate is None else torch.cat([self.E(x), self.E_gate(x)], dim=-1)

    def weights(self) -> tuple[Tensor, ...]:
        return (self.C - self.C.T - self.gamma * torch.eye(self.d_model, dtype=self.C.dtype, device=self.C.device),)

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        turned = state @ weights[0].T
        if self.E_gate is None:
            h = torch.add(state, torch.tanh(turned + entering), alpha=self.eps)
        else:
            new, gate = entering.chunk(2, dim=-1)
            h = torch.add(state, torch.sigmoid(turned + gate) * torch.tanh(turned + new), alpha=self.eps)
        return h, h

    def cost(self, length: int) -> Cost:
        width, maps = self.d_model, 2 if self.E_gate is None else 3
        return Cost.linear(length, width, width) * maps + Cost(other=8.0 * length * width + 3.0 * width**2)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class Antisymmetric(Stack):
    """eps: the step. gamma: how much the state is damped. gated: a gate on every unit's step."""

    card = Card(
        title="AntisymmetricRNN: A Dynamical System View on Recurrent Neural Networks",
        year=2019,
        url="https://arxiv.org/abs/1902.09689",
        scaling="L",
        causal=True,
        variants={"gated": {"gated": True}},
        exempt={
            "exports": "a Python loop over the tokens is unrolled for one length",
            "magnitudes": "the state is an integral over the tokens: it grows until the damping balances its inputs",
        },
    )

    def __init__(
        self, *, d_model: int, eps: float = 0.01, gamma: float = 0.001, gated: bool = False, **stack: Any
    ) -> None:
        if eps <= 0:
            raise ValueError(f"eps is {eps}; a step larger than 0")
        if gamma < 0:
            raise ValueError(f"gamma is {gamma}; at least 0, or the state grows")
        super().__init__(lambda _: AntisymmetricMixer(d_model, eps, gamma, gated), d_model=d_model, **stack)
