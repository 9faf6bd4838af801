"""ENRNN: orthogonal units with a long memory, fed by units that forget at rates given by the eigenvalues of a matrix.

Helfrich and Ye 2019, arXiv:1911.07964, coupled form. Per token, with h = [h1, h2]: (B, H1 + H2), H1 + H2 = D, h_0 = 0,
rows times matrices:

    W1 = (I + S)^-1 (I - S) D1,   S = triu(A1, 1) - triu(A1, 1)^T      scoRNN, arXiv:1707.09520: (H1, H1)
    W2' = W2 / max |eigenvalue of W2|                                  no eigenvalue outside the unit circle: (H2, H2)
    h1 = modrelu(x U1 + h1 W1 + h2 W3, b1)                             long memory
    h2 = modrelu(x U2 + h2 W2', b2)                                    short memory
    y = [h1, h2]                                                       the output; modrelu(a, b) = sign(a) relu(|a| + b)

D1: diagonal of 1 with -1 in its last entries, fixed. The spectral radius, not the norm, is 1: a product of W2' can grow
before it fades.

Initialisation: A1 turns pairs of features by angles uniform in [0, pi / 2], W2 Gaussian with variance 1 / H2, U and W3
Xavier uniform, b uniform in [-0.01, 0.01]; 60 % of the units are orthogonal, 30 % of those with -1, as released for the
adding problem.

Departures: W2 is normalised from the start, where the code waits until its radius first exceeds 1; gradients flow
through the eigenvalue by autograd, and through the Cayley map, with a tenth of the rate, where the code has its own
formulas; a pre-norm residual block followed by a feed-forward part around the recurrence.

The loop over time is Python's: `recurrent_cell` would need elman with modrelu.

Checked against: tensors of the authors' cell and its matrices, with the gradient of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._orthogonal import cayley, modrelu, rotations, skew
from lra.architectures._precision import wide
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost


class ENRNNMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). long: H1; negative: entries of -1 in D1."""

    D1: Tensor

    def __init__(self, d_model: int, long: int, negative: int) -> None:
        super().__init__()
        self.d_model, self.long = d_model, long
        short = d_model - long
        self.A1 = nn.Parameter(rotations(long, "cayley"))
        self.W2 = nn.Parameter(torch.randn(short, short) / short**0.5)
        self.W3 = nn.Parameter(nn.init.xavier_uniform_(torch.empty(short, long)))
        self.U = nn.Parameter(nn.init.xavier_uniform_(torch.empty(d_model, d_model)))
        self.b = nn.Parameter(torch.empty(d_model).uniform_(-0.01, 0.01))
        signs = torch.ones(long)
        signs[long - negative :] = -1
        self.register_buffer("D1", signs)

    def enter(self, x: Tensor) -> Tensor:
        return x @ self.U

    def weights(self) -> tuple[Tensor, ...]:
        W1 = cayley(skew(wide(self.A1))) * self.D1
        W2 = wide(self.W2)
        W2 = W2 / torch.linalg.eigvals(W2).abs().max()
        above = torch.cat([W1, W1.new_zeros(self.long, self.d_model - self.long)], dim=1)
        return torch.cat([above, torch.cat([wide(self.W3), W2], dim=1)]), self.b

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        W, b = weights
        h = modrelu(torch.addmm(entering, state, W), b)
        return h, h

    def cost(self, length: int) -> Cost:
        width, short = self.d_model, self.d_model - self.long
        matrices = Cost(batch_other=3.0 * self.long**3 + 25.0 * short**3)  # a solution, the eigenvalues
        return 2 * Cost.linear(length, width, width, bias=False) + matrices + Cost(other=6.0 * length * width)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class ENRNN(Stack):
    """long: share of orthogonal units. negative: share of these with a sign of -1."""

    card = Card(
        title="Eigenvalue Normalized Recurrent Neural Networks for Short Term Memory",
        year=2019,
        url="https://arxiv.org/abs/1911.07964",
        scaling="L",
        causal=True,
        exempt={
            "magnitudes": "units of spectral radius 1 add their inputs up; deeper layers see normalised inputs",
            "exports": "a Python loop over the tokens is unrolled for one length",
        },
    )

    def __init__(self, *, d_model: int, long: float = 0.6, negative: float = 0.3, **stack: Any) -> None:
        units = round(long * d_model)
        if not 2 <= units < d_model:
            raise ValueError(f"long is {long}; at least two of the {d_model} units, and not all")
        if not 0 <= negative <= 1:
            raise ValueError(f"negative is {negative}; a share from 0 to 1")
        super().__init__(lambda _: ENRNNMixer(d_model, units, round(negative * units)), d_model=d_model, **stack)

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {"*.A1": {"lr_scale": 0.1, "weight_decay": 0.0}}
