"""LongConv: a convolution whose kernel over the whole sequence is learned directly, made sparse by a soft threshold.

Fu, Epstein, Nguyen, Thomas, Zhang, Dao, Rudra and Re 2023, arXiv:2302.06646. C kernels of `length` taps a channel:

    smooth   k_l = mean of k over `smoothing` taps around l, zeros beyond the ends       optional, section 3.1
    squash   k = sign(k) max(|k| - lam, 0)               (C, D, `length`)                section 3.1
    y_c = k_c * x + D_c x                                (B, L, D) for each c
    out = GLU(W gelu([y_1 .. y_C]) + b)                  (B, L, D)   value half times sigmoid(gate half)

In training a share `kernel_dropout` of the taps is left out. Bidirectional: as many kernels again look ahead and leave
out the current token.

Initialisation, as released: taps normal of deviation 0.002, D standard normal; W, b PyTorch's own. Taps learn at
`kernel_lr` at most and without weight decay. A mean of many taps starts below the usual thresholds, where nothing
learns: the variant smooth has no squash.

Departures: the standalone class of the released code holds 2 `length` taps and transforms over as many, so that the
second half wraps round and reads the future of a sequence of `length`; here, as in the paper and in the code that ran
the Long Range Arena, a causal kernel is causal. The paper's alternative start, random taps under an exponential decay,
is not built in; nor is smoothing of frequencies. As there, a block holds no feed-forward part.

Checked against: tensors of the authors' LongConv (smoothed; both ways) and of their standalone class on sequences as
long as its kernel, where nothing wraps: squashed kernels, outputs, gradient of x; gradients of every parameter against
the sum written out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._dropout import Dropout
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.fft_conv import fft_conv


class LongConvMixer(Mixer):
    """(B, L, D) -> (B, L, D). The padding is zero, so what looks ahead finds nothing in it."""

    def __init__(
        self, d_model: int, *, length: int, channels: int, lam: float, smoothing: int, kernel_dropout: float,
        causal: bool, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.causal, self.channels, self.length = causal, channels, length
        self.lam, self.smoothing = lam, smoothing
        ways = 1 if causal else 2
        self.D = nn.Parameter(torch.randn(channels, d_model))
        self.kernel = nn.Parameter(torch.randn(ways * channels, d_model, length) * 0.002)  # direction before channel
        self.kernel_drop = nn.Dropout(kernel_dropout)
        self.output_linear = nn.Linear(channels * d_model, 2 * d_model)
        self.dropout = Dropout(dropout)

    def squashed(self, length: int) -> Tensor:
        """(ways C, D, length); the second half of the rows looks ahead."""
        if length > self.length:
            raise ValueError(f"length {length} exceeds the {self.length} taps of this LongConv's kernels")
        k: Tensor = self.kernel
        if self.smoothing > 1:
            k = F.avg_pool1d(k, self.smoothing, stride=1, padding=self.smoothing // 2)
        return F.softshrink(k[..., :length], self.lam)

    def _project(self, y: Tensor) -> Tensor:
        return F.glu(self.output_linear(self.dropout(F.gelu(y))), dim=-1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        k = self.kernel_drop(self.squashed(x.shape[1])).unflatten(0, (-1, self.channels)).flatten(1, 2)
        copies = x.repeat(1, 1, self.channels)
        D = self.D.flatten()
        return self._project(fft_conv(copies, k[0] if self.causal else k, D, bidirectional=not self.causal))

    def cost(self, length: int) -> Cost:
        rows, width, _ = self.kernel.shape
        transform = 2.5 * 2 * length * math.log2(2 * length)  # a real FFT over the doubled length
        inner = self.channels * width
        spectral = 2 * inner * transform + 6.0 * inner * length
        kernel = rows * width * ((4.0 + (self.smoothing > 1)) * length + transform)
        other = spectral + length * (10.0 * inner + 10.0 * width)
        return Cost.linear(length, inner, 2 * width) + Cost(other=other, batch_other=kernel)


class LongConv(Stack):
    """channels: C, kernels a channel. lam: threshold of the squash. smoothing: taps of the moving average, odd, 1 for
    none. kernel_dropout: share of taps left out in training. kernel_lr: highest learning rate of the kernels."""

    card = Card(
        title="Simple Hardware-Efficient Long Convolutions for Sequence Modeling",
        year=2023,
        url="https://arxiv.org/abs/2302.06646",
        scaling="L log L",
        causal=True,
        variants={"smooth": {"smoothing": 7, "lam": 0.0}},
        recall={"lam": 0.001},  # the paper searches the threshold for each task
        exempt={
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
        channels: int = 1,
        lam: float = 0.003,
        smoothing: int = 1,
        kernel_dropout: float = 0.0,
        kernel_lr: float = 0.001,
        **stack: Any,
    ) -> None:
        at_least(1, channels=channels)
        at_least(0, lam=lam)
        if smoothing < 1 or smoothing % 2 == 0:
            raise ValueError(f"smoothing is {smoothing}; an odd number, 1 for none")
        if not 0 <= kernel_dropout < 1:
            raise ValueError(f"kernel_dropout is {kernel_dropout}; from 0 up to, but not, 1")
        self.kernel_lr = kernel_lr
        super().__init__(
            lambda _: LongConvMixer(
                d_model, length=length, channels=channels, lam=lam, smoothing=smoothing, kernel_dropout=kernel_dropout,
                causal=direction == "causal", dropout=dropout,
            ),
            native=True, d_model=d_model, length=length, dropout=dropout, direction=direction, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {"*.kernel": {"lr": self.kernel_lr, "weight_decay": 0.0}}
