"""CCNN: one convolution a block, as long as the sequence, whose kernels a network of Gabor filters computes from the
position under a Gaussian window of learnt width.

Romero, Knigge, Gu, Bekkers, Gavves, Tomczak and Hoogendoorn 2022, arXiv:2206.03398; Knigge et al. 2023,
arXiv:2301.10540. N is `length`. A tap that looks j tokens back stands at p_j = 1 - 2 j / (N - 1); the kernel network
(MAGNet, `kernel_layers` times the second line) has H hidden units:

    f_i(p) = exp(-(gamma_i (p - mu_i))^2 / 2) sin(W_i p + b_i)                (H) at each p, i = 0, 1, ..
    h = f_0(p);  h = f_i(p) * (U_i h + c_i);  k(p) = U h + c                  (D) at each p
    kernel(p) = k(p) exp(-(p - 1)^2 / (2 s^2 + 2e-8))    and 0 where the window has fallen below `threshold`
    conv(x)_t = P (b + sum_{j <= t} kernel(p_j) * x_{t-j}) + b_P              (B, L, D)

    x = gelu(norm(conv(x)))                                                   once, before the blocks
    x = x + gelu(V dropout(gelu(conv(norm(x)))) + b_V)                        a block; after the last, norm(x)

Bidirectional: a tap j tokens back stands at p_j = -j / (N - 1), j from 1 - N to N - 1, and the window at 0. Kernels are
those of `length`: a shorter sequence uses the taps it reaches.

Initialisation: W_i uniform within 2 pi w gamma_i, b_i = 0, gamma_i from Gamma(6 / (i + 1), 1), mu uniform over 5/3 (as
released 1.667) of the window's width s = `window`, on the side of the past or on both; U_i uniform within sqrt(3 / H),
c_i = 1; U so as well but divided by the root of the number of taps under the window (Chang et al. 2020), c = 0; P and V
normal of variance 2 / D, biases 0. w is `omega`; it and `window` are those of ListOps, the other tasks have their own.

Departures: layer norm unless the recipe says otherwise, where the released networks have batch norm, whose statistics
depend on the rest of the batch. Their penalty on the norms of weights and sampled kernels is left to the weight decay.
Taps below the threshold are computed and set to 0, where theirs are left out.

Checked against: tensors of the authors' code (a causal network of two blocks; a convolution both ways): kernels,
outputs, every gradient; a float64 loop over the equations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._dropout import Dropout
from lra.architectures._norm import normalised
from lra.architectures._precision import own_precision, wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer, clean_padding
from lra.kernels.fft_conv import fft_conv

SPREAD = 1.667
"""Range of the centres of the Gabor filters over the width of the window."""


def wide_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear` in float32 at least: the angles of the sines are thousands of radians."""
    return F.linear(x, wide(linear.weight), wide(linear.bias))


class Gabor(nn.Module):
    """Positions (n, 1) -> filters (n, hidden). centres: mu at the start, (hidden,)."""

    def __init__(self, centres: Tensor, *, omega: float, alpha: float) -> None:
        super().__init__()
        hidden = len(centres)
        self.mu = nn.Parameter(centres)
        self.gamma = nn.Parameter(torch._standard_gamma(torch.full((hidden,), alpha)))
        self.linear = nn.Linear(1, hidden)
        with torch.no_grad():
            self.linear.weight.uniform_(-1, 1).mul_(2 * math.pi * omega * self.gamma.unsqueeze(1))
            self.linear.bias.zero_()

    def forward(self, p: Tensor) -> Tensor:
        return torch.exp(-0.5 * (self.gamma * (p - self.mu)).square()) * torch.sin(wide_linear(self.linear, p))


class MAGNet(nn.Module):
    """Positions (n, 1) -> kernels (n, outputs). spread: of the centres, on the side of the past of 1 or around 0."""

    def __init__(self, outputs: int, *, hidden: int, layers: int, omega: float, spread: float, causal: bool) -> None:
        super().__init__()

        def centres() -> Tensor:
            drawn = torch.rand(hidden)
            return 1 - spread * drawn if causal else spread * (2 * drawn - 1)

        self.filters: Any = nn.ModuleList(Gabor(centres(), omega=omega, alpha=6 / (i + 1)) for i in range(layers + 1))
        self.linears: Any = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.output_linear = nn.Linear(hidden, outputs)
        for linear in (*self.linears, self.output_linear):
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
            nn.init.constant_(linear.bias, 0.0 if linear is self.output_linear else 1.0)

    def forward(self, p: Tensor) -> Tensor:
        h = self.filters[0](p)
        for gabor, linear in zip(self.filters[1:], self.linears, strict=True):
            h = gabor(p) * wide_linear(linear, h)
        return wide_linear(self.output_linear, h)

    def cost(self, taps: int) -> Cost:
        outputs, hidden = self.output_linear.weight.shape
        layers = len(self.linears)
        maps = layers * Cost.linear(taps, hidden, hidden) + Cost.linear(taps, hidden, outputs)
        maps += (layers + 1) * Cost.linear(taps, 1, hidden)
        return maps + Cost(other=10.0 * (layers + 1) * taps * hidden)


