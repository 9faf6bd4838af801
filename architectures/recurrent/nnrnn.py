"""nnRNN: a recurrent matrix in Schur form, rotations and a feed-forward part in a learnt orthonormal basis.

Kerg, Goyette, Puelma Touzel, Gidel, Vorontsov, Bengio and Lajoie 2019, arXiv:1905.12080, section 3. Per token, with
h: (B, H), H = D even, h_0 = 0, rows times matrices:

    P = exp(triu(log_P, 1) - triu(log_P, 1)^T)             orthonormal basis: (H, H)
    S = triu(T, 1) + diag_i(alpha_i [[cos theta_i, -sin theta_i], [sin theta_i, cos theta_i]])
    V = P S P^T                                            of eigenvalues alpha_i exp(+- i theta_i) for T = 0
    h = modrelu(x U^T + h V, b)                            the output, (B, H); modrelu(a, b) = sign(a) relu(|a| + b)
    aux_loss = penalty * sum_i (alpha_i - 1)^2

T = 0 and alpha = 1 give an orthogonal network; T lets what a unit holds be handed on along the basis, alpha lets it
fade. As in the released code the triangle of T also covers the upper entry of each block.

Initialisation as released: log_P turns pairs by angles uniform in [-pi, pi], T = 0, alpha = 1, theta uniform in
[0, 2 pi], U Xavier normal, b uniform in [-0.01, 0.01]; penalty 1e-4, of the values the paper searches over.

Departures: log_P learns by gradients through the exponential, with a tenth of the rate, where the paper takes
Riemannian steps on P; a pre-norm residual block followed by a feed-forward part around the recurrence.

The loop over time is Python's: `recurrent_cell` would need elman with modrelu.

Checked against: tensors of the authors' cell, its basis and its matrix, with the gradient of x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._optim import undecayed
from lra.architectures._orthogonal import modrelu, rotations, skew
from lra.architectures._precision import wide
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost


class NNRNNMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, penalty: float) -> None:
        super().__init__()
        self.d_model, self.penalty = d_model, penalty
        self.U = nn.Parameter(nn.init.xavier_normal_(torch.empty(d_model, d_model)))
        self.log_P = nn.Parameter(rotations(d_model, "henaff"))
        self.T = nn.Parameter(torch.zeros(d_model, d_model))
        self.theta = nn.Parameter(torch.empty(d_model // 2).uniform_(0, 2 * math.pi))
        self.alpha = nn.Parameter(torch.ones(d_model // 2))
        self.b = nn.Parameter(torch.empty(d_model).uniform_(-0.01, 0.01))

    def enter(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.U)

    def basis(self) -> Tensor:
        """P: (H, H)."""
        return torch.linalg.matrix_exp(skew(wide(self.log_P)))

    def weights(self) -> tuple[Tensor, ...]:
        P, alpha = self.basis(), wide(self.alpha)
        cos, sin = alpha * wide(self.theta).cos(), alpha * wide(self.theta).sin()
        every_other = torch.stack([sin, torch.zeros_like(sin)], dim=1).flatten()[:-1]
        blocks = torch.diag(cos.repeat_interleave(2)) + torch.diag(every_other, -1) - torch.diag(every_other, 1)
        return P @ (wide(self.T).triu(1) + blocks) @ P.T, self.b

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        V, b = weights
        h = modrelu(torch.addmm(entering, state, V), b)
        return h, h

    def aux_loss(self) -> Tensor:
        return self.penalty * (self.alpha - 1).square().sum()

    def cost(self, length: int) -> Cost:
        width = self.d_model
        matrix = Cost(4.0 * width**3, 20.0 * width**3).per_batch  # two products, an exponential
        return 2 * Cost.linear(length, width, width, bias=False) + matrix + Cost(other=6.0 * length * width)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class NNRNN(Stack):
    """penalty: how strongly the scales of the rotations are held at 1."""

    card = Card(
        title="Non-normal Recurrent Neural Network (nnRNN): learning long time dependencies while improving "
        "expressivity with transient dynamics",
        year=2019,
        url="https://arxiv.org/abs/1905.12080",
        scaling="L",
        causal=True,
        exempt={
            "exports": "a Python loop over the tokens is unrolled for one length",
            "magnitudes": "the triangle beside the rotations amplifies; it starts at 0, and the check gives it values",
        },
    )

    def __init__(self, *, d_model: int, penalty: float = 1e-4, **stack: Any) -> None:
        if d_model % 2:
            raise ValueError(f"d_model is {d_model}; even, as features are turned in pairs")
        if penalty < 0:
            raise ValueError(f"penalty is {penalty}; at least 0")
        super().__init__(lambda _: NNRNNMixer(d_model, penalty), d_model=d_model, **stack)

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        slow = {"*.log_P": {"lr_scale": 0.1, "weight_decay": 0.0}}
        return slow | {k: v for k, v in undecayed(self, "log_P", "theta", "alpha").items() if k not in slow}
