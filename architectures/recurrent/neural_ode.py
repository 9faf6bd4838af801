"""Neural ODE (ODE-RNN): a state that follows a learnt differential equation between tokens and jumps at each.

Chen, Rubanova, Bettencourt and Duvenaud 2018, arXiv:1806.07366, with the update of Rubanova et al. 2019,
arXiv:1907.03907. Per token that comes a time t after the one before (here t = 1), with h: (B, H), H = D, h_0 = 0:

    h = h(t),   dh/dt = W_2 tanh(W_1 h + b_1) + b_2        from the state after the token before, `steps` equal steps
    r, z = sigmoid(W_r x + b_r + U_r h + c_r), ...         a GRU cell, as torch.nn.GRUCell has it
    h = (1 - z) tanh(W_n x + b_n + r (U_n h + c_n)) + z h  the output, (B, H)

Nothing is integrated before the first token. A step of length s is one of
    euler        h + s f(h)
    midpoint     h + s f(h + s/2 f(h))
    rk4          the 3/8 rule, torchdiffeq's rk4: nodes 0, 1/3, 2/3, 1 with weights 1/8, 3/8, 3/8, 1/8, of order four

Initialisation: W_1 and the maps of the GRU Xavier uniform, its recurrent matrices orthogonal, biases 0; W_2 Gaussian
with deviation 0.1 / sqrt(U), so that the state hardly moves at first. Hidden units U = D.

Departures: gradients flow through the steps of the solver, not by the adjoint equation; steps are fixed, where the
papers' solvers adapt them; a pre-norm residual block followed by a feed-forward part around the network.

The loop over time is Python's: an operator would need a network inside a step.

Checked against: tensors of torchdiffeq on a fixed grid with torch.nn.GRUCell: the three methods, irregular times, every
gradient (rk4).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lra.architectures._checks import at_least, one_of
from lra.architectures._recurrence import Timed
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost

EVALUATIONS = {"euler": 1, "midpoint": 2, "rk4": 4}
State = tuple[Tensor, Tensor]


class NeuralODEMixer(Timed):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). units: U; method: of EVALUATIONS."""

    def __init__(self, d_model: int, units: int, method: str, steps: int) -> None:
        super().__init__()
        self.d_model, self.units, self.method, self.steps = d_model, units, method, steps
        self.net = nn.Sequential(nn.Linear(d_model, units), nn.Tanh(), nn.Linear(units, d_model))
        self.cell = nn.GRUCell(d_model, d_model)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            elif name == "net.2.weight":
                nn.init.normal_(parameter, std=0.1 * units**-0.5)
            else:
                initialise = nn.init.orthogonal_ if name == "cell.weight_hh" else nn.init.xavier_uniform_
                for block in parameter.data.split(units if name == "net.0.weight" else d_model):
                    initialise(block)

    def project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.cell.weight_ih, self.cell.bias_ih)

    def weights(self) -> tuple[Tensor, ...]:
        first, last = cast(nn.Linear, self.net[0]), cast(nn.Linear, self.net[2])
        return first.weight.T, first.bias, last.weight.T, last.bias, self.cell.weight_hh.T, self.cell.bias_hh

    def advance(self, entering: Tensor, state: State, *weights: Tensor) -> tuple[Tensor, State]:
        """State: h (B, D), and whether a token came before, 0 or 1 (B, 1)."""
        W_1, b_1, W_2, b_2, U, c = weights
        h, started = state
        s = entering[:, -1:] * started / self.steps  # steps of no length before the first token

        def f(h: Tensor) -> Tensor:
            return torch.addmm(b_2, torch.tanh(torch.addmm(b_1, h, W_1)), W_2)

        for _ in range(self.steps):
            k1 = f(h)
            if self.method == "euler":
                h = h + s * k1
            elif self.method == "midpoint":
                h = h + s * f(h + s / 2 * k1)
            else:
                k2 = f(h + s * k1 / 3)
                k3 = f(h + s * (k2 - k1 / 3))
                h = h + s / 8 * (k1 + 3 * (k2 + k3) + f(h + s * (k1 - k2 + k3)))
        r, z, n = entering[:, :-1].chunk(3, dim=-1)
        u_r, u_z, u_n = torch.addmm(c, h, U).chunk(3, dim=-1)
        z = torch.sigmoid(z + u_z)
        h = (1 - z) * torch.tanh(n + torch.sigmoid(r + u_r) * u_n) + z * h
        return h, (h, torch.ones_like(started))

    def cost(self, length: int) -> Cost:
        width, units, count = self.d_model, self.units, self.steps * EVALUATIONS[self.method]
        f = Cost.linear(length, width, units) + Cost.linear(length, units, width) + Cost(other=4.0 * length * units)
        gates = 2 * Cost.linear(length, width, 3 * width) + Cost(other=20.0 * length * width)
        return f * count + gates + Cost(other=5.0 * count * length * width)

    def init_state(self, batch: int) -> State:
        return self.zeros(batch, self.d_model), self.zeros(batch, 1)


class NeuralODE(Stack):
    """method: of a step, of EVALUATIONS. steps: between two tokens. units: hidden width of the equation, `d_model`
    unless given."""

    card = Card(
        title="Neural Ordinary Differential Equations",
        year=2018,
        url="https://arxiv.org/abs/1806.07366",
        scaling="L",
        causal=True,
        variants={"euler": {"method": "euler"}, "midpoint": {"method": "midpoint"}},
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(
        self, *, d_model: int, method: str = "rk4", steps: int = 1, units: int | None = None, **stack: Any
    ) -> None:
        one_of(EVALUATIONS, method=method)
        at_least(1, steps=steps, units=units)
        super().__init__(lambda _: NeuralODEMixer(d_model, units or d_model, method, steps), d_model=d_model, **stack)
