"""RWKV-4: an average of all past values whose weights decay at a fixed rate per channel, without attention.

Peng et al. 2023, arXiv:2305.13048, section 3. With E = time_dim, H = channel_dim and x_0 = 0:

    x_k = mu_k * x_t + (1 - mu_k) * x_{t-1}, and so for each of the three     (B, L, D)     token shift
    r, k, v = W_r x_r, W_k x_k, W_v x_v                                       (B, L, E)
    wkv_t = (sum_{i<t} e^{k_i - (t-1-i) e^w} v_i + e^{u + k_t} v_t) / (the same with v = 1)     w, u: (E,)
    time mix     W_o (sigmoid(r) * wkv)                                       (B, L, D)
    channel mix  sigmoid(W'_r x'_r) * W'_v max(W'_k x'_k, 0)^2                (B, L, D)     W'_k: (H, D), mu' of its own

    h = norm_0(x);  in each layer  h = h + time mix(norm(h)),  h = h + channel mix(norm(h));  last, norm(h)

No map has a bias, and there are no positions. The parameters are named as in the released code: time_mix_k for mu_k,
time_decay for w, time_first for u.

Initialisation, that of the released code, where l of n counts the layers from 0 and p = (i / D)^(1 - l / n) for channel
i: mu_k = p, mu_v = p + 0.3 l / (n - 1), mu_r = p^(1/2), mu' = p, so that deeper layers look less at the token before;
w = -5 + 8 (i / (E - 1))^(0.7 + 1.3 l / (n - 1)), memories from 150 tokens down to less than one; u_i = log 0.3 + 0.5
((i + 1) mod 3 - 1). W_v and W'_k are orthogonal, times the root of rows over columns where they widen; all other maps
are 0, and so is bidirectionally the bias of the map that joins both ways, so that each layer starts as the identity. w,
u, mu, biases and norms learn without weight decay.

Departures: the embedding belongs to the suite; the paper starts it within 1e-4 of 0, ahead of norm_0. Dropout, of which
the paper has none, where the suite's block has it. Bidirectional, each of the two parts of a layer runs both ways.

Checked against: tensors of Hugging Face's RwkvBlock, the first one, with its norms: both parts, the output, every
gradient; the plain recurrence, its sums not stabilised, over two layers whose widths differ, with every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least
from lra.architectures._optim import undecayed
from lra.architectures._precision import wide
from lra.architectures._published import first_prefix, number_of_layers
from lra.architectures._rwkv import RWKVStack, along, depth, ramp, shifted
from lra.architectures._stack import Block
from lra.encoder import Card, Cost, Mixer, Published
from lra.kernels.wkv import wkv

HUGGING_FACE = {
    "att": "attention", "ffn": "feed_forward", "ln0": "pre_ln", "emb": "embeddings", "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance",
}  # fmt: skip
"""Names of the released code that Hugging Face writes out."""


def mixed(x: Tensor, before: Tensor, mu: Tensor) -> Tensor:
    """Token shift: each channel between a token and the one before it."""
    return mu * x + (1 - mu) * before


def orthogonal(linear: nn.Linear) -> None:
    nn.init.orthogonal_(linear.weight, gain=max(1.0, linear.out_features / linear.in_features) ** 0.5)


class TimeMix(Mixer):
    """(B, L, D) -> (B, L, D). Padding comes after all real tokens: no mask needed."""

    def __init__(self, d_model: int, width: int, layer: int, n_layers: int) -> None:
        super().__init__()
        p, deep = ramp(d_model, layer, n_layers), depth(layer, n_layers)
        self.time_mix_r, self.time_mix_k = nn.Parameter(p.sqrt()), nn.Parameter(p)
        self.time_mix_v = nn.Parameter(p + 0.3 * deep)
        self.receptance = nn.Linear(d_model, width, bias=False)
        self.key = nn.Linear(d_model, width, bias=False)
        self.value = nn.Linear(d_model, width, bias=False)
        self.time_decay = nn.Parameter(-5 + 8 * along(width) ** (0.7 + 1.3 * deep))
        self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(width) + 1) % 3 - 1))
        self.output = nn.Linear(width, d_model, bias=False)
        orthogonal(self.value)
        for linear in (self.receptance, self.key, self.output):
            nn.init.zeros_(linear.weight)

    def _views(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sigmoid(r), k, v: (..., E) each."""
        x_r, x_k, x_v = (mixed(x, before, mu) for mu in (self.time_mix_r, self.time_mix_k, self.time_mix_v))
        return torch.sigmoid(self.receptance(x_r)), self.key(x_k), self.value(x_v)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        r, k, v = self._views(x, shifted(x))
        return self.output(r * wkv(k, v, self.time_decay, self.time_first))

    def cost(self, length: int) -> Cost:
        d_model, width = self.key.in_features, self.key.out_features
        maps = 3 * Cost.linear(length, d_model, width, bias=False) + Cost.linear(length, width, d_model, bias=False)
        return maps + Cost(other=length * (12.0 * d_model + 23.0 * width))

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        sums = wide(self.time_decay).new_zeros(batch, 3, len(self.time_decay))
        sums[:, 2] = -1e38  # nothing came before
        return self.time_mix_k.new_zeros(batch, len(self.time_mix_k)), sums

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """State: the token before (B, D), and the sums of wkv with their exponent (B, 3, E)."""
        before, sums = state
        r, k, v = self._views(x, before)
        o, sums = wkv(k.unsqueeze(1), v.unsqueeze(1), self.time_decay, self.time_first, h0=sums, return_state=True)
        return self.output(r * o.squeeze(1)), (x, sums)

    def chunk(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        before, sums = state
        r, k, v = self._views(x, shifted(x, before))
        o, sums = wkv(k, v, self.time_decay, self.time_first, h0=sums, return_state=True)
        return self.output(r * o), (x[:, -1], sums)


class ChannelMix(Mixer):
    """(B, L, D) -> (B, L, D): the feed-forward part, which sees the token before."""

    def __init__(self, d_model: int, width: int, layer: int, n_layers: int) -> None:
        super().__init__()
        p = ramp(d_model, layer, n_layers)
        self.time_mix_r, self.time_mix_k = nn.Parameter(p), nn.Parameter(p.clone())
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, width, bias=False)
        self.value = nn.Linear(width, d_model, bias=False)
        orthogonal(self.key)
        for linear in (self.receptance, self.value):
            nn.init.zeros_(linear.weight)

    def _mix(self, x: Tensor, before: Tensor) -> Tensor:
        r = self.receptance(mixed(x, before, self.time_mix_r))
        return torch.sigmoid(r) * self.value(F.relu(self.key(mixed(x, before, self.time_mix_k))).square())

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._mix(x, shifted(x))

    def cost(self, length: int) -> Cost:
        d_model, width = self.key.in_features, self.key.out_features
        maps = Cost.linear(length, d_model, width, bias=False) + Cost.linear(length, width, d_model, bias=False)
        maps = maps + Cost.linear(length, d_model, d_model, bias=False)
        return maps + Cost(other=length * (13.0 * d_model + 2.0 * width))

    def init_state(self, batch: int) -> Tensor:
        return self.time_mix_k.new_zeros(batch, len(self.time_mix_k))

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """State: the token before (B, D)."""
        return self._mix(x, state), x

    def chunk(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self._mix(x, shifted(x, state)), x[:, -1]


class RWKV4(RWKVStack):
    """time_dim: E, d_model unless given. channel_dim: H, 4 d_model unless given. A layer is two blocks of the stack."""

    card = Card(
        title="RWKV: Reinventing RNNs for the Transformer Era",
        year=2023,
        url="https://arxiv.org/abs/2305.13048",
        scaling="L",
        causal=True,
    )
    block = Block(ffn="none")

    def __init__(
        self, *, d_model: int, n_layers: int, time_dim: int | None = None, channel_dim: int | None = None, **stack: Any
    ) -> None:
        within = d_model if time_dim is None else time_dim
        hidden = 4 * d_model if channel_dim is None else channel_dim
        at_least(1, time_dim=time_dim, channel_dim=channel_dim)
        super().__init__(
            lambda layer: TimeMix(d_model, within, layer, n_layers),
            lambda layer: ChannelMix(d_model, hidden, layer, n_layers),
            d_model=d_model, n_layers=n_layers, **stack,
        )  # fmt: skip

    @classmethod
    def published(cls, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Published:
        """Of the released RWKV-4 and of Hugging Face's RwkvModel and RwkvForCausalLM, as they are stored."""
        base = first_prefix(tensors, "rwkv.", "")
        theirs = HUGGING_FACE if any(".attention." in name for name in tensors) else {}

        def name(text: str) -> str:
            return base + ".".join(theirs.get(part, part) for part in text.split("."))

        n_layers = number_of_layers(tensors, f"{base}blocks.")
        time_dim, d_model = tensors[name("blocks.0.att.key.weight")].shape
        options = {
            "d_model": d_model, "n_layers": n_layers, "time_dim": time_dim,
            "channel_dim": len(tensors[name("blocks.0.ffn.key.weight")]),
        }  # fmt: skip
        time = ("time_mix_r", "time_mix_k", "time_mix_v", "time_decay", "time_first")
        parts = {
            "att": (*time, *(f"{m}.weight" for m in ("receptance", "key", "value", "output"))),
            "ffn": ("time_mix_r", "time_mix_k", *(f"{m}.weight" for m in ("receptance", "key", "value"))),
        }
        norms = {"norm_0": "blocks.0.ln0", "norm": "ln_out"}
        names: dict[str, tuple[str, ...]] = {}
        for i in range(n_layers):
            for second, (part, own) in enumerate(parts.items()):
                block = f"layers.{2 * i + second}"
                norms[f"{block}.norm"] = f"blocks.{i}.ln{1 + second}"
                names |= {f"{block}.mixer.{n}": (name(f"blocks.{i}.{part}.{n}"),) for n in own}
        for own_norm, norm in norms.items():
            names |= {f"{own_norm}.{kind}": (name(f"{norm}.{kind}"),) for kind in ("weight", "bias")}
        return Published(options, names, ignored=(name("emb.weight"), "head.weight"))

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return undecayed(self, "time_*")
