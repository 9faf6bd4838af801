"""The inputs of one call of band_attention, cut into tiles with the scores of their queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lra.kernels.band_attention.tiles import HIDDEN, Pattern, Tile, band, distinct, tiles

BUDGET = 1 << 20  # scores of a tile on a CPU: 4 MiB in float32


class Scored(NamedTuple):
    """One tile: n = b h rows, T queries, K keys of band and globals, R random keys for each block of queries."""

    q: Tensor  # (n, T, E), scaled
    k: Tensor  # (n, K, E)
    v: Tensor  # (n, K, V)
    far_k: Tensor | None  # (n T / block, R, E)
    far_v: Tensor | None
    scores: Tensor  # (n, T, K + R)


class Inputs:
    """The arguments of one call in the layout of the tiles."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None,
        random_blocks: Tensor | None, slopes: Tensor | None, pattern: Pattern, scale: float, seed: Tensor | None,
        dropout: float,
    ) -> None:  # fmt: skip
        self.batch, self.length, self.heads = q.shape[:3]
        self.pattern, self.scale, self.random_blocks, self.device = pattern, scale, random_blocks, q.device
        self.work = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        self.slopes = None if slopes is None else slopes.to(self.work).view(-1, 1, 1)
        self.budget = BUDGET if q.device.type == "cpu" else BUDGET << 5
        self.flat = q, k, v
        self.q, self.k, self.v = self.blocks(q), self.blocks(k), self.blocks(v)
        if random_blocks is not None:  # gathered block by block, several times each
            self.k, self.v = self.k.contiguous(), self.v.contiguous()
        seen = torch.ones(self.batch, self.length, dtype=torch.bool, device=q.device) if mask is None else mask
        self.seen, self.positions = seen, positions
        self.is_global = torch.zeros_like(seen)
        if positions is not None:
            # positions after the last global token are marked behind the end: nothing is read back from the device
            marked = seen.new_zeros(self.batch, self.length + 1)
            marked.scatter_(1, positions.masked_fill(positions < 0, self.length), True)
            self.is_global = marked[:, :-1]
            self.globals = positions.clamp(min=0)
            self.global_seen = (positions >= 0) & seen.gather(1, self.globals)
            self.global_k, self.global_v = (self.at_globals(x).transpose(1, 2) for x in (k, v))
        self.near = self.blocks((seen & ~self.is_global)[..., None, None])
        self.hides = mask is not None or positions is not None or self.length % pattern.block > 0
        self.last: tuple[tuple[int, ...], Tensor] | None = None
        self.extra = (0 if positions is None else positions.shape[1]) + (
            0 if random_blocks is None else random_blocks.shape[2] * pattern.block
        )
        self.use = None if random_blocks is None else distinct(random_blocks, pattern)
        self.dropout = dropout
        self.generator = None if seed is None else torch.Generator(q.device).manual_seed(int(seed))

    def kept(self, weights: Tensor) -> Tensor | None:
        """What dropout multiplies these weights by: 0 or 1 / (1 - dropout); None without dropout. The backward pass
        asks in the order of the forward pass, and so draws the same."""
        if self.generator is None:
            return None
        share = 1 - self.dropout
        mask = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
        return mask.bernoulli_(share, generator=self.generator).div_(share)

    def blocks(self, x: Tensor) -> Tensor:
        """(B, L, H, E) -> (B, H, blocks, block, E), zeros after the end."""
        missing = -self.length % self.pattern.block
        x = pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return x.transpose(1, 2).unflatten(2, (-1, self.pattern.block))

    def zeros(self, size: int) -> Tensor:
        """(B, L, H, size) in the working precision, L rounded up to whole blocks."""
        length = self.length + -self.length % self.pattern.block
        return torch.zeros(self.batch, length, self.heads, size, dtype=self.work, device=self.device)

    def at_globals(self, x: Tensor) -> Tensor:
        """(B, L, H, E) -> (B, G, H, E)."""
        return x[torch.arange(self.batch, device=self.device).unsqueeze(1), self.globals].to(self.work)

    def rows(self, view: Tensor) -> Tensor:
        """(b, h, n, block, E) -> (b h, n block, E) in the working precision."""
        return view.reshape(view.shape[0] * view.shape[1], -1, view.shape[-1]).to(self.work)

    def tiles(self) -> Iterator[Tile]:
        return tiles(self.batch, self.q.shape[2], self.pattern, self.extra, self.budget)

    def band_bias(self, tile: Tile) -> Tensor:
        """(1, 1 or h, T, K). Tiles far from both ends are alike: the last one is kept."""
        start = tile.queries.start
        heads = () if self.slopes is None else (tile.dilation, tile.heads.start)
        shape = tile.queries.stop - start, tile.keys.start - start, tile.keys.stop - start, *heads
        if self.last is None or self.last[0] != shape:
            bias = self.bias(band(tile, self.pattern, self.device))
            i, j = (tile.places(b, self.pattern.block, self.device) for b in (tile.queries, tile.keys))
            self.last = shape, self.fading(bias[None], i.unsqueeze(1) - j, tile.heads)[None]
        return self.last[1]

    def fading(self, bias: Tensor, distance: Tensor, heads: slice) -> Tensor:
        """bias - slope |distance|, both (..., 1, T, K) -> (..., h, T, K); `bias` itself without slopes."""
        return bias if self.slopes is None else bias - self.slopes[heads] * distance.abs()

    def bias(self, seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=self.work, device=self.device).masked_fill_(~seen, HIDDEN)

    def score(self, tile: Tile) -> Scored:
        q = self.rows(tile.cut(self.q, tile.queries)) * self.scale
        k, v = (self.rows(tile.cut(x, tile.keys)) for x in (self.k, self.v))
        bias = self.band_bias(tile)
        if self.hides:
            near = self.near[tile.batch, :, tile.first :: tile.dilation][:, :, tile.keys].flatten(2)
            bias = bias + self.bias(near).unsqueeze(2)
        if self.positions is not None:
            at = self.globals[tile.batch, None, None]
            known = self.global_seen[tile.batch, None, None]
            i = tile.places(tile.queries, self.pattern.block, self.device).unsqueeze(1)
            if self.pattern.causal:
                known = known & (at <= i)
            named = self.fading(self.bias(known), i - at, tile.heads).expand(-1, -1, q.shape[1], -1)
            rows, heads = max(len(bias), len(named)), max(bias.shape[1], named.shape[1])
            bias = torch.cat([t.expand(rows, heads, -1, -1) for t in (bias, named)], dim=-1)
            k, v = (
                torch.cat([x, g[tile.batch, tile.heads].flatten(0, 1)], dim=1)
                for x, g in ((k, self.global_k), (v, self.global_v))
            )
        shape = (tile.batch.stop - tile.batch.start, tile.heads.stop - tile.heads.start, -1, -1)
        scores = bias.expand(shape).clone(memory_format=torch.contiguous_format).flatten(0, 1).baddbmm_(q, k.mT)
        if self.random_blocks is None:
            return Scored(q, k, v, None, None, scores)
        far_k, far_v, far_bias = self.far(tile)
        far = torch.bmm(q.reshape(len(far_k), self.pattern.block, -1), far_k.mT)
        far += far_bias
        return Scored(q, k, v, far_k, far_v, torch.cat([scores, far.reshape(*q.shape[:2], -1)], dim=-1))

    def far_index(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the random blocks of a tile into (B, H, blocks): heads (h, 1, 1), blocks (h, n, r); whether used."""
        assert self.random_blocks is not None
        assert self.use is not None
        rows = tile.numbers(tile.queries, self.device)
        heads = torch.arange(tile.heads.start, tile.heads.stop, device=self.device)
        chosen = self.random_blocks[tile.heads][:, rows]
        return heads[:, None, None], chosen.clamp(min=0), self.use[tile.heads][:, rows]

    def far(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (n T / block, R, .) of the random blocks, and their bias (n T / block, block, R)."""
        heads, chosen, use = self.far_index(tile)
        block, rows = self.pattern.block, tile.batch.stop - tile.batch.start
        k, v = (x[tile.batch][:, heads, chosen].to(self.work) for x in (self.k, self.v))
        near = self.near[tile.batch, 0, :, :, 0][:, chosen]
        seen = (near & use[None, ..., None]).flatten(3).unsqueeze(-2).expand(-1, -1, -1, block, -1)
        inside = torch.arange(block, device=self.device)
        j = (chosen.unsqueeze(-1) * block + inside).flatten(2).unsqueeze(-2)
        i = tile.places(tile.queries, block, self.device).view(1, -1, block, 1)
        if self.pattern.causal:
            seen = seen & (j <= i)
        bias = self.bias(seen)
        if self.slopes is not None:
            bias = bias - self.slopes[tile.heads].unsqueeze(-1) * (i - j).abs()
        count = rows * chosen.shape[0] * chosen.shape[1]
        k, v = (x.reshape(count, -1, x.shape[-1]) for x in (k, v))
        return k, v, bias.reshape(count, block, -1)

    def every_key(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries of the global tokens (n, G, E), scaled, all keys and values (n, L, .), and their scores (n, G, L)."""
        q, k, v = (x[rows].transpose(1, 2) for x in self.flat)
        q = q.gather(2, self.globals[rows, None, :, None].expand(-1, self.heads, -1, q.shape[-1]))
        q, k, v = (x.flatten(0, 1).to(self.work) for x in (q * self.scale, k, v))
        seen = self.seen[rows, None, None].expand(-1, 1, self.globals.shape[1], -1)
        ahead = torch.arange(self.length, device=self.device) - self.globals[rows, None, :, None]
        if self.pattern.causal:
            seen = seen & (ahead <= 0)
        bias = self.fading(self.bias(seen), ahead, slice(None)).expand(-1, self.heads, -1, -1)
        bias = bias.clone(memory_format=torch.contiguous_format)
        return q, k, v, bias.flatten(0, 1).baddbmm_(q, k.mT)

    def global_rows(self) -> Iterator[slice]:
        step = max(1, self.budget // (self.heads * self.globals.shape[1] * self.length))
        return (slice(b, min(b + step, self.batch)) for b in range(0, self.batch, step))
