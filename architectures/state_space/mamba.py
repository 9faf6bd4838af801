"""Mamba: a diagonal state space model whose step size, input and output maps are functions of the current token.

Gu and Dao 2023, arXiv:2312.00752. With E = expand D, N the state size and R the rank of the step-size map:

    u, z = split(in_proj x)                                (B, L, E) each                    section 3.4, figure 3
    u = silu(conv1d u)                                     (B, L, E)     depthwise, causal, over d_conv tokens
    r, B, C = split(x_proj u)                              (B, L, R), (B, L, N), (B, L, N)   selection, section 3.2
    dt = softplus(dt_proj r)                               (B, L, E)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,   h_0 = 0    (B, L, E, N), never stored;  A = -exp(A_log), (E, N)
    y = out_proj((C h + D u) silu(z))                      (B, L, D)

Initialisation (section 3.6 and the released code): A = -1, ..., -N in every channel (S4D-Real); dt at x = 0 uniform in
the logarithm between dt_min and dt_max, at least 1e-4; the weight of dt_proj uniform within R^-1/2; D = 1; out_proj
divided by sqrt(n_layers), as there is one residual a layer; the rest PyTorch's own. A_log, D, biases, that of dt_proj
among them, and norms learn without weight decay.

Departures: the paper's optional norm inside the mixer is left out, as in the released code. A block is the mixer alone,
with RMS norm, as in the paper; `bias` adds biases, 0 at first, to in_proj and out_proj, which the released code offers
and leaves out.

Checked against: tensors of Hugging Face's MambaMixer, cross-checked there against mamba-minimal: outputs, gradients of
x and of every parameter, sequences inside the layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._published import first_prefix, number_of_layers, same_names
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer, Published
from lra.kernels.selective_scan import selective_scan

State = tuple[Tensor, Tensor]


class StepSizes(nn.Module):
    """dt of the equations: r (..., R) -> (..., E), in float32 at least."""

    def __init__(self, dt_rank: int, width: int, dt_min: float, dt_max: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dt_rank).uniform_(-(dt_rank**-0.5), dt_rank**-0.5))
        dt = initial_log_dt(width, dt_min, dt_max).exp().clamp(min=1e-4)
        self.bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(self, r: Tensor) -> Tensor:
        return F.softplus(wide(F.linear(r, self.weight)) + self.bias)


class MambaMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, state_size: int, expand: int, d_conv: int, dt_rank: int, dt_min: float, dt_max: float,
        bias: bool, n_layers: int,
    ) -> None:  # fmt: skip
        super().__init__()
        width = expand * d_model
        self.sizes = (dt_rank, state_size, state_size)
        self.in_proj = nn.Linear(d_model, 2 * width, bias=bias)  # rows: u, z
        self.conv1d = ShortConvolution(width, d_conv, bias=True)
        self.x_proj = nn.Linear(width, sum(self.sizes), bias=False)  # rows: r, B, C
        self.dt_proj = StepSizes(dt_rank, width, dt_min, dt_max)
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, d_model, bias=bias)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(n_layers))
        if bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    def _selection(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt (..., E), A (E, N), B and C (..., N)."""
        r, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        return self.dt_proj(r), -self.A_log.exp(), B, C

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.conv1d(u)
        return self.out_proj(selective_scan(u, *self._selection(u), self.D, z))

    def cost(self, length: int) -> Cost:
        d_model, (width, states), rank = self.in_proj.in_features, self.A_log.shape, self.sizes[0]
        bias = self.in_proj.bias is not None
        maps = (
            Cost.linear(length, d_model, 2 * width, bias)
            + Cost.linear(length, width, sum(self.sizes), bias=False)
            + Cost.linear(length, rank, width)
            + Cost.linear(length, width, d_model, bias)
        )
        scan = 7.0 * states + 2.0 * self.conv1d.weight.shape[2]
        return maps + Cost(other=length * width * (scan + 20.0))

    def init_state(self, batch: int) -> State:
        return self.conv1d.init_state(batch), self.A_log.new_zeros(batch, *self.A_log.shape)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, E), and h (B, E, N)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, window = self.conv1d.step(u, state[0])
        dt, A, B, C = self._selection(u)
        h = torch.exp(dt.unsqueeze(-1) * A) * state[1] + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
        y = torch.einsum("ben,bn->be", h, C) + self.D * u
        return self.out_proj(y * F.silu(z)), (window, h)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, window = self.conv1d.chunk(u, state[0])
        y, h = selective_scan(u, *self._selection(u), self.D, z, h0=state[1], return_state=True)
        return self.out_proj(y), (window, h)


class Mamba(Stack):
    """state_size: N. expand: E over d_model. d_conv: taps of the convolution. dt_rank: R, d_model / 16 rounded up
    unless given. dt_min, dt_max: range of the initial step sizes. bias: of the outer two maps."""

    card = Card(
        title="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        year=2023,
        url="https://arxiv.org/abs/2312.00752",
        scaling="L",
        causal=True,
    )
    block = Block(ffn="none", norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        state_size: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = False,
        **stack: Any,
    ) -> None:
        rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        at_least(1, state_size=state_size, expand=expand, d_conv=d_conv, dt_rank=rank)
        super().__init__(
            lambda _: MambaMixer(
                d_model, state_size=state_size, expand=expand, d_conv=d_conv, dt_rank=rank, dt_min=dt_min,
                dt_max=dt_max, bias=bias, n_layers=n_layers,
            ),
            d_model=d_model, n_layers=n_layers, **stack,
        )  # fmt: skip

    @classmethod
    def published(cls, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Published:
        """Of the authors' MambaLMHeadModel and Hugging Face's MambaModel and MambaForCausalLM, whose norms
        have an epsilon of 1e-5."""
        base = first_prefix(tensors, "backbone.", "")
        mixer = f"{base}layers.0.mixer."
        width, d_model = tensors[mixer + "in_proj.weight"].shape
        taps, rank = tensors[mixer + "conv1d.weight"].shape[-1], tensors[mixer + "dt_proj.weight"].shape[1]
        options = {
            "d_model": d_model, "n_layers": number_of_layers(tensors, f"{base}layers."),
            "expand": width // (2 * d_model), "state_size": tensors[mixer + "A_log"].shape[1], "d_conv": taps,
            "dt_rank": rank, "bias": mixer + "in_proj.bias" in tensors, "block": {"norm_eps": 1e-5},
        }  # fmt: skip
        names = same_names(tensors, f"{base}layers.", "layers.") | {"norm.weight": (f"{base}norm_f.weight",)}
        return Published(options, names, ignored=(f"{base}embedding*.weight", "lm_head.weight"))

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log", "D")
