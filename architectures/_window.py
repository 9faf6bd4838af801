"""A short causal convolution, over a sequence, one token, or a stretch after the tokens before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.encoder import Cost
from lra.kernels.causal_conv1d import causal_conv1d


class ShortConvolution(nn.Module):
    """Depthwise, causal: (B, L, C) -> (B, L, C). weight: (C, 1, taps), the last tap on the present token; bias: (C,).

    The parameters start as those of PyTorch's Conv1d; where `weight` gives the first taps, the bias starts at 0.
    """

    def __init__(
        self, channels: int, taps: int, activation: str | None = "silu", *, bias: bool = False,
        weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, bound = activation, taps**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-bound, bound) if weight is None else weight)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        if self.bias is not None and weight is None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv1d(x, self.weight.squeeze(1), self.bias, self.activation)

    def cost(self, length: int) -> Cost:
        channels, _, taps = self.weight.shape
        return Cost(other=length * channels * (2.0 * taps + 4))

    def init_state(self, batch: int) -> Tensor:
        channels, _, taps = self.weight.shape
        return self.weight.new_zeros(batch, taps - 1, channels)

    def step(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C); window: the inputs before it, (B, taps - 1, C)."""
        window = torch.cat([window, x.unsqueeze(1)], dim=1)
        y = torch.einsum("bkc,ck->bc", window, self.weight.squeeze(1))
        y = y if self.bias is None else y + self.bias
        return F.silu(y) if self.activation == "silu" else y, window[:, 1:]

    def chunk(self, x: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, L, C), which follows the inputs in `window`, (B, taps - 1, C) -> (B, L, C), and the last inputs."""
        inputs = torch.cat([window, x], dim=1)
        return self(inputs)[:, window.shape[1] :], inputs[:, x.shape[1] :]
