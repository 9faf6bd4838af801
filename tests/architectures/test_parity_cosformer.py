"""cosformer against tensors of the authors' module, and the definition with an L x L matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from stepping import assert_steps_equal_forward, run
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._linear_attention import summed
from lra.architectures.linear_attention.cosformer import LEAST, Cosformer, CosformerMixer
from lra.attention import merge_heads, split_heads


def theirs(g: dict[str, Tensor], causal: bool, span: int) -> CosformerMixer:
    """A mixer with the parameters of one of their modules."""
    width = len(g["param.out_proj.bias"])
    mixer = CosformerMixer(width, n_heads=int(g["cfg.H"]), qkv_dim=width, causal=causal, span=span).double()
    state = {f"qkv.{part}": torch.cat([g[f"param.{n}_proj.{part}"] for n in "qkv"]) for part in ("weight", "bias")}
    mixer.load_state_dict(state | {f"out.{part}": g[f"param.out_proj.{part}"] for part in ("weight", "bias")})
    return mixer


@pytest.mark.parametrize("causal", [False, True])
def test_layer_equals_the_authors(causal: bool) -> None:
    """Their M is the length of the batch."""
    g = golden("cosformer_causal" if causal else "cosformer_bidirectional")
    mixer = theirs(g, causal, int(g["cfg.L"]))
    x = g["x"].transpose(0, 1).requires_grad_()
    y = mixer(x, everything(x))
    torch.testing.assert_close(y.transpose(0, 1), g["y"], rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((y * g["w"].transpose(0, 1)).sum(), x)
    torch.testing.assert_close(grad.transpose(0, 1), g["grad.x"], rtol=0, atol=1e-11)


def test_sums_equal_the_authors_with_keys_from_elsewhere() -> None:
    g = golden("cosformer_bidirectional")
    mixer = theirs(g, False, int(g["cfg.S"]))
    x, source = g["x"].transpose(0, 1), g["in.cross"].transpose(0, 1)
    q, (_, k, v) = mixer.heads(x)[0], mixer.heads(source)
    top, bottom = summed(mixer.features(q), mixer.features(k), v, everything(source), causal=False)
    y = mixer.out(merge_heads(top / bottom.clamp(min=LEAST)))
    torch.testing.assert_close(y.transpose(0, 1), g["mid.y_cross"], rtol=0, atol=1e-12)


def explicit(mixer: CosformerMixer, x: Tensor, mask: Tensor) -> Tensor:
    """The layer by an L x L matrix, from the first equations."""
    q, k, v = (split_heads(part, mixer.n_heads) for part in F.linear(x, mixer.qkv.weight, mixer.qkv.bias).chunk(3, -1))
    i = torch.arange(x.shape[1], dtype=torch.float64)
    near = torch.cos(math.pi / 2 * (i[:, None] - i) / mixer.span)
    allowed = mask[:, None, None, :] & (i[:, None] >= i if mixer.causal else torch.ones_like(near, dtype=torch.bool))
    weights = q.clamp(min=0) @ k.clamp(min=0).mT * near * allowed
    assert (weights >= 0).all()
    y = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) @ v
    return F.linear(y.transpose(1, 2).flatten(2), mixer.out.weight, mixer.out.bias)


@pytest.mark.parametrize("std", [0.5, 4e-5])
@pytest.mark.parametrize("causal", [False, True])
def test_outputs_and_gradients_equal_the_definition(causal: bool, std: float) -> None:
    """Over more than a chunk of the operator; some queries meet no key, and sums of small weights fall below 1e-6."""
    torch.manual_seed(0)
    mixer = CosformerMixer(12, n_heads=3, qkv_dim=12, causal=causal, span=90).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.shape[0] == 12 else std)
    x, mask = torch.randn(2, 70, 12, dtype=torch.float64), torch.arange(70) < torch.tensor([[70], [41]])
    w = torch.randn_like(x) * mask.unsqueeze(-1)
    x.requires_grad_()
    q, k, v = mixer.heads(x)
    assert not q.relu().any(-1).all()
    below = summed(mixer.features(q), mixer.features(k), v, mask, causal)[1] < 1e-6
    assert below.any()
    assert not below.all()
    own, other = (f(x, mask) for f in (mixer, lambda x, mask: explicit(mixer, x, mask)))
    torch.testing.assert_close(own[mask], other[mask], rtol=0, atol=1e-11)
    inputs = (x, *mixer.parameters())
    for a, b in zip(*(torch.autograd.grad((y * w).sum(), inputs) for y in (own, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_weights_are_a_cosine_of_the_distance() -> None:
    """Of the distance alone, wherever a pair stands; 1 at distance 0, and above 0 up to the last."""
    mixer = CosformerMixer(4, n_heads=1, qkv_dim=4, causal=False, span=16)
    phi = mixer.features(torch.tensor([0.5, 0.5, 0.5, -0.5], dtype=torch.float64).expand(1, 1, 16, 4))
    weights = (phi @ phi.mT)[0, 0] / 0.75
    distance = torch.arange(16, dtype=torch.float64)
    torch.testing.assert_close(weights[0], torch.cos(math.pi * distance / 32), rtol=0, atol=1e-14)
    for i in range(16):
        torch.testing.assert_close(weights[i], weights[0][(distance - i).abs().long()], rtol=0, atol=1e-14)
    assert weights.min() > 0


def test_a_query_that_meets_no_key_gets_nothing() -> None:
    mixer = CosformerMixer(8, n_heads=2, qkv_dim=8, causal=False, span=9).double()
    nn.init.normal_(mixer.out.bias)
    with torch.no_grad():
        mixer.qkv.weight[:8] = 0
        mixer.qkv.bias[:8] = -1
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    y = mixer(x, everything(x))
    torch.testing.assert_close(y, mixer.out.bias.expand_as(y), rtol=0, atol=0)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(CosformerMixer(8, n_heads=2, qkv_dim=8, causal=True, span=2048), 8, rtol=1e-4, atol=1e-5)


def test_initialisation() -> None:
    """Xavier's bound for each of the four maps."""
    torch.manual_seed(0)
    mixer = Cosformer(d_model=64, n_layers=1, length=8).blocks[0].mixer
    assert isinstance(mixer, CosformerMixer)
    for weight in (*mixer.qkv.weight.chunk(3), mixer.out.weight):
        assert 0.99 < weight.abs().max() / (6 / 128) ** 0.5 <= 1
    assert not mixer.qkv.bias.any()
    assert not mixer.out.bias.any()


def test_span_is_the_length_unless_given() -> None:
    for given, found in ((None, 8), (20, 20)):
        mixer = Cosformer(d_model=16, n_layers=1, length=8, span=given).blocks[0].mixer
        assert isinstance(mixer, CosformerMixer)
        assert mixer.span == found


def test_wrong_arguments_are_named() -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "length": 8}
    for wrong, said in (
        ({"n_heads": 3}, "n_heads is 3; a divisor of the attention's width 16"),
        ({"span": 7}, "span is 7; at least 8"),
        ({"positions": "rope"}, "positions is 'rope'; one of sinusoidal, learned, none"),
        ({"direction": "both"}, "direction is 'both'; one of causal, bidirectional"),
    ):
        with pytest.raises(ValueError, match=said):
            Cosformer(**shape, **wrong)
    mixer, x = CosformerMixer(16, n_heads=2, qkv_dim=16, causal=True, span=8), torch.zeros(1, 9, 16)
    with pytest.raises(ValueError, match="length 9 exceeds the span 8"):
        mixer(x, everything(x))
    _, state = run(mixer, x[:, :8])
    with pytest.raises(ValueError, match="length 9 exceeds the span 8"):
        mixer.step(x[:, 8], state)
