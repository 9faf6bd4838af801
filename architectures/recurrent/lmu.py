"""LMU: a linear memory that holds the last `theta` tokens of one signal as Legendre coefficients, read by a network.

Voelker, Kajic and Eliasmith 2019 (NeurIPS 32). Per token, with h: (B, H), H = D, and the memory m: (B, M), both 0:

    u = e_x x + e_h h + e_m m                              what is written, one number: (B, 1)
    m = A m + B u                                          of the old m; A: (M, M), B: (M, 1)
    h = tanh(W_x x + W_h h + W_m m)                        of the new m; the output, (B, H)

A and B, fixed, discretise theta dm/dt = A_c m + B_c u by zero-order hold with a step of one token,
    (A_c)_ij = (2i + 1) (-1 if i < j else (-1)^(i-j+1)),   (B_c)_i = (2i + 1) (-1)^i,
whose state is the best approximation of u over the last theta tokens by M Legendre polynomials (HiPPO-LegT).

Variant fft, Chilkuri and Eliasmith 2021, arXiv:2102.11417: no loop through h, so that m is a convolution of u:

    u = relu(W_u x + b_u),   m_t = sum_s A^s B u_{t-s},   y = relu(W_h [m, x] + b_h)

Parameters as in the code of pytorch-lmu.

Initialisation: e_x and e_h uniform with variance 1 / D, e_m = 0, W_x, W_h, W_m Xavier normal; of fft PyTorch's own.
theta = `length`, M = `order` = 64.

Departures: a pre-norm residual block followed by a feed-forward part around the recurrence.

The loop over time of the first form is Python's: `recurrent_cell` would need elman with linear units.

Checked against: tensors of pytorch-lmu, both forms: matrices, memories, outputs, gradient of x.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._precision import wide
from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.fft_conv import fft_conv

State = tuple[Tensor, Tensor]


def legendre(order: int, theta: float) -> tuple[Tensor, Tensor]:
    """A: (M, M) and B: (M, 1), float64, discretised with a step of one token."""
    n = torch.arange(order, dtype=torch.float64)
    below = (-1) ** (n[:, None] - n + 1)
    A = (2 * n[:, None] + 1) / theta * torch.where(n[:, None] < n, -torch.ones_like(below), below)
    B = ((2 * n + 1) * (-1) ** n / theta).unsqueeze(1)
    both = torch.linalg.matrix_exp(F.pad(torch.cat([A, B], dim=1), (0, 0, 0, 1)))
    return both[:-1, :-1], both[:-1, -1:]


def impulses(A: Tensor, B: Tensor, length: int) -> Tensor:
    """A^s B for s from 0 to length - 1: (M, length), by doubling, in float64."""
    A, columns = A.double(), B.double()
    while columns.shape[1] < length:
        columns, A = torch.cat([columns, A @ columns], dim=1), A @ A
    return columns[:, :length]


class LMUMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    A: Tensor
    B: Tensor

    def __init__(self, d_model: int, order: int, theta: float) -> None:
        super().__init__()
        self.d_model, self.order = d_model, order
        bound = (3 / d_model) ** 0.5
        self.e_x, self.e_h = (nn.Parameter(torch.empty(1, d_model).uniform_(-bound, bound)) for _ in range(2))
        self.e_m = nn.Parameter(torch.zeros(1, order))
        self.W_x, self.W_h = (nn.Parameter(nn.init.xavier_normal_(torch.empty(d_model, d_model))) for _ in range(2))
        self.W_m = nn.Parameter(nn.init.xavier_normal_(torch.empty(d_model, order)))
        for name, matrix in zip("AB", legendre(order, theta), strict=True):
            self.register_buffer(name, matrix.float())

    def enter(self, x: Tensor) -> Tensor:
        """e_x x and W_x x, (..., 1 + D)."""
        return F.linear(x, torch.cat([self.e_x, self.W_x]))

    def weights(self) -> tuple[Tensor, ...]:
        return torch.cat([self.e_h, self.e_m], dim=1).T, self.A.T, self.B.T, self.W_h.T, self.W_m.T

    def advance(self, entering: Tensor, state: State, *weights: Tensor) -> tuple[Tensor, State]:
        """State: h (B, D) and m (B, M)."""
        (h, m), (e, A, B, W_h, W_m) = state, weights
        u = torch.addmm(entering[:, :1], torch.cat(state, dim=-1), e)
        m = torch.addcmul(m @ A, u, B)
        h = torch.tanh(entering[:, 1:] + torch.addmm(h @ W_h, m, W_m))
        return h, (h, m)

    def cost(self, length: int) -> Cost:
        width, order = self.d_model, self.order
        parts = [(width, width + 1), (width + order, 1), (order, order), (width, width), (order, width)]
        work = Cost(other=5.0 * length * (width + order))
        for d_in, d_out in parts:
            work = work + Cost.linear(length, d_in, d_out, bias=False)
        return work

    def init_state(self, batch: int) -> State:
        return self.zeros(batch, self.d_model), self.zeros(batch, self.order)


class LMUFFTMixer(Mixer):
    """The parallel form: (B, L, D) -> (B, L, D)."""

    A: Tensor
    B: Tensor

    def __init__(self, d_model: int, order: int, theta: float) -> None:
        super().__init__()
        self.d_model, self.order = d_model, order
        self.W_u = nn.Linear(d_model, 1)
        self.W_h = nn.Linear(order + d_model, d_model)
        for name, matrix in zip("AB", legendre(order, theta), strict=True):
            self.register_buffer(name, matrix.float())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        u = torch.relu(wide(self.W_u(x)))
        kernel = impulses(self.A, self.B, x.shape[1]).to(u.dtype)
        m = fft_conv(u.expand(-1, -1, self.order), kernel)
        return torch.relu(self.W_h(torch.cat([m.to(x.dtype), x], dim=-1)))

    def cost(self, length: int) -> Cost:
        width, order = self.d_model, self.order
        maps = Cost.linear(length, width, 1) + Cost.linear(length, order + width, width)
        doublings = max(length - 1, 0).bit_length()
        powers = Cost(sum(2.0 * order**2 * (2**k + order) for k in range(doublings))).per_batch
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        convolution = Cost(other=order * (2 * transform + 6.0 * length), batch_other=order * transform)
        return maps + powers + convolution + Cost(other=5.0 * length * width)

    def init_state(self, batch: int) -> Tensor:
        return wide(self.W_u.weight.new_zeros(batch, self.order))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: m (B, M)."""
        m = state @ self.A.T + torch.relu(self.W_u(x)) @ self.B.T
        return torch.relu(self.W_h(torch.cat([m.to(x.dtype), x], dim=-1))), m


class LMU(Stack):
    """order: numbers in the memory. theta: tokens it reaches back, `length` unless given. fft: the parallel form."""

    card = Card(
        title="Legendre Memory Units: Continuous-Time Representation in Recurrent Neural Networks",
        year=2019,
        url="https://proceedings.neurips.cc/paper/2019/hash/952285b9b7e7a1be5aa7849f32ffff05-Abstract.html",
        scaling="L",
        causal=True,
        variants={"fft": {"fft": True}},
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(
        self, *, d_model: int, length: int, order: int = 64, theta: float | None = None, fft: bool = False, **stack: Any
    ) -> None:
        window = float(length) if theta is None else theta
        if order < 1:
            raise ValueError(f"order is {order}; at least 1")
        if window < 1:
            raise ValueError(f"theta is {window}; at least 1 token")
        super().__init__(
            lambda _: LMUFFTMixer(d_model, order, window) if fft else LMUMixer(d_model, order, window),
            d_model=d_model, length=length, **stack,
        )  # fmt: skip
        self.fft = fft

    @property
    def scaling(self) -> str:
        return "L log L" if self.fft else "L"
