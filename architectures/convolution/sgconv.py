"""SGConv: a convolution as long as the sequence, whose kernel gets coarser and smaller with distance.

Li, Cai, Zhang, Chen and Dey 2022, arXiv:2210.09298. S sub-kernels w_i of d taps for each channel, i = 0 .. S - 1, with
S = 1 + ceil(log2(`length` / d)) - init_scale; up(w, f) interpolates w to f times its taps:

    cat   k = [m^(S-1) up(w_0, 1), m^(S-2) up(w_1, 1), m^(S-3) up(w_2, 2), ..., up(w_{S-1}, 2^(S-2))]
    sum   k = sum_i m^(S-1-i) up(w_i, 2^i)              (D, `length`)   each from the current token on
    y = (k / |k_0|) * x + D x                           (B, L, D)       |k_0|: norm of k at the start, a constant
    out = GLU(W gelu(y) + b)                            (B, L, D)       value half times sigmoid(gate half)

Every factor is doubled init_scale times more. decay: "scale", m evenly spaced over the channels from decay_min to
decay_max, so that early scales are the large ones; "power", m = 1 and k times (l + 1)^-a at tap l, with a constant and
drawn from the same range; "learnt", the same with a learnt. k has the taps of the whole `length` and is cut to the
sequence's. Bidirectional: a second k for each channel looks ahead and leaves out the current token.

Initialisation, as released: w standard normal ("randn"), or w_i of channel h the cosine of h periods, channels in an
order drawn for each scale ("cos"); D standard normal; W, b PyTorch's own. w and a learn at `kernel_lr` at most.

Departures: the norm |k_0| is taken when the layer is made and not at its first forward pass, so that the state dict is
complete from the start. The released layer is followed by a linear map without GLU unless its settings say so, as all
those for the Long Range Arena do; here `postact` "none" has it. As there, a block holds no feed-forward part.

Checked against: tensors of the authors' GConv (cat, cat both ways, cat with learnt power, sum by nearest taps; shorter
and longer than the kernel): kernels, outputs, gradient of x; gradients of every parameter against the direct sum.
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
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.fft_conv import fft_conv

COMBINATIONS = ("cat", "sum")
INTERPOLATIONS = ("linear", "nearest")
DECAYS = ("scale", "power", "learnt")
INITS = ("randn", "cos")
POSTACTS = ("glu", "none")


def started(init: str, ways: int, d_model: int, kernel_dim: int) -> Tensor:
    """One sub-kernel as it starts: (ways, D, d)."""
    if init == "randn":
        return torch.randn(ways, d_model, kernel_dim)
    periods = torch.linspace(0, 2 * math.pi, kernel_dim) * torch.arange(d_model).unsqueeze(1)
    return periods.cos()[torch.randperm(d_model)].repeat(ways, 1, 1)


class SGConvMixer(Mixer):
    """(B, L, D) -> (B, L, D). The padding is zero, so what looks ahead finds nothing in it."""

    kernel_norm: Tensor
    multiplier: Tensor
    decay: Tensor | None

    def __init__(
        self, d_model: int, *, length: int, kernel_dim: int, init_scale: int, combine: str, interpolation: str,
        decay: str, decay_min: float, decay_max: float, init: str, postact: str, causal: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.causal, self.length = causal, length
        self.init_scale, self.combine, self.interpolation, self.postact = init_scale, combine, interpolation, postact
        scales = max(1 + math.ceil(math.log2(length / kernel_dim)) - init_scale, 1)
        ways = 1 if causal else 2
        self.D = nn.Parameter(torch.randn(d_model))
        self.kernel_list = nn.ParameterList(started(init, ways, d_model, kernel_dim) for _ in range(scales))
        multiplier = torch.linspace(decay_min, decay_max, d_model) if decay == "scale" else torch.ones(d_model)
        self.register_buffer("multiplier", multiplier)
        power = torch.rand(d_model) * (decay_max - decay_min) + decay_min
        if decay == "learnt":
            self.decay = nn.Parameter(power)
        else:
            self.register_buffer("decay", power if decay == "power" else None)
        self.output_linear = nn.Linear(d_model, d_model * (2 if postact == "glu" else 1))
        self.dropout = Dropout(dropout)
        with torch.no_grad():
            self.register_buffer("kernel_norm", self._raw().norm(dim=-1, keepdim=True))

    def _raw(self) -> Tensor:
        """The kernel before it is divided by its norm: (ways, D, taps), with at least `length` taps unless init_scale
        leaves fewer."""
        scales, parts = len(self.kernel_list), []
        for i, taps in enumerate(self.kernel_list):
            factor = 2 ** (self.init_scale + (i if self.combine == "sum" else max(0, i - 1)))
            weighted = taps * self.multiplier.unsqueeze(-1) ** (scales - 1 - i)
            parts.append(F.interpolate(weighted, scale_factor=float(factor), mode=self.interpolation))
        longest = parts[-1].shape[-1]
        if self.combine == "sum":
            kernel = torch.stack([F.pad(part, (0, longest - part.shape[-1])) for part in parts]).sum(0)
        else:
            kernel = torch.cat(parts, dim=-1)
        if self.decay is not None:
            tap = torch.arange(1, kernel.shape[-1] + 1, device=kernel.device, dtype=kernel.dtype)
            kernel = kernel * torch.exp(-self.decay.unsqueeze(-1) * tap.log())
        return kernel

    def kernel(self, length: int) -> Tensor:
        """(ways, D, taps), at most `length` taps; the second looks ahead."""
        return self._raw()[..., :length] / self.kernel_norm

    def _project(self, y: Tensor) -> Tensor:
        y = self.output_linear(self.dropout(F.gelu(y)))
        return F.glu(y, dim=-1) if self.postact == "glu" else y

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        k = self.kernel(x.shape[1])
        return self._project(fft_conv(x, k[0] if self.causal else k, self.D, bidirectional=not self.causal))

    def cost(self, length: int) -> Cost:
        ways, width, _ = self.kernel_list[0].shape
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        spectral = width * (2 * transform + 6 * length)
        kernel = ways * width * (6.0 * max(length, self.length) + transform)
        other = spectral + 20.0 * length * width
        return Cost.linear(length, width, self.output_linear.out_features) + Cost(other=other, batch_other=kernel)


class SGConv(Stack):
    """kernel_dim: d, taps of a sub-kernel. init_scale: doublings of the first. combine: cat or sum. interpolation:
    linear or nearest. decay: scale, power or learnt; decay_min, decay_max: its range over the channels. init: randn
    or cos. postact: glu or none. kernel_lr: highest learning rate of the kernels and of a learnt decay."""

    card = Card(
        title="What Makes Convolutional Models Great on Long Sequence Modeling?",
        year=2022,
        url="https://arxiv.org/abs/2210.09298",
        scaling="L log L",
        causal=True,
        variants={"sum": {"combine": "sum"}, "power": {"decay": "learnt"}},
        exempt={
            "power/optim_norms": "the released optimiser, that of S4, spares the kernel's own parameters alone",
            "gradients": "the last sub-kernel begins half of `length` back, further than the check's sequences go",
            "exports": "torch.export makes a case of its own of the full length",
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
        kernel_dim: int = 32,
        init_scale: int = 0,
        combine: str = "cat",
        interpolation: str = "linear",
        decay: str = "scale",
        decay_min: float = 2.0,
        decay_max: float = 2.0,
        init: str = "randn",
        postact: str = "glu",
        kernel_lr: float = 0.001,
        **stack: Any,
    ) -> None:
        one_of(COMBINATIONS, combine=combine)
        one_of(INTERPOLATIONS, interpolation=interpolation)
        one_of(DECAYS, decay=decay)
        one_of(INITS, init=init)
        one_of(POSTACTS, postact=postact)
        at_least(1, kernel_dim=kernel_dim)
        at_least(0, init_scale=init_scale)
        if not 0 < decay_min <= decay_max:
            raise ValueError(f"decay_min is {decay_min}, decay_max {decay_max}; 0 < decay_min <= decay_max")
        self.kernel_lr, self.learnt = kernel_lr, decay == "learnt"
        super().__init__(
            lambda _: SGConvMixer(
                d_model, length=length, kernel_dim=kernel_dim, init_scale=init_scale, combine=combine,
                interpolation=interpolation, decay=decay, decay_min=decay_min, decay_max=decay_max, init=init,
                postact=postact, causal=direction == "causal", dropout=dropout,
            ),
            native=True, d_model=d_model, length=length, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        decay = {"*.decay": {"lr": self.kernel_lr, "weight_decay": 0.0}} if self.learnt else {}
        return {"*.kernel_list.*": {"lr": self.kernel_lr}, **decay}
