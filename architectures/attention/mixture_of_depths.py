"""Mixture of depths: a router sends a share of the tokens through a block; the others skip it.

Raposo et al. 2024, arXiv:2404.02258. Every second block is routed. With f the attention and feed-forward of a block, of
pre-norm, and n the number of real tokens of a sequence:

    r_i = w . x_i                                          (B, L)      router weights, section 3.3
    the k = max(1, floor(capacity n)) tokens of largest r take part; they attend to each other alone
    x_i = x_i + r_i (f(x)_i - x_i)  if i takes part, x_i else          equation 1: what f adds to its input, times r

so that the router learns through the tokens that it chose. The choice among all tokens is not causal. The causal form
is trained with it, and with a predictor of it, c_i = v . stop_gradient(x_i) + b, by the mean cross entropy of
sigmoid(c_i) (section 3.5); in evaluation, and token by token, i takes part if c_i > 0, as many as there are. Then all
tokens go through f, with the others hidden: only the routed form saves work. Recurrent mode keeps keys and values of
all tokens, and which took part.

Initialisation: w normal of deviation 0.02; blocks as `transformer`, the predictor as PyTorch's.

Departures: capacity is 1/2 unless told; the paper's best is 1/8, of 2,048 tokens. The bidirectional form is ours.

Checked against: tensors of an independent implementation around torch's encoder layer (output, choice, the predictor's
loss, every gradient), both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import checked_width
from lra.architectures._counts import added, unless_exporting
from lra.architectures._norm import normalised
from lra.architectures._precision import own_precision, wide
from lra.architectures._softmax import SoftmaxMixer
from lra.architectures._stack import Layer, Stack
from lra.attention import fused_attention, merge_heads
from lra.encoder import Card, Cost, clean_padding, lengths_of

POSITIONS = ("sinusoidal", "learned", "none")


class Router(nn.Module):
    """Routes tokens around a layer that is given."""

    def __init__(self, d_model: int, capacity: float, causal: bool) -> None:
        super().__init__()
        self.capacity, self.causal = capacity, causal
        self.weight = nn.Linear(d_model, 1, bias=False)
        nn.init.normal_(self.weight.weight, std=0.02)
        self.predictor = nn.Linear(d_model, 1) if causal else None
        self.loss: Tensor | None = None
        self.counts: Tensor | None = None  # tokens that took part, tokens predicted right, tokens

    def __getstate__(self) -> dict[str, Any]:
        # the loss holds a graph, which no copy can take along
        return {**self.__dict__, "loss": None}

    def places(self, length: int) -> int:
        """Most tokens that take part in a sequence of so many."""
        return max(1, int(self.capacity * length))

    def choose(self, r: Tensor, mask: Tensor) -> Tensor:
        """Which tokens have the largest weights: (B, L), (B, L) bool -> (B, L) bool."""
        best = r.masked_fill(~mask, -torch.inf).topk(self.places(r.shape[1]), dim=1).indices
        share = (lengths_of(mask).double() * self.capacity).floor().clamp_min(1)
        rank = torch.arange(best.shape[1], device=r.device)
        return torch.zeros_like(mask).scatter(1, best, rank < share.unsqueeze(1))

    def forward(self, layer: Layer, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D), (B, L) -> (B, L, D)."""
        if self.predictor is not None and not self.training:
            return self.predicted(layer, x, None, mask)[0]
        r = wide(self.weight(x)).squeeze(-1)
        chosen = self.choose(r.detach(), mask)
        self.note(x, chosen, mask)
        # in their order, before those that do not take part
        place = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.places(x.shape[1])]
        index = place.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        taken, own = chosen.gather(1, place), x.gather(1, index)
        update = (layer(own, taken) - own) * (r.gather(1, place) * taken).unsqueeze(-1).to(x.dtype)
        return x.scatter_add(1, index, update.to(x.dtype))

    @unless_exporting
    def note(self, x: Tensor, chosen: Tensor, mask: Tensor) -> None:
        """The predictor's loss at this choice, and the counts."""
        right = chosen
        if self.predictor is not None:
            c = wide(self.predictor(x.detach())).squeeze(-1)
            self.loss = F.binary_cross_entropy_with_logits(c[mask], chosen[mask].to(c.dtype))
            right = (c.detach() > 0) == chosen
        now = torch.stack([chosen.sum(), (right & mask).sum(), mask.sum()])
        self.counts = added(self.counts, now)

    def predicted(self, layer: Layer, x: Tensor, state: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """The causal form in evaluation: (B, C, D), after the tokens of a state -> (B, C, D), the state after them."""
        mixer, ffn = layer.mixer, layer.ffn
        assert isinstance(mixer, SoftmaxMixer)
        assert self.predictor is not None
        keys, values, before = self.init_state(layer, x.shape[0]) if state is None else state
        own = self.predictor(x).squeeze(-1) > 0
        h, tokens = normalised(layer.norm, x, mask), x.shape[1]
        q, k, v = mixer.heads(h)
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        chosen = torch.cat([before, own], dim=1)
        i = torch.arange(chosen.shape[1] - tokens, chosen.shape[1], device=x.device).unsqueeze(1)
        j = torch.arange(chosen.shape[1], device=x.device)
        # a token that does not take part sees itself, and is left as it was
        allowed = (chosen[:, None, None] & (j <= i)) | (i == j)
        y = x + layer.dropout(mixer.out(merge_heads(fused_attention(q, keys, values, allowed))))
        if ffn is not None and layer.ffn_norm is not None:
            y = y + layer.dropout(ffn(normalised(layer.ffn_norm, y, mask), mask))
        return torch.where(own.unsqueeze(-1), x + self.weight(x) * (y - x), x), (keys, values, chosen)

    def init_state(self, layer: Layer, batch: int) -> Any:
        """Keys and values of all tokens, (B, H, t, d) each, and which took part, (B, t)."""
        keys, values, _ = layer.mixer.init_state(batch)
        return keys, values, torch.zeros(batch, 0, dtype=torch.bool, device=keys.device)


class MixtureOfDepths(Stack):
    """capacity: share of the tokens that take part in a routed block. every: one of so many blocks is routed, the last
    of them, and where there are fewer the last of all. n_heads: must divide d_model. attention_dropout: on the
    attention weights."""

    card = Card(
        title="Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
        year=2024,
        url="https://arxiv.org/abs/2404.02258",
        scaling="L^2",
        causal=False,
        variants={"eighth": {"capacity": 0.125}},
        exempt={
            "exports": "a rounded share of the length takes part, which symbolic shapes cannot bound by the length"
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        direction: str = "bidirectional",
        capacity: float = 0.5,
        every: int = 2,
        n_heads: int = 4,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        checked_width(d_model, n_heads, None, positions, POSITIONS)
        if not 0 < capacity <= 1:
            raise ValueError(f"capacity is {capacity}; a share of the tokens, above 0 and at most 1")
        if every < 1:
            raise ValueError(f"every is {every}; at least 1, and 1 routes each block")
        if not type(self).block.updated(block).prenorm:
            raise ValueError("block.prenorm is false; what a routed block adds needs norms before its parts")
        super().__init__(
            lambda _: SoftmaxMixer(
                d_model, n_heads, width=d_model, positions="none", causal=direction == "causal",
                dropout=attention_dropout,
            ),
            native=True, d_model=d_model, n_layers=n_layers, direction=direction,
            block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
        self.routers = nn.ModuleDict(
            {str(i): Router(d_model, capacity, self.causal) for i in range(min(every, n_layers) - 1, n_layers, every)}
        )

    def router(self, layer: int) -> Router | None:
        """That of a layer; None where every token goes through it."""
        routers: dict[str, Any] = dict(self.routers.items())
        return routers.get(str(layer))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask)
        x = self.enter(x)
        for i, layer in enumerate(self.blocks):
            router = self.router(i)
            x = layer(x, mask) if router is None else own_precision(x, partial(router, layer, x, mask))
        return normalised(self.norm, x, mask)

    def cost(self, length: int) -> Cost:
        total = Cost(other=5.0 * length * self.d_model)
        for i, layer in enumerate(self.blocks):
            router, tokens = self.router(i), length
            if router is not None:
                dense = router.predictor is not None and not self.training
                tokens = length if dense else router.places(length)
                total += Cost.linear(length * (1 if router.predictor is None else 2), self.d_model, 1)
            total += layer.mixer.cost(tokens) + Cost(other=12.0 * tokens * self.d_model)
            total += Cost() if layer.ffn is None else layer.ffn.cost(tokens)
        return total

    def init_state(self, batch: int) -> Any:
        time, states = super().init_state(batch)
        routers = [self.router(i) for i in range(self.n_layers)]
        return time, tuple(
            own if router is None else router.init_state(layer, batch)
            for layer, router, own in zip(self.blocks, routers, states, strict=True)
        )

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        time, before = state
        tokens, x, after = x.shape[1], self.enter(x, time), []
        for i, (layer, own) in enumerate(zip(self.blocks, before, strict=True)):
            router = self.router(i)
            x, own = layer.chunk(x, own) if router is None else router.predicted(layer, x, own)
            after.append(own)
        return self.norm(x), (time + tokens, tuple(after))

    def aux_loss(self) -> Tensor | None:
        routers = [self.router(i) for i in range(self.n_layers)]
        losses = [super().aux_loss(), *(router.loss for router in routers if router is not None)]
        found = [loss for loss in losses if loss is not None]
        return torch.stack(found).sum() if found else None

    def diagnostics(self) -> dict[str, float]:
        """`routed<layer>`: share of the tokens that took part; `predicted<layer>`, where causal: share of the tokens of
        which the predictor told whether they did. Over the forwards with routing since last asked."""
        found = super().diagnostics()
        for i in range(self.n_layers):
            router = self.router(i)
            if router is not None and router.counts is not None:
                routed, right, tokens = router.counts.tolist()
                router.counts = None
                found[f"routed{i}"] = routed / tokens
                if router.predictor is not None:
                    found[f"predicted{i}"] = right / tokens
        return found
