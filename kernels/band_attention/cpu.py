"""band_attention in plain torch on any device: per tile of queries one product with the stretch of keys it can see.

Forward and backward form a tile's scores anew; nothing wider than a tile is laid out. On a GPU the band itself can be
left to the Triton kernels of gpu.py; global and random keys join it by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from lra.kernels.band_attention.tiles import HIDDEN, Pattern, Tile, band, distinct, tiles

BUDGET = 1 << 21  # scores of a tile: 8 MiB in float32


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
        random_blocks: Tensor | None, pattern: Pattern, scale: float,
    ) -> None:  # fmt: skip
        self.batch, self.length, self.heads = q.shape[:3]
        self.pattern, self.scale, self.random_blocks, self.device = pattern, scale, random_blocks, q.device
        self.work = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        self.flat = q, k, v
        self.q, self.k, self.v = self.blocks(q), self.blocks(k), self.blocks(v)
        seen = torch.ones(self.batch, self.length, dtype=torch.bool, device=q.device) if mask is None else mask
        self.seen, self.positions = seen, positions
        self.is_global = torch.zeros_like(seen)
        if positions is not None:
            rows, columns = (positions >= 0).nonzero(as_tuple=True)
            self.is_global[rows, positions[rows, columns]] = True
            self.globals = positions.clamp(min=0)
            self.global_seen = (positions >= 0) & seen.gather(1, self.globals)
            self.global_k, self.global_v = (self.at_globals(x).transpose(1, 2) for x in (k, v))
        self.near = self.blocks((seen & ~self.is_global)[..., None, None])
        self.hides = mask is not None or positions is not None or self.length % pattern.block > 0
        self.last: tuple[tuple[int, int, int], Tensor] | None = None
        self.extra = (0 if positions is None else positions.shape[1]) + (
            0 if random_blocks is None else random_blocks.shape[2] * pattern.block
        )
        self.use = None if random_blocks is None else distinct(random_blocks, pattern)

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
        return tiles(self.batch, self.q.shape[2], self.pattern, self.extra, BUDGET)

    def band_bias(self, tile: Tile) -> Tensor:
        """(b or 1, 1, T, K). Tiles far from both ends are alike: the last one is kept."""
        shape = (tile.queries.stop - tile.queries.start, tile.keys.start - tile.queries.start, tile.keys.stop - tile.queries.start)
        if self.last is None or self.last[0] != shape:
            self.last = shape, self.bias(band(tile, self.pattern, self.device))[None, None]
        return self.last[1]

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
            if self.pattern.causal:
                known = known & (at <= tile.places(tile.queries, self.pattern.block, self.device).unsqueeze(1))
            bias = torch.cat([bias, self.bias(known).expand(-1, 1, q.shape[1], -1)], dim=-1)
            k, v = (
                torch.cat([x, g[tile.batch, tile.heads].flatten(0, 1)], dim=1)
                for x, g in ((k, self.global_k), (v, self.global_v))
            )
        shape = (tile.batch.stop - tile.batch.start, tile.heads.stop - tile.heads.start, -1, -1)
        scores = bias.expand(shape).clone(memory_format=torch.contiguous_format).flatten(0, 1).baddbmm_(q, k.mT)
        if self.random_blocks is None:
            return Scored(q, k, v, None, None, scores)
        far_k, far_v, far_seen = self.far(tile)
        far = torch.bmm(q.reshape(len(far_k), self.pattern.block, -1), far_k.mT)
        far += self.bias(far_seen)
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
        """Keys and values (n T / block, R, .) of the random blocks, and who sees them (n T / block, block, R)."""
        heads, chosen, use = self.far_index(tile)
        block, rows = self.pattern.block, tile.batch.stop - tile.batch.start
        k, v = (x[tile.batch][:, heads, chosen].to(self.work) for x in (self.k, self.v))
        near = self.near[tile.batch, 0, :, :, 0][:, chosen]
        seen = (near & use[None, ..., None]).flatten(3).unsqueeze(-2).expand(-1, -1, -1, block, -1)
        if self.pattern.causal:
            inside = torch.arange(block, device=self.device)
            j = (chosen.unsqueeze(-1) * block + inside).flatten(2).unsqueeze(-2)
            i = tile.places(tile.queries, block, self.device).view(1, -1, block, 1)
            seen = seen & (j <= i)
        count = rows * chosen.shape[0] * chosen.shape[1]
        k, v = (x.reshape(count, -1, x.shape[-1]) for x in (k, v))
        return k, v, seen.reshape(count, block, -1)

    def every_key(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries of the global tokens (n, G, E), scaled, all keys and values (n, L, .), and their scores (n, G, L)."""
        q, k, v = (x[rows].transpose(1, 2) for x in self.flat)
        q = q.gather(2, self.globals[rows, None, :, None].expand(-1, self.heads, -1, q.shape[-1]))
        q, k, v = (x.flatten(0, 1).to(self.work) for x in (q * self.scale, k, v))
        seen = self.seen[rows, None, None].expand(-1, 1, self.globals.shape[1], -1)
        if self.pattern.causal:
            position = torch.arange(self.length, device=self.device)
            seen = seen & (position <= self.globals[rows, None, :, None])
        bias = self.bias(seen).expand(-1, self.heads, -1, -1).clone(memory_format=torch.contiguous_format)
        return q, k, v, bias.flatten(0, 1).baddbmm_(q, k.mT)

    def global_rows(self) -> Iterator[slice]:
        step = max(1, BUDGET // (self.heads * self.globals.shape[1] * self.length))
        return (slice(b, min(b + step, self.batch)) for b in range(0, self.batch, step))


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, log-sum-exp (HIDDEN in rows that see nothing) and those rows, both (n, T, 1)."""
    top = scores.amax(-1, keepdim=True)
    weights = scores.softmax(-1)
    empty = top < HIDDEN / 2
    return weights, (top - weights.amax(-1, keepdim=True).log()).masked_fill_(empty, HIDDEN), empty


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output (B, L', H, V) and log-sum-exp (B, L', H, 1), global queries not yet attended to."""
    out, lse = x.zeros(x.v.shape[-1]), x.zeros(1)
    out_blocks, lse_blocks = (t.transpose(1, 2).unflatten(2, (-1, x.pattern.block)) for t in (out, lse))
    for tile in x.tiles():
        s = x.score(tile)
        weights, log_sum, empty = _softmax(s.scores)
        keys = s.k.shape[1]
        o = torch.bmm(weights[..., :keys], s.v)
        if s.far_v is not None:
            o += torch.bmm(weights[..., keys:].reshape(len(s.far_v), x.pattern.block, -1), s.far_v).reshape(o.shape)
        share = tile.cut(out_blocks, tile.queries)
        share.copy_(o.masked_fill_(empty, 0).reshape(share.shape))
        share = tile.cut(lse_blocks, tile.queries)
        share.copy_(log_sum.reshape(share.shape))
    return out, lse


def global_forward(x: Inputs, out: Tensor, lse: Tensor) -> None:
    """Overwrite the rows of the global tokens, which see every key."""
    assert x.positions is not None
    for rows in x.global_rows():
        _, _, v, scores = x.every_key(rows)
        weights, log_sum, empty = _softmax(scores)
        o = torch.bmm(weights, v).masked_fill_(empty, 0)
        b, g = (x.positions[rows] >= 0).nonzero(as_tuple=True)
        at = x.globals[rows][b, g]
        for target, value in ((out, o), (lse, log_sum)):
            target[rows][b, at] = value.unflatten(0, (-1, x.heads)).transpose(1, 2)[b, g]


def _score_gradient(weights: Tensor, delta: Tensor, dweights: Tensor) -> Tensor:
    """d loss / d score = weights (d loss / d weights - delta), in place of dweights."""
    return dweights.sub_(delta).mul_(weights)


def backward(x: Inputs, dout: Tensor, lse: Tensor, delta: Tensor, grads: tuple[Tensor, ...]) -> None:
    """Add to `grads` of q, k and v. dout: (B, L', H, V), zero in the rows of global tokens; delta: dout . out."""
    block = x.pattern.block
    split = [t.transpose(1, 2).unflatten(2, (-1, block)) for t in (dout, lse, delta, *grads)]
    dout, lse, delta, dq, dk, dv = split
    if x.positions is not None:
        global_dk, global_dv = torch.zeros_like(x.global_k), torch.zeros_like(x.global_v)
    for tile in x.tiles():
        s = x.score(tile)
        g, log_sum, d = (x.rows(tile.cut(t, tile.queries)) for t in (dout, lse, delta))
        keys = s.k.shape[1]
        dweights = torch.bmm(g, s.v.mT)
        if s.far_v is not None:
            far = torch.bmm(g.reshape(len(s.far_v), block, -1), s.far_v.mT)
            dweights = torch.cat([dweights, far.reshape(*g.shape[:2], -1)], dim=-1)
        # scores of the whole row, or of what another kernel left; exp of hidden scores is slow on a CPU, softmax is not
        weights = s.scores.softmax(-1) if x.pattern.band else s.scores.sub_(log_sum).exp_()
        dscores = _score_gradient(weights, d, dweights)
        tile_dq = torch.bmm(dscores[..., :keys], s.k)
        tile_dk, tile_dv = torch.bmm(dscores[..., :keys].mT, s.q), torch.bmm(weights[..., :keys].mT, g)
        if s.far_k is not None:
            heads, chosen, _ = x.far_index(tile)
            near_w, near_s = (t[..., keys:].reshape(len(s.far_k), block, -1) for t in (weights, dscores))
            tile_dq += torch.bmm(near_s, s.far_k).reshape(tile_dq.shape)
            index = (torch.arange(x.batch, device=x.device)[tile.batch, None, None, None], heads, chosen)
            for target, value in (
                (dk, torch.bmm(near_s.mT, s.q.reshape(len(s.far_k), block, -1))),
                (dv, torch.bmm(near_w.mT, g.reshape(len(s.far_k), block, -1))),
            ):
                shape = (index[0].shape[0], *chosen.shape, *target.shape[3:])
                target.index_put_(index, value.reshape(shape), accumulate=True)
        share = tile.cut(dq, tile.queries)
        share += tile_dq.mul_(x.scale).reshape(share.shape)
        for target, value, apart in ((dk, tile_dk, "global_dk"), (dv, tile_dv, "global_dv")):
            share = tile.cut(target, tile.keys)
            stretch = share.shape[2] * block
            share += value[:, :stretch].reshape(share.shape)
            if x.positions is not None:
                total = (global_dk if apart == "global_dk" else global_dv)[tile.batch, tile.heads]
                total += value[:, stretch:].reshape(total.shape)
    if x.positions is not None:
        _add_at_globals(x, grads[1], global_dk.transpose(1, 2), slice(None))
        _add_at_globals(x, grads[2], global_dv.transpose(1, 2), slice(None))


def _add_at_globals(x: Inputs, target: Tensor, value: Tensor, rows: slice) -> None:
    """target[:, positions] += value: (B, L', H, E), (b, G, H, E)."""
    assert x.positions is not None
    b, g = (x.positions[rows] >= 0).nonzero(as_tuple=True)
    target[rows][b, x.globals[rows][b, g]] += value[b, g]


def global_backward(x: Inputs, dout: Tensor, delta: Tensor, grads: tuple[Tensor, ...]) -> None:
    """Add the share of the rows of global tokens."""
    dq, dk, dv = grads
    assert x.positions is not None
    for rows in x.global_rows():
        q, k, v, scores = x.every_key(rows)
        each = x.globals[rows, :, None, None]
        real = (x.positions[rows] >= 0)[:, :, None, None]
        g, d = (
            (t[rows].gather(1, each.expand(-1, -1, x.heads, t.shape[-1])) * real).transpose(1, 2).flatten(0, 1)
            for t in (dout, delta)
        )
        weights = scores.softmax(-1)
        dscores = _score_gradient(weights, d, torch.bmm(g, v.mT))
        back = [torch.bmm(dscores, k).mul_(x.scale), torch.bmm(dscores.mT, q), torch.bmm(weights.mT, g)]
        rows_dq, all_dk, all_dv = (t.unflatten(0, (-1, x.heads)).transpose(1, 2) for t in back)
        _add_at_globals(x, dq, rows_dq, rows)
        dk[rows, : x.length] += all_dk
        dv[rows, : x.length] += all_dv


@torch.library.custom_op("lra::band_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None, random_blocks: Tensor | None,
    behind: int, ahead: int, dilation: Sequence[int], block: int, causal: bool, scale: float, gpu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, L, H, V) and log-sum-exp (B, L, H, 1) of the scores. positions: (B, G), -1 after the last."""
    pattern = Pattern(behind, ahead, dilation, block, causal, band=not gpu)
    x = Inputs(q, k, v, mask, positions, random_blocks, pattern, scale)
    out, lse = forward(x)
    if positions is not None:
        global_forward(x, out, lse)
    return out[:, : x.length].to(q.dtype).contiguous(), lse[:, : x.length].contiguous()


@torch.library.custom_op("lra::band_attention_backward", mutates_args=())
def attend_backward(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    positions: Tensor | None, random_blocks: Tensor | None, behind: int, ahead: int, dilation: Sequence[int],
    block: int, causal: bool, scale: float, gpu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pattern = Pattern(behind, ahead, dilation, block, causal, band=not gpu)
    x = Inputs(q, k, v, mask, positions, random_blocks, pattern, scale)
    # rows that see nothing stand still; the log-sum-exp that makes exp(score - lse) 0 in them
    empty = lse < HIDDEN / 2
    dout, lse = dout.to(x.work).masked_fill(empty, 0), lse.masked_fill(empty, -HIDDEN)
    delta = (dout * out.to(x.work)).sum(-1, keepdim=True)
    missing = -x.length % block
    dout, lse, delta = (pad(t, (0, 0, 0, 0, 0, missing)) if missing else t for t in (dout, lse, delta))
    grads = tuple(x.zeros(t.shape[-1]) for t in (q, k, v))
    if positions is None:
        backward(x, dout, lse, delta, grads)
    else:
        chosen = pad(x.is_global, (0, missing))[..., None, None]
        backward(x, dout.masked_fill(chosen, 0), lse, delta.masked_fill(chosen, 0), grads)
        global_backward(x, dout, delta, grads)
    dq, dk, dv = (g[:, : x.length].to(t.dtype).contiguous() for g, t in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    work = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(*q.shape[:3], 1, dtype=work)


@attend_backward.register_fake
def _(
    dout: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    out, lse, *inputs = ctx.saved_tensors
    return *attend_backward(dout, out, lse, *inputs, *ctx.options), *[None] * 10


attend.register_autograd(_backward, setup_context=_setup)


def _pairs(q: Any, positions: Any, random_blocks: Any, behind: int, ahead: int, dilation: Any, block: int) -> int:
    """Pairs of query and key inside the pattern, as if every token were real and no two of its parts overlapped."""
    batch, length, _, _ = q
    total, blocks = 0, -(-length // block)
    for step in dilation:
        for first in range(min(step, blocks)):
            lane = -(-(blocks - first) // step)
            clipped = sum(side * (side + 1) // 2 for side in (min(behind, lane - 1), min(ahead, lane - 1)))
            total += lane * (1 + min(behind, lane - 1) + min(ahead, lane - 1)) - clipped
    total *= block * block
    if positions is not None:
        total += 2 * positions[1] * length * len(dilation)
    if random_blocks is not None:
        total += random_blocks[0] * length * random_blocks[2] * block
    return batch * total


@register_flop_formula(torch.ops.lra.band_attention)
def _flops(
    q: Any, k: Any, v: Any, mask: Any, positions: Any, random_blocks: Any, behind: int, ahead: int, dilation: Any,
    block: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * (q[-1] + v[-1]) * _pairs(q, positions, random_blocks, behind, ahead, dilation, block)


@register_flop_formula(torch.ops.lra.band_attention_backward)
def _flops_backward(
    dout: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, mask: Any, positions: Any, random_blocks: Any, behind: int,
    ahead: int, dilation: Any, block: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Scores again, then the gradients of weights, q, k and v."""
    pairs = _pairs(q, positions, random_blocks, behind, ahead, dilation, block)
    return 2 * (3 * q[-1] + 2 * v[-1]) * pairs
