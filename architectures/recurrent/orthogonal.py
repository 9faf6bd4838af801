"""Orthogonal RNN (expRNN, scoRNN): a recurrent matrix that stays on the orthogonal group while it learns.

Lezcano-Casado and Martinez-Rubio 2019, arXiv:1901.08428. Per token, with h: (B, H), H = D, h_0 = 0, as rows:

    B = exp(S),   S = triu(A, 1) - triu(A, 1)^T            orthogonal, with determinant 1: (H, H)
    h = modrelu(x W^T + h B, b)                            the output, (B, H); modrelu(a, b) = sign(a) relu(|a| + b)

Variant cayley: B = (I + S)^-1 (I - S), the map of arXiv:1707.09520 without its signs. Gradients flow through either
map, so that any optimiser works on A.

Parameters as in the released code: A, of which the strict upper triangle is read, `input_kernel` for W, b.

Initialisation as released: A turns pairs of features by angles uniform in [-pi, pi] (cayley: [0, pi / 2]); W He normal
for relu; b uniform in [-0.01, 0.01].

Departures: the base of the exponential is the identity throughout, the released static mode; a pre-norm residual block
followed by a feed-forward part around the recurrence. A has its own rate in the paper, a tenth of the others' or less:
so it has here.

The loop over time is Python's: `recurrent_cell` would need this cell, elman with modrelu.

Checked against: tensors of the authors' code, both maps, with the gradient of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._optim import undecayed
from lra.architectures._orthogonal import cayley, modrelu, rotations, skew
from lra.architectures._precision import wide
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost

MAPS = ("exponential", "cayley")


class OrthogonalMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, map: str) -> None:
        super().__init__()
        self.d_model, self.map = d_model, map
        self.A = nn.Parameter(rotations(d_model, "cayley" if map == "cayley" else "henaff"))
        self.input_kernel = nn.Parameter(torch.empty(d_model, d_model))
        self.b = nn.Parameter(torch.empty(d_model).uniform_(-0.01, 0.01))
        nn.init.kaiming_normal_(self.input_kernel, nonlinearity="relu")

    def enter(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.input_kernel)

    def weights(self) -> tuple[Tensor, ...]:
        S = skew(wide(self.A))
        return cayley(S) if self.map == "cayley" else torch.linalg.matrix_exp(S), self.b

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        B, b = weights
        h = modrelu(torch.addmm(entering, state, B), b)
        return h, h

    def cost(self, length: int) -> Cost:
        width = self.d_model
        matrix = Cost(batch_other=(3.0 if self.map == "cayley" else 30.0) * width**3)  # a solution, or an exponential
        return 2 * Cost.linear(length, width, width, bias=False) + matrix + Cost(other=6.0 * length * width)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class Orthogonal(Stack):
    """map: how a skew-symmetric matrix becomes an orthogonal one, of MAPS."""

    card = Card(
        title="Cheap Orthogonal Constraints in Neural Networks: A Simple Parametrization of the Orthogonal and "
        "Unitary Group",
        year=2019,
        url="https://arxiv.org/abs/1901.08428",
        scaling="L",
        causal=True,
        variants={"cayley": {"map": "cayley"}},
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(self, *, d_model: int, map: str = "exponential", **stack: Any) -> None:
        if map not in MAPS:
            raise ValueError(f"map is {map!r}; one of {', '.join(MAPS)}")
        super().__init__(lambda _: OrthogonalMixer(d_model, map), d_model=d_model, **stack)

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {**undecayed(self, "A"), "*.A": {"lr_scale": 0.1, "weight_decay": 0.0}}
