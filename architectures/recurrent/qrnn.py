"""QRNN: gates computed by a convolution over a few tokens, and a gated sum of each feature as the recurrence.

Bradbury et al. 2016, arXiv:1611.01576, section 2. With taps W of a convolution over the last `window` tokens, zeros
before the first:

    Z, F, O, I = W_z * X, W_f * X, W_o * X, W_i * X        (B, L, D) each, with biases
    z = tanh(Z);  f, o, i = sigmoid(F), sigmoid(O), sigmoid(I)
    f-pooling      h_t = f_t h_{t-1} + (1 - f_t) z_t                                 equation 3
    fo-pooling     c_t = f_t c_{t-1} + (1 - f_t) z_t,   h_t = o_t c_t                equation 4
    ifo-pooling    c_t = f_t c_{t-1} + i_t z_t,         h_t = o_t c_t                equation 5
    zoneout        f = 1 - drop(1 - sigmoid(F)): when training, f is 1 with that probability, and
                   what is left is not rescaled                                      section 2.1

Initialisation: taps are PyTorch's own; the bias of F is log(u), u uniform in [1, horizon - 1], the chrono rule of
arXiv:1804.11188 (and that of I, where there is one, its negative): memories from two tokens to `horizon`.

Departures: that bias, the paper's being the library's; and the surroundings: a pre-norm residual block followed by a
feed-forward part, where the paper stacks layers directly or joins them densely.

Checked against: tensors of the authors' QRNNLayer (f- and fo-pooling, gradients of x), whose f has the opposite sense,
and of equation 5; parameter gradients against the recurrence step by step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._init import chrono
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.linear_scan import linear_scan

POOLINGS = ("f", "fo", "ifo")
State = tuple[Tensor, Tensor]


class QRNNMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, *, pooling: str, window: int, zoneout: float, horizon: int) -> None:
        super().__init__()
        self.pooling, self.zoneout = pooling, zoneout
        self.conv = nn.Conv1d(d_model, (1 + len(pooling)) * d_model, window)  # rows: Z, F, O, I
        assert self.conv.bias is not None
        biases = self.conv.bias.data.view(-1, d_model)
        forget = chrono(biases[1], horizon)
        if pooling == "ifo":
            biases[3] = -forget

    def _terms(self, gates: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """f, what enters c, and o where there is one, each (..., D), of the convolution's (..., G D)."""
        Z, F_, *rest = wide(gates).chunk(1 + len(self.pooling), dim=-1)
        f, not_f = torch.sigmoid(F_), torch.sigmoid(-F_)
        if self.training and self.zoneout:
            not_f = not_f * (torch.rand_like(not_f) >= self.zoneout)
            f = 1 - not_f
        i = torch.sigmoid(rest[1]) if self.pooling == "ifo" else not_f
        return f, i * torch.tanh(Z), torch.sigmoid(rest[0]) if rest else None

    def pool(self, x: Tensor, c0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs (B, L, D) and last cell (B, D), from the cell c0 (zero where None)."""
        gates = self.conv(F.pad(x.mT, (self.conv.kernel_size[0] - 1, 0))).mT
        f, inputs, o = self._terms(gates)
        c = linear_scan(f, inputs, c0)
        return c if o is None else o * c, c[:, -1]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.pool(x)[0]

    def cost(self, length: int) -> Cost:
        width, (window,) = self.conv.in_channels, self.conv.kernel_size
        return Cost.linear(length, window * width, self.conv.out_channels) + Cost(other=24.0 * length * width)

    def init_state(self, batch: int) -> State:
        weight, width = self.conv.weight, self.conv.in_channels
        return weight.new_zeros(batch, self.conv.kernel_size[0] - 1, width), weight.new_zeros(batch, width)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last window - 1 inputs (B, window - 1, D), and c (B, D)."""
        recent = torch.cat([state[0], x.unsqueeze(1)], dim=1)
        f, inputs, o = self._terms(self.conv(recent.mT).squeeze(-1))
        c = f * state[1] + inputs
        return c if o is None else o * c, (recent[:, 1:], c)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        recent = torch.cat([state[0], x], dim=1)
        f, inputs, o = self._terms(self.conv(recent.mT).mT)
        c = linear_scan(f, inputs, state[1])
        return c if o is None else o * c, (recent[:, x.shape[1] :], c[:, -1])


class QRNN(Stack):
    """pooling: of POOLINGS. window: tokens the convolution sees. zoneout: probability of keeping a feature's state when
    training. horizon: the longest memory, in tokens, that the gates start with; `length` unless given, 2 for none."""

    card = Card(
        title="Quasi-Recurrent Neural Networks",
        year=2016,
        url="https://arxiv.org/abs/1611.01576",
        scaling="L",
        causal=True,
        variants={"f": {"pooling": "f"}, "ifo": {"pooling": "ifo"}},
    )

    def __init__(
        self,
        *,
        d_model: int,
        length: int,
        pooling: str = "fo",
        window: int = 2,
        zoneout: float = 0.0,
        horizon: int | None = None,
        **stack: Any,
    ) -> None:
        reach = length if horizon is None else horizon
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; one of {', '.join(POOLINGS)}")
        if window < 1:
            raise ValueError(f"window is {window}; at least 1 token")
        if not 0 <= zoneout < 1:
            raise ValueError(f"zoneout is {zoneout}; a probability in [0, 1)")
        if reach < 1:
            raise ValueError(f"horizon is {reach}; at least 1 token")
        super().__init__(
            lambda _: QRNNMixer(d_model, pooling=pooling, window=window, zoneout=zoneout, horizon=reach),
            d_model=d_model,
            length=length,
            **stack,
        )
