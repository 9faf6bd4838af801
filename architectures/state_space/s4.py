"""S4: each channel filtered by a linear state space model that starts as HiPPO, diagonal plus a correction of low rank.

Gu, Goel and Re 2022, arXiv:2111.00396. N is the state size; of each conjugate pair of modes one is kept: M = N / 2
complex modes a channel, and P^* x over all of them is 2 Re(P^H x). Per channel, with step size dt = exp(log_dt):

    S = diag(A) - sum_r P_r P_r^*,  A = -exp(log_A_real) + i A_imag    (H, M)     normal plus low rank, theorem 1
    Abar = (I - dt/2 S)^-1 (I + dt/2 S),  Bbar = dt (I - dt/2 S)^-1 B   bilinear
    K_l = C Abar^l Bbar                                      (H, L)     Cauchy sums, Woodbury, one inverse FFT
    x_t = Abar x_{t-1} + Bbar u_t,   y_t = C x_t + D u_t = (K * u)_t + D u_t
    out = GLU(W gelu(y) + b)                                 (B, L, D)  value half times sigmoid(gate half)

The parameter is Ct = C (I - Abar^length), as in algorithm 1: the kernel at `length` taps needs no power of Abar then.
It is computed at that length and cut to the sequence's. Bidirectional: a second Ct gives a second kernel of the same
modes; it looks ahead and leaves out the current token.

Initialisation, exactly S = V* HiPPO V for a unitary V of eigenvectors, B = V* B_HiPPO, P = V* P_HiPPO:
    legs  HiPPO_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it; B_n = sqrt(2n + 1), P = B / sqrt(2)
    fout  frequencies pi n, n = 0 .. M - 1, that decay through P alone; P = B = 1, and sqrt(1/2) for n = 0
    legt  HiPPO_nk = -sqrt((2n + 1)(2k + 1)) / 2, times (-1)^(n - k) above the diagonal; B_n = sqrt(2n + 1) / 2; two P,
          sqrt(n + 1/2) at odd n and at even n
    hippo legs in the first half of the n_ssm state matrices, fout in the second (arXiv:2206.12037, LegS/FouT)
C complex and D real standard normal; log_dt uniform between log dt_min and log dt_max; W, b PyTorch's own. A, B and P
learn at `ssm_lr` at most, dt at `dt_lr`, all without weight decay.

Departures: the released code clips |Im B| at 2, which takes legs away from HiPPO; here B is whole. The real part of
fout and legt, 0, is -1e-4, as there. As there, a block holds no feed-forward part beside the GLU.

Checked against: tensors of the authors' S4Block with SSMKernelDPLR (legs, fout with tied modes, legt of rank 2,
bidirectional, two lengths), outputs and gradient; their HiPPO matrices and normal-plus-low-rank forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._dplr import DPLRSSM, check_dplr
from lra.architectures._dropout import Dropout
from lra.architectures._ssm import checked_copies
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.fft_conv import fft_conv


class S4Mixer(DPLRSSM, Mixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, *, length: int, state_size: int, init: str, dt_min: float, dt_max: float, n_ssm: int,
        causal: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__(
            d_model,
            length=length,
            state_size=state_size,
            init=init,
            dt_min=dt_min,
            dt_max=dt_max,
            n_ssm=n_ssm,
            ways=1 if causal else 2,
        )
        self.causal = causal
        self.D = nn.Parameter(torch.randn(d_model))
        self.output_linear = nn.Linear(d_model, 2 * d_model)
        # the released block drops before its activation as well, at each position even where it ties the other masks
        self.inner_dropout, self.dropout = nn.Dropout(dropout), Dropout(dropout)

    def _project(self, y: Tensor) -> Tensor:
        return F.glu(self.output_linear(self.dropout(F.gelu(self.inner_dropout(y)))), dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        K = self.kernel(x.shape[1])
        return self._project(fft_conv(x, K[0] if self.causal else K, self.D, bidirectional=not self.causal))

    def cost(self, length: int) -> Cost:
        width = len(self.D)
        return Cost.linear(length, width, 2 * width) + self.convolution_cost(length) + Cost(other=20.0 * length * width)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """x_0 = 0, and C."""
        start = torch.zeros(
            batch, *self.C_tilde.shape[1:3], dtype=self.C_tilde.dtype.to_complex(), device=self.D.device
        )
        return start, self.output()[0]

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """State: x_t, (B, H, M) complex, and C. In double precision: rounding Abar would grow with time."""
        before, C = state
        A, P, B, dt = self._continuous()
        A, half = A.to(torch.complex128), (dt / 2).double().unsqueeze(-1)
        P = P.to(torch.complex128).transpose(0, 1)  # (H, rank, M)

        def against_P(v: Tensor) -> Tensor:
            """P^* v: (..., H, M) -> (..., H, rank)."""
            return 2 * (P.conj() * v.unsqueeze(-2)).sum(-1).real

        def times_P(c: Tensor) -> Tensor:
            return (c.unsqueeze(-1) * P).sum(-2)

        # (I - dt/2 S) x_t = (I + dt/2 S) x_{t-1} + dt B u, the inverse by Woodbury
        right = before + half * (A * before - times_P(against_P(before))) + 2 * half * B * x.unsqueeze(-1)
        scale = 1 / (1 - half * A)
        inner = 2 * (P.conj().unsqueeze(-3) * (scale.unsqueeze(-2) * P).unsqueeze(-2)).sum(-1).real.mT
        inner = torch.eye(P.shape[1], dtype=inner.dtype, device=inner.device) + half.unsqueeze(-1) * inner
        y = scale * right
        after = y - half * scale * times_P(torch.linalg.solve(inner, against_P(y).unsqueeze(-1)).squeeze(-1))
        out = self._project(2 * (C * after).sum(-1).real.to(x.dtype) + self.D * x)
        return out, (after.to(before.dtype), C)


class S4(Stack):
    """state_size: N, even. n_ssm: independent state matrices, d_model unless given, which it divides. init: legs,
    fout, legt or hippo. dt_min, dt_max: range of the initial step sizes. ssm_lr: highest learning rate of A, B and P,
    dt_lr: of dt."""

    card = Card(
        title="Efficiently Modeling Long Sequences with Structured State Spaces",
        year=2021,
        url="https://arxiv.org/abs/2111.00396",
        scaling="L log L",
        causal=True,
        exempt={
            "optim_norms": "the authors' optimiser spares dt, A, P and B alone",
            "exports": "torch.export makes a case of its own of the full length",
        },
        variants={
            "legs": {"init": "legs"},
            "fout": {"init": "fout"},
            "legt": {"init": "legt"},
            "hippo": {"init": "hippo"},
        },
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        state_size: int = 64,
        init: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        ssm_lr: float = 0.001,
        dt_lr: float = 0.001,
        **stack: Any,
    ) -> None:
        copies = checked_copies(n_ssm, d_model)
        check_dplr(state_size, init, copies)
        self.ssm_lr, self.dt_lr = ssm_lr, dt_lr
        super().__init__(
            lambda _: S4Mixer(
                d_model, length=length, state_size=state_size, init=init, dt_min=dt_min, dt_max=dt_max, n_ssm=copies,
                causal=direction == "causal", dropout=dropout,
            ),
            native=True, d_model=d_model, length=length, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        names = ("log_A_real", "A_imag", "P", "B")
        rates = {"log_dt": self.dt_lr} | dict.fromkeys(names, self.ssm_lr)
        return {f"*.{name}": {"lr": rate, "weight_decay": 0.0} for name, rate in rates.items()}
