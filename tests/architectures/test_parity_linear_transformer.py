"""linear_transformer against tensors of the authors' code and of LRA's, and the definition with an L x L matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from stepping import assert_steps_equal_forward
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.linear_attention.linear_transformer import (
    FEATURE_MAPS,
    LinearTransformer,
    LinearTransformerMixer,
)
from lra.attention import split_heads


@pytest.mark.parametrize("causal", [False, True])
def test_layer_equals_the_authors(causal: bool) -> None:
    """The layer whose maps hand on q, k and v: outputs and gradients. Heads have 4 features there, and values 5: the
    fifth of the keys is so low that its feature is 0. Keys at the padding are as low where the direction is causal: the
    authors read outputs there too, and only those depend on such keys."""
    g = golden("linear_attn_elu_causal" if causal else "linear_attn_elu")
    mask = g["mask"].bool()
    assert not mask.all(), "no padding: the test shows less than it says"
    mixer = LinearTransformerMixer(30, n_heads=2, qkv_dim=10, feature_map="elu", causal=causal, n_features=1).double()
    identity = torch.eye(30, dtype=torch.float64)
    mixer.load_state_dict({"qkv.weight": identity, "out.weight": identity[:, :10]}, strict=False)
    inputs = [g[f"in.{name}"].requires_grad_() for name in "qkv"]
    q, k, v = F.pad(inputs[0], (0, 1)), F.pad(inputs[1], (0, 1), value=-1e4), inputs[2]
    k = k.masked_fill(~mask[..., None, None] & causal, -1e4)
    y = mixer(torch.cat([t.flatten(2) for t in (q, k, v)], dim=-1), mask)[..., :10].unflatten(-1, (2, 5))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-13)
    for name, grad in zip("qkv", torch.autograd.grad(y, inputs, g["w"]), strict=True):
        torch.testing.assert_close(grad, g[f"grad.{name}"], rtol=0, atol=1e-12)


def test_layer_equals_lra_s() -> None:
    g = golden("lra_linear")
    mixer = LinearTransformerMixer(8, n_heads=2, qkv_dim=8, feature_map="elu", causal=False, n_features=1).double()
    names = ("query", "key", "value")
    mixer.load_state_dict({
        "qkv.weight": torch.cat([g[f"param.{name}.kernel"].flatten(1).T for name in names]),
        "qkv.bias": torch.cat([g[f"param.{name}.bias"].flatten() for name in names]),
        "out.weight": g["param.out.kernel"].flatten(0, 1).T,
        "out.bias": g["param.out.bias"],
    })  # fmt: skip
    x = g["x"].requires_grad_()
    y = mixer(x, everything(x))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad((y * g["w"]).sum(), x)[0], g["grad.x"], rtol=0, atol=1e-12)


def explicit(mixer: LinearTransformerMixer, x: Tensor, mask: Tensor) -> Tensor:
    """The layer by an L x L matrix, from the equations."""
    q, k, v = (split_heads(part, mixer.n_heads) for part in F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(3, -1))
    allowed = mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
    if mixer.causal:
        allowed = allowed & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if mixer.feature_map == "random":
        assert mixer.sigma is not None
        assert mixer.projection is not None
        frequencies = mixer.projection * mixer.sigma[:, None]
        q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
        between = (q.unsqueeze(3) - k.unsqueeze(2)).unsqueeze(-2) * frequencies[:, None, None]
        weights = between.sum(-1).cos().mean(-1) * allowed
        least = torch.exp(-2 * mixer.sigma.square().amax(-1))[:, None, None].detach()
        total = torch.maximum(weights.sum(-1, keepdim=True), allowed.sum(-1, keepdim=True) * least)
    else:
        phi = {"elu": lambda t: torch.where(t < 0, t.exp(), t + 1), "relu": lambda t: t.clamp(min=0) + 1e-3,
               "sigmoid": lambda t: 1 / (1 + (-t).exp())}[mixer.feature_map]  # fmt: skip
        weights = phi(q) @ phi(k).mT * allowed
        total = weights.sum(-1, keepdim=True) + 1e-6
    y = (weights / total @ v).transpose(1, 2).flatten(2)
    return F.linear(y, mixer.out.weight, mixer.out.bias)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_outputs_and_gradients_equal_the_definition(feature_map: str, causal: bool) -> None:
    mixer = LinearTransformerMixer(
        12, n_heads=3, qkv_dim=12, feature_map=feature_map, causal=causal, n_features=5
    ).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, mask = torch.randn(2, 70, 12, dtype=torch.float64), torch.arange(70) < torch.tensor([[70], [41]])
    w = torch.randn_like(x) * mask.unsqueeze(-1)
    x.requires_grad_()
    own, other = (f(x, mask) for f in (mixer, lambda x, mask: explicit(mixer, x, mask)))
    torch.testing.assert_close(own[mask], other[mask], rtol=1e-10, atol=1e-10)
    inputs = (x, *mixer.parameters())
    for a, b in zip(*(torch.autograd.grad((y * w).sum(), inputs) for y in (own, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_random_features_estimate_the_kernel_of_unit_vectors() -> None:
    """The error of the mean over m frequencies falls as 1 / sqrt(m): 256 times as many, a sixteenth."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 200, 8, dtype=torch.float64) for _ in range(2))
    exact = torch.exp(-(F.normalize(q, dim=-1) - F.normalize(k, dim=-1)).square().sum(-1) / 2)
    errors = []
    for m in (16, 4096):
        mixer = LinearTransformerMixer(
            8, n_heads=1, qkv_dim=8, feature_map="random", causal=False, n_features=m
        ).double()
        found = (mixer.features(q) * mixer.features(k)).sum(-1)
        errors.append((found - exact).square().mean().sqrt())
    assert 8 < errors[0] / errors[1] < 32


def test_step_equals_forward_over_2048_tokens() -> None:
    for feature_map in ("elu", "random"):
        mixer = LinearTransformerMixer(8, n_heads=2, qkv_dim=8, feature_map=feature_map, causal=True, n_features=4)
        assert_steps_equal_forward(mixer, 8, rtol=1e-4, atol=2e-5)


def test_wrong_arguments_are_named() -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "length": 8}
    for wrong, said in (
        ({"n_heads": 3}, "n_heads is 3; a divisor of the attention's width 16"),
        ({"feature_map": "exp"}, "feature_map is 'exp'; one of elu, relu, sigmoid, random"),
        ({"positions": "rope"}, "positions is 'rope'; one of sinusoidal, learned, none"),
        ({"n_features": 0}, "n_features is 0; at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            LinearTransformer(**shape, **wrong)
