"""rwkv6 against tensors of the authors' two parts of a layer and of the recurrence, and the numbers it starts with."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import assert_close, assert_layer_as_stored, golden
from refusals import refuses
from stepping import run
from torch import Tensor

from lra.architectures.linear_attention.rwkv6 import RWKV6, ChannelMix, TimeMix, advance


def loaded(part: TimeMix | ChannelMix, g: dict[str, Tensor], prefix: str = "param.") -> dict[str, Tensor]:
    """The stored tensors in the shapes of ours, whose vectors have one dimension."""
    return {name: g[f"{prefix}{name}"].view(p.shape) for name, p in part.named_parameters()}


def time_mix(g: dict[str, Tensor]) -> TimeMix:
    mix, decay = g["param.time_maa_w2"].shape[1], len(g["param.time_decay_w2"])
    part = TimeMix(
        g["x"].shape[-1], n_heads=int(g["cfg.heads"]), mix_rank=mix, decay_rank=decay, layer=0, n_layers=1
    ).double()
    part.load_state_dict(loaded(part, g))
    return part


def channel_mix(g: dict[str, Tensor]) -> ChannelMix:
    part = ChannelMix(g["x"].shape[-1], len(g["param.key.weight"]), 0, 1).double()
    part.load_state_dict(loaded(part, g))
    return part


@pytest.mark.parametrize(("name", "make"), [("rwkv6_timemix", time_mix), ("rwkv6_channelmix", channel_mix)])
def test_parts_equal_the_authors(name: str, make: Any) -> None:
    g = golden(name)
    part = make(g)
    assert_layer_as_stored(part, g, loaded(part, g, "grad.param."))


@pytest.mark.parametrize(("name", "make"), [("rwkv6_timemix", time_mix), ("rwkv6_channelmix", channel_mix)])
def test_steps_equal_the_authors(name: str, make: Any) -> None:
    g = golden(name)
    y, state = run(make(g), g["x"])
    assert_close(y, g["y"], 1e-12)
    if "mid.final_state" in g:
        assert_close(state[1], g["mid.final_state"], 1e-12)


def test_recurrence_from_a_state_equals_flash_linear_attention() -> None:
    g = golden("rwkv6_wkv")
    names = ("r", "k", "v", "decay", "u", "initial_state")
    inputs = [g[f"in.{name}"].requires_grad_() for name in names]
    *sequences, u, S = inputs
    outputs = []
    for t in range(sequences[0].shape[2]):
        r, k, v, log_w = (x[:, :, t] for x in sequences)
        o, S = advance(r, k, v, log_w, u, S)
        outputs.append(o)
    y = torch.stack(outputs, 2)
    assert_close(y, g["y"], 1e-12)
    assert_close(S, g["mid.final_state"], 1e-12)
    for name, grad in zip(names, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        assert_close(grad, g[f"grad.{name}"], name=name)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_initialisation(n_layers: int) -> None:
    """The loops of the released code."""
    d = 8
    encoder = RWKV6(d_model=d, n_layers=n_layers, length=16, n_heads=2)
    for layer in range(n_layers):
        time, channel = (encoder.blocks[2 * layer + part].mixer for part in (0, 1))
        assert isinstance(time, TimeMix)
        assert isinstance(channel, ChannelMix)
        up, down = (0.0 if n_layers == 1 else layer / (n_layers - 1)), 1 - layer / n_layers
        for i in range(d):
            p = (i / d) ** down
            for name, value in (("x", p), ("w", p), ("k", p), ("v", p + 0.3 * up)):
                assert getattr(time, f"time_maa_{name}")[i].item() == pytest.approx(1 - value, abs=1e-6)
            for name in ("r", "g"):
                assert getattr(time, f"time_maa_{name}")[i].item() == pytest.approx(1 - p**0.5, abs=1e-6)
            decay = -6 + 5 * (i / (d - 1)) ** (0.7 + 1.3 * up)
            assert time.time_decay[i].item() == pytest.approx(decay, abs=1e-5)
            bonus = up * (1 - i / (d - 1)) + 0.1 * ((i + 1) % 3 - 1)
            assert time.time_faaaa.flatten()[i].item() == pytest.approx(bonus, abs=1e-6)
            for part in (channel.time_maa_k, channel.time_maa_r):
                assert part[i].item() == pytest.approx(1 - p, abs=1e-6)
        for linear in (time.output, channel.receptance, channel.value):
            assert not linear.weight.any()
        for linear, gain in ((time.receptance, 1.0), (time.key, 0.1), (time.value, 1.0), (time.gate, 0.1)):
            torch.testing.assert_close(linear.weight @ linear.weight.T, gain**2 * torch.eye(d), rtol=0, atol=1e-5)
        torch.testing.assert_close(time.ln_x.weight, torch.full((d,), ((layer + 1) / n_layers) ** 0.7))


def test_weight_decay_spares_what_is_no_map() -> None:
    encoder = RWKV6(d_model=8, n_layers=1, length=8)
    first = {name: next((p for p in encoder.optim if fnmatch(name, p)), None) for name, _ in encoder.named_parameters()}
    assert {name.rpartition(".")[2] for name, pattern in first.items() if pattern == "*.time_decay"} == {"time_decay"}
    maps = {"receptance.weight", "key.weight", "value.weight", "gate.weight", "output.weight"}
    assert all(name.endswith(tuple(maps)) == (pattern is None) for name, pattern in first.items())


test_wrong_arguments_are_named = refuses(RWKV6, d_model=8, n_layers=1, length=8)(
    ({"n_heads": 3}, "n_heads is 3; a divisor of d_model, 8"),
    ({"mix_rank": 0}, "mix_rank is 0; at least 1"),
    ({"channel_dim": 0}, "channel_dim is 0; at least 1"),
    ({"block": {"ffn": "gelu"}}, r"block\.ffn is 'gelu'; 'none'"),
)
