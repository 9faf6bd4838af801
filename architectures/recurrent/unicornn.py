"""UnICORNN: independent undamped oscillators, each with its own time step, in stacked layers.

Rusch and Mishra 2021, arXiv:2103.05487, equations 3 and 4. Per token, with the positions y and the velocities z:
(B, H), H = D, both 0 at first, all products element by element but that with V:

    s = dt * sigmoid(c)                                    a step for each unit, learnt: (H,)
    z = z - s * (tanh(w * y + V x + b) + alpha * y)
    y = y + s * z                                          of the new z; the output, (B, H)

A symplectic step of a Hamiltonian system: what a unit holds neither grows nor fades. Units meet in V of the next layer.

Parameters as released: `fc` for V and b, `weight_hh` for w, `c_` for c.

Initialisation as released: w uniform in [0, 1], c in [-0.1, 0.1], V He uniform with a = 8, b = 0; dt = 0.19 and
alpha = 30.65, the values for permuted sequential MNIST.

Departures: a pre-norm residual block followed by a feed-forward part around each layer, where the paper stacks layers
directly, with a residual connection in its deepest networks only.

The loop over time is Python's: it would need an operator for element-wise recurrences of two states.

Checked against: tensors of the authors' kernels, two layers, with the gradient of x by their adjoint kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost

State = tuple[Tensor, Tensor]


class UnICORNNMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, dt: float, alpha: float) -> None:
        super().__init__()
        self.d_model, self.dt, self.alpha = d_model, dt, alpha
        self.fc = nn.Linear(d_model, d_model)
        self.weight_hh = nn.Parameter(torch.rand(d_model))
        self.c_ = nn.Parameter(torch.empty(d_model).uniform_(-0.1, 0.1))
        nn.init.kaiming_uniform_(self.fc.weight, a=8)
        nn.init.zeros_(self.fc.bias)

    def enter(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def weights(self) -> tuple[Tensor, ...]:
        return self.weight_hh, self.dt * torch.sigmoid(self.c_)

    def advance(self, entering: Tensor, state: State, *weights: Tensor) -> tuple[Tensor, State]:
        """State: z and y, (B, D) each."""
        (z, y), (w, step) = state, weights
        force = torch.add(torch.tanh(torch.addcmul(entering, w, y)), y, alpha=self.alpha)
        z = torch.addcmul(z, step, force, value=-1)
        y = torch.addcmul(y, step, z)
        return y, (z, y)

    def cost(self, length: int) -> Cost:
        return Cost.linear(length, self.d_model, self.d_model) + Cost(other=12.0 * length * self.d_model)

    def init_state(self, batch: int) -> State:
        return self.zeros(batch, self.d_model), self.zeros(batch, self.d_model)


class UnICORNN(Stack):
    """dt: twice the step that units start with. alpha: how strongly positions are pulled back."""

    card = Card(
        title="UnICORNN: A recurrent model for learning very long time dependencies",
        year=2021,
        url="https://arxiv.org/abs/2103.05487",
        scaling="L",
        causal=True,
        recall={"dt": 0.1, "alpha": 0.0001},  # the paper searches both for each task
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(self, *, d_model: int, dt: float = 0.19, alpha: float = 30.65, **stack: Any) -> None:
        for name, value in (("dt", dt), ("alpha", alpha)):
            if value <= 0:
                raise ValueError(f"{name} is {value}; more than 0")
        if dt**2 * (alpha + 1) >= 4:
            raise ValueError(f"dt is {dt} with alpha {alpha}; dt^2 (alpha + 1) less than 4, or a step can overshoot")
        super().__init__(lambda _: UnICORNNMixer(d_model, dt, alpha), d_model=d_model, **stack)
