"""HGRN: a gated linear recurrence whose forget gates have a lower bound that rises from layer to layer.

Qin, Yang and Zhong 2023, arXiv:2311.04823. In layer l, with complex states of width D:

    c = silu(W_c x + b_c)                                  (B, L, D)   complex: pairs of 2 D features
    lambda = gamma + (1 - gamma) sigmoid(W_f x + b_f)      (B, L, D)   gamma: (D,), the lower bound of layer l
    h_t = lambda_t e^(i theta) h_{t-1} + (1 - lambda_t) c_t,   h_0 = 0     theta: (D,), learned
    g = silu(W_g x + b_g)                                  (B, L, 2 D)
    y = W_o (g * norm([Re h, Im h])) + b_o                 (B, L, D)   layer norm over all 2 D features

gamma_l is the sum of the first l rows, the very first one left out, of a softmax over the layers of a table that the
stack shares: low layers may forget at once, high layers keep what they have. Bidirectional, the states of a scan in
each direction are added ahead of the norm; the scans share everything but theta.

Initialisation: maps are PyTorch's own; theta_j = 10000^(-2 j / D), the angles of rotary positions; the table is
constant, so that gamma rises by 1 / n_layers from layer to layer.

Departures: none known in the mixer. The paper's output gate is a sigmoid in its equation 8 and a SiLU in the released
code, which is followed. A block has a SwiGLU part of width 8/3 D after the mixer, with biases; the LRA runs have 1 D or
2 D.

Checked against: tensors of the authors' Hgru1d, BiHgru1d and HgruRealV6 (outputs and every gradient, the lower bound's
among them), and of flash-linear-attention's gates and recurrence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._bounds import LowerBounds
from lra.architectures._norm import LayerNorm
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.linear_scan import linear_scan


class HGRNMixer(Mixer):
    """(B, L, D) -> (B, L, D). bounds: the table shared by the stack, read at row `layer`."""

    def __init__(
        self, d_model: int, *, bounds: LowerBounds, layer: int, complex_state: bool, bidirectional: bool
    ) -> None:
        super().__init__()
        self.layer, self.complex_state, self.bidirectional = layer, complex_state, bidirectional
        self._bounds = (bounds,)  # in a tuple: the stack registers it, a mixer only reads it
        width = d_model * (2 if complex_state else 1)
        self.input_proj = nn.Linear(d_model, width)
        self.lambda_proj = nn.Linear(d_model, d_model)
        if complex_state:
            angles = 10000.0 ** (-2 * torch.arange(d_model) / d_model)
            self.theta = nn.Parameter(angles)
            if bidirectional:
                self.theta_reverse = nn.Parameter(angles.clone())
        self.gate = nn.Linear(d_model, width)
        self.norm = LayerNorm(width)
        self.out_proj = nn.Linear(width, d_model)

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """lambda and (1 - lambda) c, each (..., D), the second one complex where the state is."""
        c, forget = F.silu(wide(self.input_proj(x))), torch.sigmoid(wide(self.lambda_proj(x)))
        bound = self._bounds[0](self.layer)
        if bound is not None:
            forget = bound + (1 - bound) * forget
        if self.complex_state:
            c = torch.view_as_complex(c.unflatten(-1, (-1, 2)).contiguous())
        return forget, (1 - forget) * c

    def _decay(self, forget: Tensor, theta: str) -> Tensor:
        """lambda e^(i theta), or lambda where the state is real: (..., D)."""
        if not self.complex_state:
            return forget
        angle = wide(getattr(self, theta))
        return torch.complex(forget * angle.cos(), forget * angle.sin())

    def _finish(self, h: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output map: (..., D) state and input -> (..., D)."""
        features = torch.cat([h.real, h.imag], -1) if self.complex_state else h
        return self.out_proj(self.norm(features.to(self.norm.weight.dtype)) * F.silu(self.gate(x)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        forget, inputs = self._terms(x)
        h = linear_scan(self._decay(forget, "theta"), inputs)
        if self.bidirectional:
            inputs = inputs.masked_fill(~mask.unsqueeze(-1), 0)  # the scan from the end starts in the padding
            h = h + linear_scan(self._decay(forget, "theta_reverse"), inputs, reverse=True)
        return self._finish(h, x)

    def cost(self, length: int) -> Cost:
        d_model, width = self.input_proj.in_features, self.input_proj.out_features
        maps = 2 * Cost.linear(length, d_model, width) + Cost.linear(length, d_model, d_model)
        scans = (10.0 if self.complex_state else 2.0) * (2 if self.bidirectional else 1)
        return maps + Cost.linear(length, width, d_model) + Cost(other=length * (d_model * (scans + 9) + 18.0 * width))

    def init_state(self, batch: int) -> Tensor:
        weight = wide(self.input_proj.weight)
        h = weight.new_zeros(batch, self.lambda_proj.out_features)
        return torch.complex(h, h) if self.complex_state else h

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: h (B, D)."""
        forget, inputs = self._terms(x)
        h = self._decay(forget, "theta") * state + inputs
        return self._finish(h, x), h


class HGRN(Stack):
    """complex_state: whether states are complex and turn by theta at each token."""

    card = Card(
        title="Hierarchically Gated Recurrent Neural Network for Sequence Modeling",
        year=2023,
        url="https://arxiv.org/abs/2311.04823",
        scaling="L",
        causal=True,
        variants={"real": {"complex_state": False}},
    )
    block = Block(ffn="swiglu", expand=8 / 3)

    def __init__(
        self, *, d_model: int, n_layers: int, direction: str = "causal", complex_state: bool = True, **stack: Any
    ) -> None:
        bounds = LowerBounds(n_layers, d_model)
        super().__init__(
            lambda layer: HGRNMixer(
                d_model, bounds=bounds, layer=layer, complex_state=complex_state,
                bidirectional=direction == "bidirectional",
            ),
            native=True, d_model=d_model, n_layers=n_layers, direction=direction, **stack,
        )  # fmt: skip
        self.bounds, self.complex_state = bounds, complex_state

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, *(("theta",) if self.complex_state else ()))
