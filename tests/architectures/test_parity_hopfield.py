"""hopfield against tensors of the released layer, and its retrieval of one pattern."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import assert_close, golden
from refusals import refuses
from torch import Tensor, nn

from lra.architectures._norm import LayerNorm
from lra.architectures.attention.hopfield import Hopfield, HopfieldMixer

CORE = "param.association_core."


def loaded(g: dict[str, Tensor]) -> HopfieldMixer:
    """With maps of the widths that its three inputs have."""
    heads, size, steps = (int(g[f"cfg.{n}"]) for n in ("H", "d", "steps"))
    mixer = HopfieldMixer(
        heads * size, heads, beta=float(g["cfg.beta"]), steps=steps, normalised=True, causal=False, dropout=0.0
    ).double()
    state = {f"p_norm.{kind}": g[f"{CORE}p_norm_{kind}"] for kind in ("weight", "bias")}
    parts = (("q", "state_pattern"), ("k", "stored_pattern"), ("v", "pattern_projection"))
    for (name, norm), bias in zip(parts, g[f"{CORE}in_proj_bias"].chunk(3), strict=True):
        weight = g[f"{CORE}{name}_proj_weight"]
        setattr(mixer, f"{name}_proj", nn.Linear(weight.shape[1], heads * size).double())
        setattr(mixer, f"norm_{norm}", LayerNorm(weight.shape[1]).double())
        state |= {f"{name}_proj.weight": weight, f"{name}_proj.bias": bias}
        state |= {f"norm_{norm}.{kind}": g[f"param.norm_{norm}.{kind}"] for kind in ("weight", "bias")}
    mixer.out_proj = nn.Linear(heads * size, int(g["cfg.O"])).double()
    mixer.load_state_dict(state | {f"out_proj.{kind}": g[f"{CORE}out_proj.{kind}"] for kind in ("weight", "bias")})
    return mixer


@pytest.mark.parametrize("name", ["hopfield_steps0", "hopfield_steps3"])
def test_equals_the_released_layer(name: str) -> None:
    g = golden(name)
    mixer, inputs = loaded(g), [g[f"in.{n}"].requires_grad_() for n in ("state", "stored", "projection")]
    y = mixer.retrieve(*mixer.heads(*inputs), g["mask"].bool()[:, None, None])
    assert_close(y, g["y"], 1e-12)
    (y * g["w"]).sum().backward()
    for own, key in zip(inputs, ("state", "stored", "projection"), strict=True):
        assert_close(own.grad, g[f"grad.{key}"], 1e-11, key)


def test_a_large_beta_retrieves_the_nearest_pattern_in_one_update() -> None:
    """Theorems 4 and 5: convergence after one update, with an error exponential in beta times the separation."""
    torch.manual_seed(0)
    patterns = torch.randn(1, 1, 6, 32, dtype=torch.float64)
    state = patterns + 0.1 * torch.randn_like(patterns)
    mixer = HopfieldMixer(32, 1, beta=4.0, steps=1, normalised=False, causal=False, dropout=0.0).double()
    nn.init.eye_(mixer.out_proj.weight)
    allowed = torch.ones(6, 6, dtype=torch.bool)
    once = mixer.retrieve(state, patterns, patterns, allowed)
    assert_close(once, patterns[:, 0], 1e-10)
    mixer.beta, mixer.steps = 1e-9, 0
    assert_close(mixer.retrieve(state, patterns, patterns, allowed)[0, 0], patterns.mean((0, 1, 2)), 1e-6)


test_wrong_arguments_are_named = refuses(Hopfield, d_model=16, n_layers=1, length=8)(
    ({"steps": -1}, "steps is -1; at least 0"),
    ({"beta": 0.0}, r"beta is 0\.0; more than 0"),
    ({"n_heads": 3}, "n_heads is 3; a divisor"),
    ({"positions": "rope"}, "positions is 'rope'; one of sinusoidal, learned, none"),
)
