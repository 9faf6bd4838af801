"""HGRN2: HGRN with a matrix state; the key of a channel is computed from its forget gate.

Qin, Yang, Sun, Shen, Li, Sun and Zhong 2024, arXiv:2404.07904. With H heads of width N = D / H, in layer l:

    v, q, z = W_v x, W_q x, W_f x                          (B, L, H, N) each
    f = gamma + (1 - gamma) sigmoid(z),   k = 1 - f        (B, L, H, N)   gamma: (D,), the lower bound of layer l
    S_t = diag(f_t) S_{t-1} + k_t v_t^T,   S_0 = 0         (B, H, N, N), never stored
    o_t = S_t^T q_t
    y = W_o norm(o)                                        (B, L, D)      norm over all D features

N is the paper's expansion ratio: a state of N numbers for each of D channels. gamma as in HGRN. Two forms of the layer
are released, of which `lra` chooses one:

                    q             v         norm         maps have biases    the scores are divided by
    language model  silu(W_q x)   W_v x     RMS norm     no                  sqrt(N)
    lra             sigmoid       silu      layer norm   yes                 1

Bidirectional, the outputs of a scan in each direction, which share all weights, are added ahead of the norm.

Initialisation: maps are PyTorch's own; the bounds rise by 1 / n_layers from layer to layer.

Departures: none known in the mixer. The root of N is that of flash-linear-attention, and the norm undoes it but for its
epsilon, 1e-5. A block has a SwiGLU part of width 8/3 D after the mixer, with biases; the LRA runs have 1 D or 2 D.

Checked against: tensors of flash-linear-attention's HGRN2Attention and of the authors' Hgru2_1d and BiHgru2_1d:
outputs, gradients of x, of every parameter and of the table of bounds; flash-linear-attention's recurrence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._bounds import LowerBounds
from lra.architectures._norm import LayerNorm, RMSNorm
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack, flip
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention import decay_attention

CHUNK = 64


def gates(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """log f and k = 1 - f of logits z: (..., D); bound: (D,), None for 0."""
    if bound is None:
        return F.logsigmoid(z), torch.sigmoid(-z)
    log_f = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(z))
    return log_f, (1 - bound) * torch.sigmoid(-z)


def advance(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One token: q, k, log_f: (B, H, N); v: (B, H, V); S: (B, H, N, V) -> o: (B, H, V), S."""
    S = log_f.exp().unsqueeze(-1) * S + k.unsqueeze(-1) * v.unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", S, q) * scale, S


class HGRN2Mixer(Mixer):
    """(B, L, D) -> (B, L, D). bounds: the table shared by the stack, read at row `layer`."""

    def __init__(
        self, d_model: int, *, n_heads: int, bounds: LowerBounds, layer: int, lra: bool, bidirectional: bool
    ) -> None:
        super().__init__()
        self.n_heads, self.layer, self.lra, self.bidirectional = n_heads, layer, lra, bidirectional
        self.scale = 1.0 if lra else (d_model // n_heads) ** -0.5
        self._bounds = (bounds,)  # in a tuple: the stack registers it, a mixer only reads it
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=lra)  # rows: v, q, f
        self.norm = LayerNorm(d_model) if lra else RMSNorm(d_model, eps=1e-5)
        self.out_proj = nn.Linear(d_model, d_model, bias=lra)

    def _heads(self, vqf: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(..., 3 D) -> q, k, v, log f: (..., H, N)."""
        v, q, z = vqf.chunk(3, dim=-1)
        q, v = (torch.sigmoid(q), F.silu(v)) if self.lra else (F.silu(q), v)
        log_f, k = gates(wide(z), self._bounds[0](self.layer))
        q, k, v, log_f = (t.unflatten(-1, (self.n_heads, -1)) for t in (q, k, v, log_f))
        return q, k, v, log_f

    def _scan(self, vqf: Tensor) -> Tensor:
        """(B, L, 3 D) -> (B, L, D)."""
        o = decay_attention(*self._heads(vqf), CHUNK, scale=self.scale)
        assert isinstance(o, Tensor)
        return o.flatten(-2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        vqf = self.in_proj(x)
        o = self._scan(vqf)
        if self.bidirectional:
            o = o + flip(self._scan(flip(vqf, mask)), mask)
        return self.out_proj(self.norm(o.to(self.norm.weight.dtype)))

    def cost(self, length: int) -> Cost:
        d_model = self.out_proj.out_features
        maps = Cost.linear(length, d_model, 3 * d_model, self.lra) + Cost.linear(length, d_model, d_model, self.lra)
        attention = 4.0 * CHUNK * d_model + 4.0 * d_model**2 / self.n_heads + 16.0 * d_model
        return maps + Cost(other=length * (attention * (2 if self.bidirectional else 1) + 6.0 * d_model))

    def init_state(self, batch: int) -> Tensor:
        weight, head = self.out_proj.weight, self.out_proj.out_features // self.n_heads
        return wide(weight.new_zeros(batch, self.n_heads, head, head))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: S (B, H, N, N)."""
        o, S = advance(*self._heads(self.in_proj(x)), state, self.scale)
        return self.out_proj(self.norm(o.flatten(-2).to(self.norm.weight.dtype))), S


class HGRN2(Stack):
    """n_heads: H; the expansion ratio N is d_model / H. lra: the authors' layer for the Long Range Arena in place of
    that of their language models."""

    card = Card(
        title="HGRN2: Gated Linear RNNs with State Expansion",
        year=2024,
        url="https://arxiv.org/abs/2404.07904",
        scaling="L",
        causal=True,
        variants={"lra": {"lra": True}},
    )
    block = Block(ffn="swiglu", expand=8 / 3)

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        direction: str = "causal",
        n_heads: int = 4,
        lra: bool = False,
        **stack: Any,
    ) -> None:
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}; a divisor of d_model, {d_model}")
        bounds = LowerBounds(n_layers, d_model)
        super().__init__(
            lambda layer: HGRN2Mixer(
                d_model, n_heads=n_heads, bounds=bounds, layer=layer, lra=lra,
                bidirectional=direction == "bidirectional",
            ),
            native=True, d_model=d_model, n_layers=n_layers, direction=direction, **stack,
        )  # fmt: skip
        self.bounds = bounds
