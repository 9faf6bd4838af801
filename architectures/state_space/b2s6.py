"""B2S6: a selective scan whose parameters are selected per block of channels, with a bias of the input vector.

Yu and Erichson 2025, arXiv:2505.09022. D channels in h blocks of p neighbours, x = [x^1 .. x^h]; n modes with one
diagonal A for all channels. For block j, channel i of it and token t (Algorithm 2, equation 7):

    dt = softplus(w_j . x^j_t + b_ji)                        (B, L, h, p)      one number a block, a bias a channel
    B_t = B_weight_j x^j_t + B_bias_ji                       (B, L, h, p, n)
    C_t = x^j_t C_j                                          (B, L, h, n)      shared by the channels of the block
    s_t = exp(dt A) s_{t-1} + (exp(dt A) - 1) / A B_t x_t    (B, L, h, p, n)   zero-order hold, s_0 = 0
    y_t = Re(C_t . s_t) + D x_t                              (B, L, D)
    out = GLU(W gelu(y) + b)                                 (B, L, D)         value half times sigmoid(gate half)

`complex`: A, B_weight and B_bias are complex, as for the paper's long-range runs (section 7), and C is real; otherwise
all are real. There are no conjugate pairs: Re stands without a factor 2.

The states are D n numbers a token: they are made for CHUNK tokens at a time, and made again for the backward pass. A
`selective_scan` with an input vector for each channel, complex A and zero-order hold would not need to store them.

Initialisation. The paper prints none and its code could not be had, so these are ours: A = -1/2 + i pi n (S4D-Lin),
or -(n + 1) where real; B_bias = 1, so that the unit starts as S4D with a selective part added; B_weight, C and w
uniform within p^-1/2; dt at x = 0 uniform in the logarithm between dt_min and dt_max; D standard normal; W, b
PyTorch's own. A, w and b learn at `ssm_lr` at most, A, w, b and B_bias without weight decay.

Departures: the paper's code base for these runs is that of S4, and says neither whether the unit stands in the Mamba
block nor whether it has a skip (a footnote names a D): here it takes the place of the kernel in the block of S4.

Checked against: Algorithm 2 around the Mamba authors' plain reference scan: step sizes, outputs with real and with
complex parameters, gradients of x and of every real parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lra.architectures._checks import at_least, divides
from lra.architectures._dropout import Dropout
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.linear_scan import linear_scan

CHUNK = 256


def number(t: Tensor) -> Tensor:
    """(..., 2), pairs of real and imaginary parts, or (..., 1) -> (...)."""
    t = wide(t)
    return torch.view_as_complex(t) if t.shape[-1] == 2 else t.squeeze(-1)


class B2S6Mixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self,
        d_model: int,
        *,
        state_size: int,
        n_blocks: int,
        complex: bool,
        dt_min: float,
        dt_max: float,
        dropout: float,
    ) -> None:
        super().__init__()
        share, parts = d_model // n_blocks, 2 if complex else 1
        bound = share**-0.5
        n = torch.arange(state_size, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.full_like(n, 0.5).log() if complex else (n + 1).log())
        self.A_imag = nn.Parameter(math.pi * n) if complex else None
        self.w = nn.Parameter(torch.empty(n_blocks, share).uniform_(-bound, bound))
        dt = initial_log_dt(d_model, dt_min, dt_max).exp().view(n_blocks, share)
        self.b = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        # complex numbers are kept as pairs of reals, which every optimiser and checkpoint format takes
        self.B_weight = nn.Parameter(torch.empty(n_blocks, state_size, share, parts).uniform_(-bound, bound))
        self.B_bias = nn.Parameter(F.pad(torch.ones(n_blocks, share, state_size, 1), (0, parts - 1)))
        self.C = nn.Parameter(torch.empty(n_blocks, share, state_size).uniform_(-bound, bound))
        self.D = nn.Parameter(torch.randn(d_model))
        self.output_linear = nn.Linear(d_model, 2 * d_model)
        self.dropout = Dropout(dropout)

    def _A(self) -> Tensor:
        real = -wide(self.A_log).exp()
        return real if self.A_imag is None else torch.complex(real, wide(self.A_imag))

    def step_sizes(self, x: Tensor) -> Tensor:
        """x: (..., h, p) -> dt (..., h, p)."""
        return F.softplus((wide(x) * self.w).sum(-1, keepdim=True) + self.b)

    def _recurrence(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (..., h, p) -> factor and input of the states (..., h, p, n), and C (..., h, 1, n)."""
        A = self._A()
        z = self.step_sizes(x).unsqueeze(-1) * A
        B = number(torch.einsum("...hp,hnpc->...hnc", x, self.B_weight).contiguous())
        B = B.unsqueeze(-2) + number(self.B_bias)
        C = wide(torch.einsum("...hp,hpn->...hn", x, self.C)).unsqueeze(-2)
        return z.exp(), torch.expm1(z) / A * B * x.unsqueeze(-1), C

    def _chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, c, h, p), the state before (B, D n) -> Re(C . s) (B, c, h, p) and the state after."""
        decay, inputs, C = self._recurrence(x)
        states = linear_scan(decay.flatten(2), inputs.flatten(2), state)
        return (C * states.view_as(inputs)).sum(-1).real, states[:, -1]

    def unit(self, x: Tensor) -> Tensor:
        """Re(C . s) of the equations, without the skip: (B, L, D) -> (B, L, D)."""
        blocks, state = x.unflatten(-1, self.w.shape), self.init_state(x.shape[0]).flatten(1)
        if x.shape[1] <= CHUNK:
            return self._chunk(blocks, state)[0].flatten(-2)
        outputs = []
        for part in blocks.split(CHUNK, dim=1):
            y, state = checkpoint(self._chunk, part, state, use_reentrant=False, preserve_rng_state=False)
            outputs.append(y)
        return torch.cat(outputs, dim=1).flatten(-2)

    def _project(self, y: Tensor) -> Tensor:
        return F.glu(self.output_linear(self.dropout(F.gelu(y))), dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._project(self.unit(x) + self.D * x)

    def cost(self, length: int) -> Cost:
        states, width = self.C.shape[2], len(self.D)
        parts = self.B_weight.shape[-1]
        selection = Cost(2.0 * length * width * states * (1 + parts))
        scan = (30.0 if parts == 2 else 10.0) * width * states
        return selection + Cost.linear(length, width, 2 * width) + Cost(other=length * (scan + 30.0 * width))

    def init_state(self, batch: int) -> Tensor:
        like = self._A()
        return like.new_zeros(batch, *self.w.shape, len(like))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: s (B, h, p, n)."""
        decay, inputs, C = self._recurrence(x.unflatten(-1, self.w.shape))
        state = decay * state + inputs
        y = (C * state).sum(-1).real.flatten(-2)
        return self._project(y + self.D * x), state


