"""Lipschitz RNN: a stable linear part and a Lipschitz nonlinearity, stepped along their differential equation.

Erichson, Azencot, Queiruga, Hodgkinson and Mahoney 2020, arXiv:2006.12070, equations 3 to 5, by forward Euler. Per
token, with h: (B, H), H = D, h_0 = 0:

    A = S(M_A), W = S(M_W),   S(M) = (1 - beta) (M + M^T) + beta (M - M^T) - gamma I      (H, H)
    h = h + eps * (alpha A h + tanh(W h + U x + b))        the output, (B, H)

beta = 1 leaves the antisymmetric part alone, beta = 1/2 all of 2 M / 2. Variant gated, of the released code:
    h = h + eps * z * (alpha A h + tanh(W h + U x + b)),   z = sigmoid(W h + U_z x + b_z)

Parameters as in the released code: B and C for M_A and M_W, E and E_gate for U and U_z. The code multiplies by A and W
on the right; here, as in the paper, on the left.

Initialisation: M Gaussian with deviation 1 / D and beta = 0.75, gamma = 0.001, eps = 0.03, alpha = 1 as released for
sequential MNIST; U Xavier uniform, biases 0.

Departures: one gamma and one beta for A and W, as in the code; the paper's second integrator, the midpoint rule, is not
here. A pre-norm residual block followed by a feed-forward part around the recurrence.

The loop over time is Python's: `recurrent_cell` would need this cell.

Checked against: tensors of the authors' code, both forms, with the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost


class LipschitzMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, *, eps: float, beta: float, gamma: float, alpha: float, gated: bool) -> None:
        super().__init__()
        self.d_model, self.eps, self.beta, self.gamma, self.alpha = d_model, eps, beta, gamma, alpha
        self.B = nn.Parameter(torch.randn(d_model, d_model) / d_model)
        self.C = nn.Parameter(torch.randn(d_model, d_model) / d_model)
        self.E = nn.Linear(d_model, d_model)
        self.E_gate = nn.Linear(d_model, d_model) if gated else None
        for part in (self.E, self.E_gate):
            if part is not None:
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def _stable(self, M: Tensor) -> Tensor:
        identity = torch.eye(self.d_model, dtype=M.dtype, device=M.device)
        return (1 - self.beta) * (M + M.T) + self.beta * (M - M.T) - self.gamma * identity

    def enter(self, x: Tensor) -> Tensor:
        return self.E(x) if self.E_gate is None else torch.cat([self.E(x), self.E_gate(x)], dim=-1)

    def weights(self) -> tuple[Tensor, ...]:
        return (torch.cat([self.alpha * self._stable(self.B), self._stable(self.C)]).T,)

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        linear, inside = (state @ weights[0]).chunk(2, dim=-1)
        if self.E_gate is None:
            change = linear + torch.tanh(inside + entering)
        else:
            new, gate = entering.chunk(2, dim=-1)
            change = (linear + torch.tanh(inside + new)) * torch.sigmoid(inside + gate)
        h = torch.add(state, change, alpha=self.eps)
        return h, h

    def cost(self, length: int) -> Cost:
        width, maps = self.d_model, 3 if self.E_gate is None else 4
        return Cost.linear(length, width, width) * maps + Cost(other=10.0 * length * width + 14.0 * width**2)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class Lipschitz(Stack):
    """eps: the step. beta: weight of the antisymmetric parts, 1 - beta that of the symmetric ones. gamma: damping.
    alpha: weight of the linear term. gated: a gate on every unit's step."""

    card = Card(
        title="Lipschitz Recurrent Neural Networks",
        year=2020,
        url="https://arxiv.org/abs/2006.12070",
        scaling="L",
        causal=True,
        variants={"gated": {"gated": True}},
        exempt={
            "exports": "a Python loop over the tokens is unrolled for one length",
            "magnitudes": "the state is an integral over the tokens: it grows until damping balances its inputs",
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        eps: float = 0.03,
        beta: float = 0.75,
        gamma: float = 0.001,
        alpha: float = 1.0,
        gated: bool = False,
        **stack: Any,
    ) -> None:
        if eps <= 0:
            raise ValueError(f"eps is {eps}; a step larger than 0")
        if not 0.5 <= beta <= 1:
            raise ValueError(f"beta is {beta}; from 0.5 to 1")
        super().__init__(
            lambda _: LipschitzMixer(d_model, eps=eps, beta=beta, gamma=gamma, alpha=alpha, gated=gated),
            d_model=d_model, **stack,
        )  # fmt: skip
