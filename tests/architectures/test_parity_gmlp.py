"""gmlp against tensors of a public spatial gating unit, and a loop over the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.convolution.gmlp import GMLP, GMLPMixer


def mixer_of(**own: Any) -> GMLPMixer:
    mixer = GMLP(**{"d_model": 4, "n_layers": 1, "length": 9, "expand": 2.0, **own}).blocks[0].mixer
    assert isinstance(mixer, GMLPMixer)
    return mixer.double()


def loaded(g: dict[str, Tensor], head: int, direction: str) -> GMLPMixer:
    """One of the unit's two heads, whose features have a W of their own, with the norm over all of them outside."""
    mixer = mixer_of(direction=direction)
    mixer.weight.data, mixer.bias.data = g["param.weight"][head], g["param.bias"][head]
    return mixer


def unit(mixers: list[GMLPMixer], x: Tensor, norm: torch.nn.Module) -> Tensor:
    u, v = x.chunk(2, dim=-1)
    halves = [m.mixed(part) + m.bias[: x.shape[1], None] for m, part in zip(mixers, norm(v).chunk(2, -1), strict=True)]
    return u * torch.cat(halves, dim=-1)


@pytest.mark.parametrize(("direction", "key"), [("bidirectional", "y"), ("causal", "mid.y_causal")])
def test_gate_equals_that_of_a_public_unit(direction: str, key: str) -> None:
    g = golden("gmlp_sgu")
    mixers = [loaded(g, head, direction) for head in range(2)]
    norm = torch.nn.LayerNorm(4).double()
    norm.load_state_dict({name: g[f"param.norm.{name}"] for name in ("weight", "bias")})
    x = g["x"].requires_grad_()
    y = unit(mixers, x, norm)
    assert_near(y, g[key], "y")
    if direction == "causal":
        assert_near(unit(mixers, x[:, :7], norm), g["mid.y_causal_shorter"], "of a shorter sequence")
        return
    wanted = {f"norm.{name}": (getattr(norm, name), g[f"grad.norm.{name}"]) for name in ("weight", "bias")}
    for head, mixer in enumerate(mixers):
        for name in ("weight", "bias"):
            wanted[f"{name}.{head}"] = (getattr(mixer, name), g[f"grad.{name}"][head])
    assert_gradients(y, g, x, wanted)


def written_out(mixer: GMLPMixer, x: Tensor) -> Tensor:
    u, v = F.gelu(F.linear(x, mixer.proj_in.weight, mixer.proj_in.bias)).tensor_split(2, -1)
    v = F.layer_norm(v, v.shape[2:], mixer.norm.weight, mixer.norm.bias)
    length, rows = x.shape[1], []
    for t in range(length):
        seen = range(t + 1 if mixer.causal else length)
        if mixer.spatial == "full":
            row = [mixer.weight[t, r] for r in seen]
        else:  # w_{-1} is the last of the numbers
            row = [mixer.weight[t - r if t >= r else len(mixer.weight) + t - r] for r in seen]
        s = mixer.bias[t] + sum((w * v[:, r] for w, r in zip(row, seen, strict=True)), start=torch.zeros_like(v[:, 0]))
        if mixer.attention is not None:
            q, k, values = mixer.attention.to_qkv(x).chunk(3, -1)
            odds = torch.stack([(q[:, t] * k[:, r]).sum(-1) for r in seen], -1) * q.shape[-1] ** -0.5
            head = (odds.softmax(-1).unsqueeze(-1) * values[:, list(seen)]).sum(1)
            s = s + mixer.attention.to_out(head)
        rows.append(mixer.proj_out(u[:, t] * s))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("options", [{}, {"spatial": "toeplitz"}, {"attention": 3}])
@pytest.mark.parametrize("length", [1, 6, 9])
def test_mixer_equals_the_equations(options: dict[str, Any], direction: str, length: int) -> None:
    torch.manual_seed(0)
    mixer = mixer_of(direction=direction, **options)
    torch.nn.init.normal_(mixer.weight)
    x = torch.randn(2, length, 4, dtype=torch.float64)
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: written_out(mixer, x))


def test_a_toeplitz_map_has_its_numbers_on_diagonals() -> None:
    full, toeplitz = mixer_of(), mixer_of(spatial="toeplitz")
    assert toeplitz.weight.shape == (17,)
    full.weight.data = toeplitz.rows(0, 9).detach()
    full.bias.data = toeplitz.bias.data
    for offset in range(-8, 9):
        assert (full.weight.diagonal(offset) == full.weight.diagonal(offset)[0]).all()
    v = torch.randn(2, 9, 4, dtype=torch.float64)
    assert_near(toeplitz.mixed(v), full.mixed(v), "mixture")


def test_starts_as_a_feed_forward_part() -> None:
    """s is 1 up to a thousandth: out = u W_out + b_out."""
    mixer, x = mixer_of(), torch.randn(2, 9, 4, dtype=torch.float64)
    u = F.gelu(mixer.proj_in(x)).chunk(2, -1)[0]
    assert (mixer(x, everything(x)) - mixer.proj_out(u)).abs().max() < 2e-3


test_bad_arguments = refuses(mixer_of)(
    ({"spatial": "tall"}, "spatial is 'tall'; one of full, toeplitz"),
    ({"expand": 0.0}, "expand is 0.0; at least two hidden features"),
    ({"attention": -1}, "attention is -1; a width, 0 for none"),
)


def test_longer_sequences_are_refused() -> None:
    x = torch.randn(1, 10, 4, dtype=torch.float64)
    mixer = mixer_of(direction="causal")
    for call in (lambda: mixer(x, everything(x)), lambda: mixer.chunk(x, mixer.init_state(1))):
        with pytest.raises(ValueError, match="length 10 exceeds the 9 positions"):
            call()
