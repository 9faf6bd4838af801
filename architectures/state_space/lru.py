"""LRU: a linear recurrence with a complex diagonal, parametrised to be stable and initialised on a ring.

Orvieto et al. 2023, arXiv:2303.06349. Per token, with N complex states:

    lambda = exp(-exp(nu_log) + i exp(theta_log))          (N,)        |lambda| < 1 whatever is learnt
    s_t = lambda s_{t-1} + exp(gamma_log) B x_t,   s_0 = 0 (B, L, N)   B complex (N, D)     sections 3.3, 3.4
    y_t = Re(C s_t) + D x_t                                (B, L, D)   C complex (D, N), D (D,)
    out = (W_1 gelu(y) + b_1) sigmoid(W_2 gelu(y) + b_2)   (B, L, D)   tanh form of GELU

There are no conjugate pairs: N counts complex states, each of which is used.

Bidirectional, as in S5, whose code the paper follows: a second scan of the same exp(gamma_log) B x with the same lambda
runs backwards and is read by a C of its own; both include x_t.

Initialisation: |lambda|^2 uniform in [r_min^2, r_max^2], which is uniform over the area of the ring, phase uniform in
[0, max_phase]; exp(gamma_log) = sqrt(1 - |lambda|^2) gives every state the variance of white noise, and is learnt
freely from there; parts of B normal of variance 1 / 2D, of C of 1 / N, D standard normal; W, b PyTorch's own. The paper
chooses r_min and r_max for each task, and max_phase pi / 10 for Path-X alone (section 3.4). lambda, gamma_log and B
learn at `recurrent_lr_scale` times the recipe's rate (a half to a tenth in the paper) and without weight decay.

Departures: layer norm unless the recipe says otherwise, as in S4D and unlike the paper's batch norm, whose statistics
depend on the rest of the batch.

Checked against: tensors of minimal-LRU, an independent implementation, as the authors published no repository: the
recurrence with its gradient, the ring, the whole residual layer with layer and batch norm before and after; parameter
gradients against the recurrence step by step; the backward scan against the recurrence over each reversed sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._dropout import Dropout
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.linear_scan import linear_scan


def ring(u: Tensor, v: Tensor, r_min: float, r_max: float, max_phase: float) -> tuple[Tensor, Tensor, Tensor]:
    """nu_log, theta_log and gamma_log from draws u and v, uniform in (0, 1): all (N,)."""
    radius_squared = u * (r_max**2 - r_min**2) + r_min**2
    return (-0.5 * radius_squared.log()).log(), (max_phase * v).log(), 0.5 * torch.log1p(-radius_squared)


class LRUMixer(Mixer):
    """(B, L, D) -> (B, L, D). The padding is zero, so the backward scan reaches the last real token with no state."""

    def __init__(
        self,
        d_model: int,
        *,
        state_size: int,
        r_min: float,
        r_max: float,
        max_phase: float,
        causal: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        # float64: 1 - |lambda| of float32 is off by 1e-4 of itself at |lambda| = 0.999; 1 - u is never 0
        u, v = 1 - torch.rand(2, state_size, dtype=torch.float64)
        start = (nn.Parameter(t.float()) for t in ring(u, v, r_min, r_max, max_phase))
        self.nu_log, self.theta_log, self.gamma_log = start
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.B = nn.Parameter(torch.randn(state_size, 2, d_model) / math.sqrt(2 * d_model))
        # the second C reads the backward scan
        self.C = nn.Parameter(torch.randn(1 if causal else 2, d_model, state_size, 2) / math.sqrt(state_size))
        self.D = nn.Parameter(torch.randn(d_model))
        self.out = nn.Linear(d_model, 2 * d_model)  # rows: W_1, W_2
        self.dropout = Dropout(dropout)

    def _decay(self) -> Tensor:
        """lambda: (N,) complex."""
        return torch.exp(torch.complex(-wide(self.nu_log).exp(), wide(self.theta_log).exp()))

    def _inputs(self, x: Tensor) -> Tensor:
        """exp(gamma_log) B x: (..., D) -> (..., N) complex."""
        B = (self.gamma_log.exp()[:, None, None] * self.B).flatten(0, 1)
        return torch.view_as_complex(wide(F.linear(x, B)).unflatten(-1, (-1, 2)))

    def _outputs(self, states: list[Tensor], x: Tensor) -> Tensor:
        """Re(C s) + D x: one (..., N) complex for each direction, (..., D) -> (..., D)."""
        real, imaginary = self.C.unbind(-1)
        C = torch.stack([real, -imaginary], dim=-1)  # (1 or 2, D, N, 2)
        s = torch.cat([torch.view_as_real(s).flatten(-2) for s in states], dim=-1)
        return F.linear(s, C.flatten(2).transpose(0, 1).flatten(1)) + self.D * x

    def _project(self, y: Tensor) -> Tensor:
        return F.glu(self.out(self.dropout(F.gelu(y, approximate="tanh"))), dim=-1)

    def recurrence(self, x: Tensor) -> Tensor:
        """y of the equations: (B, L, D) -> (B, L, D)."""
        decay, inputs = self._decay()[None, None], self._inputs(x)
        ways = [False, True][: len(self.C)]
        return self._outputs([linear_scan(decay, inputs, reverse=way) for way in ways], x)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._project(self.recurrence(x))

    def cost(self, length: int) -> Cost:
        ways, width, states, _ = self.C.shape
        maps = (1 + ways) * Cost.linear(length, width, 2 * states, bias=False)
        maps += Cost.linear(length, width, 2 * width)
        return maps + Cost(other=8.0 * length * ways * states + 20.0 * length * width)

    def init_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, len(self.nu_log), dtype=self.nu_log.dtype.to_complex(), device=self.nu_log.device)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: s (B, N) complex."""
        state = self._decay() * state + self._inputs(x)
        return self._project(self._outputs([state], x)), state

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        s = linear_scan(self._decay()[None, None], self._inputs(x), state)
        return self._project(self._outputs([s], x)), s[:, -1]


class LRU(Stack):
    """state_size: N complex states. r_min, r_max: radii of the ring lambda starts on; max_phase: its largest angle.
    recurrent_lr_scale: learning rate of lambda, gamma and B over the recipe's."""

    card = Card(
        title="Resurrecting Recurrent Neural Networks for Long Sequences",
        year=2023,
        url="https://arxiv.org/abs/2303.06349",
        scaling="L",
        causal=True,
        exempt={"optim_norms": "the paper decays all but recurrent parameters (appendix B)"},
        recall={"r_min": 0.98, "r_max": 0.9999, "max_phase": 0.1},  # section 3.4: a thin ring and small phases
        variants={"slow": {"max_phase": 0.314}},
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        dropout: float = 0.0,
        direction: str = "causal",
        state_size: int = 64,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        recurrent_lr_scale: float = 0.25,
        **stack: Any,
    ) -> None:
        if state_size < 1:
            raise ValueError(f"state_size is {state_size}; at least 1")
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"r_min is {r_min}, r_max {r_max}; 0 <= r_min < r_max <= 1, radii of a stable ring")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase is {max_phase}; an angle in (0, 2 pi]")
        self.recurrent_lr_scale = recurrent_lr_scale
        super().__init__(
            lambda _: LRUMixer(
                d_model, state_size=state_size, r_min=r_min, r_max=r_max, max_phase=max_phase,
                causal=direction == "causal", dropout=dropout,
            ),
            native=True, d_model=d_model, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        names = ("nu_log", "theta_log", "gamma_log", "B")
        return {f"*.{name}": {"lr_scale": self.recurrent_lr_scale, "weight_decay": 0.0} for name in names}
