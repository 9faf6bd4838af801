"""The order in which band_attention is computed: lanes, and tiles of queries with the stretch of keys they can see.

Heads of one dilation D fall into D lanes: lane r holds blocks r, r + D, r + 2 D ..., and inside a lane the band is
contiguous. A tile is a run of a lane's blocks, for some of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

HIDDEN = -1e30  # added to the score of a key that is not seen: exp is exactly 0, and no inf - inf arises


@dataclass(frozen=True)
class Pattern:
    """The arguments of `band_attention` that say who sees whom. `band`: False leaves the band to another kernel."""

    behind: int
    ahead: int
    dilation: Sequence[int]
    block: int
    causal: bool
    band: bool = True


@dataclass(frozen=True)
class Tile:
    batch: slice
    heads: slice
    first: int
    dilation: int
    queries: slice
    keys: slice

    def cut(self, x: Tensor, blocks: slice) -> Tensor:
        """(B, H, blocks, block, E) -> the view (b, h, n, block, E) of this tile's share, n blocks of its lane."""
        return x[self.batch, self.heads, self.first :: self.dilation][:, :, blocks]

    def numbers(self, blocks: slice, device: torch.device) -> Tensor:
        """The blocks' numbers in the sequence: (n,)."""
        return self.first + self.dilation * torch.arange(blocks.start, blocks.stop, device=device)

    def places(self, blocks: slice, block: int, device: torch.device) -> Tensor:
        """The positions in those blocks: (n * block,)."""
        inside = torch.arange(block, device=device)
        return (self.numbers(blocks, device).unsqueeze(1) * block + inside).flatten()


def tiles(batch: int, blocks: int, pattern: Pattern, extra: int, budget: int) -> Iterator[Tile]:
    """Every query once. `extra`: keys beyond the band per query; `budget`: scores at once."""
    if not pattern.band:
        yield from _wholes(batch, blocks, pattern, extra, budget)
        return
    reach = pattern.behind + pattern.ahead
    # half the reach: two thirds of the scores in a tile are then in the band, and tiles are large enough for a product
    size = max(1, min(256, max(64, reach * pattern.block // 2)) // pattern.block)
    start = 0
    for dilation, run in groupby(pattern.dilation):
        heads = slice(start, start + len(list(run)))
        start = heads.stop
        for first in range(min(dilation, blocks)):
            lane = -(-(blocks - first) // dilation)
            step = min(size, lane)
            scores = (heads.stop - heads.start) * step * pattern.block * ((step + reach) * pattern.block + extra)
            rows = max(1, budget // scores)
            for b in range(0, batch, rows):
                for s in range(0, lane, step):
                    queries = slice(s, min(s + step, lane))
                    keys = slice(max(0, s - pattern.behind), min(lane, queries.stop + pattern.ahead))
                    yield Tile(slice(b, min(b + rows, batch)), heads, first, dilation, queries, keys)


def _wholes(batch: int, blocks: int, pattern: Pattern, extra: int, budget: int) -> Iterator[Tile]:
    """Tiles without keys of the band, as large as the budget allows: all heads, queries as in the sequence."""
    heads, scores = len(pattern.dilation), len(pattern.dilation) * pattern.block * max(extra, 1)
    step = max(1, min(blocks, budget // scores))
    rows = max(1, budget // (scores * step))
    for b in range(0, batch, rows):
        for s in range(0, blocks, step):
            queries = slice(s, min(s + step, blocks))
            yield Tile(slice(b, min(b + rows, batch)), slice(0, heads), 0, 1, queries, slice(s, s))


def band(tile: Tile, pattern: Pattern, device: torch.device) -> Tensor:
    """Which keys of the tile are in the band of which of its queries: (T, K) bool. Depends on its shape alone."""
    block = pattern.block
    i, j = (torch.arange(b.start * block, b.stop * block, device=device) for b in (tile.queries, tile.keys))
    d = j // block - (i // block).unsqueeze(1)
    near = (d >= -pattern.behind) & (d <= pattern.ahead)
    # a lane keeps the order of the sequence
    return near & (j <= i.unsqueeze(1)) if pattern.causal else near


def distinct(random_blocks: Tensor, pattern: Pattern) -> Tensor:
    """Where a random block adds keys: it exists, is not named before in its row, and is not in the band anyway."""
    named = random_blocks >= 0
    same = random_blocks.unsqueeze(-1) == random_blocks.unsqueeze(-2)
    named = named & ~same.tril(-1).any(-1)
    step = torch.tensor(pattern.dilation, device=random_blocks.device).view(-1, 1, 1)
    d = random_blocks - torch.arange(random_blocks.shape[1], device=random_blocks.device).view(-1, 1)
    return named & ~((d % step == 0) & (d >= -pattern.behind * step) & (d <= pattern.ahead * step))


def pairs(length: int, behind: int, ahead: int, dilation: Sequence[int], named: int, random: int, block: int) -> int:
    """Pairs of query and key of one sequence, over all heads, as if every token were real and no two parts of the
    pattern overlapped. named: rows and columns of global tokens; random: blocks per row of blocks."""
    total, blocks = 0, -(-length // block)
    for step in dilation:
        for first in range(min(step, blocks)):
            lane = -(-(blocks - first) // step)
            clipped = sum(side * (side + 1) // 2 for side in (min(behind, lane - 1), min(ahead, lane - 1)))
            total += lane * (1 + min(behind, lane - 1) + min(ahead, lane - 1)) - clipped
    return total * block * block + len(dilation) * length * (named + random * block)
