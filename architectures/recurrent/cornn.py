"""coRNN: a network of damped oscillators, forced by the input and coupled through their positions and velocities.

Rusch and Mishra 2020, arXiv:2010.00951, equations 1 and 3, discretised as in the released code. Per token, with the
positions y and the velocities z: (B, H), H = D, both 0 at first:

    z = z + dt * (tanh(W_x x + W_z z + W_y y + b) - gamma * y - epsilon * z)      everything old
    y = y + dt * z                                                              of the new z; the output, (B, H)

Parameters as released: `i2h` maps [x, z, y]. dt: length of a step; gamma: frequencies; epsilon: damping.

Initialisation as released: PyTorch's own of one linear map of 3 D features; dt = 0.042, gamma = 2.7, epsilon = 4.7, the
values for sequential MNIST.

Departures: the damping acts on the old velocity, as in the code, where the paper's scheme is implicit in it; a pre-norm
residual block followed by a feed-forward part around the recurrence.

The loop over time is Python's: `recurrent_cell` would need this cell.

Checked against: tensors of the authors' cell, positions and velocities, with the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost

State = tuple[Tensor, Tensor]


class CoRNNMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, dt: float, gamma: float, epsilon: float) -> None:
        super().__init__()
        self.d_model, self.dt, self.gamma, self.epsilon = d_model, dt, gamma, epsilon
        self.i2h = nn.Linear(3 * d_model, d_model)  # columns: x, z, y

    def enter(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.i2h.weight[:, : self.d_model], self.i2h.bias)

    def weights(self) -> tuple[Tensor, ...]:
        return (self.i2h.weight[:, self.d_model :].T,)

    def advance(self, entering: Tensor, state: State, *weights: Tensor) -> tuple[Tensor, State]:
        """State: z and y, (B, D) each."""
        z, y = state
        force = torch.tanh(torch.addmm(entering, torch.cat(state, dim=-1), weights[0]))
        z = z + self.dt * (force - self.gamma * y - self.epsilon * z)
        y = y + self.dt * z
        return y, (z, y)

    def cost(self, length: int) -> Cost:
        return Cost.linear(length, 3 * self.d_model, self.d_model) + Cost(other=12.0 * length * self.d_model)

    def init_state(self, batch: int) -> State:
        return self.zeros(batch, self.d_model), self.zeros(batch, self.d_model)


class CoRNN(Stack):
    """dt: length of a step. gamma: how strongly positions are pulled back. epsilon: damping of the velocities."""

    card = Card(
        title="Coupled Oscillatory Recurrent Neural Network (coRNN): An accurate and (gradient) stable architecture "
        "for learning long time dependencies",
        year=2020,
        url="https://arxiv.org/abs/2010.00951",
        scaling="L",
        causal=True,
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(
        self, *, d_model: int, dt: float = 0.042, gamma: float = 2.7, epsilon: float = 4.7, **stack: Any
    ) -> None:
        for name, value in (("dt", dt), ("gamma", gamma), ("epsilon", epsilon)):
            if value <= 0:
                raise ValueError(f"{name} is {value}; more than 0")
        super().__init__(lambda _: CoRNNMixer(d_model, dt, gamma, epsilon), d_model=d_model, **stack)
