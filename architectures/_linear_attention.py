"""What attention through feature maps shares: sums over keys in place of an L x L matrix.

With features phi(q_i), phi(k_j) of width M, y_i = phi(q_i) S / (phi(q_i) z) where S = sum_j phi(k_j) v_j' (M, d) and
z = sum_j phi(k_j) (M,), over all real keys, or over j <= i when causal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._precision import wide
from lra.encoder import Cost
from lra.kernels.decay_attention import decay_attention

CHUNK = 64


def summed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, causal: bool, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """phi(q_i) S (B, H, L, d) and phi(q_i) z (B, H, L, 1): features q, k: (B, H, L, M), v: (B, H, L, d), mask: (B, L).

    log_decay: (B, L, H), by which causal sums shrink before a key is added; for features whose scale moves along.
    Padding comes after all real tokens: the causal sums need no mask.
    """
    # a last value of 1 at real tokens makes the sum of the keys a column of S
    v = F.pad(v, (0, 1), value=1.0)
    if causal:
        if log_decay is None:
            log_decay = q.new_zeros(q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = decay_attention(q, k, v, log_decay, CHUNK, scale=1.0)
        assert isinstance(o, Tensor)
        o = o.transpose(1, 2)
    else:
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = wide(q), wide(k), wide(v.masked_fill(~mask[:, None, :, None], 0))
            o = q @ (k.mT @ v)
    return o[..., :-1], o[..., -1:]


def summed_step(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token of `summed`: q, k: (B, H, M), v: (B, H, d), S: (B, H, M, d), z: (B, H, M), without this token; returns
    both products and the new S and z."""
    S, z = S + k.unsqueeze(-1) * v.unsqueeze(-2), z + k
    return torch.einsum("bhm,bhmd->bhd", q, S), (q * z).sum(-1, keepdim=True), S, z


def sums_cost(length: int, heads: int, features: int, width: int, causal: bool) -> Cost:
    """Work of `summed`."""
    if causal:
        inside = CHUNK * (features + width + 1) + 2 * features * (width + 1)
        return Cost(other=2.0 * length * heads * inside)
    return Cost(4.0 * length * heads * features * (width + 1), 2.0 * length * heads * width)
