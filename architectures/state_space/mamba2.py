"""Mamba-2: a selective state space model with one decay per head, which makes it linear attention in chunks.

Dao and Gu 2024, arXiv:2405.21060. With E = expand D split into H heads of width P, state size N, and G groups of heads
that share B and C:

    z, (x, B, C), dt = split(in_proj x)                    (B, L, E), (B, L, E + 2 G N), (B, L, H)   section 7.1
    x, B, C = silu(conv1d(x, B, C))                        depthwise, causal, over d_conv tokens
    dt = softplus(dt + dt_bias)                            (B, L, H)
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t',   h_0 = 0   (B, L, H, P, N), never stored;  A = -exp(A_log), (H,)
    y_t = h_t C_t + D x_t                                  (B, L, H, P), flattened to (B, L, E)      section 6
    out = out_proj norm(y silu(z))                         (B, L, D)     RMS over the E / G features of each group

Initialisation, that of the released code: A uniform in [-16, -1]; dt at x = 0 uniform in the logarithm between dt_min
and dt_max, at least 1e-4; D = 1; out_proj divided by sqrt(n_layers), as there is one residual a layer; the rest
PyTorch's own. A_log, D, biases, dt_bias among them, and norms learn without weight decay.

Departures: none known in the mixer. N is 64 unless told, where the paper's language models have 128, and P the largest
power of two up to 64 that divides E. A block is the mixer alone, with RMS norm, as in the paper; `bias` adds biases, 0
at first, to in_proj and out_proj, which the released code offers and leaves out.

Checked against: tensors of Hugging Face's Mamba2Mixer, cross-checked there against mamba2-minimal, with one group and
with two: outputs, gradients of x and of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._norm import rms_norm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._published import first_prefix, number_of_layers, same_names
from lra.architectures._ssm import initial_log_dt
from lra.architectures._stack import Block, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer, Published
from lra.kernels.ssd import ssd

State = tuple[Tensor, Tensor]
CHUNK = 64


class GatedNorm(nn.Module):
    """norm(y silu(z)) of the equations, y, z: (..., E) -> (..., E), in float32 at least."""

    def __init__(self, width: int, n_groups: int) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y = wide(y * F.silu(z)).unflatten(-1, (self.n_groups, -1))
        return rms_norm(y, 1e-5).flatten(-2) * self.weight


class Mamba2Mixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, *, state_size: int, head_dim: int, n_groups: int, expand: int, d_conv: int, dt_min: float,
        dt_max: float, bias: bool, n_layers: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.state_size, self.n_groups = expand * d_model, state_size, n_groups
        self.n_heads = self.width // head_dim
        shared = n_groups * state_size
        self.inner = (self.width, shared, shared)  # x, B, C
        self.sizes = (self.width, sum(self.inner), self.n_heads)  # z, (x, B, C), dt
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=bias)
        self.conv1d = ShortConvolution(sum(self.inner), d_conv, bias=True)
        dt = initial_log_dt(self.n_heads, dt_min, dt_max).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = GatedNorm(self.width, n_groups)
        self.out_proj = nn.Linear(self.width, d_model, bias=bias)
        with torch.no_grad():
            self.out_proj.weight.div_(math.sqrt(n_layers))
        if bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., E + 2 G N) -> x: (..., H, P), B and C: (..., G, N)."""
        x, B, C = xBC.split(self.inner, dim=-1)
        return (
            x.unflatten(-1, (self.n_heads, -1)),
            B.unflatten(-1, (self.n_groups, -1)),
            C.unflatten(-1, (self.n_groups, -1)),
        )

    def _rates(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """dt of the equations: (..., H), and A: (H,)."""
        return F.softplus(wide(dt) + self.dt_bias), -self.A_log.exp()

    def _finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, norm and output map: y, x: (..., H, P), z: (..., E) -> (..., D)."""
        return self.out_proj(self.norm((y + self.D.unsqueeze(-1) * x).flatten(-2), z))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z, xBC, dt = self.in_proj(x).split(self.sizes, dim=-1)
        heads, B, C = self._split(self.conv1d(xBC))
        y = ssd(heads, *self._rates(dt), B, C, CHUNK)
        assert isinstance(y, Tensor)
        return self._finish(y, heads, z)

    def cost(self, length: int) -> Cost:
        d_model, taps = self.in_proj.in_features, self.conv1d.weight.shape[2]
        bias = self.in_proj.bias is not None
        maps = Cost.linear(length, d_model, sum(self.sizes), bias) + Cost.linear(length, self.width, d_model, bias)
        head_dim = self.width // self.n_heads
        scan = 4.0 * self.n_heads * (CHUNK * (self.state_size + head_dim) / 2 + self.state_size * head_dim)
        return maps + Cost(other=length * (scan + sum(self.inner) * (2.0 * taps + 6) + 16.0 * self.width))

    def init_state(self, batch: int) -> State:
        h = self.D.new_zeros(batch, self.n_heads, self.width // self.n_heads, self.state_size)
        return self.conv1d.init_state(batch), h

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, E + 2 G N), and h (B, H, P, N)."""
        z, xBC, raw_dt = self.in_proj(x).split(self.sizes, dim=-1)
        xBC, window = self.conv1d.step(xBC, state[0])
        heads, B, C = self._split(xBC)
        B, C = (t.repeat_interleave(self.n_heads // self.n_groups, dim=1) for t in (B, C))  # (B, H, N)
        dt, A = self._rates(raw_dt)
        h = torch.exp(dt * A)[..., None, None] * state[1] + torch.einsum("bh,bhp,bhn->bhpn", dt, heads, B)
        return self._finish(torch.einsum("bhpn,bhn->bhp", h, C), heads, z), (window, h)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        z, xBC, dt = self.in_proj(x).split(self.sizes, dim=-1)
        xBC, window = self.conv1d.chunk(xBC, state[0])
        heads, B, C = self._split(xBC)
        y, h = ssd(heads, *self._rates(dt), B, C, CHUNK, h0=state[1], return_state=True)
        return self._finish(y, heads, z), (window, h)


class Mamba2(Stack):
    """state_size: N. head_dim: P, which divides expand * d_model. n_groups: G, which divides the number of heads.
    d_conv: taps of the convolution. dt_min, dt_max: range of the initial step sizes. bias: of the outer two maps."""

    card = Card(
        title="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space "
        "Duality",
        year=2024,
        url="https://arxiv.org/abs/2405.21060",
        scaling="L",
        causal=True,
    )
    block = Block(ffn="none", norm="rms")

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        state_size: int = 64,
        head_dim: int | None = None,
        n_groups: int = 1,
        expand: int = 2,
        d_conv: int = 4,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = False,
        **stack: Any,
    ) -> None:
        at_least(1, state_size=state_size, expand=expand, d_conv=d_conv)
        width = expand * d_model
        share = math.gcd(64, width) if head_dim is None else head_dim
        if share < 1 or width % share:
            raise ValueError(f"head_dim is {share}; a divisor of expand * d_model, {width}")
        if n_groups < 1 or width // share % n_groups:
            raise ValueError(f"n_groups is {n_groups}; a divisor of the number of heads, {width // share}")
        super().__init__(
            lambda _: Mamba2Mixer(
                d_model, state_size=state_size, head_dim=share, n_groups=n_groups, expand=expand, d_conv=d_conv,
                dt_min=dt_min, dt_max=dt_max, bias=bias, n_layers=n_layers,
            ),
            d_model=d_model, n_layers=n_layers, **stack,
        )  # fmt: skip

    @classmethod
    def published(cls, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Published:
        """Of the authors' MambaLMHeadModel with Mamba-2 layers and Hugging Face's Mamba2Model and Mamba2ForCausalLM,
        whose norms have an epsilon of 1e-5."""
        base = first_prefix(tensors, "backbone.", "")
        mixer = f"{base}layers.0.mixer."
        d_model, width = tensors[mixer + "out_proj.weight"].shape
        channels, _, taps = tensors[mixer + "conv1d.weight"].shape
        options = {
            "d_model": d_model, "n_layers": number_of_layers(tensors, f"{base}layers."), "expand": width // d_model,
            "state_size": (channels - width) // 2 // given.get("n_groups", 1), "d_conv": taps,
            "head_dim": width // len(tensors[mixer + "A_log"]), "bias": mixer + "in_proj.bias" in tensors,
            "block": {"norm_eps": 1e-5},
        }  # fmt: skip
        names = same_names(tensors, f"{base}layers.", "layers.") | {"norm.weight": (f"{base}norm_f.weight",)}
        ignored = (f"{base}embedding*.weight", "lm_head.weight")
        return Published(options, names, ignored=ignored, undetermined=("n_groups",))

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "A_log", "D")
