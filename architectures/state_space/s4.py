"""S4: each channel filtered by a linear state space model that starts as HiPPO, diagonal plus a correction of rank 1.

Gu, Goel and Re 2022, arXiv:2111.00396. N is the state size; of each conjugate pair of modes one is kept: M = N / 2
complex modes a channel, and P^* x over all of them is 2 Re(P^H x). Per channel, with step size dt = exp(log_dt):

    S = diag(A) - P P^*,  A = -exp(log_A_real) + i A_imag    (H, M)     normal plus low rank, theorem 1
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
C complex and D real standard normal; log_dt uniform between log dt_min and log dt_max; W, b PyTorch's own. A, B, P and
dt learn at `ssm_lr` at most and without weight decay.

Departures: the released code clips |Im B| at 2, which takes legs away from HiPPO; here B is whole. The real part of
fout, 0, is -1e-4, as there. As there, a block holds no feed-forward part beside the GLU.

Checked against: tensors of the authors' S4Block with SSMKernelDPLR (legs, fout with tied modes, bidirectional, two
lengths), outputs and gradient; their HiPPO matrices and normal-plus-low-rank forms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._dropout import Dropout
from lra.architectures._hippo import legs_modes
from lra.architectures._ssm import checked_copies, initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.fft_conv import fft_conv
from lra.kernels.ssm_kernel_dplr import ssm_kernel_dplr
from lra.kernels.ssm_kernel_dplr.transform import transformed_output

INITS = ("legs", "fout")


def modes(init: str, state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, P and B, each (N / 2,) complex128: HiPPO in the basis that makes it diagonal minus P P^*."""
    n = torch.arange(state_size // 2, dtype=torch.float64)
    if init == "fout":
        B = torch.where(n == 0, 0.5, torch.ones_like(n)).sqrt().to(torch.complex128)
        return torch.complex(torch.zeros_like(n), math.pi * n), B, B
    frequency, basis, b = legs_modes(state_size)
    kept = frequency > 0
    B = (basis.mH @ b.to(basis.dtype))[kept]
    return torch.complex(torch.full_like(n, -0.5), frequency[kept]), B * 0.5**0.5, B


class S4Mixer(Mixer):
    """(B, L, D) -> (B, L, D). n_ssm: independent (A, P, B), channel h taking number h mod n_ssm."""

    def __init__(
        self, d_model: int, length: int, state_size: int, init: str, dt_min: float, dt_max: float, n_ssm: int,
        causal: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.causal, self.length = causal, length
        A, P, B = modes(init, state_size)
        self.log_dt = nn.Parameter(initial_log_dt(d_model, dt_min, dt_max))
        self.log_A_real = nn.Parameter((-A.real).clamp_min(1e-4).log().float().repeat(n_ssm, 1))
        self.A_imag = nn.Parameter(A.imag.float().repeat(n_ssm, 1))
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.P = nn.Parameter(torch.view_as_real(P).float().repeat(n_ssm, 1, 1))
        self.B = nn.Parameter(torch.view_as_real(B).float().repeat(n_ssm, 1, 1))
        self.C_tilde = nn.Parameter(torch.empty(1 if causal else 2, d_model, len(A), 2))
        self.set_output(torch.randn(1 if causal else 2, d_model, len(A), dtype=torch.complex64))
        self.D = nn.Parameter(torch.randn(d_model))
        self.out = nn.Linear(d_model, 2 * d_model)
        # the released block drops before its activation as well, at each position even where it ties the other masks
        self.inner_dropout, self.dropout = nn.Dropout(dropout), Dropout(dropout)

    @torch.no_grad()
    def set_output(self, C: Tensor) -> None:
        """Let the output vectors be C: (1 or 2, H, M) complex, with the modes and steps as they are now."""
        A, P, _, dt = self._continuous()
        self.C_tilde.copy_(torch.view_as_real(transformed_output(A, P, C, dt, self.length)))

    def _continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A: (H, M), P: (1, H, M), B: (H, M), dt: (H,)."""
        tiles = len(self.log_dt) // len(self.A_imag)
        A = torch.complex(-self.log_A_real.exp(), self.A_imag).repeat(tiles, 1)
        P, B = (torch.view_as_complex(t).repeat(tiles, 1) for t in (self.P, self.B))
        return A, P.unsqueeze(0), B, self.log_dt.exp()

    def kernel(self, length: int) -> Tensor:
        """K: (1 or 2, H, length); the second looks ahead."""
        if length > self.length:
            raise ValueError(f"length {length} exceeds the {self.length} steps the parameter of this S4 stands for")
        A, P, B, dt = self._continuous()
        C = torch.view_as_complex(self.C_tilde)
        return ssm_kernel_dplr(A, P, B, C, dt, self.length, transformed=True)[..., :length]

    def _project(self, y: Tensor) -> Tensor:
        return F.glu(self.out(self.dropout(F.gelu(self.inner_dropout(y)))), dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        K = self.kernel(x.shape[1])
        return self._project(fft_conv(x, K[0] if self.causal else K, self.D, bidirectional=not self.causal))

    def cost(self, length: int) -> Cost:
        kernels, width, modes, _ = self.C_tilde.shape
        taps = max(length, self.length)
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        light = width * (2 * transform + 6 * length) + 20.0 * length * width
        # at half of the roots two reciprocals a mode, and Cauchy sums of P and of each C with P and with B
        cauchy = modes * (taps / 2 + 1) * (18.0 + 8.0 * (kernels + 1) * 2)
        kernel = width * (cauchy + kernels * (2.5 * taps * math.log2(2 * taps) + transform))
        return Cost.linear(length, width, 2 * width) + Cost(other=light, batch_other=kernel)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """x_0 = 0, and C, which takes a solve of 2M equations a channel to get back from Ct."""
        A, P, _, dt = self._continuous()
        width, modes = A.shape
        eye = torch.eye(2 * modes, dtype=torch.float64, device=dt.device)
        rows = torch.complex(eye[:, :modes], -eye[:, modes:]).unsqueeze(1).expand(-1, width, -1)
        turned = transformed_output(A, P, rows, dt, self.length).transpose(0, 1)
        matrix = torch.cat([turned.real, -turned.imag], dim=-1)
        C = torch.view_as_complex(self.C_tilde)[0].to(torch.complex128)
        given = torch.cat([C.real, -C.imag], dim=-1)
        left, right = torch.linalg.solve(matrix, given.unsqueeze(1), left=False).squeeze(1).chunk(2, dim=-1)
        C = torch.complex(left, -right)
        return torch.zeros(batch, width, modes, dtype=self.C_tilde.dtype.to_complex(), device=dt.device), C

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """State: x_t, (B, H, M) complex, and C. In double precision: rounding Abar would grow with time."""
        before, C = state
        A, P, B, dt = self._continuous()
        A, P, half = A.to(torch.complex128), P[0].to(torch.complex128), (dt / 2).double().unsqueeze(-1)

        def against_P(v: Tensor) -> Tensor:
            return 2 * (P.conj() * v).sum(-1, keepdim=True).real

        # (I - dt/2 S) x_t = (I + dt/2 S) x_{t-1} + dt B u, the inverse by Woodbury
        right = before + half * (A * before - P * against_P(before)) + 2 * half * B * x.unsqueeze(-1)
        scale = 1 / (1 - half * A)
        y, z = scale * right, scale * P
        after = y - half * z * against_P(y) / (1 + half * against_P(z))
        out = self._project(2 * (C * after).sum(-1).real.to(x.dtype) + self.D * x)
        return out, (after.to(before.dtype), C)


class S4(Stack):
    """state_size: N, even. n_ssm: independent state matrices, d_model unless given, which it divides. init: of INITS.
    dt_min, dt_max: range of the initial step sizes. ssm_lr: highest learning rate of A, B, P and dt."""

    card = Card(
        title="Efficiently Modeling Long Sequences with Structured State Spaces",
        year=2021,
        url="https://arxiv.org/abs/2111.00396",
        scaling="L log L",
        causal=True,
        exempt={"optim_norms": "the authors' optimiser spares dt, A, P and B alone"},
        variants={"legs": {"init": "legs"}, "fout": {"init": "fout"}},
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        state_size: int = 64,
        init: str = "legs",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        ssm_lr: float = 0.001,
        block: Mapping[str, Any] | None = None,
    ) -> None:
        copies = checked_copies(n_ssm, d_model)
        if state_size < 2 or state_size % 2:
            raise ValueError(f"state_size is {state_size}; an even number of at least 2, conjugate modes come in pairs")
        if init not in INITS:
            raise ValueError(f"init is {init!r}; one of {', '.join(INITS)}")
        self.ssm_lr = ssm_lr
        super().__init__(
            lambda _: S4Mixer(
                d_model, length, state_size, init, dt_min, dt_max, copies, direction == "causal", dropout
            ),
            d_model=d_model, n_layers=n_layers, length=length, dropout=dropout,
            direction=direction, native=True, block=block,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        names = ("log_dt", "log_A_real", "A_imag", "P", "B")
        return {f"*.{name}": {"lr": self.ssm_lr, "weight_decay": 0.0} for name in names}
