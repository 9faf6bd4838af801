"""Linear Transformer: attention whose weights are products of query and key features, computed as running sums.

Katharopoulos et al. 2020, arXiv:2006.16236. With d = qkv_dim / H and per head:

    Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v        (B, L, D) -> (B, H, L, d)
    y_i = phi(Q_i) S / (phi(Q_i) z + 1e-6)                 S = sum_j phi(K_j) V_j' (M, d),  z = sum_j phi(K_j) (M,)
    out = concat_h(y) W_o + b_o                            (B, L, D)       equations 5, 6; causal: equations 9 to 12

phi is elu(x) + 1 (section 3.2.1); `relu` is max(x, 0) + 0.001, `sigmoid` its namesake; `random` is the map of Random
Feature Attention (Peng et al. 2021, arXiv:2103.02143): [sin(W x), cos(W x)] / sqrt(m) of x scaled to length 1, rows of
W drawn from N(0, diag(sigma^2)) with sigma learned per head, so that phi(q) . phi(k) estimates
exp(-|sigma (q - k)|^2 / 2), a softmax kernel of unit vectors.

Initialisation: Xavier uniform for each of W_q, W_k, W_v, W_o and zero biases (the LRA code has none); sigma is 1.

Departures: norms come before each part, as in the LRA code. An estimate by random features may come out at 0 or below;
its denominator is kept at the least value the kernel can have, exp(-2 max(sigma)^2) a key, and W is drawn once, stored
with the weights. The paper of the random features adds gates, which are left out. LRA's code ignores padding and the
causal direction; neither happens here.

Checked against: tensors of the authors' LinearAttention and CausalLinearAttention, outputs and gradients, with padding;
tensors of LRA's layer; the definition with an explicit L x L matrix for every feature map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer, checked_width, drop_keys
from lra.architectures._checks import at_least, one_of
from lra.architectures._linear_attention import divided, summed, summed_chunk, summed_step, sums_cost
from lra.architectures._precision import wide
from lra.architectures._stack import Stack
from lra.attention import merge_heads
from lra.encoder import Card, Cost, lengths_of

FEATURE_MAPS = ("elu", "relu", "sigmoid", "random")
POSITIONS = ("sinusoidal", "learned", "none")
EPS = 1e-6
FLOOR = 1e-3  # what the ReLU of the Performer's authors adds: without it y jumps where the last feature goes out


State = tuple[Tensor, Tensor, Tensor]


class AboveElu(torch.autograd.Function):
    """elu(x) + 1. Its slope is the smaller of y and 1, so that nothing but y is kept and no exponential repeated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(max=0).exp_().add_(x.relu())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].clamp(max=1)


