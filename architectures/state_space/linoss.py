"""LinOSS: a state of forced harmonic oscillators, discretised so that it is stable for any frequency and step size.

Rusch and Rus 2024, arXiv:2410.03943. y'' = -A y + B x with P oscillators, A = relu(A_diag) >= 0 and a step size
dt = sigmoid(steps) for each; z = y' is the velocity, and both start at zero:

    im    z_n = z_{n-1} + dt (-A y_n + B x_n),       y_n = y_{n-1} + dt z_n     implicit; loses energy
    imex  z_n = z_{n-1} + dt (-A y_{n-1} + B x_n),   y_n = y_{n-1} + dt z_n     implicit-explicit; keeps energy
    o_n = Re(C y_n) + D x_n                          (B, L, D)   B complex (P, D), C complex (D, P), D (D,)
    out = (W_1 g + b_1) sigmoid(W_2 g + b_2),  g = gelu(o)       (B, L, D), tanh form of GELU

Without z, and with a = dt^2 A, both are y_n = t y_{n-1} - d y_{n-2} + e B x_n:

    im    t = 2 d,    d = 1 / (1 + a),  e = d dt^2
    imex  t = 2 - a,  d = 1,            e = dt^2

The polynomial 1 - t q + d q^2 = (1 - l_1 q)(1 - l_2 q) makes y a scan with l_1 of a scan with l_2, which needs no
eigenvectors and so holds for double roots (A = 0) too.

Initialisation, as released: A_diag and steps uniform in [0, 1]; both parts of B uniform within D^-1/2, of C within
P^-1/2; D standard normal; W, b PyTorch's own.

Departures: layer norm unless the recipe says otherwise, where the released block has batch norm without gain and bias.
A_diag and steps learn without weight decay, which would slow every oscillator down. A block holds no feed-forward
part beside the gate, as there.

Checked against: tensors of the authors' LinOSSLayer, both discretisations: outputs, gradients of x and of every
parameter, with a frequency that relu holds at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least, one_of
from lra.architectures._dropout import Dropout
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.linear_scan import linear_scan

DISCRETIZATIONS = ("im", "imex")
State = tuple[Tensor, Tensor]


class LinOSSMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, state_size: int, discretization: str, dropout: float) -> None:
        super().__init__()
        self.implicit = discretization == "im"
        self.A_diag = nn.Parameter(torch.rand(state_size))
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.B = nn.Parameter(torch.empty(state_size, d_model, 2).uniform_(-(d_model**-0.5), d_model**-0.5))
        self.C = nn.Parameter(torch.empty(d_model, state_size, 2).uniform_(-(state_size**-0.5), state_size**-0.5))
        self.D = nn.Parameter(torch.randn(d_model))
        self.steps = nn.Parameter(torch.rand(state_size))
        self.glu = nn.Linear(d_model, 2 * d_model)  # rows: W_1, W_2
        self.dropout = Dropout(dropout)

    def _rates(self) -> tuple[Tensor, Tensor]:
        """dt and A of the equations: (P,) each."""
        return torch.sigmoid(wide(self.steps)), F.relu(self.A_diag)

    def _roots(self) -> tuple[Tensor, Tensor, Tensor]:
        """l_1 and l_2 complex, e real: (P,) each."""
        dt, A = self._rates()
        a = dt.square() * A
        if self.implicit:
            middle = 1 / (1 + a)
            square, gain = -a * middle.square(), middle * dt.square()
        else:
            middle, square, gain = 1 - a / 2, a.square() / 4 - a, dt.square()
        # a root of 0 has no derivative; there relu is flat, and nothing is lost by a constant
        double = square == 0
        root = torch.complex(square.masked_fill(double, 1), torch.zeros_like(square)).sqrt().masked_fill(double, 0)
        return middle + root, middle - root, gain

    def _inputs(self, x: Tensor) -> Tensor:
        """B x: (..., D) -> (..., P) complex."""
        B = self.B.transpose(1, 2).flatten(0, 1)
        return torch.view_as_complex(wide(F.linear(x, B)).unflatten(-1, (-1, 2)))

    def _outputs(self, y: Tensor, x: Tensor) -> Tensor:
        """Re(C y) + D x: (..., P) complex, (..., D) -> (..., D)."""
        real, imaginary = self.C.unbind(-1)
        C = torch.stack([real, -imaginary], dim=-1).flatten(1)
        return F.linear(torch.view_as_real(y).flatten(-2), C) + self.D * x

    def ssm(self, x: Tensor) -> Tensor:
        """o of the equations: (B, L, D) -> (B, L, D)."""
        one, two, gain = self._roots()
        inner = linear_scan(two[None, None], gain * self._inputs(x))
        return self._outputs(linear_scan(one[None, None], inner), x)

    def _gate(self, o: Tensor) -> Tensor:
        return F.glu(self.glu(self.dropout(F.gelu(o, approximate="tanh"))), dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._gate(self.ssm(x))

    def cost(self, length: int) -> Cost:
        width, states = len(self.D), len(self.steps)
        maps = 2 * Cost.linear(length, width, 2 * states, bias=False) + Cost.linear(length, width, 2 * width)
        return maps + Cost(other=length * (18.0 * states + 20.0 * width))

    def init_state(self, batch: int) -> State:
        zeros = torch.zeros(batch, len(self.steps), dtype=wide(self.steps).dtype.to_complex(), device=self.steps.device)
        return zeros, zeros

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token through the two equations as they stand: x (B, D) -> o (B, D), and (z, y)."""
        z, y = state
        dt, A = self._rates()
        z = z + dt * (self._inputs(x) - A * y)
        if self.implicit:
            z = z / (1 + dt.square() * A)
        y = y + dt * z
        return self._outputs(y, x), (z, y)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: z and y, (B, P) complex each."""
        o, state = self.advance(x, state)
        return self._gate(o), state


class LinOSS(Stack):
    """state_size: P, oscillators. discretization: im or imex."""

    card = Card(
        title="Oscillatory State-Space Models",
        year=2024,
        url="https://arxiv.org/abs/2410.03943",
        scaling="L",
        causal=True,
        variants={"im": {"discretization": "im"}, "imex": {"discretization": "imex"}},
        exempt={"imex/magnitudes": "the step keeps the energy of an oscillator, which grows with every input"},
    )
    block = Block(ffn="none")

    def __init__(
        self, *, d_model: int, dropout: float = 0.0, state_size: int = 64, discretization: str = "im", **stack: Any
    ) -> None:
        at_least(1, state_size=state_size)
        one_of(DISCRETIZATIONS, discretization=discretization)
        super().__init__(
            lambda _: LinOSSMixer(d_model, state_size, discretization, dropout),
            d_model=d_model, dropout=dropout, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_diag", "steps")
