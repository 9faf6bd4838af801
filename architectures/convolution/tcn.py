"""TCN: causal convolutions whose dilation doubles from level to level until the last output depends on the whole past.

Bai, Kolter and Koltun 2018, arXiv:1803.01271. Level i of n has dilation d = 2^i, K taps, and two weight-normalised
convolutions c(x)_t = b + sum_k W_k x_{t - (K - 1 - k) d}, W = g v / |v| per output channel (section 3.4):

    h = relu(c_1(x)),  h = relu(c_2(h)),  x = relu(x + h)        (B, L, D) -> (B, L, D)

An output sees 1 + 2 (K - 1) (2^n - 1) tokens; n is the smallest for which that is at least `length`, and `n_layers`
where that is more.

`tcn/gated` is WaveNet, van den Oord et al. 2016, arXiv:1609.03499, sections 2.3 and 2.4: one convolution a level, into
a filter f and a gate s, so that an output sees 1 + (K - 1) (2^n - 1) tokens; K = 2 as in the paper:

    u = tanh(f) * sigmoid(s),  x = x + W_o u + b_o               (B, L, D)
    y = W_2 relu(W_1 relu(sum over levels of W_s u + b_s))       (B, L, D), every map with bias and weight norm

Initialisation: PyTorch's own for every map, with g = |v|. The authors' normal of deviation 0.01 goes into a tensor that
their weight norm overwrites.

Departures: both networks stand alone as in the papers, with their own residuals and without the stack's norms and
feed-forward parts; the bidirectional form runs two of them. WaveNet starts its dilations over at 512, and ends in a
softmax over samples where this ends in D features; weight norm in it is that of the code compared with. Its last level
feeds no other and has no W_o.

Checked against: tensors of the authors' TemporalConvNet; of a public WaveNet, one block and a network of four, whose
streams are scaled by sqrt(1/2) where the paper's are not; outputs and gradients. A float64 loop over the equations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least, one_of
from lra.architectures._stack import Bidirectional
from lra.architectures._weight_norm import WeightNormConv1d
from lra.encoder import Card, Cost, Encoder, Mixer, clean_padding


class CausalConv(nn.Module):
    """Weight-normalised dilated convolution over the past: (B, L, in) -> (B, L, out)."""

    def __init__(self, d_in: int, d_out: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = WeightNormConv1d(d_in, d_out, kernel, dilation)
        self.reach = (kernel - 1) * dilation  # tokens seen before the present one

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.mT, (self.reach, 0))).mT

    def cost(self, length: int) -> Cost:
        d_out, d_in, kernel = self.conv.weight.shape
        return Cost.linear(length, d_in * kernel, d_out)

    def init_state(self, batch: int) -> Tensor:
        return self.conv.weight.new_zeros(batch, self.reach, self.conv.in_channels)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: the tokens within reach, (B, (K - 1) d, in)."""
        seen = torch.cat([state, x.unsqueeze(1)], dim=1)
        return self.conv(seen.mT).squeeze(-1), seen[:, 1:]


class TCNLevel(nn.Module):
    """x -> relu(x + relu(c_2(relu(c_1(x))))), and nothing for the end of the network."""

    convs: Any

    def __init__(self, d_model: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(CausalConv(d_model, d_model, kernel, dilation) for _ in range(2))
        self.dropout = nn.Dropout1d(dropout)  # of whole channels, section 3.4

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        h = x
        for conv in self.convs:
            h = self.dropout(F.relu(conv(h)).mT).mT
        return F.relu(x + h), None

    def cost(self, length: int) -> Cost:
        return sum((conv.cost(length) for conv in self.convs), Cost())

    def init_state(self, batch: int) -> tuple[Tensor, ...]:
        return tuple(conv.init_state(batch) for conv in self.convs)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, None, tuple[Tensor, ...]]:
        h, after = x, []
        for conv, own in zip(self.convs, state, strict=True):
            h, own = conv.step(h, own)
            h = F.relu(h)
            after.append(own)
        return F.relu(x + h), None, tuple(after)


