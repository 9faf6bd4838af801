"""Linear SSM: each channel filtered by a linear state space model with a dense state matrix that starts as HiPPO-LegS.

Gu et al. 2021, arXiv:2110.13985 (LSSL), the matrix of arXiv:2008.07669. With state size N and, for each of D channels,
a step size dt = exp(log_dt):

    bilinear    Abar = (I - dt/2 A)^-1 (I + dt/2 A),  Bbar = dt (I - dt/2 A)^-1 B     (D, N, N), (D, N)
    zoh         Abar = exp(dt A),                     Bbar = A^-1 (Abar - I) B
    s_t = Abar s_{t-1} + Bbar x_t,   y_t = C s_t + D x_t                              recurrent view, s: (B, L, D, N)
    y_t = (K * x)_t + D x_t,         K_l = C Abar^l Bbar                              convolutional view, K: (D, L)
    out = W gelu(y) + b                                                               (B, L, D)

K_{im + j} = (C Abar^{mi}) (Abar^j Bbar) with m about sqrt(L): 2 sqrt(L) vectors a channel, each family by doubling, and
one product; in float64, as the powers of a matrix that is far from normal multiply rounding errors.

Bidirectional: a second C gives a second kernel of the same states; it looks ahead and leaves out the current token.

Initialisation: A and B are HiPPO-LegS, n_ssm copies; C, D standard normal; log_dt uniform between log dt_min and
log dt_max; W, b PyTorch's own. A, B and dt learn at `ssm_lr` at most and without weight decay. Variant fixed, the
paper's LSSL-f: A, B and dt stay as they start.

Departures: N = 32, where the paper has 128 or 256, as a kernel takes log L squarings of a dense matrix a channel. The
paper's trained LSSL holds A within the matrices that tridiagonal factors make; here the dense matrix itself is learnt.
A channel has one output, where the paper's may have several that its linear map merges.

Checked against: tensors of the authors' dense kernel (bilinear) and of SciPy's zero-order hold: discrete matrices,
kernels, outputs, gradient; HiPPO-LegS of the same repository.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least, one_of
from lra.architectures._dropout import Dropout
from lra.architectures._hippo import legs
from lra.architectures._ssm import checked_copies, initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.fft_conv import fft_conv

DISCRETIZATIONS = ("bilinear", "zoh")
State = tuple[Tensor, Tensor, Tensor]


def discretized(A: Tensor, B: Tensor, dt: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """Abar: (D, N, N), Bbar: (D, N) of A: (D or 1, N, N), B: (D or 1, N), dt: (D,)."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    step = dt[:, None, None] * A
    if discretization == "bilinear":
        both = torch.cat([eye + step / 2, (dt[:, None] * B).unsqueeze(-1)], dim=-1)
        both = torch.linalg.solve(eye - step / 2, both)
        return both[..., :-1], both[..., -1]
    # exp of [[dt A, dt B], [0, 0]] holds both, and needs no inverse of A
    square = torch.cat([step, (dt[:, None] * B).unsqueeze(-1)], dim=-1)
    both = torch.linalg.matrix_exp(F.pad(square, (0, 0, 0, 1)))
    return both[:, :-1, :-1], both[:, :-1, -1]