class FlexConv(nn.Module):
    """Depthwise convolution with a windowed continuous kernel, then a map of the channels: (B, L, D) -> (B, L, D)."""

    def __init__(
        self, d_model: int, *, length: int, causal: bool, hidden: int, layers: int, omega: float, window: float,
        threshold: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.length, self.causal = length, causal
        self.step_size = (2 if causal else 1) / max(length - 1, 1)
        self.widths = math.sqrt(-2 * math.log(threshold))  # at which the window falls below the threshold
        self.Kernel = MAGNet(d_model, hidden=hidden, layers=layers, omega=omega, spread=SPREAD * window, causal=causal)
        self.mask_width_param = nn.Parameter(torch.tensor([window]))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.channel_mixer = nn.Linear(d_model, d_model)
        nn.init.kaiming_normal_(self.channel_mixer.weight)
        nn.init.zeros_(self.channel_mixer.bias)
        reach = self.widths * window / self.step_size
        taps = min(length, math.ceil(reach) + 1) if causal else 2 * min(length - 1, math.floor(reach)) + 1
        with torch.no_grad():
            self.Kernel.output_linear.weight.mul_(taps**-0.5)

    def kernel(self, taps: int) -> Tensor:
        """(D, taps), the tap of the current token first; both ways (2, D, taps), the second half without it."""
        width = wide(self.mask_width_param)
        back = torch.arange(taps, device=width.device, dtype=width.dtype)
        away = self.step_size * (back if self.causal else torch.cat([back, -1 - back])).unsqueeze(1)
        reach = self.widths * width.detach().abs()
        # theirs rounds the last index up where it is causal
        inside = away.abs() < reach + self.step_size if self.causal else away.abs() <= reach
        window = torch.exp(-0.5 * away.square() / (width.square() + 1e-8)) * inside
        k = self.Kernel(1 - away if self.causal else -away) * window
        return k.mT if self.causal else k.unflatten(0, (2, taps)).mT

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.length:
            raise ValueError(f"length {length} exceeds the {self.length} taps of this CCNN's kernels")
        with torch.autocast(x.device.type, enabled=False):
            k = self.kernel(length)
        return self.channel_mixer(fft_conv(x, k, bidirectional=not self.causal) + self.bias)

    def cost(self, length: int) -> Cost:
        width, ways = len(self.bias), 1 if self.causal else 2
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        spectral = 2 * width * transform + 7.0 * width * length
        kernel = self.Kernel.cost(ways * length) + Cost(other=ways * width * (transform + length))
        return Cost.linear(length, width, width) + Cost(other=spectral) + kernel.per_batch


class CCNNMixer(Mixer):
    """gelu(V dropout(gelu(conv(x)))): (B, L, D) -> (B, L, D). The padding is zero, so what looks ahead finds nothing
    in it."""

    def __init__(self, conv: FlexConv, dropout: float) -> None:
        super().__init__()
        self.conv1, self.dp = conv, Dropout(dropout)
        self.linear1 = nn.Linear(len(conv.bias), len(conv.bias))
        nn.init.kaiming_normal_(self.linear1.weight)
        nn.init.zeros_(self.linear1.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.gelu(self.linear1(self.dp(F.gelu(self.conv1(x)))))

    def cost(self, length: int) -> Cost:
        width = self.linear1.in_features
        return self.conv1.cost(length) + Cost.linear(length, width, width) + Cost(other=16.0 * length * width)


class CCNN(Stack):
    """kernel_hidden, kernel_layers: H and the number of products in the kernel networks. omega: w, the highest
    frequency they start with. window: width of the windows at the start. threshold: of the windows, above 0."""

    card = Card(
        title="Towards a General Purpose CNN for Long Range Dependencies in ND",
        year=2022,
        url="https://arxiv.org/abs/2206.03398",
        scaling="L log L",
        causal=True,
    )
    block = Block(ffn="none")

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        kernel_hidden: int = 32,
        kernel_layers: int = 3,
        omega: float = 784.655,
        window: float = 0.03,
        threshold: float = 0.1,
        **stack: Any,
    ) -> None:
        at_least(1, d_model=d_model, length=length, kernel_hidden=kernel_hidden, kernel_layers=kernel_layers)
        for name, value in (("omega", omega), ("window", window)):
            if value <= 0:
                raise ValueError(f"{name} is {value}; more than 0")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold}; between 0 and 1")

        def conv() -> FlexConv:
            return FlexConv(
                d_model, length=length, causal=direction == "causal", hidden=kernel_hidden, layers=kernel_layers,
                omega=omega, window=window, threshold=threshold,
            )  # fmt: skip

        super().__init__(
            lambda _: CCNNMixer(conv(), dropout),
            native=True, d_model=d_model, length=length, direction=direction, **stack,
        )  # fmt: skip
        self.conv1, self.norm1 = conv(), type(self).block.updated(stack.get("block")).make_norm(d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask)
        x = own_precision(x, lambda: F.gelu(normalised(self.norm1, self.conv1(x), mask)))
        return super().forward(x, mask)

    def cost(self, length: int) -> Cost:
        return super().cost(length) + self.conv1.cost(length) + Cost(other=14.0 * length * self.d_model)
