"""Reformer: attention among tokens of the same hash bucket, in reversible layers that store no activations.

Kitaev et al. 2020, arXiv:2001.04451. With m = `chunk`, r = `n_hashes`, d = qkv_dim / H, per head (section 2):

    q, V = x W_qk, x W_v                                   queries and keys share a map; (B, L, D) -> (B, H, L, d)
    k = q / sqrt(|q|^2 + 1e-6 d)                           keys have length 1
    bucket_s(i) = argmax [q_i R_s, -q_i R_s]               R_s: (d, b / 2) normal; rounds s = 1 .. r
    place_s(i): rank of token i when sorted by (bucket, position); chunk_s = floor(place_s / m)
    i sees j in round s  where  their buckets are equal, and chunk_s(i) - chunk_s(j) is 0 or 1      equation 5
    y = W_o concat_h softmax over the union of rounds of (q_i . k_j), itself at -1e5              equation 6

The scores are not divided by sqrt(d) again: with unit keys q . k is |q| times a cosine, of unit variance where the
features of q have it. trax and Hugging Face compute the same, with keys of length sqrt(d) and the division.

Rounds are softmaxes of their own, merged by their log-sum-exp, a key seen in several counted once (N_ij, appendix A).
Layers act on two streams X1 = X2 = x (section 3):  Y1 = X1 + attention(norm(X2)),  Y2 = X2 + feedforward(norm(Y1)).
Training keeps the last pair and recovers the others while going back; of each layer only the buckets are kept (two
bytes per token, head and round) and the state of the random generator, so that memory does not grow with depth. Work
grows with L r m, the sort, and L r b of hashing: with L^2 where b follows the length, which passes the attention at
L = 4 m^2.

Initialisation: Xavier uniform maps. R_s is drawn once per layer by torch's generator and saved (buffer `rotations`);
b = 2 ceil(length / m) unless given, so that a chunk holds two average buckets (section 2).

Departures: chunks do not reach across rounds, nor around the end; in the authors' code they do both. When causal, i
sees the m tokens before it in its bucket: with whole chunks, what it sees would hang on how many later tokens come into
lower buckets. The streams are averaged at the end and normalised.

Checked against: tensors of Hugging Face's LSHSelfAttention: its buckets; the forward pass over its chunks, outputs and
gradients; forward and step against its stored probabilities among the keys that are seen here; its layers through the
reversible pass. Softmax attention under the explicit L x L mask of the equation; the entropy of one bucket in closed
form; autograd through the same layers; inputs recovered from outputs.
"""

from __future__ import annotations

from math import log, log2
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import (  # fmt: skip
    alibi_slopes,
    checked_dropout,
    drop_keys,
    rope,
)
from lra.architectures._attention_stack import AttentionStack
from lra.architectures._checks import at_least
from lra.architectures._norm import rms_norm
from lra.architectures._precision import own_precision
from lra.architectures._reversible import Step, reversible
from lra.architectures._rounds import Reordered, UnionOfRounds
from lra.architectures._stack import Layer
from lra.architectures._table import Tables
from lra.attention import merge_heads, split_heads
from lra.encoder import Card, Cost, Mixer, clean_padding, fill_padding, stepwise

ITSELF = -1e5
"""Score of a token for itself: it looks at itself only when nothing else is there."""