class B2S6(Stack):
    """state_size: n. n_blocks: h, a divisor of d_model. complex: whether A and B are complex. dt_min, dt_max: range of
    the initial step sizes. ssm_lr: highest learning rate of A and of the step sizes."""

    card = Card(
        title="Block-Biased Mamba for Long-Range Sequence Processing",
        year=2025,
        url="https://arxiv.org/abs/2505.09022",
        scaling="L",
        causal=True,
        variants={"real": {"complex": False}},
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        dropout: float = 0.0,
        state_size: int = 16,
        n_blocks: int = 8,
        complex: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        ssm_lr: float = 0.001,
        **stack: Any,
    ) -> None:
        at_least(1, state_size=state_size)
        divides("d_model", d_model, n_blocks=n_blocks)
        self.ssm_lr, self.complex = ssm_lr, complex
        super().__init__(
            lambda _: B2S6Mixer(
                d_model, state_size=state_size, n_blocks=n_blocks, complex=complex, dt_min=dt_min, dt_max=dt_max,
                dropout=dropout,
            ),
            d_model=d_model, dropout=dropout, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        slow = ("A_log", "A_imag", "w", "b") if self.complex else ("A_log", "w", "b")
        rules = {f"*.{name}": {"lr": self.ssm_lr, "weight_decay": 0.0} for name in slow}
        return {**rules, **undecayed(self, "B_bias", "D")}
