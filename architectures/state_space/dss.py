"""DSS: the first state space model with a diagonal state matrix, its kernel a softmax over the length, or plain.

Gupta, Gu and Berant 2022, arXiv:2203.14343. N complex modes, shared by all H channels and without conjugate pairs, so
that the kernel is the real part of a sum. Per channel h, with a step size dt = exp(log_dt), P_nl = dt_h Lambda_n l and
L = `length`, whatever the length of the batch (proposition 1):

    softmax   Lambda = Lambda_re + i Lambda_im           K = Re W_h / Lambda softmax_l(P)
              K_l = Re sum_n W_hn (e^z - 1) / ((e^(zL) - 1) Lambda_n) e^(zl),   z = dt_h Lambda_n
    exp       Lambda = -exp(Lambda_re) + i Lambda_im     K_l = Re sum_n W_hn (e^z - 1) / Lambda_n e^(zl)
    s_t = e^z s_{t-1} + u_t                              (B, H, N)     K_l = Re sum_n C_hn e^(zl)
    y_t = Re sum_n C_hn s_t,n + D_h u_t                  = (K * u)_t + D u_t
    out = W_out gelu(y) + b                              (B, L, D)

A mode of softmax may have Re Lambda > 0: it weighs tokens the more, the further back they lie. With the largest term of
its softmax taken out, every power has a size of at most 1: its kernel is that of -z read from the last place, and its
state s_t = s_{t-1} + e^(-zt) u_t is read with e^(z(t - L + 1)). Quotients are 1 / x = x* / (|x|^2 + 1e-7) in softmax,
and x* / max(|x|^2, 1e-7) in exp. Bidirectional: a second W gives a second kernel of the same modes; it looks ahead and
leaves out the current token. `separate_dt`: a step size for Re Lambda and one for Im Lambda, equal at first.

Initialisation (Skew-Hippo): Lambda = -1/2 + i times the N positive frequencies of the normal part of HiPPO-LegS of size
2 N; W complex with standard normal parts and D standard normal; log_dt uniform between log dt_min and log dt_max;
W_out, b PyTorch's own. Lambda and W learn at `ssm_lr` at most, dt at `dt_lr`, all without weight decay.

Departures: the released softmax runs over the batch's own length, where outputs would hang on the amount of padding.
Its gradient takes the largest term of a rising mode as a constant, which it is not once the sum is in closed form; ours
is the gradient of the kernel. Two step sizes are the default there. As there, no feed-forward part follows.

Checked against: tensors of the authors' DSS (softmax with modes of either sign; exp; exp bidirectional with two heads),
kernels, outputs and gradient of x; the dense softmax, and the recurrence step by step, outputs and every gradient.
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
from lra.architectures._hippo import legs_modes
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt, weighted_sum
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.fft_conv import fft_conv
from lra.kernels.ssm_kernel_diag import ssm_kernel_diag

VERSIONS = ("softmax", "exp")
EPSILON = 1e-7


class DSSMixer(Mixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, *, length: int, state_size: int, version: str, separate_dt: bool, dt_min: float,
        dt_max: float, causal: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.causal, self.length, self.version = causal, length, version
        frequency = legs_modes(2 * state_size)[0].flip(0)[:state_size].float()
        real = torch.full_like(frequency, 0.5)
        self.log_dt = nn.Parameter(initial_log_dt(d_model, dt_min, dt_max).unsqueeze(1).repeat(1, 1 + separate_dt))
        self.Lambda_re = nn.Parameter(real.log() if version == "exp" else -real)
        self.Lambda_im = nn.Parameter(frequency)
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.W = nn.Parameter(torch.randn(1 if causal else 2, d_model, state_size, 2))
        self.D = nn.Parameter(torch.randn(d_model))
        self.output_linear = nn.Linear(d_model, d_model)
        self.dropout = Dropout(dropout)

    def _modes(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A: (H, N), dt: (H,), z = dt A and C: (1 or 2, H, N), both complex128, and which modes rise, (N,) bool: their
        A is turned round, so that every exp(z) has a size of at most 1."""
        dt, real, imaginary = wide(self.log_dt).exp(), wide(self.Lambda_re), wide(self.Lambda_im)
        real = -real.exp() if self.version == "exp" else real
        rises = real > 0
        # the imaginary step is exact, as phases need it; the real one is a ratio to it
        A = torch.complex(real * dt[:, :1] / dt[:, -1:], imaginary.expand(len(dt), -1))
        A = torch.where(rises, -A, A)
        z = dt[:, -1:].double() * A.to(torch.complex128)
        Lambda = torch.complex(real, imaginary).to(torch.complex128)
        if self.version == "softmax":
            below = torch.expm1(z * self.length) * Lambda
            scale = torch.expm1(z) * below.conj() / (below.abs().square() + EPSILON)
        else:
            scale = torch.expm1(z) * Lambda.conj() / Lambda.abs().square().clamp_min(EPSILON)
        return A, dt[:, -1], z, torch.view_as_complex(wide(self.W)) * scale, rises

    def kernel(self, length: int) -> Tensor:
        """K: (1 or 2, H, length); the second looks ahead."""
        A, dt, z, C, rises = self._modes()
        if self.version == "exp":
            return ssm_kernel_diag(A, C.to(A.dtype) / 2, dt, length, "none")
        if length > self.length:
            raise ValueError(f"length {length} exceeds the {self.length} places the softmax of this DSS runs over")
        last = C * (z * (self.length - length)).exp()
        both = torch.cat([C.masked_fill(rises, 0), last.masked_fill(~rises, 0)])
        falling, rising = ssm_kernel_diag(A, both.to(A.dtype) / 2, dt, length, "none").chunk(2)
        return falling + rising.flip(-1)

    def _project(self, y: Tensor) -> Tensor:
        return self.output_linear(self.dropout(F.gelu(y)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        K = self.kernel(x.shape[1])
        return self._project(fft_conv(x, K[0] if self.causal else K, self.D, bidirectional=not self.causal))

    def cost(self, length: int) -> Cost:
        kernels, width, modes, _ = self.W.shape
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        light = width * (2 * transform + 6 * length) + 15.0 * length * width
        vandermonde = 4.0 * (1 + (self.version == "softmax")) * modes * length
        kernel = kernels * width * (vandermonde + transform)
        return Cost.linear(length, width, width) + Cost(other=light, batch_other=kernel)

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        device = self.W.device
        state = torch.zeros(batch, *self.W.shape[1:3], dtype=self.W.dtype.to_complex(), device=device)
        return torch.zeros((), dtype=torch.int64, device=device), state

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """State: t and s_t, (B, H, N) complex. One step is in double precision: rounding e^z would grow with time."""
        time, before = state
        _, _, z, C, rises = self._modes()
        fall, rise = z.masked_fill(rises, 0), z.masked_fill(~rises, 0)
        after = (fall.exp() * before + (rise * time).exp() * x.unsqueeze(-1)).to(before.dtype)
        y = (C[0] * (rise * (self.length - 1 - time)).exp() * after).sum(-1).real.to(x.dtype)
        return self._project(y + self.D * x), (time + 1, after)

    def chunk(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The kernel filters the tokens; what the state adds is a kernel too, one for each sequence."""
        (time, before), tokens = state, x.shape[1]
        A, dt, z, C, rises = self._modes()
        reads = C[0] * before
        fall, rise = reads * z.exp(), reads * (z * (self.length - time - tokens)).exp()
        both = torch.cat([fall.masked_fill(rises, 0), rise.masked_fill(~rises, 0)])
        falling, rising = ssm_kernel_diag(A, both.to(A.dtype) / 2, dt, tokens, "none").chunk(2)
        y = fft_conv(x, self.kernel(tokens)[0], self.D) + (falling + rising.flip(-1)).transpose(1, 2).to(x.dtype)

        def exponent(place: Tensor) -> Tensor:
            return z.unsqueeze(-1) * torch.where(rises.unsqueeze(-1), time + place, tokens - 1 - place)

        after = (z.masked_fill(rises, 0) * tokens).exp() * before + weighted_sum(x, exponent)
        return self._project(y), (time + tokens, after.to(before.dtype))


class DSS(Stack):
    """state_size: N, complex. version: of VERSIONS. separate_dt: two step sizes a channel. dt_min, dt_max: range of the
    initial step sizes. ssm_lr: highest learning rate of Lambda and W, dt_lr: of dt, which trains at dt_lr_scale
    times the base rate below that."""

    card = Card(
        title="Diagonal State Spaces are as Effective as Structured State Spaces",
        year=2022,
        url="https://arxiv.org/abs/2203.14343",
        scaling="L log L",
        causal=True,
        exempt={"optim_norms": "the authors' optimiser spares dt, Lambda and W alone"},
        variants={"softmax": {"version": "softmax"}, "exp": {"version": "exp"}},
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
        version: str = "softmax",
        separate_dt: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        ssm_lr: float = 0.001,
        dt_lr: float = 0.001,
        dt_lr_scale: float = 1.0,
        **stack: Any,
    ) -> None:
        at_least(1, state_size=state_size)
        one_of(VERSIONS, version=version)
        self.ssm_lr, self.dt_lr, self.dt_lr_scale = ssm_lr, dt_lr, dt_lr_scale
        super().__init__(
            lambda _: DSSMixer(
                d_model, length=length, state_size=state_size, version=version, separate_dt=separate_dt, dt_min=dt_min,
                dt_max=dt_max, causal=direction == "causal", dropout=dropout,
            ),
            native=True, d_model=d_model, length=length, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        settings = {f"*.{name}": {"lr": self.ssm_lr, "weight_decay": 0.0} for name in ("Lambda_re", "Lambda_im", "W")}
        return settings | {"*.log_dt": {"lr": self.dt_lr, "lr_scale": self.dt_lr_scale, "weight_decay": 0.0}}