class LinearTransformerMixer(AttentionMixer):
    """(B, L, D) -> (B, L, D). n_features: rows of W, for the random map."""

    projection: Tensor | None

    def __init__(
        self, d_model: int, *, n_heads: int, qkv_dim: int, feature_map: str, causal: bool, n_features: int,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, width=qkv_dim, positions="none", causal=causal, dropout=dropout)
        self.feature_map = feature_map
        self.width = 2 * n_features if feature_map == "random" else self.head  # M
        self.sigma, projection = None, None
        if feature_map == "random":
            self.sigma = nn.Parameter(torch.ones(n_heads, self.head))
            projection = torch.randn(n_heads, n_features, self.head)
        self.register_buffer("projection", projection)

    def features(self, x: Tensor) -> Tensor:
        """phi: (B, H, L, d) -> (B, H, L, M)."""
        if self.projection is not None and self.sigma is not None:
            angle = wide(F.normalize(x, dim=-1) @ (self.projection * self.sigma.unsqueeze(1)).mT)
            return torch.cat([angle.sin(), angle.cos()], dim=-1) * self.projection.shape[1] ** -0.5
        if self.feature_map == "elu":
            return AboveElu.apply(x)
        return F.relu(x) + FLOOR if self.feature_map == "relu" else x.sigmoid()

    def _divided(self, top: Tensor, bottom: Tensor, keys: Tensor) -> Tensor:
        """keys: how many were summed, (B or 1, 1, L or 1, 1)."""
        if self.sigma is None:
            return divided(top, bottom + EPS)
        least = torch.exp(-2 * self.sigma.detach().square().amax(-1))[:, None, None]
        return divided(top, torch.maximum(bottom, keys * least))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        top, bottom = summed(self.features(q), self.features(k), drop_keys(v, self.rate), mask, self.causal)
        if self.causal:
            keys = torch.arange(1, q.shape[2] + 1, device=q.device)[:, None]
        else:
            keys = lengths_of(mask)[:, None, None, None]
        return self._divided(top, bottom, keys)

    def pairs(self, length: int) -> float:
        return 0.0

    def cost(self, length: int) -> Cost:
        qkv_dim = self.out.in_features
        total = super().cost(length) + sums_cost(length, self.n_heads, self.width, self.head, self.causal)
        if self.projection is not None:
            total += Cost(2.0 * length * qkv_dim * self.width, 6.0 * length * qkv_dim)
        return total + Cost(other=length * (6.0 * self.n_heads * self.width + 2.0 * qkv_dim))

    def init_state(self, batch: int) -> State:
        sums = self.out.weight.new_zeros(batch, self.n_heads, self.width, self.head)
        return torch.zeros((), dtype=torch.int64, device=sums.device), sums, sums[..., 0]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """State: how many keys, S (B, H, M, d) and z (B, H, M)."""
        count = state[0] + 1
        q, k, v = self.heads(x.unsqueeze(1))
        q, k, v = (part.squeeze(2) for part in (self.features(q), self.features(k), v))
        top, bottom, S, z = summed_step(q, k, v, state[1], state[2])
        y = self._divided(top.unsqueeze(2), bottom.unsqueeze(2), count)
        return self.out(y.flatten(1)), (count, S, z)

    def chunk(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = self.heads(x)
        top, bottom, S, z = summed_chunk(self.features(q), self.features(k), drop_keys(v, self.rate), state[1:])
        keys = state[0] + torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.out(merge_heads(self._divided(top, bottom, keys))), (state[0] + x.shape[1], S, z)


class LinearTransformer(Stack):
    """n_heads: must divide qkv_dim. qkv_dim: width of all heads together, d_model unless given. feature_map: one of
    FEATURE_MAPS. n_features: frequencies of the random map, each giving a sine and a cosine. attention_dropout:
    on weights that are never formed: a key is left out for all queries of a head."""

    card = Card(
        title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        year=2020,
        url="https://arxiv.org/abs/2006.16236",
        scaling="L",
        causal=False,
        variants={
            "relu": {"feature_map": "relu"},
            "sigmoid": {"feature_map": "sigmoid"},
            "random": {"feature_map": "random"},
        },
    )

    def __init__(
        self,
        *,
        d_model: int,
        direction: str = "bidirectional",
        n_heads: int = 4,
        qkv_dim: int | None = None,
        feature_map: str = "elu",
        n_features: int = 64,
        positions: str = "sinusoidal",
        attention_dropout: float = 0.0,
        block: Mapping[str, Any] | None = None,
        **stack: Any,
    ) -> None:
        width = checked_width(d_model, n_heads, qkv_dim, "none")
        one_of(FEATURE_MAPS, feature_map=feature_map)
        one_of(POSITIONS, positions=positions)
        at_least(1, n_features=n_features)
        causal = direction == "causal"
        super().__init__(
            lambda _: LinearTransformerMixer(
                d_model, n_heads=n_heads, qkv_dim=width, feature_map=feature_map, causal=causal, n_features=n_features,
                dropout=attention_dropout,
            ),
            native=True, d_model=d_model, direction=direction, block={"positions": positions, **(block or {})}, **stack,
        )  # fmt: skip