def orbit(A: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """v, A v, A^2 v, ...: at least `count` rows, a power of two, (..., D, rows, N), and A^rows; v: (..., D, N)."""
    rows = v.unsqueeze(-2)
    while rows.shape[-2] < count:
        rows, A = torch.cat([rows, rows @ A.mT], dim=-2), A @ A
    return rows, A


class LinearSSMMixer(Mixer):
    """(B, L, D) -> (B, L, D). n_ssm: independent (A, B), channel h taking number h mod n_ssm."""

    A: Tensor
    B: Tensor
    log_dt: Tensor

    def __init__(
        self, d_model: int, *, state_size: int, discretization: str, dt_min: float, dt_max: float, n_ssm: int,
        fixed: bool, causal: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.causal, self.discretization = causal, discretization
        A, B = (t.float() for t in legs(state_size))
        log_dt = initial_log_dt(d_model, dt_min, dt_max)
        for name, start in (("log_dt", log_dt), ("A", A.repeat(n_ssm, 1, 1)), ("B", B.repeat(n_ssm, 1))):
            if fixed:
                self.register_buffer(name, start)
            else:
                self.register_parameter(name, nn.Parameter(start))
        self.C = nn.Parameter(torch.randn(1 if causal else 2, d_model, state_size))
        self.D = nn.Parameter(torch.randn(d_model))
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Abar: (D, N, N), Bbar: (D, N), float64."""
        tiles = len(self.log_dt) // len(self.A)
        A, B = self.A.double().repeat(tiles, 1, 1), self.B.double().repeat(tiles, 1)
        return discretized(A, B, self.log_dt.double().exp(), self.discretization)

    def kernel(self, length: int) -> Tensor:
        """K: (1 or 2, D, length), float64; the second looks ahead."""
        A, B = self.discrete()
        near, A = orbit(A, B, math.isqrt(length))
        far, _ = orbit(A.mT, self.C.double(), -(-length // near.shape[-2]))
        return (far @ near.mT).flatten(-2)[..., :length]

    def ssm(self, x: Tensor) -> Tensor:
        """y of the equations: (B, L, D) -> (B, L, D)."""
        K = self.kernel(x.shape[1]).to(torch.promote_types(x.dtype, torch.float32))
        return fft_conv(x, K[0] if self.causal else K, self.D, bidirectional=not self.causal)

    def _project(self, y: Tensor) -> Tensor:
        return self.output_linear(self.dropout(F.gelu(y)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._project(self.ssm(x))

    def cost(self, length: int) -> Cost:
        kernels, width, N = self.C.shape
        near = 1 << max(math.isqrt(length) - 1, 0).bit_length()
        far = 1 << (-(-length // near) - 1).bit_length()
        doublings = round(math.log2(near * far))
        powers = 2.0 * width * (N**2 * (near - 1 + kernels * (far - 1)) + N**3 * doublings)
        # a solve of N equations with N + 1 right sides; the exponential takes some 15 products
        discrete = width * N**3 * (8 / 3 if self.discretization == "bilinear" else 30.0)
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        light = width * (2 * transform + 6 * length) + 12.0 * length * width
        product = powers + 2.0 * kernels * width * near * far * N
        kernel = Cost(product, discrete + kernels * width * transform).per_batch
        return kernel + Cost.linear(length, width, width) + Cost(other=light)

    def init_state(self, batch: int) -> State:
        """s_0 = 0, and the discrete matrices, which take a solve of N equations a channel."""
        _, width, N = self.C.shape
        return self.C.new_zeros(batch, width, N), *self.discrete()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: s_t, (B, D, N), Abar and Bbar. One step is in float64, as the kernel is."""
        before, A, B = state
        after = (A @ before.to(A.dtype).unsqueeze(-1)).squeeze(-1) + B * x.unsqueeze(-1)
        y = (self.C[0] * after).sum(-1).to(x.dtype) + self.D * x
        return self._project(y), (after.to(before.dtype), A, B)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (before, A, B), tokens = state, x.shape[1]
        reads = orbit(A.mT, self.C[0].double(), tokens + 1)[0]  # C Abar^l
        K = (reads[:, :tokens] @ B.unsqueeze(-1)).squeeze(-1)
        y = fft_conv(x, K.to(torch.promote_types(x.dtype, torch.float32)), self.D)
        y = y + torch.einsum("dln,bdn->bld", reads[:, 1 : tokens + 1], before.to(A.dtype)).to(y.dtype)
        inputs = orbit(A, B, tokens)[0][:, :tokens].flip(1)  # Abar^(C - 1 - l) Bbar
        after = torch.einsum("dij,bdj->bdi", torch.linalg.matrix_power(A, tokens), before.to(A.dtype))
        after = after + torch.einsum("dln,bld->bdn", inputs, x.to(A.dtype))
        return self._project(y), (after.to(before.dtype), A, B)


class LinearSSM(Stack):
    """state_size: N. n_ssm: independent (A, B), a divisor of d_model. discretization: of DISCRETIZATIONS. fixed: A, B
    and dt are not learnt. dt_min, dt_max: range of the initial step sizes. ssm_lr: rate cap of A, B, dt."""

    card = Card(
        title="Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers",
        year=2021,
        url="https://arxiv.org/abs/2110.13985",
        scaling="L log L",
        causal=True,
        exempt={
            "optim_norms": "trained as S4, whose optimiser spares dt, A and B alone",
            "exports": "the powers of A are computed for one length",
        },
        variants={"zoh": {"discretization": "zoh"}, "fixed": {"fixed": True}},
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        dropout: float = 0.0,
        direction: str = "causal",
        state_size: int = 32,
        n_ssm: int = 1,
        discretization: str = "bilinear",
        fixed: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        ssm_lr: float = 0.001,
        **stack: Any,
    ) -> None:
        at_least(1, state_size=state_size)
        one_of(DISCRETIZATIONS, discretization=discretization)
        checked_copies(n_ssm, d_model)
        self.ssm_lr, self.fixed = ssm_lr, fixed
        super().__init__(
            lambda _: LinearSSMMixer(
                d_model, state_size=state_size, discretization=discretization, dt_min=dt_min, dt_max=dt_max,
                n_ssm=n_ssm, fixed=fixed, causal=direction == "causal", dropout=dropout,
            ),
            native=True, d_model=d_model, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        names = () if self.fixed else ("log_dt", "A", "B")
        return {f"*.{name}": {"lr": self.ssm_lr, "weight_decay": 0.0} for name in names}
