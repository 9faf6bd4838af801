"""performer against tensors of performer-pytorch, the L x L matrix of its features, and softmax attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from stepping import assert_steps_equal_forward, stepped
from torch import Tensor
from torch.nn import functional as F

from lra.architectures._linear_attention import summed
from lra.architectures.linear_attention import linear_transformer, performer
from lra.architectures.linear_attention.linear_transformer import LinearTransformerMixer
from lra.architectures.linear_attention.performer import Performer, PerformerMixer, orthogonal_features
from lra.attention import merge_heads, split_heads

both = pytest.mark.parametrize("causal", [False, True])
maps = pytest.mark.parametrize("feature_map", ["softmax", "relu"])


@both
@maps
def test_layer_equals_performer_pytorch(feature_map: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer whose maps hand on q, k and v: features, outputs and gradients. Causally theirs differ in two places,
    which are put in here: its sums of keys carry a further 1e-6 for each feature, which are m^-1/2 smaller there, and
    its c is the largest of the whole sequence."""
    g = golden(f"performer_{feature_map}{'_causal' if causal else ''}")
    mixer = PerformerMixer(
        36, n_heads=2, qkv_dim=12, feature_map=feature_map, causal=causal, n_features=14, redraw=0
    ).double()
    mixer.projection = g["mid.projection"]
    identity = torch.eye(36, dtype=torch.float64)
    mixer.load_state_dict({"qkv.weight": identity, "out.weight": identity[:, :12]}, strict=False)
    scale = 14**-0.5 if feature_map == "softmax" else 1.0
    features: dict[str, Tensor] = {}

    def sums(phi_q: Tensor, phi_k: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        features.update(q=phi_q, k=phi_k)
        top, bottom = summed(phi_q, phi_k, *more)
        return top, bottom + (1e-6 / scale * phi_q.sum(-1, keepdim=True) if causal else 0)

    def largest(dots: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        return g["mid.max_k"].expand(-1, -1, dots.shape[2], -1), None

    monkeypatch.setattr(performer, "summed", sums)
    if causal:
        monkeypatch.setattr(mixer, "largest_key", largest)
    given = [g[f"in.{name}"].requires_grad_() for name in "qkv"]
    x = torch.cat([merge_heads(t) for t in given], dim=-1)
    y = split_heads(mixer(x, everything(x))[..., :12], 2)
    torch.testing.assert_close(features["q"] * scale, g["mid.phi_q"], rtol=0, atol=1e-13)
    torch.testing.assert_close(features["k"] * scale, g["mid.phi_k"], rtol=0, atol=1e-13)
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    for name, grad in zip("qkv", torch.autograd.grad(y, given, g["w"]), strict=True):
        torch.testing.assert_close(grad, g[f"grad.{name}"], rtol=0, atol=1e-11)


def heads(mixer: PerformerMixer, x: Tensor) -> list[Tensor]:
    parts = F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(3, -1)
    return [split_heads(part, mixer.n_heads) for part in parts]


def explicit(mixer: PerformerMixer, x: Tensor, mask: Tensor) -> Tensor:
    """The layer by an L x L matrix of products of features, query by query."""
    q, k, v = heads(mixer, x)
    scale, rows = q.shape[-1] ** -0.25, []
    dots = [t * scale @ mixer.projection.T for t in (q, k)]
    halves = [(t * scale).square().sum(-1, keepdim=True) / 2 for t in (q, k)]
    for i in range(x.shape[1]):
        row = []
        for b, real in enumerate(mask.sum(1).tolist()):
            seen = slice(0, i + 1 if mixer.causal else real)
            dot_q, dot_k = dots[0][b, :, i : i + 1], dots[1][b, :, seen]
            if mixer.feature_map == "relu":
                weights = (dot_q.relu() + 1e-3) @ (dot_k.relu() + 1e-3).mT
            else:
                c = dot_k.detach().amax(-1, keepdim=True).cummax(1).values  # of each key, when it was added
                last = c[:, -1:]
                phi_k = (dot_k - halves[1][b, :, seen] - last).exp()
                phi_k = phi_k + mixer.eps * ((c - last).exp() if mixer.causal else 1)
                c_q = dot_q.detach().amax(-1, keepdim=True)
                weights = ((dot_q - halves[0][b, :, i : i + 1] - c_q).exp() + mixer.eps) @ phi_k.mT
            row.append(weights / weights.sum(-1, keepdim=True) @ v[b, :, seen])
        rows.append(torch.stack(row))
    return F.linear(merge_heads(torch.cat(rows, 2)), mixer.out.weight, mixer.out.bias)


@both
@maps
def test_outputs_and_gradients_equal_the_definition(feature_map: str, causal: bool) -> None:
    mixer = PerformerMixer(
        12, n_heads=3, qkv_dim=12, feature_map=feature_map, causal=causal, n_features=9, redraw=0
    ).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, mask = torch.randn(2, 40, 12, dtype=torch.float64), torch.arange(40) < torch.tensor([[40], [23]])
    x = x * mask.unsqueeze(-1)
    w = torch.randn_like(x) * mask.unsqueeze(-1)
    x.requires_grad_()
    own, other = mixer(x, mask), explicit(mixer, x, mask)
    torch.testing.assert_close(own[mask], other[mask], rtol=1e-10, atol=1e-10)
    inputs = (x, *mixer.parameters())
    for a, b in zip(*(torch.autograd.grad((y * w).sum(), inputs) for y in (own, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@both
def test_the_deterministic_map_is_that_of_the_linear_transformer_with_relu(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LRA's default: relu(x) + 1e-3 without a projection. The other layer adds a small number to the sum it divides by,
    which is left out here."""
    monkeypatch.setattr(linear_transformer, "EPS", 0.0)
    torch.manual_seed(0)
    mixer = PerformerMixer(
        12, n_heads=3, qkv_dim=12, feature_map="deterministic", causal=causal, n_features=4, redraw=1000
    )
    other = LinearTransformerMixer(12, n_heads=3, qkv_dim=12, feature_map="relu", causal=causal, n_features=4)
    other.load_state_dict({k: v for k, v in mixer.state_dict().items() if k in other.state_dict()})
    x, mask = torch.randn(2, 40, 12), torch.arange(40) < torch.tensor([[40], [23]])
    torch.testing.assert_close(mixer(x, mask)[mask], other(x, mask)[mask], rtol=0, atol=5e-6)
    if causal:
        torch.testing.assert_close(stepped(mixer.eval(), x), mixer(x, everything(x)), rtol=0, atol=5e-6)


@both
def test_error_to_softmax_attention_falls_as_the_root_of_the_features(causal: bool) -> None:
    """Sixteen times as many features, a quarter of the error; without the 1e-4, which leaves a bias. Scores are small:
    the features are log-normal, and of large scores few features estimate nothing."""
    torch.manual_seed(0)
    x = torch.randn(2, 50, 16, dtype=torch.float64) / 2
    errors = []
    for m in (128, 2048):
        draws: list[Tensor] = []
        for _ in range(4):
            torch.manual_seed(len(draws))
            mixer = PerformerMixer(
                16, n_heads=2, qkv_dim=16, feature_map="softmax", causal=causal, n_features=m, redraw=0
            ).double()
            mixer.eps = 0.0
            q, k, v = heads(mixer, x)
            exact = mixer.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal)))
            draws.append((mixer(x, everything(x)) - exact).square().mean())
        errors.append(torch.stack(draws).mean().sqrt())
    assert 2.5 < errors[0] / errors[1] < 6.5
    assert errors[1] < 0.1


def test_features_are_orthogonal_in_blocks_with_gaussian_lengths() -> None:
    w = orthogonal_features(8 * 300 + 3, 8, torch.Generator().manual_seed(0)).double()
    for block in (*w[:2400].view(300, 8, 8)[:20], w[2400:]):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-5)
    # the squared length of a Gaussian vector of 8 numbers has mean 8 and variance 16
    squares = w.square().sum(1)
    assert abs(squares.mean() - 8) < 4 * 4 / len(w) ** 0.5
    assert abs(squares.var() - 16) < 2
    # any direction alike: the mean of w w' is the identity
    torch.testing.assert_close(w.T @ w / len(w), torch.eye(8, dtype=torch.float64), rtol=0, atol=0.15)
    torch.testing.assert_close(w.mean(0), torch.zeros(8, dtype=torch.float64), rtol=0, atol=0.1)


def test_features_are_drawn_anew_and_the_same_after_a_restart() -> None:
    def built(seed: int) -> PerformerMixer:
        torch.manual_seed(seed)
        return PerformerMixer(8, n_heads=2, qkv_dim=8, feature_map="softmax", causal=False, n_features=6, redraw=3)

    one, x = built(0), torch.randn(1, 5, 8)
    drawn = [one.projection.clone()]
    for _ in range(7):
        one.train()(x, everything(x))
        one.eval()(x, everything(x))
        drawn.append(one.projection.clone())
    same = [torch.equal(a, b) for a, b in pairwise(drawn)]
    assert same == [True, True, False, True, True, False, True]
    two = built(1)
    two.load_state_dict(one.state_dict())
    for mixer in (one, two):
        for _ in range(3):
            mixer.train()(x, everything(x))
    assert torch.equal(one.projection, two.projection)
    assert not torch.equal(one.projection, drawn[-1])


def test_step_equals_forward_over_2048_tokens() -> None:
    for feature_map in ("softmax", "relu"):
        mixer = PerformerMixer(8, n_heads=2, qkv_dim=8, feature_map=feature_map, causal=True, n_features=6, redraw=0)
        assert_steps_equal_forward(mixer, 8, rtol=1e-4, atol=2e-5)


def test_wrong_arguments_are_named() -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "length": 8}
    for wrong, said in (
        ({"n_heads": 3}, "n_heads is 3; a divisor of the attention's width 16"),
        ({"feature_map": "elu"}, "feature_map is 'elu'; one of softmax, relu, deterministic"),
        ({"feature_map": "deterministic", "n_features": 4}, "n_features is 4; .* those of a head, 4"),
        ({"n_features": 0}, "n_features is 0 and redraw 1000; at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            Performer(**shape, **wrong)
