"""Second-order RNN: the next state is bilinear in state and input, so that each input applies its own matrix.

Lizaire, Rizvi-Martel, Eyono Gagnon and Rabusseau 2024, arXiv:2406.05045 (second-order networks: Giles et al. 1989).
Per token, with h: (B, H), H = D, a 1 appended to h and to x:

    h_k = tanh(sum_ij [h, 1]_i [x, 1]_j w_ijk)             w: (H + 1, D + 1, H); the output, (B, H)

w_ijk for i <= H, j <= D is the second-order part, w[:H, D], w[H, :D] and w[H, D] are the recurrent matrix, the input
matrix and the bias of a plain recurrence.

Variant cprnn: the second-order part is a sum of `rank` outer products, a CP decomposition:

    h = tanh(C ((A^T h) * (B^T x)) + V^T h + U^T x + d)    A, C: (H, R), B: (D, R), U: (D, H), V: (H, H)

Initialisation: recurrent matrix orthogonal, input matrix Xavier uniform, bias 0; second-order part Gaussian with
variance 1 / (H D), A, B, C Xavier uniform.

Departures: that initialisation, the released one being uniform throughout; a pre-norm residual block followed by a
feed-forward part around the recurrence.

The matrix that a token applies to the state, M_ik = sum_j [x, 1]_j w_ijk, is made for all tokens in one product, H D
numbers a token: for CHUNK tokens at a time, and again for the backward pass. The loop over time is Python's:
`recurrent_cell` would need elman with U h times a vector of every token (cprnn), and with a matrix of every token.

Checked against: tensors of the authors' code, both forms, with the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lra.architectures._precision import wide
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost

CHUNK = 128


class SecondOrderMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        w = torch.randn(d_model + 1, d_model + 1, d_model) / d_model
        nn.init.orthogonal_(w[:-1, -1])
        nn.init.xavier_uniform_(w[-1, :-1])
        w[-1, -1] = 0
        self.w = nn.Parameter(w)

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] <= CHUNK:
            return super().chunk(x, state)
        outputs = []
        for part in x.split(CHUNK, dim=1):
            y, state = checkpoint(super().chunk, part, state, use_reentrant=False, preserve_rng_state=False)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    def enter(self, x: Tensor) -> Tensor:
        """The matrices M, (B, C, (H + 1) H). They act on the state, so that they are made in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            return F.pad(wide(x), (0, 1), value=1.0) @ wide(self.w).transpose(0, 1).flatten(1)

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        M = entering.unflatten(-1, (-1, self.d_model))
        h = torch.tanh((F.pad(state, (0, 1), value=1.0).unsqueeze(1) @ M).squeeze(1))
        return h, h

    def cost(self, length: int) -> Cost:
        width = self.d_model
        matrices = Cost.linear(length, width + 1, (width + 1) * width, bias=False)
        return matrices + Cost.linear(length, width + 1, width, bias=False) + Cost(other=length * 5.0 * width)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class CPRNNMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.d_model, self.rank = d_model, rank
        self.A, self.B, self.C = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(d_model, rank))) for _ in range(3)
        )  # fmt: skip
        self.U = nn.Parameter(nn.init.xavier_uniform_(torch.empty(d_model, d_model)))
        self.V = nn.Parameter(nn.init.orthogonal_(torch.empty(d_model, d_model)))
        self.d = nn.Parameter(torch.zeros(d_model))

    def enter(self, x: Tensor) -> Tensor:
        """B^T x and U^T x + d, (..., R + H)."""
        return x @ torch.cat([self.B, self.U], dim=1) + F.pad(self.d, (self.rank, 0))

    def weights(self) -> tuple[Tensor, ...]:
        return torch.cat([self.A, self.V], dim=1), self.C.T

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        AV, C = weights
        sizes = (self.rank, self.d_model)
        (factor, term), (seen, turned) = entering.split(sizes, dim=-1), (state @ AV).split(sizes, dim=-1)
        h = torch.tanh(torch.addmm(term + turned, factor * seen, C))
        return h, h

    def cost(self, length: int) -> Cost:
        width, rank = self.d_model, self.rank
        both = 2 * Cost.linear(length, width, rank + width) + Cost.linear(length, rank, width)
        return both + Cost(other=length * (rank + 5.0 * width))

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class SecondOrder(Stack):
    """rank: terms of the second-order part; None for the full tensor of D^3 numbers, 0 for D terms."""

    card = Card(
        title="A Tensor Decomposition Perspective on Second-order RNNs",
        year=2024,
        url="https://arxiv.org/abs/2406.05045",
        scaling="L",
        causal=True,
        variants={"cprnn": {"rank": 0}},
        no_recall="its state passes through tanh at every step, so the gradient of the first token vanishes",
        exempt={
            "exports": "a Python loop over the tokens is unrolled for one length",
            "cprnn/optim_groups": "A is a factor of the recurrent weights, not a rate",
            "cprnn/optim_norms": "A is a factor of the recurrent weights, not a rate",
        },
    )

    def __init__(self, *, d_model: int, rank: int | None = None, **stack: Any) -> None:
        if rank is not None and rank < 0:
            raise ValueError(f"rank is {rank}; at least 1, 0 for d_model, None for the full tensor")
        super().__init__(
            lambda _: SecondOrderMixer(d_model) if rank is None else CPRNNMixer(d_model, rank or d_model),
            d_model=d_model, **stack,
        )  # fmt: skip
