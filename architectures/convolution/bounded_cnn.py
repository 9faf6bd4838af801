"""Bounded CNN: gated convolutions with an exactly known receptive field, the control for every task.

Miralles-Gonzalez, Huertas-Tato, Martin and Camacho 2025, arXiv:2501.14850, show how much of a long-range score a model
reaches that has no long range. Their convolutional model is a gMLP whose tokens meet in one depthwise convolution,
made short to bound what it sees. Per layer, with n the normalised input, E = expand D channels and K taps a channel:

    z = gelu(W_z n + b_z),  g = gelu(W_g n + b_g)          (B, L, E), z then 0 at padding
    s_t = sum_k w_k z_{t + k - (K - 1) / 2} + b_s          (B, L, E)   taps t - (K - 1) .. t when causal
    y = W_o (g * norm(s)) + b_o                            (B, L, D)

Nothing else moves information along the sequence, so that an output depends on `receptive_field` =
n_layers (K - 1) + 1 tokens around it (up to it when causal), whatever was learnt.

Initialisation, theirs: w normal of deviation 1e-5 and b_s = 1: a block starts all but closed; W and b PyTorch's own.

Our choice: 5 taps, or `61`, the ends of the range the paper goes through; E = 4 D, which gives the weight of a
Transformer's block (theirs: 1 to 8 D, or less, and taps shared between channels). Their head,
augmentation and auxiliary loss are no part of the encoder.

Checked against: tensors of the authors' GMLP module, centred and causal, outputs and gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._norm import LayerNorm
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer, fill_padding
from lra.kernels.causal_conv1d import causal_conv1d


class BoundedCNNMixer(Mixer):
    """(B, L, D) -> (B, L, D). weight: (E, K), the last tap on the latest token it sees."""

    def __init__(self, d_model: int, kernel: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.ahead = 0 if causal else kernel // 2
        self.value = nn.Linear(d_model, hidden)
        self.gate = nn.Linear(d_model, hidden)
        self.weight = nn.Parameter(torch.randn(hidden, kernel) * 1e-5)
        self.bias = nn.Parameter(torch.ones(hidden))
        self.norm = LayerNorm(hidden)
        self.out = nn.Linear(hidden, d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        z = fill_padding(F.gelu(self.value(x)), mask)
        s = causal_conv1d(F.pad(z, (0, 0, 0, self.ahead)), self.weight, self.bias)[:, self.ahead :]
        return self._project(x, s)

    def _project(self, x: Tensor, s: Tensor) -> Tensor:
        return self.out(F.gelu(self.gate(x)) * self.norm(s))

    def cost(self, length: int) -> Cost:
        hidden, kernel = self.weight.shape
        linear = 2 * Cost.linear(length, self.out.out_features, hidden)
        seen = length + self.ahead
        mixing = Cost(other=2.0 * kernel * hidden * seen + 22.0 * length * hidden)
        return linear + Cost.linear(length, hidden, self.out.out_features) + mixing

    def init_state(self, batch: int) -> Tensor:
        hidden, kernel = self.weight.shape
        return self.weight.new_zeros(batch, kernel - 1, hidden)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: the last K - 1 values of z, (B, K - 1, E)."""
        seen = torch.cat([state, F.gelu(self.value(x)).unsqueeze(1)], dim=1)
        return self._project(x, (seen * self.weight.T).sum(1) + self.bias), seen[:, 1:]


class BoundedCNN(Stack):
    """kernel: tokens a layer sees, K, odd unless causal. expand: channels of the convolution over d_model."""

    card = Card(
        title="On the locality bias and results in the Long Range Arena",
        year=2025,
        url="https://arxiv.org/abs/2501.14850",
        scaling="L",
        causal=False,
        variants={"5": {"kernel": 5}, "61": {"kernel": 61}},
        no_recall="its receptive field is bounded and does not reach the first token",
    )
    block = Block(ffn="none")

    def __init__(
        self, *, d_model: int, direction: str = "bidirectional", kernel: int = 5, expand: float = 4.0, **stack: Any
    ) -> None:
        hidden, causal = round(expand * d_model), direction == "causal"
        if kernel < 2 or not (kernel % 2 or causal):
            raise ValueError(f"kernel is {kernel}; at least 2 tokens, an odd number unless direction is causal")
        if hidden < 1:
            raise ValueError(f"expand is {expand}; it leaves {hidden} channels of d_model {d_model}")
        self.kernel = kernel
        super().__init__(
            lambda _: BoundedCNNMixer(d_model, kernel, hidden, causal),
            native=True, d_model=d_model, direction=direction, **stack,
        )  # fmt: skip

    @property
    def receptive_field(self) -> int:
        """Tokens that an output can depend on, its own among them."""
        return self.n_layers * (self.kernel - 1) + 1
