"""minGRU: a GRU whose gate and candidate do not see the previous state, so that all steps run as one linear scan.

Feng et al. 2024, arXiv:2410.01201, section 3.1, in the form of appendix B, which keeps states positive. Per token, with
H = expand D:

    z = sigmoid(W_z x + b_z)                               (B, L, H)   update gate: z = 1 replaces the state
    n = g(W_h x + b_h)                                     (B, L, H)   candidate: g(v) = v + 1/2
                                                                       for v >= 0, else sigmoid(v)
    h_t = (1 - z_t) h_{t-1} + z_t n_t,   h_0 = 0           (B, L, H)
    y = h, or to_out h where H differs from D              (B, L, D)

The paper scans in the log domain, which is why it needs n > 0. All terms being positive nothing cancels, and the direct
scan used here gives the same numbers with fewer operations.

Initialisation: maps are PyTorch's own; b_z = -log(u), u uniform in [1, horizon - 1], the chrono rule of
arXiv:1804.11188: the gates start with memories from two tokens to `horizon`. The paper leaves biases to its library and
reports, for minLSTM, that a start that remembers trains in fewer steps.

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
from torch.autograd.function import once_differentiable

from lra.architectures._init import chrono
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.linear_scan import linear_scan


class Terms(torch.autograd.Function):
    """Candidate and gate before their nonlinearities, (..., 2 H) -> 1 - z and z n, (..., H) in float32 at least.

    With z' = z (1 - z), and n' = 1 where n >= 1/2, else n (1 - n), both follow from what is kept: 1 - z, z and n.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c, gate = wide(x).chunk(2, dim=-1)
        forget, z = gate.neg().sigmoid_(), gate.sigmoid()
        n = torch.where(c >= 0, c + 0.5, c.sigmoid())
        return forget, z * n, z, n

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        forget, _, z, n = output
        ctx.mark_non_differentiable(z, n)
        ctx.save_for_backward(forget, z, n)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        forget, z, n = ctx.saved_tensors
        to_forget, to_inputs, *_ = grads
        to_x = n.new_empty(*n.shape[:-1], 2 * n.shape[-1], dtype=ctx.dtype)
        to_c, to_gate = to_x.chunk(2, dim=-1)
        to_c.copy_(torch.where(n >= 0.5, 1, torch.addcmul(n, n, n, value=-1)).mul_(z).mul_(to_inputs))
        to_gate.copy_((to_inputs * n).sub_(to_forget).mul_(z).mul_(forget))
        return to_x


class MinGRUMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, expand: float, horizon: int) -> None:
        super().__init__()
        self.width = round(expand * d_model)
        self.to_hidden_and_gate = nn.Linear(d_model, 2 * self.width)  # rows: candidate, gate
        self.to_out = nn.Linear(self.width, d_model) if self.width != d_model else None
        chrono(self.to_hidden_and_gate.bias.data[self.width :], horizon).neg_()

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """1 - z and z n, each (..., H)."""
        forget, inputs, *_ = Terms.apply(self.to_hidden_and_gate(x))
        return forget, inputs

    def _output(self, h: Tensor) -> Tensor:
        return h if self.to_out is None else self.to_out(h)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        forget, inputs = self._terms(x)
        return self._output(linear_scan(forget, inputs))

    def cost(self, length: int) -> Cost:
        d_model = self.to_hidden_and_gate.in_features
        work = Cost.linear(length, d_model, 2 * self.width) + Cost(other=18.0 * length * self.width)
        return work if self.to_out is None else work + Cost.linear(length, self.width, d_model)

    def init_state(self, batch: int) -> Tensor:
        return self.to_hidden_and_gate.weight.new_zeros(batch, self.width)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, H)."""
        forget, inputs = self._terms(x)
        h = forget * state + inputs
        return self._output(h), h

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = linear_scan(*self._terms(x), state)
        return self._output(h), h[:, -1]


class MinGRU(Stack):
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
        super().__init__(lambda _: MinGRUMixer(d_model, expand, reach), d_model=d_model, length=length, **stack)
