"""minLSTM: an LSTM whose gates and candidate do not see the previous state, the two gates normalised to sum to one.

Feng et al. 2024, arXiv:2410.01201, section 3.2, in the form of appendix B, which keeps states positive. Per token, with
H = expand D:

    f = sigmoid(W_f x + b_f),  i = sigmoid(W_i x + b_i)    (B, L, H)   forget and input gate
    f' = f / (f + i),  i' = i / (f + i)                    (B, L, H)   so that the scale of h does not depend on time
    n = g(W_h x + b_h)                                     (B, L, H)   candidate: g(v) = v + 1/2
                                                                       for v >= 0, else sigmoid(v)
    h_t = f'_t h_{t-1} + i'_t n_t,   h_0 = 0               (B, L, H)
    y = h, or to_out h where H differs from D              (B, L, D)

f' is computed as sigmoid(log f - log i), which stays finite where both gates round to 0. The paper scans in the log
domain, which is why it needs n > 0. All terms being positive nothing cancels, and the direct scan used here gives the
same numbers with fewer operations.

Initialisation: maps are PyTorch's own; b_f = log(u) and b_i = -b_f, u uniform in [1, horizon - 1], the chrono rule of
arXiv:1804.11188: f' starts at u / (u + 1), memories from two tokens to `horizon`. The paper leaves biases to its
library and reports that raising b_f at the start makes training take fewer steps.

Departures: that bias; and the surroundings: a pre-norm residual block followed by a feed-forward part, while the paper
puts a short convolution before the recurrence in its language models. The paper's listing starts from g(h_0), a half
where h_0 is 0, and the authors' code always ends in to_out.

Checked against: tensors of lucidrains/minGRU-pytorch, whose parallel form is the listing of the paper's appendix:
outputs and gradients of input and weights.
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


class MinLSTMMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, expand: float, horizon: int) -> None:
        super().__init__()
        self.width = round(expand * d_model)
        self.to_hidden_and_f_i_gate = nn.Linear(d_model, 3 * self.width)  # rows: candidate, forget gate, input gate
        self.to_out = nn.Linear(self.width, d_model) if self.width != d_model else None
        _, forget, input_gate = self.to_hidden_and_f_i_gate.bias.data.chunk(3)
        input_gate.copy_(-chrono(forget, horizon))

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f' and i' n, each (..., H)."""
        c, forget, input_gate = wide(self.to_hidden_and_f_i_gate(x)).chunk(3, dim=-1)
        n = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        odds = F.logsigmoid(forget) - F.logsigmoid(input_gate)
        return torch.sigmoid(odds), torch.sigmoid(-odds) * n

    def _output(self, h: Tensor) -> Tensor:
        return h if self.to_out is None else self.to_out(h)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        forget, inputs = self._terms(x)
        return self._output(linear_scan(forget, inputs))

    def cost(self, length: int) -> Cost:
        d_model = self.to_hidden_and_f_i_gate.in_features
        work = Cost.linear(length, d_model, 3 * self.width) + Cost(other=34.0 * length * self.width)
        return work if self.to_out is None else work + Cost.linear(length, self.width, d_model)

    def init_state(self, batch: int) -> Tensor:
        return self.to_hidden_and_f_i_gate.weight.new_zeros(batch, self.width)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, H)."""
        forget, inputs = self._terms(x)
        h = forget * state + inputs
        return self._output(h), h

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = linear_scan(*self._terms(x), state)
        return self._output(h), h[:, -1]


class MinLSTM(Stack):
    """expand: width of the state over d_model. horizon: the longest memory, in tokens, that the gates start with;
    `length` unless given, 2 for none."""

    card = Card(
        title="Were RNNs All We Needed?",
        year=2024,
        url="https://arxiv.org/abs/2410.01201",
        scaling="L",
        causal=True,
    )

    def __init__(
        self, *, d_model: int, length: int, expand: float = 1.0, horizon: int | None = None, **stack: Any
    ) -> None:
        reach = length if horizon is None else horizon
        if reach < 1:
            raise ValueError(f"horizon is {reach}; at least 1 token")
        if round(expand * d_model) < 1:
            raise ValueError(f"expand is {expand}; a state of at least one feature, expand * d_model")
        super().__init__(lambda _: MinLSTMMixer(d_model, expand, reach), d_model=d_model, length=length, **stack)
