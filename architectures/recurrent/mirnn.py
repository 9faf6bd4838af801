"""MI-RNN: the plain recurrence with the product of the terms of token and state in addition to their sum.

Wu, Zhang, Zhang, Bengio and Salakhutdinov 2016, arXiv:1606.06630, equation 4. Per token, with h: (B, H) and H = D:

    h = tanh(alpha * (x w) * (h u) + beta1 * (h u) + beta2 * (x w) + b)      the output, (B, H)

Parameters as in the code of arXiv:2406.05045, weights applied on the right: w, u: (D, D), alpha, beta1, beta2, b: (D,).

Initialisation: w Xavier uniform, u orthogonal; alpha = 1, beta1 = beta2 = 1/2, b = 0, so that the plain recurrence is
there at the start, at half its size, as the paper begins from constants.

Departures: this initialisation; a pre-norm residual block followed by a feed-forward part around the recurrence. The
paper's LSTM and GRU with multiplicative integration are not here.

The loop over time is Python's: `recurrent_cell` would need this cell, elman with a factor on U h for every token.

Checked against: tensors of the layer in the code of arXiv:2406.05045, with the gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._recurrence import Loop
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost


class MIRNNMixer(Loop):
    """The recurrence over a sequence: (B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.alpha = nn.Parameter(torch.ones(d_model))
        self.w = nn.Parameter(nn.init.xavier_uniform_(torch.empty(d_model, d_model)))
        self.u = nn.Parameter(nn.init.orthogonal_(torch.empty(d_model, d_model)))
        self.beta1 = nn.Parameter(torch.full((d_model,), 0.5))
        self.beta2 = nn.Parameter(torch.full((d_model,), 0.5))
        self.b = nn.Parameter(torch.zeros(d_model))

    def enter(self, x: Tensor) -> Tensor:
        """What multiplies h u and what is added to it, (..., 2 D)."""
        seen = x @ self.w
        return torch.cat([self.alpha * seen + self.beta1, self.beta2 * seen + self.b], dim=-1)

    def weights(self) -> tuple[Tensor, ...]:
        return (self.u,)

    def advance(self, entering: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        factor, term = entering.chunk(2, dim=-1)
        h = torch.tanh(torch.addcmul(term, factor, state @ weights[0]))
        return h, h

    def cost(self, length: int) -> Cost:
        return 2 * Cost.linear(length, self.d_model, self.d_model) + Cost(other=10.0 * length * self.d_model)

    def init_state(self, batch: int) -> Tensor:
        return self.zeros(batch, self.d_model)


class MIRNN(Stack):
    card = Card(
        title="On Multiplicative Integration with Recurrent Neural Networks",
        year=2016,
        url="https://arxiv.org/abs/1606.06630",
        scaling="L",
        causal=True,
        no_recall="its state passes through tanh at every step, so the gradient of the first token vanishes",
        exempt={"exports": "a Python loop over the tokens is unrolled for one length"},
    )

    def __init__(self, *, d_model: int, **stack: Any) -> None:
        super().__init__(lambda _: MIRNNMixer(d_model), d_model=d_model, **stack)
