"""Shared by layers around a delta rule, and the rule with a decay for each channel of the keys in plain PyTorch:

    S' = diag(exp(g_t)) S_{t-1},   S_t = S' + b_t (e_t - S'^T a_t)^T + k_t v_t^T,   o_t = S_t^T q_t

Kimi Delta Attention has a = k, b = beta k, e = v and nothing added; RWKV-7 has e = 0 and an addition of its own. Inside
a chunk that finds the state S, with P_i the decay through step i and <x_i, y_j> = sum_c x_ic exp(g_{j+1} + .. + g_i)_c
y_jc, the errors E that the chunk writes solve

    (I + T) E = e - M v - (P a) S,      T_ij = <a_i, b_j>,  M_ij = <a_i, k_j>  for j < i, 0 elsewhere.

One triangular solve serves all chunks at once; only E and S go from chunk to chunk. Sums of log decays are formed block
by block and are never positive, so that no decay, however fast, overflows. PyTorch differentiates all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._precision import wide
from lra.architectures._ssm import initial_log_dt
from lra.encoder import Cost
from lra.kernels.decay_attention.chunks import chunk_size
from lra.kernels.decay_attention.decays import PerChannel, first, second

CHUNK = 32
EPS = 1e-6


class Addition(NamedTuple):
    """What a token adds to the state beside its correction: k (B, L, H, K), v (B, L, H, V)."""

    k: Tensor
    v: Tensor


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension."""
    return (wide(x) * torch.rsqrt(wide(x).square().sum(-1, keepdim=True) + EPS)).to(x.dtype)


def advance(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None, S: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`, with one decay for a head: q, k: (B, H, K); v: (B, H, V); beta, log_alpha: (B, H);
    S: (B, H, K, V) -> o: (B, H, V), S. scale: K^-0.5 unless given."""
    if log_alpha is not None:
        S = log_alpha.exp()[..., None, None] * S
    error = v - torch.einsum("bhkv,bhk->bhv", S, k)
    S = S + k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", S, q) * (k.shape[-1] ** -0.5 if scale is None else scale), S


def mamba_decay(n_heads: int, channels: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log: (n_heads,) and dt_bias: (channels,) as Mamba-2 starts them: exp(A_log) uniform in (0, 16], the step at 0
    uniform in the logarithm between 0.001 and 0.1."""
    dt = initial_log_dt(channels, 0.001, 0.1).exp()
    inverse_softplus = dt + torch.log(-torch.expm1(-dt))
    return nn.Parameter((16 * (1 - torch.rand(n_heads))).log()), nn.Parameter(inverse_softplus)


def decayed_scores(rows: Tensor, columns: Tensor, decay: PerChannel) -> Tensor:
    """<x_i, y_j> for j <= i, 0 above the diagonal: (R, ..., C, K), (Q, ..., C, K) -> (R, Q, ..., C, C)."""
    rows, columns = rows.unsqueeze(1), columns.unsqueeze(0)
    blocks = (rows * columns).sum(-1)[..., None, None]
    for size, since, until in decay.levels:
        late, early = second(rows, size) * second(since, size).exp(), first(columns, size) * first(until, size).exp()
        above, below = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        left, right = torch.cat([above, late @ early.mT], -2), torch.cat([torch.zeros_like(below), below], -2)
        blocks = torch.cat([left, right], -1)
    return blocks.squeeze(-3)


def channel_delta(
    q: Tensor, a: Tensor, b: Tensor, e: Tensor | None, log_decay: Tensor, added: Addition | None = None
) -> Tensor:
    """o: (B, L, H, V) from q, a, b, log_decay: (B, L, H, K), e: (B, L, H, V) or None for 0; S_0 = 0. In float32, or
    float64 where q has it."""
    v = e if added is None else added.v
    assert v is not None
    length, size = q.shape[1], chunk_size(CHUNK, q.shape[1])

    def cut(x: Tensor) -> Tensor:
        x = F.pad(wide(x), (0, 0, 0, 0, 0, -length % size))
        return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)

    with torch.autocast(q.device.type, enabled=False):
        q, a, b, v, g = (cut(x) for x in (q, a, b, v, log_decay))
        decay, ones = PerChannel(g), torch.ones(size, size, dtype=q.dtype, device=q.device)
        k = None if added is None else cut(added.k)
        scores = decayed_scores(torch.stack([a, q]), torch.stack([b] if k is None else [b, k]), decay)
        system, read = scores[0, 0] * ones.tril(-1), scores[1, 0]
        own = v if k is None else -(scores[0, 1] * ones.tril(-1)) @ v
        right = torch.cat([own, a * decay.since], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        own, seen = solved.split([v.shape[-1], a.shape[-1]], -1)
        kept, through = (b * decay.until).mT, decay.since[..., -1, :].unsqueeze(-1)
        new = None if k is None else (k * decay.until).mT @ v
        state, found, errors = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), [], []
        for c in range(q.shape[2]):
            error = own[:, :, c] - seen[:, :, c] @ state
            found.append(state)
            errors.append(error)
            state = through[:, :, c] * state + kept[:, :, c] @ error
            if new is not None:
                state = state + new[:, :, c]
        o = (q * decay.since) @ torch.stack(found, 2) + read @ torch.stack(errors, 2)
        if k is not None:
            o = o + scores[1, 1] @ v
        return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def channel_delta_step(
    q: Tensor, a: Tensor, b: Tensor, e: Tensor | None, log_decay: Tensor, S: Tensor, added: Addition | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `channel_delta`, of whose tensors it takes what a single token has: o (B, H, V), S (B, H, K, V)."""
    S = log_decay.exp().unsqueeze(-1) * S
    error = -torch.einsum("bhkv,bhk->bhv", S, a)
    if e is not None:
        error = error + e
    S = S + b.unsqueeze(-1) * error.unsqueeze(-2)
    if added is not None:
        S = S + added.k.unsqueeze(-1) * added.v.unsqueeze(-2)
    return torch.einsum("bhkv,bhk->bhv", S, q), S


def channel_delta_cost(length: int, heads: int, keys: int, values: int, adds: bool) -> Cost:
    """Work of `channel_delta`; keys, values: widths of one head."""
    size = chunk_size(CHUNK, length)
    chunks = -(-length // size) * heads
    pairs, squares, states = (4, 3, 4) if adds else (2, 1, 3)
    products = pairs * size * (size - 1) * keys + 2.0 * size * (squares * size * values + states * keys * values)
    return Cost(chunks * products, chunks * size * (size * (keys + values) + 40.0 * (keys + values)))
