"""PaTH attention: softmax attention with products of Householder matrices of the tokens between as positions.

Yang, Shen, Wen, Tan, Mishra, Ren, Panda and Kim 2025, arXiv:2505.16381. With H heads of width K = D / H:

    q, k, v = W_q x, W_k x, W_v x                          (B, L, H, K) each
    w = u / |u|,   u = silu(conv(W_2 W_1 x))               (B, L, H, K)   W_1: (R, D); conv: depthwise, causal
    beta = 2 sigmoid(W_b x + b_b)                          (B, L, H)
    P_ij = (I - beta_i w_i w_i^T) .. (I - beta_{j+1} w_{j+1} w_{j+1}^T)       P_ii = I
    o_i = sum over j <= i of softmax_j(q_i^T P_ij k_j / sqrt(K)) v_j
    forget: g = log sigmoid(W_g x + b_g), (B, L, H); g_{j+1} + .. + g_i is added to the logit of (i, j)
    out = W_o o                                            (B, L, D)

As beta reaches 2 a factor can reflect, and the product can track a state, where a rotary position turns by an angle
that the distance alone sets. In chunks of C tokens, a triangular solve (the WY form) carries queries to the start of
their chunk, keys to the end of theirs, and gives the product M of each chunk; then queries walk back over the chunks,
through one M a chunk, and meet the keys of each: L^2 K + L^2 K^2 / C work, and all L^2 logits in memory.

Most of the time goes to copies between the chunks: an operator would keep a query's walk over them in the cache.

A recurrent step turns every key that came before by the new factor; keys, values and sums of gates are the state.

Initialisation: maps and taps are PyTorch's own, as released.

Departures: none known in the mixer. The released code multiplies the sums of forget gates by 1 / sqrt(K) as it does the
logits; the Forgetting Transformer, from which they come, and this file do not. R = 32 and three taps, as released. Four
heads by default. A block has a SwiGLU part of width 8/3 D, with biases, and RMS norm.

Checked against: tensors of flash-linear-attention's definition with and without forget gates, every gradient; the layer
with its products written out; its own steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._delta import unit
from lra.architectures._precision import wide
from lra.architectures._stack import Block, Stack
from lra.architectures._window import ShortConvolution
from lra.encoder import Card, Cost, Mixer
from lra.kernels.decay_attention.chunks import chunk_size

State = tuple[Tensor, Tensor, Tensor, Tensor]
CHUNK = 64


def path_logits(q: Tensor, k: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """q_i^T P_ij k_j for j <= i; without meaning above the diagonal. q, k, w: (B, H, n, C, K); beta: (B, H, n, C, 1) ->
    (B, H, n C, n C)."""
    chunks, size = q.shape[2:4]
    ones = torch.ones(size, size, dtype=q.dtype, device=q.device)
    system = beta * (w @ w.mT) * ones.tril(-1)
    right = torch.cat([beta * (w @ k.mT) * ones.tril(-1), beta * w], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    # errors, (C, C): one column a key; the product of a chunk is I - w^T weights
    errors, weights = solved.split([size, w.shape[-1]], -1)
    seen = (q @ w.mT) * ones.tril()
    inside = q @ k.mT - seen @ errors
    start, end = q - seen @ weights, k - errors.mT @ w
    through = torch.eye(w.shape[-1], dtype=q.dtype, device=q.device) - w.mT @ weights
    rows = []
    for back in range(1, chunks):
        rows.append(start[:, :, 1:] @ end[:, :, : chunks - back].mT)
        start = start[:, :, 1:]
        if back < chunks - 1:
            start = torch.cat([start[:, :, :1], start[:, :, 1:] @ through[:, :, 1 : chunks - back]], 2)
    logits = q.new_zeros(*q.shape[:2], chunks, chunks, size, size)
    place = torch.arange(chunks, device=q.device)
    logits[:, :, place, place] = inside
    for back, row in enumerate(rows, 1):
        logits[:, :, place[back:], place[:-back]] = row
    return logits.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def path_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor, beta: Tensor, log_gate: Tensor | None = None) -> Tensor:
    """o of the equations: q, k, v, w: (B, L, H, K); beta, log_gate: (B, L, H) -> (B, L, H, K)."""
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    size = chunk_size(CHUNK, length)

    def cut(x: Tensor) -> Tensor:
        x = F.pad(wide(x), (0, 0, 0, 0, 0, -length % size))
        return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)

    with torch.autocast(q.device.type, enabled=False):
        logits = path_logits(*(cut(x) for x in (q, k, w, beta.unsqueeze(-1))))[..., :length, :length] * scale
        if log_gate is not None:
            total = wide(log_gate).transpose(1, 2).cumsum(-1)
            logits = logits + (total.unsqueeze(-1) - total.unsqueeze(-2))
        ahead = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = logits.masked_fill(ahead, -torch.inf).softmax(-1)
        return (weights @ wide(v).transpose(1, 2)).transpose(1, 2)


class PathMixer(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, n_heads: int, *, rank: int, d_conv: int, forget: bool) -> None:
        super().__init__()
        self.n_heads, self.rank = n_heads, rank
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.w_proj = nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_model, bias=False))
        self.w_conv1d = ShortConvolution(d_model, d_conv)
        self.bt_proj = nn.Linear(d_model, n_heads)
        self.g_proj = nn.Linear(d_model, n_heads) if forget else None
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def _views(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Convolved w: (..., H K) -> the arguments of `path_attention`."""
        parts = self.q_proj(x), self.k_proj(x), self.v_proj(x), w
        q, k, v, w = (t.unflatten(-1, (self.n_heads, -1)) for t in parts)
        beta = 2 * torch.sigmoid(wide(self.bt_proj(x)))
        return q, k, v, unit(w), beta, None if self.g_proj is None else F.logsigmoid(wide(self.g_proj(x)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o_proj(path_attention(*self._views(x, self.w_conv1d(self.w_proj(x)))).flatten(-2))

    def cost(self, length: int) -> Cost:
        d_model, rank, heads = self.q_proj.in_features, self.rank, self.n_heads
        maps = 4 * Cost.linear(length, d_model, d_model, False) + 2 * Cost.linear(length, d_model, rank, False)
        maps = maps + (1 if self.g_proj is None else 2) * Cost.linear(length, d_model, heads)
        head, size = d_model // heads, chunk_size(CHUNK, length)
        chunks = -(-length // size)
        inside = chunks * (12.0 * size**2 * head + 2.0 * size**3 + 2.0 * size * head**2)
        across = chunks * (chunks - 1) * size**2 * head + max(chunks - 1, 0) * max(chunks - 2, 0) * size * head**2
        solve = chunks * size**2 * (size + head)
        attention = Cost(inside + across + 2.0 * length**2 * head, solve + 8.0 * length**2)
        return maps + self.w_conv1d.cost(length) + heads * attention + Cost(other=10.0 * length * d_model)

    def init_state(self, batch: int) -> State:
        weight, head = wide(self.q_proj.weight), self.q_proj.in_features // self.n_heads
        empty = weight.new_zeros(batch, self.n_heads, 0, head)
        return self.w_conv1d.init_state(batch), empty, empty, weight.new_zeros(batch, self.n_heads, 0)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the last inputs of the convolution; keys turned by all factors since, and values, two (B, H, t, K);
        the sums of gates since (B, H, t)."""
        window, keys, values, gates = state
        w, window = self.w_conv1d.step(self.w_proj(x), window)
        q, k, v, w, beta, log_gate = self._views(x, w)
        w = wide(w).unsqueeze(-2)
        keys = keys - beta[..., None, None] * (keys * w).sum(-1, keepdim=True) * w
        keys, values = torch.cat([keys, wide(k).unsqueeze(2)], 2), torch.cat([values, wide(v).unsqueeze(2)], 2)
        gates = F.pad(gates if log_gate is None else gates + log_gate.unsqueeze(-1), (0, 1))
        logits = torch.einsum("bhk,bhtk->bht", wide(q), keys) * q.shape[-1] ** -0.5 + gates
        o = torch.einsum("bht,bhtk->bhk", logits.softmax(-1), values)
        return self.o_proj(o.flatten(-2)), (window, keys, values, gates)


class PathAttention(Stack):
    """n_heads: H. rank: R. d_conv: taps of the convolution. forget: whether logits fade by a gate (PaTH-FoX)."""

    card = Card(
        title="PaTH Attention: Position Encoding via Accumulating Householder Transformations",
        year=2025,
        url="https://arxiv.org/abs/2505.16381",
        scaling="L^2",
        causal=True,
        variants={"forget": {"forget": True}},
        exempt={
            "exports": "the chunks follow the length",
        },
    )
    block = Block(ffn="swiglu", expand=8 / 3, norm="rms")

    def __init__(
        self, *, d_model: int, n_heads: int = 4, rank: int = 32, d_conv: int = 3, forget: bool = False, **stack: Any
    ) -> None:
        at_least(1, n_heads=n_heads, rank=rank, d_conv=d_conv)
        if d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}; a divisor of d_model, {d_model}")
        super().__init__(
            lambda _: PathMixer(d_model, n_heads, rank=rank, d_conv=d_conv, forget=forget), d_model=d_model, **stack
        )
