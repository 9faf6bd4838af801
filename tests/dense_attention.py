"""Comparison of a sparse attention layer with its dense definition: a softmax under an explicit L x L mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._attention import AttentionMixer
from lra.attention import merge_heads


def real_prefixes(*lengths: int, total: int | None = None) -> Tensor:
    """(B, L) mask with these numbers of real tokens."""
    return torch.arange(total or max(lengths)) < torch.tensor(lengths)[:, None]


def distances(length: int) -> Tensor:
    """j - i: (L, L)."""
    return torch.arange(length) - torch.arange(length)[:, None]


def load_lra(mixer: AttentionMixer, g: dict[str, Tensor]) -> AttentionMixer:
    """With the parameters of a layer of the LRA code: kernels (D, H, d), and (H, d, D) going out."""
    names = ("query", "key", "value")
    state = {
        "qkv.weight": torch.cat([g[f"param.{name}.kernel"].flatten(1).T for name in names]),
        "qkv.bias": torch.cat([g[f"param.{name}.bias"].flatten() for name in names]),
        "out.weight": g["param.out.kernel"].flatten(0, 1).T,
        "out.bias": g["param.out.bias"],
    }
    left = mixer.double().load_state_dict(state, strict=False)
    assert not left.unexpected_keys
    return mixer


def assert_dense(mixer: AttentionMixer, sees: Tensor, mask: Tensor, tolerance: float = 1e-11) -> None:
    """Outputs at real tokens, the gradient of the input and of every parameter, in float64. sees: (B or 1, H or 1, L,
    L) bool, padding left out."""
    mixer = mixer.double()
    torch.manual_seed(0)
    x = torch.randn(*mask.shape, mixer.out.out_features, dtype=torch.float64).masked_fill(~mask[..., None], 0)
    x.requires_grad_()
    given = [x, *mixer.parameters()]
    q, k, v = mixer.heads(x)
    allowed = sees & mask[:, None, None]
    bias = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    if mixer.slopes is not None:
        bias = bias - mixer.slopes[:, None, None] * distances(mask.shape[1]).abs()
    dense = mixer.out(merge_heads(F.scaled_dot_product_attention(q, k, v, bias)))[mask]
    y = mixer(x, mask)[mask]
    torch.testing.assert_close(y, dense, rtol=0, atol=tolerance)
    weight = torch.randn_like(y)
    one, two = (torch.autograd.grad(t, given, weight, materialize_grads=True) for t in (y, dense))
    for found, wanted in zip(one, two, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=10 * tolerance)
