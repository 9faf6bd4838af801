"""ChordMixer: tokens are mixed by circular shifts of parts of the features by powers of two; no attention, no filters.

Khalitov, Yu, Cheng and Yang 2022, arXiv:2206.05852. With n = ceil(log2 `length`) there are n + 1 tracks of S features,
E = (n + 1) S in all; track 0 stays, track i >= 1 is turned by 2^(i-1), over a ring of the l real tokens. A block:

    h = fc2 gelu(fc1 prenorm(x))                           (B, L, E)   from E to F features and back
    r_t = [h^0_t, h^1_{t+1}, h^2_{t+2}, h^3_{t+4}, ..., h^n_{t+2^(n-1)}]   every t + 2^(i-1) modulo l
    x = norm(x + r)                                        (B, L, E)

Any distance below 2^n is a sum of at most n powers of two, one a block: after n blocks each output has seen every
token. There are n blocks, and `n_layers` where that is more. Where d_model is not E, a linear map leads in, as the
authors' embedding does, and one leads out.

Initialisation: as released, Xavier uniform with zero biases.

Departures: the ring closes at each sequence's own last token, as it does in the authors' mode of variable lengths; that
mode also leaves blocks out when the first sequence of the batch is short, ours never does. The paper's own tasks use no
norms (`prenorm`, `norm` "none"), its Long Range Arena layer or batch norm before and batch norm after; layer norms are
the default here, because with them no sequence sees another. Dropout stands behind gelu and fc2 (the authors' second
one, behind fc2 again, is 0 in their settings).

Checked against: tensors of the authors' encoder with layer norms, outputs and gradient; a float64 loop that rolls each
sequence at its own length, outputs and every gradient; what an output sees after n blocks and after n - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._norm import BatchNorm, LayerNorm, normalised
from lra.architectures._table import Tables
from lra.encoder import Card, Cost, Encoder, clean_padding, lengths_of

NORMS: dict[str, type[nn.Module]] = {"layer": LayerNorm, "batch": BatchNorm, "none": nn.Identity}


class Turn(torch.autograd.Function):
    """Rows of x: (R, S) in another order. A permutation: the gradient is a read in the opposite order."""

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


def turned(mask: Tensor, by: Tensor) -> Tensor:
    """Of each track of each token, the row, in (B L T) rows, of that track `by`, (T,), places further round the ring;
    padding stays: (B L T,)."""
    batch, total = mask.shape
    place = torch.arange(total, device=mask.device).unsqueeze(1)
    length = lengths_of(mask).view(-1, 1, 1).clamp_min(1)
    source = torch.where(mask.unsqueeze(-1), (place + by) % length, place)
    first = total * torch.arange(batch, device=mask.device).view(-1, 1, 1)
    return ((first + source) * len(by) + torch.arange(len(by), device=mask.device)).flatten()


def shifts(powers: int) -> Tensor:
    """Places that each track is turned by: (powers + 1,)."""
    return torch.tensor([0, *(2**i for i in range(powers))])


class ChordMixerBlock(nn.Module):
    """(B, L, E) -> (B, L, E). order, inverse: of the rows of tracks, as `turned` gives them."""

    def __init__(self, width: int, *, track_size: int, hidden: int, prenorm: str, norm: str, dropout: float) -> None:
        super().__init__()
        self.track_size = track_size
        self.prenorm = NORMS[prenorm](width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.norm = NORMS[norm](width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        h = self.dropout(F.gelu(self.fc1(normalised(self.prenorm, x, mask))))
        h = self.dropout(self.fc2(h))
        rotated = Turn.apply(h.reshape(-1, self.track_size), order, inverse).view(h.shape)
        return normalised(self.norm, x + rotated, mask)


class ChordMixer(Tables, Encoder):
    """track_size: S; the largest with E <= d_model unless given, at least 1. hidden: F, E unless given. blocks: as many
    as `length` needs and at least n_layers unless given. prenorm, norm: of NORMS."""

    card = Card(
        title="ChordMixer: A Scalable Neural Attention Model for Sequences with Different Lengths",
        year=2022,
        url="https://arxiv.org/abs/2206.05852",
        scaling="L log L",
        causal=False,
    )
    refuses_causal = True

    shifts: Tensor
    blocks: Any

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "bidirectional",
        track_size: int | None = None,
        hidden: int | None = None,
        blocks: int | None = None,
        prenorm: str = "layer",
        norm: str = "layer",
    ) -> None:
        super().__init__()
        whole = {"d_model": d_model, "n_layers": n_layers, "length": length}
        at_least(1, **(whole | {"track_size": track_size, "hidden": hidden, "blocks": blocks}))
        for name, kind in (("prenorm", prenorm), ("norm", norm)):
            if kind not in NORMS:
                raise ValueError(f"{name} is {kind!r}; one of {', '.join(NORMS)}")
        if direction != "bidirectional":
            raise ValueError(f"direction is {direction!r}; a ring has no past, so bidirectional")
        self.d_model, self.n_layers, self.length, self.direction = d_model, n_layers, length, direction
        self.follows_length = blocks is None
        powers = (length - 1).bit_length()
        size = track_size or max(1, d_model // (powers + 1))
        width = (powers + 1) * size
        depth = blocks or max(n_layers, powers)
        self.register_table("shifts", shifts, powers)
        self.embedding = nn.Identity() if width == d_model else nn.Linear(d_model, width)
        self.blocks = nn.ModuleList(
            ChordMixerBlock(width, track_size=size, hidden=hidden or width, prenorm=prenorm, norm=norm, dropout=dropout)
            for _ in range(depth)
        )
        self.out = nn.Identity() if width == d_model else nn.Linear(width, d_model)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    @property
    def scaling(self) -> str:
        return "L log L" if self.follows_length else "L"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask)
        order, inverse = turned(mask, self.shifts), turned(mask, -self.shifts)
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, mask, order, inverse)
        return self.out(x)

    def cost(self, length: int) -> Cost:
        hidden, width = self.blocks[0].fc1.weight.shape
        mixing = Cost.linear(length, width, hidden) + Cost.linear(length, hidden, width)
        block = mixing + Cost(other=8.0 * length * hidden + 11.0 * length * width)
        maps = Cost.linear(length, self.d_model, width) + Cost.linear(length, width, self.d_model)
        return len(self.blocks) * block + (width != self.d_model) * maps
