"""RWKV-7 (Goose): a matrix state that is decayed and corrected channel by channel, at rates that depend on the input.

Peng et al. 2025, arXiv:2503.14456, section 4. With H heads of width N = D / H, x' the token before x (0 before the
first) and low-rank maps lo_n(x) = f(x W_n1) W_n2:

    x_n = x + mu_n (x' - x)                                n in r, w, k, v, a, g     (B, L, D)    token shift
    r, k, v = W_r x_r, W_k x_k, W_v x_v                    (B, L, H, N)
    v = v + sigmoid(v_0 + lo_v(x_v)) (v_first - v)         above the first layer, whose v is v_first
    w = exp(-e^(-1/2) sigmoid(w_0 + lo_w(x_w)))            (B, L, H, N)   decay, at least 0.545; f = tanh
    a = sigmoid(a_0 + lo_a(x_a))                           (B, L, H, N)   in-context learning rate
    g = lo_g(x_g)                                          (B, L, D)      f = sigmoid
    kappa = k k_k / |k k_k|,   k = k (1 + (a - 1) k_a)     (B, L, H, N)
    S_t = (diag(w_t) - (a_t kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T,   S_0 = 0        (B, H, N, N)
    o = norm(S_t^T r_t) + (r_t . (r_k k_t)) v_t            (B, L, D)      group norm of each head
    time mix     W_o (o g)                                 (B, L, D)
    channel mix  W'_v max(W'_k x'_k, 0)^2                  (B, L, D)      W'_k: (E, D)

    h = norm_0(x);  in each layer  h = h + time mix(norm(h)),  h = h + channel mix(norm(h));  last, norm(h)

The transition has eigenvalues below 0, down to 0.545 - 1, where w is small and a near 1: a state can change its sign.
Maps have no bias, and there are no positions. The recurrence runs in chunks of plain PyTorch: `delta_rule` would need a
decay for each channel and two vectors, a kappa and kappa, in the correction.

Initialisation, that of the released code, with l of n layers counted from 0, i of D channels, d = l / (n - 1), s = i /
(D - 1) - 1/2, z = y |y| where y runs from -1 to 1 over a head, and p(c) = (i / D)^(c (1 - l / n)): mu = 1 - p(c), c =
0.2 for r and g, 0.9 for w and a, 0.7 for k and v; mu' = 1 - (i / D)^((1 - l / n)^4); w_0 = -5.5 + 6 (i / (D - 1))^(1 +
d^0.3) + 2.5 z; a_0 = -0.19 + 0.3 z + 0.4 s; v_0 = 0.73 - 0.4 s; k_k = 0.71 - 0.1 s; k_a = 1.02; r_k = -0.04. The first
of two low-rank maps is 0, the second orthogonal times 0.1; W_r, W_v and W'_k uniform within 0.5 / sqrt(D), W_k within a
tenth of that, W_o and W'_v 0, so that each part starts at 0. What is no map learns without weight decay, w_0 at twice
the rate. Ranks are those the code suggests for the width, at least 32.

Departures: the embedding belongs to the suite. Four heads by default, as the models here are narrow, where the released
ones have N = 64. Dropout, of which the paper has none, where the suite's block has it. Bidirectional, each of the two
parts of a layer runs both ways, and a direction has a v_first of its own.

Checked against: tensors of the NumPy reference in the authors' repository, of both parts and of the time mix in the
first layer; the recurrence of flash-linear-attention from a given state, with every gradient; the gradients of the
chunked form against those of the recurrence token by token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least, divides
from lra.architectures._delta import Addition, channel_delta, channel_delta_cost, channel_delta_step
from lra.architectures._norm import normalised
from lra.architectures._precision import wide
from lra.architectures._rwkv import RWKVStack, along, depth, ramp, shifted
from lra.architectures._stack import Bidirectional, Block, Layer, flip
from lra.encoder import Card, Cost, Encoder, Mixer, clean_padding, fill_padding

EPS = 64e-5
"""Of the group norm, as released: 1e-5 times the head width of 64."""
SHIFTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
RANKS = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}
"""Low-rank map -> the rank that the released code suggests, over the root of the width."""
State = tuple[Tensor, Tensor]


def suggested_rank(name: str, d_model: int) -> int:
    """A multiple of 32."""
    return max(32, round(RANKS[name] * d_model**0.5 / 32) * 32)


class TimeMix(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed.

    ranks: of the low-rank maps w, a, v and g. The first layer has no map v: its values are those the others look back
    to.
    """

    def __init__(self, d_model: int, n_heads: int, *, ranks: Mapping[str, int], layer: int, n_layers: int) -> None:
        super().__init__()
        self.n_heads, self.is_first = n_heads, layer == 0
        slope, deep = along(d_model) - 0.5, depth(layer, n_layers)
        within = 2 * along(d_model // n_heads) - 1 if d_model > n_heads else torch.zeros(1)
        curve = (within * within.abs()).repeat(n_heads)
        for name, power in SHIFTS.items():
            self.register_parameter(f"x_{name}", nn.Parameter(1 - ramp(d_model, layer, n_layers, power)))
        starts = {
            "w": -5.5 + 6 * along(d_model) ** (1 + deep**0.3) + 2.5 * curve,
            "a": -0.19 + 0.3 * curve + 0.4 * slope,
            "v": 0.73 - 0.4 * slope,
        }
        for name in RANKS:
            if name == "v" and self.is_first:
                continue
            if name in starts:
                self.register_parameter(f"{name}0", nn.Parameter(starts[name]))
            second = torch.empty(ranks[name], d_model)
            nn.init.orthogonal_(second, gain=0.1 * max(1.0, ranks[name] / d_model) ** 0.5)
            self.register_parameter(f"{name}1", nn.Parameter(torch.zeros(d_model, ranks[name])))
            self.register_parameter(f"{name}2", nn.Parameter(second))
        self.k_k = nn.Parameter(0.71 - 0.1 * slope)
        self.k_a = nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((n_heads, d_model // n_heads), -0.04))
        self.receptance, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear.weight, -bound / math.sqrt(d_model), bound / math.sqrt(d_model))
        nn.init.zeros_(self.output.weight)
        self.ln_x = nn.GroupNorm(n_heads, d_model, eps=EPS)

    def _low(self, name: str, x: Tensor) -> Tensor:
        """A low-rank map before its last function: (..., D) -> (..., D)."""
        low = x @ getattr(self, f"{name}1")
        low = torch.tanh(low) if name == "w" else torch.sigmoid(low) if name == "g" else low
        low = low @ getattr(self, f"{name}2")
        return low if name == "g" else getattr(self, f"{name}0") + low

    def _views(self, x: Tensor, before: Tensor, first: Tensor | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """What the state needs, by name, (..., H, N) each; the values (..., D), and the gate (..., D)."""
        change = before - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + change * getattr(self, f"x_{name}") for name in SHIFTS)
        k, v = self.key(x_k), self.value(x_v)
        if first is not None:
            v = v + torch.sigmoid(self._low("v", x_v)) * (first - v)
        log_w = -math.exp(-0.5) * torch.sigmoid(wide(self._low("w", x_w)))
        rate = torch.sigmoid(self._low("a", x_a))
        views = {
            "r": self.receptance(x_r), "k": k * (1 + (rate - 1) * self.k_a), "v": v, "log_w": log_w, "rate": rate,
            "removed": k * self.k_k,
        }  # fmt: skip
        views = {name: t.unflatten(-1, (self.n_heads, -1)) for name, t in views.items()}
        return views, v, self._low("g", x_g)

    @staticmethod
    def _terms(views: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor, None, Tensor], Addition]:
        """The arguments of `channel_delta`. It removes from the decayed state, RWKV-7 from the one before: a is kappa
        over the decay, which is at least 0.545."""
        kappa, log_w = F.normalize(wide(views["removed"]), dim=-1), views["log_w"]
        terms = views["r"], kappa * (-log_w).exp(), views["rate"] * kappa, None, log_w
        return terms, Addition(views["k"], views["v"])

    def _finish(self, o: Tensor, views: dict[str, Tensor], gate: Tensor) -> Tensor:
        """Norm, bonus, gate and output map: (..., H, N) -> (..., D)."""
        normed = self.ln_x(o.to(self.ln_x.weight.dtype).reshape(-1, gate.shape[-1])).view(gate.shape)
        bonus = (views["r"] * views["k"] * self.r_k).sum(-1, keepdim=True) * views["v"]
        return self.output((normed + bonus.flatten(-2)) * gate)

    def mix(self, x: Tensor, mask: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and the values of the first layer, (B, L, D): `first`, or this layer's own where that is None."""
        views, v, gate = self._views(x, shifted(x), first)
        terms, added = self._terms(views)
        return self._finish(channel_delta(*terms, added), views, gate), v if first is None else first

    def mix_step(self, x: Tensor, state: State, first: Tensor | None) -> tuple[Tensor, State, Tensor]:
        """One token of `mix`, with the next state ahead of the values."""
        views, v, gate = self._views(x, state[0], first)
        terms, added = self._terms(views)
        o, S = channel_delta_step(*terms, state[1], added)
        return self._finish(o, views, gate), (x, S), v if first is None else first

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """As in a layer that has no other below it."""
        return self.mix(x, mask, None)[0]

    def cost(self, length: int) -> Cost:
        d_model = self.key.in_features
        ranks = sum(getattr(self, f"{name}1").shape[1] for name in RANKS if hasattr(self, f"{name}1"))
        maps = 4 * Cost.linear(length, d_model, d_model, False) + 2 * Cost.linear(length, d_model, ranks, False)
        head = d_model // self.n_heads
        return maps + channel_delta_cost(length, self.n_heads, head, head, True) + Cost(other=60.0 * length * d_model)

    def init_state(self, batch: int) -> State:
        heads, width = self.r_k.shape
        return self.r_k.new_zeros(batch, heads * width), wide(self.r_k.new_zeros(batch, heads, width, width))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: the token before (B, D), and S (B, H, N, N)."""
        y, state, _ = self.mix_step(x, state, None)
        return y, state


class ChannelMix(Mixer):
    """(B, L, D) -> (B, L, D): the feed-forward part, which sees the token before."""

    def __init__(self, d_model: int, width: int, layer: int, n_layers: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(1 - ramp(d_model, layer, n_layers, (1 - layer / n_layers) ** 3))
        self.key = nn.Linear(d_model, width, bias=False)
        self.value = nn.Linear(width, d_model, bias=False)
        nn.init.uniform_(self.key.weight, -0.5 / math.sqrt(d_model), 0.5 / math.sqrt(d_model))
        nn.init.zeros_(self.value.weight)

    def _mix(self, x: Tensor, before: Tensor) -> Tensor:
        return self.value(F.relu(self.key(x + (before - x) * self.x_k)).square())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._mix(x, shifted(x))

    def cost(self, length: int) -> Cost:
        d_model, width = self.key.in_features, self.key.out_features
        return 2 * Cost.linear(length, d_model, width, False) + Cost(other=length * (3.0 * d_model + 2.0 * width))

    def init_state(self, batch: int) -> Tensor:
        return self.x_k.new_zeros(batch, len(self.x_k))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: the token before (B, D)."""
        return self._mix(x, state), x


class BothTimeMixes(Bidirectional):
    """A time mix each way; what they call `first` is a pair, the second one in reverse."""

    ahead: TimeMix
    back: TimeMix

    def mix(self, x: Tensor, mask: Tensor, first: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert self.project is not None
        of_ahead, of_back = (None, None) if first is None else first
        ahead, of_ahead = self.ahead.mix(x, mask, of_ahead)
        back, of_back = self.back.mix(flip(x, mask), mask, of_back)
        return self.project(torch.cat([ahead, flip(back, mask)], dim=-1)), (of_ahead, of_back)


class ValueLayer(Layer):
    """A block that also hands on the values of the first layer: forward(x, mask, first) -> x, first."""

    def forward(self, x: Tensor, mask: Tensor, first: Any = None) -> Any:
        passed = [first]

        def mix(h: Tensor) -> Tensor:
            h = fill_padding(h, mask)
            if not isinstance(self.mixer, TimeMix | BothTimeMixes):
                return self.mixer(h, mask)
            y, passed[0] = self.mixer.mix(h, mask, first)
            return y

        return self._around(x, self.norm, mix, mask), passed[0]

    def value_step(self, x: Tensor, state: Any, first: Tensor | None) -> tuple[Tensor, Any, Tensor | None]:
        """One token of `forward`: x, the next state, first."""
        after = [state, first]

        def mix(h: Tensor) -> Tensor:
            if isinstance(self.mixer, TimeMix):
                y, *after[:] = self.mixer.mix_step(h, state, first)
            else:
                y, after[0] = self.mixer.step(h, state)
            return y

        return self._around(x, self.norm, mix), after[0], after[1]


class RWKV7(RWKVStack):
    """n_heads: H. channel_dim: E, 4 d_model unless given. decay_rank, rate_rank, value_rank, gate_rank: of the low-rank
    maps w, a, v, g; what the released code suggests for this width unless given. A layer is two blocks of the stack."""

    card = Card(
        title='RWKV-7 "Goose" with Expressive Dynamic State Evolution',
        year=2025,
        url="https://arxiv.org/abs/2503.14456",
        scaling="L",
        causal=True,
        exempt={
            "exports": "the chunks follow the length",
        },
    )
    block = Block(ffn="none")
    layer = ValueLayer

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        direction: str = "causal",
        n_heads: int = 4,
        channel_dim: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        sizes = {
            "channel_dim": channel_dim, "decay_rank": decay_rank, "rate_rank": rate_rank, "value_rank": value_rank,
            "gate_rank": gate_rank,
        }  # fmt: skip
        at_least(1, **sizes)
        divides("d_model", d_model, n_heads=n_heads)
        if (positions := type(self).block.updated(block).positions) != "none":
            raise ValueError(f"block.positions is {positions!r}; 'none', the token shift takes their place")
        hidden = 4 * d_model if channel_dim is None else channel_dim
        given = dict(zip(RANKS, (decay_rank, rate_rank, value_rank, gate_rank), strict=True))
        ranks = {name: suggested_rank(name, d_model) if rank is None else rank for name, rank in given.items()}

        def time_mix(layer: int) -> Mixer:
            def make() -> TimeMix:
                return TimeMix(d_model, n_heads, ranks=ranks, layer=layer, n_layers=n_layers)

            return make() if direction == "causal" else BothTimeMixes(make, d_model, "concat")

        def channel_mix(layer: int) -> Mixer:
            def make() -> ChannelMix:
                return ChannelMix(d_model, hidden, layer, n_layers)

            return make() if direction == "causal" else Bidirectional(make, d_model, "concat")

        super().__init__(
            time_mix,
            channel_mix,
            native=True, d_model=d_model, n_layers=n_layers, direction=direction, block=block, **stack,
        )  # fmt: skip

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        spared = ("x_?", "[av]0", "[wavg][12]", "k_k", "k_a", "r_k")
        return {"*.w0": {"lr_scale": 2.0, "weight_decay": 0.0}} | {f"*.{n}": {"weight_decay": 0.0} for n in spared}

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask)
        x, first = normalised(self.norm_0, x, mask), None
        for layer in self.blocks:
            x, first = layer(x, mask, first)
        return normalised(self.norm, x, mask)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        time, before = state
        x, first, after = self.norm_0(x), None, []
        for layer, own in zip(self.blocks, before, strict=True):
            assert isinstance(layer, ValueLayer)
            x, own, first = layer.value_step(x, own, first)
            after.append(own)
        return self.norm(x), (time + 1, tuple(after))

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        # token by token: the layers of the stack's own form do not hand on v_first
        return Encoder.chunk(self, x, state)
