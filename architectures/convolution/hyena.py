"""Hyena: long convolutions with filters computed by a small network, between products with projections of the input.

Poli et al. 2023, arXiv:2302.10866. Order N, E positional features, and per layer (section 3.3, as the released code has
it):

    x_0 .. x_{N-1}, v = split(short_filter(in_proj x))     (B, L, D) each; causal depthwise, 3 taps and a bias
    v = h_n * (x_{N-1-n} v) + a_n (x_{N-1-n} v)            for n = 0 .. N - 2; * is the causal convolution over L
    y = out_proj (x_0 v)                                   (B, L, D)

and the filters, at the time t = step / (length - 1) in [0, 1]:

    z(t) = [t, cos(f_k phi), -sin(f_k phi)]                phi = 2 pi step / length, f_k from 1e-4 to (E - 1)/2 - 1
    h(t) = M_3 sin(s M_2 sin(s M_1 sin(s M_0 z)))          ((N - 1) D), M_0 .. M_2 with biases, one frequency s a unit
    h_n(t) = h(t) (exp(-t |delta|) + shift)                window; delta even over the channels

Initialisation, the authors': maps PyTorch's own, a standard normal, s = w, delta from log(0.01) / 1.5 to
log(0.01) / 0.3 so that windows fall to 0.01 after 0.3 to 1.5 of the sequence, shift = 0. The filter learns without
weight decay. The positional features z are fixed, as in the authors' longest experiment (associative recall over
131,072 tokens), so that the number of parameters does not grow with the length; a `position_lr` makes them learn.

E = 33 with w = 1 is one of the settings of the released experiments; others are 33 with 14 and 5 with 10. None of them
uses E = 3, the default of the released class: its one frequency is 1e-4, so that two of its three features are constant
and the filters start without detail.

Departures: as the released code, N - 1 long convolutions; definition 3.1 has N, the first on v. It stands in the
pre-norm block of this suite. For N > 2 the authors' complete module orders the filters' channels otherwise than their
standalone one, which this follows.

Checked against: tensors of the authors' standalone HyenaOperator, orders 2 and 3, outputs and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._stack import Stack
from lra.architectures._table import Tables
from lra.encoder import Card, Cost, Mixer
from lra.kernels.causal_conv1d import causal_conv1d
from lra.kernels.fft_conv import fft_conv


def times(length: int) -> Tensor:
    """From 0 to 1: (L,) float64."""
    return torch.arange(length, dtype=torch.float64) / max(length - 1, 1)


def positions(length: int, features: int) -> Tensor:
    """Time, and cosines and sines of (features - 1) / 2 frequencies: (L, features) float64."""
    bands = (features - 1) // 2
    phase = 2 * math.pi * torch.arange(length, dtype=torch.float64) / length
    angle = torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64) * phase.unsqueeze(1)
    return torch.cat([times(length).unsqueeze(1), angle.cos(), -angle.sin()], dim=1)


class HyenaFilter(Tables):
    """h: (channels, L) for the first L of `length` steps."""

    z: Tensor
    t: Tensor
    deltas: Tensor

    def __init__(
        self, channels: int, length: int, *, features: int, width: int, shift: float, w: float, learn_z: bool
    ) -> None:
        super().__init__()
        self.shift = shift
        if learn_z:
            self.z = nn.Parameter(positions(length, features).float())
        else:
            self.register_table("z", positions, length, features)
        self.sizes = [features, width, width, width]
        self.implicit_filter = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(self.sizes))
        self.last = nn.Linear(width, channels, bias=False)
        self.freq = nn.Parameter(torch.full((width,), float(w)))
        self.register_table("t", times, length)
        self.register_table("deltas", torch.linspace, math.log(0.01) / 1.5, math.log(0.01) / 0.3, channels)

    def forward(self, length: int) -> Tensor:
        h = self.z[:length]
        for linear in self.implicit_filter:
            h = torch.sin(self.freq * linear(h))
        window = torch.exp(-self.t[:length].unsqueeze(1) * self.deltas.abs()) + self.shift
        return (self.last(h) * window).T

    def cost(self, length: int) -> Cost:
        parts = [Cost.linear(length, a, b) for a, b in pairwise(self.sizes)]
        width, channels = self.last.in_features, self.last.out_features
        last = Cost.linear(length, width, channels, bias=False)
        return sum(parts, last) + Cost(other=length * (3.0 * 6 * width + 8.0 * channels))


class HyenaMixer(Mixer):
    """(B, L, D) -> (B, L, D). Causal; padding comes after all real tokens: no mask needed."""

    def __init__(
        self, d_model: int, length: int, *, order: int, features: int, width: int, shift: float, w: float = 1.0,
        learn_z: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.order, self.length = order, length
        self.in_proj = nn.Linear(d_model, (order + 1) * d_model)
        self.short_filter = nn.Conv1d((order + 1) * d_model, (order + 1) * d_model, 3, groups=(order + 1) * d_model)
        self.filter_fn = HyenaFilter(
            (order - 1) * d_model, length, features=features, width=width, shift=shift, w=w, learn_z=learn_z
        )
        self.skip = nn.Parameter(torch.randn(order - 1, d_model))
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        if length > self.length:
            raise ValueError(f"length {length} exceeds the {self.length} steps of this Hyena's filters")
        taps, bias = self.short_filter.weight.squeeze(1), self.short_filter.bias
        parts = causal_conv1d(self.in_proj(x), taps, bias).chunk(self.order + 1, dim=-1)
        v, filters = parts[-1], self.filter_fn(length).chunk(self.order - 1)
        for n, h in enumerate(filters):
            v = fft_conv(v * parts[self.order - 1 - n], h, self.skip[n])
        return self.out_proj(v * parts[0])

    def cost(self, length: int) -> Cost:
        width = self.out_proj.in_features
        maps = Cost.linear(length, width, (self.order + 1) * width) + Cost.linear(length, width, width)
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        convolution = width * (2 * transform + 6 * length)
        light = length * width * (7.0 * (self.order + 1) + self.order)
        filters = (self.filter_fn.cost(length) + Cost(other=(self.order - 1) * width * transform)).per_batch
        return maps + filters + Cost(other=(self.order - 1) * convolution + light)


class Hyena(Stack):
    """order: N, multiplications. features: of the filters' positions, E, odd. width: of the filters' network. shift:
    what the window leaves after it has faded. w: frequency that the sines of the network start with. filter_lr,
    position_lr: highest rates of the filters and of z; 0 keeps z fixed."""

    card = Card(
        title="Hyena Hierarchy: Towards Larger Convolutional Language Models",
        year=2023,
        url="https://arxiv.org/abs/2302.10866",
        scaling="L log L",
        causal=True,
        variants={"order3": {"order": 3}},
        exempt={"order3/magnitudes": "filters have no norm, as released: both convolutions grow with the length"},
    )

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        order: int = 2,
        features: int = 33,
        width: int = 64,
        shift: float = 0.0,
        w: float = 1.0,
        filter_lr: float = 0.001,
        position_lr: float = 0.0,
        **stack: Any,
    ) -> None:
        if order < 2:
            raise ValueError(f"order is {order}; at least 2, or there is no long convolution")
        if features < 3 or features % 2 == 0:
            raise ValueError(f"features is {features}; an odd number of at least 3: time, cosines and sines")
        if width < 1:
            raise ValueError(f"width is {width}; at least 1")
        if not w > 0:
            raise ValueError(f"w is {w}; more than 0")
        if position_lr < 0:
            raise ValueError(f"position_lr is {position_lr}; at least 0, and 0 keeps the positional features fixed")
        self.filter_lr, self.position_lr = filter_lr, position_lr
        super().__init__(
            lambda _: HyenaMixer(
                d_model, length, order=order, features=features, width=width, shift=shift, w=w, learn_z=position_lr > 0
            ),
            d_model=d_model, length=length, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        own = {"*.filter_fn.z": {"lr": self.position_lr, "weight_decay": 0.0}} if self.position_lr else {}
        return {**own, "*.filter_fn.*": {"lr": self.filter_lr, "weight_decay": 0.0}}
