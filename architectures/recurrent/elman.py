"""Elman network: the plain recurrence with one matrix and one nonlinearity per token.

Elman 1990, doi:10.1207/s15516709cog1402_1. Per token, with h: (B, H) and H = D:

    h = act(W x + b + U h)                                 act = tanh or relu; the output, (B, H)

The recurrent matrix U is one of
    free         V itself
    spectral     V min(1, 0.99 / |V|), |V| its largest singular value: the state never grows
    orthogonal   sigmoid(s) Q, Q = Q_0 Cayley((V - V') / 2) with Q_0 fixed, V upper triangular and s one number a layer:
                 but for act, s alone shrinks h

Initialisation: W Xavier uniform, b = 0. V of free and spectral: orthogonal for tanh, so that the state starts to fade
as slowly as tanh allows; for relu the identity (arXiv:1504.00941). Q_0 uniform over the orthogonal matrices, V = 0, so
that Q = Q_0; s = 6, sigmoid(s) = 0.9975.

Departures: the paper has one layer, logistic units and free U. Here one layer is this recurrence in a pre-norm residual
block followed by a feed-forward part, as the suite's other recurrent networks. The bounds on U are a control's, chosen
here: the largest singular value is computed, where spectral normalisation (arXiv:1802.05957) follows it by iteration.

A recurrence with tanh loses its first inputs: the gradient through t steps is a product of t factors tanh' U. This
network is the one that is expected to fail where the memory has to be long.

Checked against: torch.nn.RNN, tanh and relu, outputs and gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._orthogonal import cayley, skew
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.recurrent_cell import recurrent_cell
from lra.kernels.recurrent_cell.layer import recurrent_layer

ACTIVATIONS = {"tanh": "elman", "relu": "elman_relu"}
RECURRENT = ("free", "spectral", "orthogonal")
BOUND = 0.99


class ElmanMixer(Mixer):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    Q_0: Tensor

    def __init__(self, d_model: int, activation: str, recurrent: str) -> None:
        super().__init__()
        self.activation, self.recurrent = activation, recurrent
        self.input = nn.Linear(d_model, d_model)
        self.state = nn.Linear(d_model, d_model, bias=False)
        nn.init.xavier_uniform_(self.input.weight)
        nn.init.zeros_(self.input.bias)
        nn.init.orthogonal_(self.state.weight)
        if recurrent == "orthogonal":
            self.V = nn.Parameter(torch.zeros(d_model, d_model))  # its strict upper triangle counts
            self.register_buffer("Q_0", self.state.weight.detach())
            del self.state
            self.scale = nn.Parameter(torch.tensor(6.0))
        elif activation == "relu":
            nn.init.eye_(self.state.weight)

    @property
    def U(self) -> Tensor:
        """(H, H)."""
        if self.recurrent == "spectral":
            V = wide(self.state.weight)
            return V * (BOUND / torch.linalg.matrix_norm(V, 2)).clamp_max(1)
        if self.recurrent == "orthogonal":
            return self.scale.sigmoid() * (wide(self.Q_0) @ cayley(skew(wide(self.V)) / 2))
        return self.state.weight

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        cell = ACTIVATIONS[self.activation]
        return recurrent_layer(x, self.input.weight, self.input.bias, self.U, None, cell)

    def cost(self, length: int) -> Cost:
        width = self.input.in_features
        bounded = {"free": 0.0, "spectral": 20.0, "orthogonal": 3.0}[self.recurrent] * width**3  # a factorisation
        turned = 2.0 * width**3 if self.recurrent == "orthogonal" else 0.0
        own = 2 * Cost.linear(length, width, width) + Cost(other=5.0 * length * width)
        return own + Cost(turned, bounded).per_batch

    def init_state(self, batch: int) -> Tensor:
        return self.input.weight.new_zeros(batch, self.input.in_features)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, H)."""
        h = self.input(x) + state @ self.U.T
        h = torch.tanh(h) if self.activation == "tanh" else torch.relu(h)
        return h, h

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        cell = ACTIVATIONS[self.activation]
        h, last = recurrent_cell(self.input(x), self.U, None, cell, state, return_state=True)
        return h, last


class Elman(Stack):
    """activation: "tanh" or "relu". recurrent: how the recurrent matrix is bounded, of RECURRENT."""

    card = Card(
        title="Finding Structure in Time",
        year=1990,
        url="https://doi.org/10.1207/s15516709cog1402_1",
        scaling="L",
        causal=True,
        exempt={"relu/magnitudes": "the matrix starts as the identity (arXiv:1504.00941): units sum over the length"},
        no_recall="its state passes through tanh at every step, so the gradient of the first token vanishes",
        variants={
            "relu": {"activation": "relu"},
            "spectral": {"recurrent": "spectral"},
            "orthogonal": {"recurrent": "orthogonal"},
            "orthogonal-relu": {"recurrent": "orthogonal", "activation": "relu"},
        },
    )

    def __init__(self, *, d_model: int, activation: str = "tanh", recurrent: str = "free", **stack: Any) -> None:
        for name, value, known in (("activation", activation, ACTIVATIONS), ("recurrent", recurrent, RECURRENT)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; one of {', '.join(known)}")
        super().__init__(lambda _: ElmanMixer(d_model, activation, recurrent), d_model=d_model, **stack)
