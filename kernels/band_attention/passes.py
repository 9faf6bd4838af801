"""Forward and backward of band_attention over its tiles, and over the rows of global tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lra.kernels.band_attention.scores import Inputs
from lra.kernels.band_attention.tiles import HIDDEN


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
        weights = _times(weights, x.kept(weights))
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
        weights = _times(weights, x.kept(weights))
        o = torch.bmm(weights, v).masked_fill_(empty, 0)
        b, g = (x.positions[rows] >= 0).nonzero(as_tuple=True)
        at = x.globals[rows][b, g]
        for target, value in ((out, o), (lse, log_sum)):
            target[rows][b, at] = value.unflatten(0, (-1, x.heads)).transpose(1, 2)[b, g]


def _times(weights: Tensor, kept: Tensor | None) -> Tensor:
    return weights if kept is None else weights.mul_(kept)


def _score_gradient(weights: Tensor, delta: Tensor, dweights: Tensor) -> Tensor:
    """d loss / d score = weights (d loss / d weights - delta), in place of dweights."""
    return dweights.sub_(delta).mul_(weights)


def backward(x: Inputs, dout: Tensor, lse: Tensor, delta: Tensor, grads: tuple[Tensor, ...]) -> None:
    """Add to `grads` of q, k and v. dout: (B, L', H, V), zero in the rows of global tokens; delta: dout . out."""
    block = x.pattern.block
    split = [t.transpose(1, 2).unflatten(2, (-1, block)) for t in (dout, lse, delta, *grads)]
    dout, lse, delta, dq, dk, dv = split
    shared = [None, None] if x.positions is None else [torch.zeros_like(t) for t in (x.global_k, x.global_v)]
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
        kept = x.kept(weights)
        dscores = _score_gradient(weights, d, _times(dweights, kept))
        weights = _times(weights, kept)
        tile_dq = torch.bmm(dscores[..., :keys], s.k)
        if s.far_k is not None:
            far_w, far_s = (t[..., keys:].reshape(len(s.far_k), block, -1) for t in (weights, dscores))
            tile_dq += torch.bmm(far_s, s.far_k).reshape(tile_dq.shape)
            heads, chosen, _ = x.far_index(tile)
            index = (torch.arange(x.batch, device=x.device)[tile.batch, None, None, None], heads, chosen)
            for target, weight, rows in ((dk, far_s, s.q), (dv, far_w, g)):
                value = torch.bmm(weight.mT, rows.reshape(len(weight), block, -1))
                target.index_put_(index, value.reshape(-1, *chosen.shape, *target.shape[3:]), accumulate=True)
        share = tile.cut(dq, tile.queries)
        share += tile_dq.mul_(x.scale).reshape(share.shape)
        for target, weight, rows, total in ((dk, dscores, s.q, shared[0]), (dv, weights, g, shared[1])):
            value = torch.bmm(weight[..., :keys].mT, rows)
            share = tile.cut(target, tile.keys)
            share += value[:, : share.shape[2] * block].reshape(share.shape)
            if total is not None:
                part = total[tile.batch, tile.heads]
                part += value[:, keys - part.shape[2] :].reshape(part.shape)
    for target, total in zip(grads[1:], shared, strict=True):
        if total is not None:
            _add_at_globals(x, target, total.transpose(1, 2), slice(None))


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
        kept = x.kept(weights)
        dscores = _score_gradient(weights, d, _times(torch.bmm(g, v.mT), kept))
        weights = _times(weights, kept)
        back = [torch.bmm(dscores, k).mul_(x.scale), torch.bmm(dscores.mT, q), torch.bmm(weights.mT, g)]
        rows_dq, all_dk, all_dv = (t.unflatten(0, (-1, x.heads)).transpose(1, 2) for t in back)
        _add_at_globals(x, dq, rows_dq, rows)
        dk[rows, : x.length] += all_dk
        dv[rows, : x.length] += all_dv