class GatedLevel(nn.Module):
    """x -> x + W_o u + b_o, and W_s u + b_s for the end of the network; u = tanh(f) sigmoid(s)."""

    def __init__(self, d_model: int, *, kernel: int, dilation: int, dropout: float, last: bool) -> None:
        super().__init__()
        self.conv = CausalConv(d_model, 2 * d_model, kernel, dilation)
        self.conv1x1_out = None if last else CausalConv(d_model, d_model)
        self.conv1x1_skip = CausalConv(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def _after(self, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        f, s = gates.chunk(2, dim=-1)
        u = f.tanh() * s.sigmoid()
        return (x if self.conv1x1_out is None else x + self.conv1x1_out(u)), self.conv1x1_skip(u)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._after(x, self.conv(self.dropout(x)))

    def cost(self, length: int) -> Cost:
        maps = (
            [self.conv, self.conv1x1_skip]
            if self.conv1x1_out is None
            else [self.conv, self.conv1x1_skip, self.conv1x1_out]
        )
        return sum((part.cost(length) for part in maps), Cost())

    def init_state(self, batch: int) -> Tensor:
        return self.conv.init_state(batch)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates, state = self.conv.step(x, state)
        x, skip = self._after(x.unsqueeze(1), gates.unsqueeze(1))
        return x.squeeze(1), skip.squeeze(1), state


class TCNMixer(Mixer):
    """All levels: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    levels: Any
    head: Any

    def __init__(self, d_model: int, *, levels: int, kernel: int, gated: bool, dropout: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            GatedLevel(d_model, kernel=kernel, dilation=2**i, dropout=dropout, last=i == levels - 1)
            if gated else TCNLevel(d_model, kernel, 2**i, dropout)
            for i in range(levels)
        )  # fmt: skip
        self.head = nn.ModuleList(CausalConv(d_model, d_model) for _ in range(2)) if gated else None

    def _finish(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        if self.head is None:
            return x
        y = torch.stack(skips).sum(0)
        for conv in self.head:
            y = conv(F.relu(y))
        return y

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        skips = []
        for level in self.levels:
            x, skip = level(x)
            skips.append(skip)
        return self._finish(x, skips)

    def cost(self, length: int) -> Cost:
        parts = [*self.levels, *(self.head or ())]
        width = self.levels[0].cost(1).other
        return sum((part.cost(length) for part in parts), Cost(other=4.0 * len(parts) * length * width))

    def init_state(self, batch: int) -> tuple[Any, ...]:
        return tuple(level.init_state(batch) for level in self.levels)

    def step(self, x: Tensor, state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        skips, after = [], []
        for level, own in zip(self.levels, state, strict=True):
            x, skip, own = level.step(x, own)
            skips.append(skip)
            after.append(own)
        if self.head is not None:
            x = self._finish(x, [skip.unsqueeze(1) for skip in skips]).squeeze(1)
        return x, tuple(after)


class TCN(Encoder):
    """kernel: taps a convolution, K. levels: n; as many as `length` needs and at least n_layers unless given."""

    card = Card(
        title="An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence Modeling",
        year=2018,
        url="https://arxiv.org/abs/1803.01271",
        scaling="L log L",
        causal=True,
        variants={"gated": {"gated": True, "kernel": 2}},
    )

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        kernel: int = 3,
        levels: int | None = None,
        gated: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, d_model=d_model, n_layers=n_layers, length=length, levels=levels)
        if kernel < 2:
            raise ValueError(f"kernel is {kernel}; at least 2, or no token would meet another")
        known = ("causal", "bidirectional", "concat", "add", "shared")
        one_of(known, direction=direction)
        self.d_model, self.n_layers, self.length, self.direction = d_model, n_layers, length, direction
        self.follows_length = levels is None
        per_level = (1 if gated else 2) * (kernel - 1)
        needed = (-(-(length - 1) // per_level)).bit_length()  # smallest n with per_level (2^n - 1) >= length - 1
        depth = max(n_layers, needed) if levels is None else levels
        self.receptive_field = 1 + per_level * (2**depth - 1)

        def make() -> Mixer:
            return TCNMixer(d_model, levels=depth, kernel=kernel, gated=gated, dropout=dropout)

        combine = "concat" if direction == "bidirectional" else direction
        self.net = make() if direction == "causal" else Bidirectional(make, d_model, combine)

    @property
    def scaling(self) -> str:
        return "L log L" if self.follows_length else "L"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(*clean_padding(x, mask))

    def cost(self, length: int) -> Cost:
        return self.net.cost(length)

    def init_state(self, batch: int) -> Any:
        if not self.causal:
            raise NotImplementedError(f"TCN has no recurrent mode when {self.direction}")
        return self.net.init_state(batch)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.net.step(x, state)
