"""Attention over segments with a memory of older tokens: the relative attention of Transformer-XL, arXiv:1901.02860."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import checked_dropout
from lra.architectures._checks import at_least
from lra.architectures._table import Tables
from lra.attention import merge_heads, split_heads
from lra.encoder import Cost, Mixer


class SegmentMixer(Tables, Mixer):
    """Causal attention of the tokens of a segment to older tokens and to each other; per head, with W_q, W_k, W_v the
    rows of qkv_net, W_r r_net, R_n the sinusoids of a distance n and scale d^-1/2 (section 3.3):

        A_ij = softmax_j of [(q_i + u) . k_j + (q_i + v) . W_r R_{i-j}] / sqrt(d),    y = concat_h(A V) W_o

    width: of all heads together, H d. biases: u and v, (H, d) each, of all layers. longest: keys that a query may have.
    No map has a bias. Starts as the authors' code: everything normal of deviation 0.02.
    """

    distances: Tensor

    def __init__(
        self, d_model: int, n_heads: int, width: int, *, segment: int, memory: int, longest: int,
        biases: tuple[nn.Parameter, nn.Parameter], dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_heads, self.segment, self.memory = n_heads, segment, memory
        self.dropout = checked_dropout(dropout)
        self.qkv_net = nn.Linear(d_model, 3 * width, bias=False)
        self.r_net = nn.Linear(d_model, width, bias=False)
        self.o_net = nn.Linear(width, d_model, bias=False)
        self.r_w_bias, self.r_r_bias = biases
        self.register_table("distances", sinusoids, longest, d_model)
        for linear in (self.qkv_net, self.r_net, self.o_net):
            nn.init.normal_(linear.weight, std=0.02)

    def heads(self, x: Tensor, older: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (B, C, D), keys and values of `older` (B, t, D) and x: (B, H, C or t + C, d)."""
        width = self.o_net.in_features
        of_queries, of_others = self.qkv_net.weight.split([width, 2 * width])
        q = F.linear(x, of_queries)
        k, v = F.linear(torch.cat([older, x], dim=1), of_others).chunk(2, dim=-1)
        return split_heads(q, self.n_heads), split_heads(k, self.n_heads), split_heads(v, self.n_heads)

    def weights(self, q: Tensor, k: Tensor, known: Tensor | None = None) -> Tensor:
        """A: the queries are of the last tokens of the keys, (B, H, C, d), (B, H, t, d) -> (B, H, C, t). known: (B, n),
        the first n keys that there are; None: all."""
        tokens, keys = q.shape[2], k.shape[2]
        r = split_heads(self.r_net(self.distances[:keys].flip(0).to(q.dtype)).unsqueeze(0), self.n_heads)
        content = (q + self.r_w_bias.unsqueeze(1)) @ k.mT
        scores = (content + shifted((q + self.r_r_bias.unsqueeze(1)) @ r.mT)) * q.shape[-1] ** -0.5
        allowed = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(keys - tokens)
        if known is not None:
            allowed = allowed & F.pad(known, (0, keys - known.shape[1]), value=True)[:, None, None]
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1)

    def read(self, x: Tensor, older: Tensor, known: Tensor | None = None) -> Tensor:
        """y of x (B, C, D), which follows `older` (B, t, D) -> (B, C, D)."""
        q, k, v = self.heads(x, older)
        a = F.dropout(self.weights(q, k, known), self.dropout, self.training)
        return self.o_net(merge_heads(a.to(v.dtype) @ v))

    def pieces(self, x: Tensor, time: int) -> tuple[Tensor, ...]:
        """x (B, C, D), whose first token stands at `time`, cut where a segment begins."""
        cuts = range(self.segment - time % self.segment, x.shape[1], self.segment)
        return x.tensor_split(list(cuts), dim=1)

    def read_cost(self, tokens: int, keys: int) -> Cost:
        """Work of `read` for so many tokens, with themselves among the keys."""
        width, d_model, pairs = self.o_net.in_features, self.o_net.out_features, float(tokens * keys)
        maps = Cost.linear(2 * tokens + 2 * keys, d_model, width, bias=False)
        maps += Cost.linear(keys, d_model, width, bias=False).per_batch
        return maps + Cost(6.0 * pairs * width, 8.0 * pairs * self.n_heads)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state


def sinusoids(number: int, d_model: int) -> Tensor:
    """Of the distances 0 .. number - 1, all sines before all cosines: (number, D)."""
    rate = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = torch.arange(number).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :d_model]


def shifted(x: Tensor) -> Tensor:
    """Scores by distance to scores by key: x (..., C, t), with distances t - 1 .. 0, -> column j of row i is that of
    its distance t - C + i - j. Ahead of the query stands what the causal mask hides."""
    tokens = x.shape[-2]
    return F.pad(x, (1, 0)).flatten(-2)[..., tokens:].unflatten(-1, (tokens, x.shape[-1]))


def shared_biases(n_heads: int, head: int) -> tuple[nn.Parameter, nn.Parameter]:
    """u and v of all layers: (H, d) each."""
    return nn.Parameter(torch.randn(n_heads, head) * 0.02), nn.Parameter(torch.randn(n_heads, head) * 0.02)


def checked_segments(length: int, segment: int | None, memory: int | None, multiple: int = 1) -> tuple[int, int]:
    """Tokens of a segment, an eighth of `length` unless given, and of the memory, a segment unless given: multiples of
    `multiple`. Raises ValueError."""
    size = max(1, length // 8 // multiple) * multiple if segment is None else segment
    kept = size if memory is None else memory
    at_least(1, segment=size, memory=kept)
    for name, value in (("segment", size), ("memory", kept)):
        if value % multiple:
            raise ValueError(f"{name} is {value}; a multiple of the {multiple} tokens that are compressed into one")
    return size, kept