class LSHMixer(Tables, Mixer):
    """Attention within hash buckets: (B, L, D) -> (B, L, D)."""

    rotations: Tensor
    slopes: Tensor | None

    def __init__(
        self, d_model: int, *, n_heads: int, width: int, positions: str, causal: bool, n_hashes: int, n_buckets: int,
        chunk: int, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dropout = checked_dropout(dropout)
        self.n_heads, self.head, self.causal, self.rotary = n_heads, width // n_heads, causal, positions == "rope"
        self.n_hashes, self.n_buckets, self.chunk_size = n_hashes, n_buckets, chunk
        self.query_key, self.value = nn.Linear(d_model, width, bias=False), nn.Linear(d_model, width, bias=False)
        self.out = nn.Linear(width, d_model, bias=False)
        for layer in (self.query_key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
        self.register_buffer("rotations", torch.randn(n_heads, self.head, n_hashes, n_buckets // 2))
        self.register_buffer("slopes", None)
        if positions == "alibi":
            self.register_table("slopes", alibi_slopes, n_heads)

    @torch.no_grad()
    def buckets(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, H, r, L) int16; padding has a bucket of its own, the last."""
        with torch.autocast(x.device.type, enabled=False):  # a bucket is a comparison, which rounding turns over
            rotations = self.rotations.flatten(2)
            qk = split_heads(self.query_key(x.to(rotations.dtype)), self.n_heads)
            turned = (qk @ rotations).unflatten(-1, (self.n_hashes, -1)).transpose(2, 3)
            # argmax of [y, -y] without laying it out twice
            high, low = turned.max(dim=-1), turned.min(dim=-1)
            found = torch.where(-low.values > high.values, low.indices + self.n_buckets // 2, high.indices)
        return found.masked_fill(~mask[:, None, None], self.n_buckets).short()

    def forward(self, x: Tensor, mask: Tensor, buckets: Tensor | None = None) -> Tensor:
        """`buckets` of these tokens, where they are known already."""
        length = x.shape[1]
        m = min(self.chunk_size, length)  # all tokens fit into one chunk then
        missing = -length % m
        buckets = self.buckets(x, mask) if buckets is None else buckets
        x, buckets = F.pad(x, (0, 0, 0, missing)), F.pad(buckets, (0, missing), value=self.n_buckets)
        q, k = self.queries_and_keys(split_heads(self.query_key(x), self.n_heads))
        v = drop_keys(split_heads(self.value(x), self.n_heads), self.dropout if self.training else 0.0)
        order = buckets.sort(dim=-1, stable=True).indices
        place = torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[1], device=x.device).expand_as(order))
        q, k = q.to(v.dtype), k.to(v.dtype)
        q, k, v = (Reordered.apply(t.unsqueeze(2), order, place).unflatten(3, (-1, m)) for t in (q, k, v))
        bias = self.bias(order, place, buckets, m, torch.promote_types(v.dtype, torch.float32))
        y = UnionOfRounds.apply(q, with_chunk_before(k), with_chunk_before(v), bias, order, place)
        return self.out(merge_heads(y))[:, :length]

    def queries_and_keys(self, qk: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        k = rms_norm(qk, 1e-6) * self.head**-0.5
        return (rope(qk, start), rope(k, start)) if self.rotary else (qk, k)

    @torch.no_grad()
    def bias(self, order: Tensor, place: Tensor, buckets: Tensor, m: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of sorted chunks, (B, H, r, chunks, m, 2 m): 0, or -log N of a key that N rounds
        see, -inf where it is not seen, ITSELF on the token itself. All of order, place, buckets: (B, H, r, L)."""
        near, reach = (place, m) if self.causal else (place // m, 1)
        # equal buckets and 0 to `reach` apart, as one difference, doubled to be compared in one go: places rise with
        # buckets; in two bytes where they fit, as this is most of what the scores cost
        far = 2 * ((self.n_buckets + 1) * (reach + 1) + (place.shape[-1] if self.causal else place.shape[-1] // m))
        small = torch.int16 if 2 * far < 2**15 else torch.int32
        code = 2 * (buckets.int() * (reach + 1) + near.int())
        shape = (*order.shape[:3], order.shape[3] // m, m, 2 * m)
        seen = torch.empty(shape, dtype=torch.bool, device=order.device)
        count = torch.zeros(shape, dtype=torch.uint8, device=order.device)
        for s in range(order.shape[2]):
            # round s as round t has sorted its tokens: the own one decides, the others are counted
            ours = code[:, :, [s]].expand_as(order).gather(-1, order).unflatten(-1, (-1, m)).to(small)
            keys = with_chunk_before((ours + reach).unsqueeze(-1), far + reach).mT
            inside = (ours.unsqueeze(-1) - keys).abs_() <= reach
            seen[:, :, s] = inside[:, :, s]
            count += inside
        bias = torch.where(seen, 0.0, -torch.inf).to(dtype)
        for number in range(2, order.shape[2] + 1):
            bias.masked_fill_(seen & (count == number), -log(number))
        if self.slopes is not None:
            at = order.unflatten(-1, (-1, m)).unsqueeze(-1)
            bias -= self.slopes.view(-1, 1, 1, 1, 1) * (at - with_chunk_before(at).mT).abs()
        bias.diagonal(offset=m, dim1=-2, dim2=-1).fill_(ITSELF)
        return bias

    def cost(self, length: int) -> Cost:
        d_model, width = self.out.out_features, self.out.in_features
        m = min(self.chunk_size, length)
        total = -(-length // m) * m
        maps = 2 * Cost.linear(total, d_model, width, bias=False) + Cost.linear(total, width, d_model, bias=False)
        # the buckets are found before padding, by a product of their own
        hashing = Cost.linear(length, d_model, width, bias=False)
        hashing += Cost(2.0 * length * width * self.n_hashes * (self.n_buckets // 2))
        rows = float(self.n_heads * self.n_hashes * total)
        # a comparison of a sort reads and writes a key and an index of two tokens
        return maps + hashing + Cost(8.0 * rows * m * self.head, rows * (24.0 * m + 8 * log2(length)))

    def init_state(self, batch: int) -> tuple[Tensor, ...]:
        empty = self.out.weight.new_zeros(batch, self.n_heads, 0, self.head)
        found = torch.zeros(batch, self.n_heads, self.n_hashes, 0, dtype=torch.int16, device=empty.device)
        return empty, empty, found

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """State: keys, values (B, H, t, d) and buckets (B, H, r, t) so far."""
        if not self.causal:
            raise NotImplementedError("LSH attention has no recurrent mode when bidirectional")
        x, time = x.unsqueeze(1), state[0].shape[2]
        found = self.buckets(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        q, k = self.queries_and_keys(split_heads(self.query_key(x), self.n_heads), time)
        new = k, split_heads(self.value(x), self.n_heads)
        keys, values = (torch.cat([old, t], dim=2) for old, t in zip(state, new, strict=False))
        buckets = torch.cat([state[2], found], dim=3)
        same = buckets == found
        seen = (same & (same.flip(-1).cumsum(-1).flip(-1) <= self.chunk_size + 1)).any(dim=2, keepdim=True)
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=x.device).masked_fill_(~seen, -torch.inf)
        if self.slopes is not None:
            bias -= self.slopes.view(-1, 1, 1) * torch.arange(time, -1, -1, device=x.device)
        bias[..., -1] = ITSELF
        y = (q @ keys.mT + bias).softmax(dim=-1) @ values
        return self.out(merge_heads(y)).squeeze(1), (keys, values, buckets)


def with_chunk_before(x: Tensor, first: float = 0) -> Tensor:
    """(B, H, r, chunks, m, d) -> (B, H, r, chunks, 2 m, d): each chunk behind the one before it, `first` filling in."""
    before = F.pad(x[:, :, :, :-1], (0, 0, 0, 0, 1, 0), value=first)
    return torch.cat([before, x], dim=-2)


class Reformer(AttentionStack):
    """n_hashes: r, rounds of hashing. chunk: m. n_buckets: b, even; None for 2 ceil(length / m). n_heads: must divide
    qkv_dim, the width of all heads together, d_model unless given. positions: "sinusoidal", "learned", "rope", "alibi",
    "none". attention_dropout: a key is left out for all queries of a head."""

    card = Card(
        title="Reformer: The Efficient Transformer",
        year=2020,
        url="https://arxiv.org/abs/2001.04451",
        scaling="L^2",
        causal=False,
        exempt={
            "functional": "reversible layers run autograd inside their backward pass, which torch.func cannot see",
            "exports": "the buckets and chunks follow the length",
        },
    )

    def __init__(
        self, *, length: int, n_hashes: int = 2, chunk: int = 64, n_buckets: int | None = None, **attention: Any
    ) -> None:
        at_least(1, n_hashes=n_hashes, chunk=chunk, length=length)
        count = 2 * -(-length // chunk) if n_buckets is None else n_buckets
        if not 2 <= count < 2**15 or count % 2:
            raise ValueError(f"n_buckets is {count}; an even number from 2 to {2**15 - 2}")
        self.follows_length = n_buckets is None
        super().__init__(
            lambda _, **heads: LSHMixer(n_hashes=n_hashes, n_buckets=count, chunk=chunk, **heads),
            length=length,
            **attention,
        )
        if any(layer.ffn is None or not layer.prenorm for layer in self.blocks):
            raise ValueError("block: a reversible layer has a feed-forward part, and norms before its parts")

    @property
    def scaling(self) -> str:
        return "L^2" if self.follows_length else "L log L"

    def streams(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams after the last layer, before they are averaged: (B, L, D) each."""
        x, mask = clean_padding(x, mask)
        x = self.enter(x)
        steps = [reversible_step(layer, mask) for layer in self.blocks]
        return own_precision(x, lambda: reversible(x, x, steps, random=self.training))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y1, y2 = self.streams(x, mask)
        return self.norm((y1 + y2) / 2)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        time, before = state
        x = self.enter(x, time)
        x1, x2, after = x, x, []
        for layer, own in zip(self.blocks, before, strict=True):
            assert layer.ffn is not None
            assert layer.ffn_norm is not None
            y, own = layer.mixer.step(layer.norm(x2), own)
            x1 = x1 + y
            x2 = x2 + layer.ffn(layer.ffn_norm(x1))
            after.append(own)
        return self.norm((x1 + x2) / 2), (time + 1, tuple(after))

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return stepwise(self.step, x, state)


def reversible_step(layer: Layer, mask: Tensor) -> Step:
    mixer, ffn, ffn_norm = layer.mixer, layer.ffn, layer.ffn_norm
    assert isinstance(mixer, LSHMixer)
    assert ffn is not None
    assert ffn_norm is not None

    def attention(x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        h = fill_padding(layer.norm(x), mask)
        buckets = mixer.buckets(h, mask) if kept is None else kept
        return layer.dropout(mixer(h, mask, buckets)), buckets

    def feedforward(x: Tensor) -> Tensor:
        return layer.dropout(ffn(ffn_norm(x)))

    learnt = [*layer.norm.parameters(), *mixer.parameters()], [*ffn_norm.parameters(), *ffn.parameters()]
    return Step(attention, feedforward, *learnt)
