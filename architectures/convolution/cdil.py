"""CDIL: dilated convolutions with circular padding, so that every output depends on every token symmetrically.

Cheng, Khalitov, Yu, Zhang and Yang 2022, arXiv:2201.02143. Level i of n has dilation d = 2^i and K taps (K odd), and
one weight-normalised convolution, W = g v / |v| per output channel, over a sequence of l real tokens closed to a ring:

    c(x)_t = b + sum_k W_k x_{(t + (k - (K - 1) / 2) d) mod l}   (B, L, D)
    x = x + relu(c(x))                                           (B, L, D)

An output sees the nearest 1 + (K - 1) (2^n - 1) places of the ring; n is the smallest for which both halves of a ring
of `length` tokens are covered, and `n_layers` where that is more.

Initialisation: PyTorch's own, with g = |v|.

Departures: the ring closes at each sequence's own last token; the authors' closes over padding too, where an output
would depend on how much of it there is. A dilation longer than the ring goes around it more than once. The authors'
biases are normal of deviation 0.01 (so are their weights, but weight norm overwrites those). As theirs, the network
stands alone, without the stack's norms and feed-forward parts.

Checked against: tensors of the authors' ConvPart (model CDIL), outputs and gradient; a float64 loop over the equations
with rings of several lengths, outputs and every gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._weight_norm import WeightNormConv1d
from lra.encoder import Card, Cost, Encoder, clean_padding, lengths_of


class Turn(torch.autograd.Function):
    """Rows of x: (R, D) in another order. A permutation: the gradient is a read in the opposite order."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return Turn.apply(grads[0], inverse, order), None, None


def turned(mask: Tensor, by: int) -> Tensor:
    """Row number, in (B L) rows, of the token `by` places further round each ring; padding stays: (B L,)."""
    batch, total = mask.shape
    place, length = torch.arange(total, device=mask.device), lengths_of(mask).unsqueeze(1)
    source = torch.where(mask, (place + by) % length.clamp_min(1), place)
    return (source + total * torch.arange(batch, device=mask.device).unsqueeze(1)).flatten()


class CDILLevel(nn.Module):
    """x -> x + relu(c(x)): (B, L, D) -> (B, L, D)."""

    def __init__(self, d_in: int, *, d_out: int, kernel: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv = WeightNormConv1d(d_in, d_out, kernel)
        self.dropout = nn.Dropout(dropout)

    def convolve(self, x: Tensor, mask: Tensor) -> Tensor:
        weight, rows = self.conv.weight, x.flatten(0, 1)
        taps = []
        for k in range(weight.shape[2]):
            by = (k - weight.shape[2] // 2) * self.dilation
            taps.append(rows if by == 0 else Turn.apply(rows, turned(mask, by), turned(mask, -by)))
        return F.linear(torch.cat(taps, dim=1), weight.mT.flatten(1), self.conv.bias).unflatten(0, mask.shape)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.dropout(F.relu(self.convolve(x, mask)))


class CDIL(Encoder):
    """kernel: taps a convolution, K, odd. levels: n; as many as `length` needs and at least n_layers unless given."""

    card = Card(
        title="Classification of Long Sequential Data using Circular Dilated Convolutional Neural Networks",
        year=2022,
        url="https://arxiv.org/abs/2201.02143",
        scaling="L log L",
        causal=False,
    )
    refuses_causal = True

    levels: Any

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "bidirectional",
        kernel: int = 3,
        levels: int | None = None,
    ) -> None:
        super().__init__()
        at_least(1, d_model=d_model, n_layers=n_layers, length=length, levels=levels)
        if kernel < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; an odd number of at least 3, as many taps on either side")
        if direction != "bidirectional":
            raise ValueError(f"direction is {direction!r}; a ring has no past, so bidirectional")
        self.d_model, self.n_layers, self.length, self.direction = d_model, n_layers, length, direction
        self.follows_length = levels is None
        # smallest n with (K - 1) / 2 (2^n - 1) >= length / 2, rounded down: the far side of the ring
        needed = (-(-(length // 2) // (kernel // 2))).bit_length()
        depth = max(n_layers, needed) if levels is None else levels
        self.levels = nn.ModuleList(
            CDILLevel(d_model, d_out=d_model, kernel=kernel, dilation=2**i, dropout=dropout) for i in range(depth)
        )

    @property
    def scaling(self) -> str:
        return "L log L" if self.follows_length else "L"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask)
        for level in self.levels:
            x = level(x, mask)
        return x

    def cost(self, length: int) -> Cost:
        d_out, d_in, kernel = self.levels[0].conv.weight.shape
        level = Cost.linear(length, kernel * d_in, d_out) + Cost(other=2.0 * length * d_out)
        return len(self.levels) * level
