"""S4D: each channel filtered by a linear state space model whose state matrix is diagonal.

Gu, Gupta, Goel and Re 2022, arXiv:2206.11893. N is the state size; of each conjugate pair of modes one is kept: M = N/2
complex modes a channel, and every sum over them is 2 Re. Per channel, with step size dt = exp(log_dt):

    A = -exp(log_A_real) + i A_imag                        (H, M)      so that Re A < 0
    zoh         Abar = exp(dt A),                      Bbar = (Abar - 1) / A B
    bilinear    Abar = (1 + dt A / 2) / (1 - dt A / 2),  Bbar = dt / (1 - dt A / 2) B
    K_l = 2 Re sum_m C_m Bbar_m Abar_m^l                   (H, L)      a Vandermonde product
    x_t = Abar x_{t-1} + Bbar u_t,   y_t = 2 Re C x_t + D u_t = (K * u)_t + D u_t
    out = GLU(W gelu(y) + b)                               (B, L, D)   value half times sigmoid(gate half)

Bidirectional: a second C gives a second kernel of the same modes; it looks ahead and leaves out the current token.

Initialisation of A and B (section 4), half of the pairs, n = 0 .. M - 1:
    lin   A = -1/2 + i pi n,                          B = 1    frequencies of a Fourier basis
    inv   A = -1/2 + i (N / pi) (N / (2 n + 1) - 1),  B = 1    the asymptotic law of LegS
    legs  A = the eigenvalues of the normal part of HiPPO-LegS, B = |V* B_LegS| / 2. The phases of B are free, as those
          of V are. As N grows the kernels tend to those of LegS, a Legendre basis, on average only: against exp(-t),
          the first of them, the error over 8 units of time stays at 0.7 of its norm for N = 8 and 64, as modes of ever
          higher frequency remain; of running means over half a unit it falls from 0.29 to 0.05.
    real  A = -(n + 1),                               B = 1    the eigenvalues of LegS itself; frequencies start at 0
    diag  inv in the first half of the n_ssm state matrices, lin in the second: the mixture of the released code
C complex and D real standard normal; log_dt uniform between log dt_min and log dt_max, so that channels remember from
1 / dt_max to 1 / dt_min tokens; W, b PyTorch's own. A and B learn at `ssm_lr` at most, dt at `dt_lr`, all
without weight decay.

Departures: the released code clamps frequencies at 1e-4 from below, so its n = 0 is not quite 0, and starts legs from
a B clipped to |Im B| <= 2 and not halved. As there, a block holds no feed-forward part beside the GLU.

Checked against: tensors of the authors' modules S4Block with SSMKernelDiag (lin, inv and legs, both discretisations,
tied modes, bidirectional, odd length) and S4D (minimal), outputs and gradients; HiPPO-LegS of the same repository.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._diagonal import DiagonalSSM, check_diagonal
from lra.architectures._dropout import Dropout
from lra.architectures._published import number_of_layers
from lra.architectures._ssm import checked_copies, weighted_sum
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer, Published
from lra.kernels.fft_conv import fft_conv
from lra.kernels.ssm_kernel_diag import ssm_kernel_diag


class S4DMixer(DiagonalSSM, Mixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, *, state_size: int, init: str, discretization: str, dt_min: float, dt_max: float,
        n_ssm: int, causal: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__(
            d_model,
            state_size=state_size,
            init=init,
            discretization=discretization,
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
        kernels, width, modes, _ = self.C.shape
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        light = width * (2 * transform + 6 * length) + 20.0 * length * width
        kernel = kernels * width * (4.0 * modes * length + transform)  # a Vandermonde product, and its transform
        return Cost.linear(length, width, 2 * width) + Cost(other=light, batch_other=kernel)

    def init_state(self, batch: int) -> Tensor:
        return self.start(batch)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: x_t, (B, H, M) complex."""
        y, state = self.advance(x, state)
        return self._project(y + self.D * x), state

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel filters the tokens; what the state adds is a kernel too, one for each sequence."""
        tokens, (A, C, dt) = x.shape[1], self._continuous()
        A_bar, B_bar = self.discrete(A, dt)
        reads = (C[0] * state * A_bar / B_bar).to(A.dtype)
        before = ssm_kernel_diag(A, reads, dt, tokens, self.discretization).transpose(1, 2)
        y = fft_conv(x, self.kernel(tokens)[0], self.D) + before.to(x.dtype)
        z = A_bar.log().unsqueeze(-1)
        after = A_bar**tokens * state + B_bar * weighted_sum(x, lambda place: z * (tokens - 1 - place))
        return self._project(y), after.to(state.dtype)


class S4D(Stack):
    """state_size: N, even. n_ssm: independent state matrices, d_model unless given, which it divides. init: lin, inv,
    legs, real or diag. dt_min, dt_max: range of the initial step sizes. ssm_lr: highest learning rate of A and B,
    dt_lr: of dt."""

    card = Card(
        title="On the Parameterization and Initialization of Diagonal State Space Models",
        year=2022,
        url="https://arxiv.org/abs/2206.11893",
        scaling="L log L",
        causal=True,
        exempt={"optim_norms": "the authors' optimiser spares dt, A and B alone"},
        variants={
            "lin": {"init": "lin"},
            "inv": {"init": "inv"},
            "legs": {"init": "legs"},
            "real": {"init": "real"},
            "diag": {"init": "diag"},
            "bilinear": {"discretization": "bilinear"},
        },
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        dropout: float = 0.0,
        direction: str = "causal",
        state_size: int = 64,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        n_ssm: int | None = None,
        ssm_lr: float = 0.001,
        dt_lr: float = 0.001,
        **stack: Any,
    ) -> None:
        copies = checked_copies(n_ssm, d_model)
        check_diagonal(state_size, init, discretization, copies)
        self.ssm_lr, self.dt_lr = ssm_lr, dt_lr
        super().__init__(
            lambda _: S4DMixer(
                d_model, state_size=state_size, init=init, discretization=discretization, dt_min=dt_min, dt_max=dt_max,
                n_ssm=copies, causal=direction == "causal", dropout=dropout,
            ),
            native=True, d_model=d_model, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @classmethod
    def published(cls, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Published:
        """Of S4Model in the authors' example.py with their minimal S4D: norms after each layer unless `block` says
        otherwise, and B = 1."""
        first = "s4_layers.0."
        width, modes = tensors[first + "kernel.log_A_real"].shape
        n_layers = number_of_layers(tensors, "s4_layers.")
        options = {
            "d_model": width, "n_layers": n_layers, "state_size": 2 * modes, "discretization": "zoh",
            "block": {"prenorm": False},
        }  # fmt: skip
        names: dict[str, tuple[str, ...]] = {}
        for i in range(n_layers):
            mixer, theirs = f"layers.{i}.mixer.", f"s4_layers.{i}."
            names |= {f"{mixer}{name}": (f"{theirs}kernel.{name}",) for name in ("log_dt", "log_A_real", "A_imag", "C")}
            names |= {f"{mixer}D": (f"{theirs}D",), f"{mixer}B": ()}
            for kind in ("weight", "bias"):
                names[f"{mixer}output_linear.{kind}"] = (f"{theirs}output_linear.0.{kind}",)
                names[f"layers.{i}.norm.{kind}"] = (f"norms.{i}.{kind}",)
        one = torch.tensor([1.0, 0.0]).expand(width, modes, 2)
        return Published(options, names, {"*.B": lambda: one}, ignored=("encoder.*", "decoder.*"))

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        names = ("log_A_real", "A_imag", "B")
        rates = {"log_dt": self.dt_lr} | dict.fromkeys(names, self.ssm_lr)
        return {f"*.{name}": {"lr": rate, "weight_decay": 0.0} for name, rate in rates.items()}
