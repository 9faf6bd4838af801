"""FNet: a Fourier transform without parameters in place of attention.

Lee-Thorp et al. 2021, arXiv:2105.03824, equation 3: of each sequence of n tokens x (n, D),

    y = Re(F_n x F_D)                                      F_N[j, k] = exp(-2 pi i j k / N), not normalised

and the block is x = norm(x + y), x = norm(x + ffn(x)), with a GELU feed-forward part (section 3.1).

Padding: the transform is that of the n real tokens alone, whatever the row is padded to. Rows of one length are
transformed together. The real part at feature D - k and token -t mod n equals that at (k, t), so half the features are
transformed.

Initialisation: the transform has no parameters; the rest is the stack's.

Departures: the authors pad every example to one length and let padding take part. Every output sees every token: there
is no causal form.

Checked against: tensors of Hugging Face's FNetBasicFourierTransform, outputs and gradients; torch.fft.fft2 of each
sequence alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer, lengths_of

POSITIONS = ("sinusoidal", "learned", "none")


def fourier(x: Tensor) -> Tensor:
    """Real part of the Fourier transform over tokens and features: (..., L, D) -> (..., L, D)."""
    half = torch.fft.rfft2(x).real
    mirrored = half[..., 1 : (x.shape[-1] + 1) // 2]
    return torch.cat([half, mirrored.flip((-2, -1)).roll(1, -2)], dim=-1)


class FNetMixer(Mixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = wide(x)
        lengths = lengths_of(mask)
        if lengths.is_meta or bool((lengths == x.shape[1]).all()):
            return fourier(x)
        y = torch.zeros_like(x)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            mixed = torch.nn.functional.pad(fourier(x[rows, :length]), (0, 0, 0, x.shape[1] - length))
            y = y.index_copy(0, rows, mixed)
        return y

    def cost(self, length: int) -> Cost:
        size = length * self.d_model
        return Cost(other=2.5 * size * math.log2(max(2, size)) + size)


class FNet(Stack):
    """positions: one of POSITIONS; the authors learn them."""

    card = Card(
        title="FNet: Mixing Tokens with Fourier Transforms",
        year=2021,
        url="https://arxiv.org/abs/2105.03824",
        scaling="L log L",
        causal=False,
        exempt={"exports": "each sequence is transformed at its own length, which is read from the mask"},
    )
    refuses_causal = True
    block = Block(prenorm=False)

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        positions: str = "sinusoidal",
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}; one of {', '.join(POSITIONS)}")
        if direction != "bidirectional":
            raise ValueError(f"direction is {direction!r}; bidirectional, a Fourier transform sees the future")
        super().__init__(
            lambda _: FNetMixer(d_model),
            native=True, d_model=d_model, direction=direction, block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
