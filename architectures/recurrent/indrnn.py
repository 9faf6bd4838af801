"""IndRNN: each unit depends on its own past only, through one weight that is bounded for the sequence's length.

Li et al. 2018, arXiv:1803.04831. Per token, with h: (B, H) and H = D:

    h = relu(W x + b + u * h)                              u: (H,), the output (B, H)

What a unit holds is multiplied by u at each token, by u^L over the sequence, so u is held in |u| <= gamma^(1/L)
(section 4.1). Units meet in the feed-forward part and in the next layer's W only.

Initialisation: u uniform in [0, gamma^(1/L)], as in the paper (section 5). `last_holds` starts the last layer in
[gamma^(-1/L), gamma^(1/L)], the choice of the released classification scripts, where a classifier reads the last token
of that layer and every unit holds something from the first token on. It sums over the whole length: in a residual stack
the last mixer is 40 to 500 times as large as the others at 1,000 to 16,000 tokens, so it is off unless asked for. W He
uniform with a = 8, as released, a gain of 0.18 that keeps sums over the length small; b = 0. u, biases and norms learn
without weight decay.

Departures: the released code puts u back on the bound after each training step; here the recurrence uses the nearest
value inside, and a gradient that would take u further outside is dropped. gamma = 5, the default of the released
classification code, where the paper has 2; layer norm where the released code has batch norm; this suite's pre-norm
residual block, with a feed-forward part that none of the paper's networks has.

Checked against: tensors of the authors' recurrence, with the gradient of x; parameter gradients against a loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lra.architectures._optim import undecayed
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.recurrent_cell import recurrent_cell


class Bounded(torch.autograd.Function):
    """The nearest number to u in [-bound, bound]. A gradient whose descent leads further outside is dropped, one that
    leads back inside is kept, where that of `clamp` would be zero and u could not return."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, bound: float) -> Tensor:
        return u.clamp(-bound, bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        u, ctx.bound = inputs
        ctx.save_for_backward(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        outward = (u.abs() >= ctx.bound) & (grads[0] * u < 0)
        return grads[0].masked_fill(outward, 0), None


class IndRNNMixer(Mixer):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed.
    bound: of |u|; floor: the smallest u to start from."""

    def __init__(self, d_model: int, bound: float, floor: float) -> None:
        super().__init__()
        self.bound = bound
        self.input = nn.Linear(d_model, d_model)
        self.u = nn.Parameter(torch.empty(d_model).uniform_(floor, bound))
        nn.init.kaiming_uniform_(self.input.weight, a=8)
        nn.init.zeros_(self.input.bias)

    def recurrent_weight(self) -> Tensor:
        """u within its bound: (H,)."""
        return cast(Tensor, Bounded.apply(self.u, self.bound))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return cast(Tensor, recurrent_cell(self.input(x), self.recurrent_weight(), None, "indrnn"))

    def cost(self, length: int) -> Cost:
        width = self.input.in_features
        return Cost.linear(length, width, width) + Cost(other=4.0 * length * width)

    def init_state(self, batch: int) -> Tensor:
        return self.u.new_zeros(batch, len(self.u))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, H)."""
        h = torch.relu(self.input(x) + self.recurrent_weight() * state)
        return h, h

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h, last = recurrent_cell(self.input(x), self.recurrent_weight(), None, "indrnn", state, return_state=True)
        return h, last


class IndRNN(Stack):
    """gamma: how many times larger a unit's memory may get over `length` tokens. last_holds: start the last layer with
    units that lose or gain no more than a factor of gamma over the length."""

    card = Card(
        title="Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN",
        year=2018,
        url="https://arxiv.org/abs/1803.04831",
        scaling="L",
        causal=True,
    )

    def __init__(
        self, *, d_model: int, n_layers: int, length: int, gamma: float = 5.0, last_holds: bool = False, **stack: Any
    ) -> None:
        if gamma < 1:
            raise ValueError(f"gamma is {gamma}; at least 1, or no unit could keep what it holds")
        bound = gamma ** (1 / max(length, 1))
        super().__init__(
            lambda layer: IndRNNMixer(d_model, bound, 1 / bound if last_holds and layer == n_layers - 1 else 0.0),
            d_model=d_model, n_layers=n_layers, length=length, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "u")
