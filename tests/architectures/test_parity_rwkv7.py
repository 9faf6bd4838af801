"""rwkv7 against tensors of the NumPy reference and of the recurrence, its own steps, and the numbers it starts with."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import assert_close, everything, golden
from refusals import refuses
from stepping import run
from torch import Tensor, nn

from lra.architectures._delta import Addition, channel_delta, channel_delta_step
from lra.architectures.linear_attention.rwkv7 import RWKV7, ChannelMix, TimeMix, suggested_rank

NAMES = {"ln_x.weight": "ln_x_w", "ln_x.bias": "ln_x_b"}


def time_mix(g: dict[str, Tensor], layer: int) -> TimeMix:
    ranks = {name: g[f"param.{name}1"].shape[1] for name in "wavg"}
    part = TimeMix(g["x"].shape[-1], int(g["cfg.heads"]), ranks=ranks, layer=layer, n_layers=2).double()
    names = {name: NAMES.get(name, name.removesuffix(".weight")) for name, _ in part.named_parameters()}
    part.load_state_dict({own: g[f"param.{theirs}"] for own, theirs in names.items()})
    return part


def test_time_mix_equals_the_reference_above_the_first_layer() -> None:
    g = golden("rwkv7_timemix")
    part = time_mix(g, 1)
    y, first = part.mix(g["x"], everything(g["x"]), g["in.v_first"])
    assert_close(y, g["y"], 1e-12)
    assert first is g["in.v_first"]
    state, outputs = part.init_state(len(y)), []
    for x, v in zip(g["x"].unbind(1), g["in.v_first"].unbind(1), strict=True):
        o, state, _ = part.mix_step(x, state, v)
        outputs.append(o)
    assert_close(torch.stack(outputs, 1), g["y"], 1e-12)
    assert_close(state[1].mT, g["mid.final_state"], 1e-12)


def test_time_mix_equals_the_reference_in_the_first_layer() -> None:
    g = golden("rwkv7_timemix")
    part = time_mix(g, 0)
    y, first = part.mix(g["x"], everything(g["x"]), None)
    assert_close(y, g["mid.y_layer0"], 1e-12)
    assert_close(run(part, g["x"])[0], g["mid.y_layer0"], 1e-12)
    shifted = torch.cat([torch.zeros_like(g["x"][:, :1]), g["x"][:, :-1]], 1)
    assert_close(first, (g["x"] + g["param.x_v"] * (shifted - g["x"])) @ g["param.value"].T, 1e-12)


def test_channel_mix_equals_the_reference() -> None:
    g = golden("rwkv7_channelmix")
    part = ChannelMix(g["x"].shape[-1], len(g["param.key"]), 0, 1).double()
    part.load_state_dict({"x_k": g["param.x_k"], "key.weight": g["param.key"], "value.weight": g["param.value"]})
    assert_close(part(g["x"], everything(g["x"])), g["y"], 1e-12)
    assert_close(run(part, g["x"])[0], g["y"], 1e-12)


def test_recurrence_from_a_state_equals_flash_linear_attention() -> None:
    """They remove from the state before it decays."""
    g = golden("rwkv7_wkv")
    names = ("r", "decay", "k", "v", "a", "b", "initial_state")
    inputs = [g[f"in.{name}"].requires_grad_() for name in names]
    *sequences, start = inputs
    S, outputs = start.mT, []
    for t in range(sequences[0].shape[2]):
        r, w, k, v, a, b = (x[:, :, t] for x in sequences)
        log_w = -w.exp()
        o, S = channel_delta_step(r, -a * (-log_w).exp(), b, None, log_w, S, Addition(k, v))
        outputs.append(o)
    y = torch.stack(outputs, 2)
    assert_close(y, g["y"], 1e-12)
    assert_close(S.mT, g["mid.final_state"], 1e-12)
    for name, grad in zip(names, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        assert_close(grad, g[f"grad.{name}"], name=name)


@pytest.mark.parametrize("length", [1, 31, 32, 70])
def test_chunks_equal_the_recurrence_with_every_gradient(length: int) -> None:
    """Decays as fast as exp(-40) a step among them, which no quotient of products could hold."""
    torch.manual_seed(0)
    q, a, b, k, v = (torch.randn(2, length, 3, 4, dtype=torch.float64) / 2 for _ in range(5))
    log_decay = -torch.rand(2, length, 3, 4, dtype=torch.float64)
    log_decay[:, ::7] *= 40
    inputs = [x.requires_grad_() for x in (q, a, b, log_decay, k, v)]
    S, outputs = q.new_zeros(2, 3, 4, 4), []
    for q_, a_, b_, g_, k_, v_ in zip(*(x.unbind(1) for x in inputs), strict=True):
        o, S = channel_delta_step(q_, a_, b_, None, g_, S, Addition(k_, v_))
        outputs.append(o)
    ours, theirs = channel_delta(q, a, b, None, log_decay, Addition(k, v)), torch.stack(outputs, 1)
    assert_close(ours, theirs)
    w = torch.randn_like(ours)
    grads = [torch.autograd.grad(y, inputs, w) for y in (ours, theirs)]
    for name, own, other in zip("qabgkv", *grads, strict=True):
        assert_close(own, other, 1e-10, name)


def test_values_of_the_first_layer_reach_every_other_one_both_ways() -> None:
    torch.manual_seed(0)
    for direction in ("causal", "bidirectional"):
        encoder = RWKV7(d_model=8, n_layers=3, length=8, n_heads=2, direction=direction).double()
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.4)
        received: list[Any] = []
        for block in encoder.blocks[::2]:
            block.register_forward_pre_hook(lambda _, inputs, to=received: to.append(inputs[2]))
        x = torch.randn(2, 8, 8, dtype=torch.float64)
        encoder(x, everything(x))
        first, second, third = received
        assert first is None
        pairs = [(second, third)] if direction == "causal" else list(zip(second, third, strict=True))
        assert all(a is b for a, b in pairs)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_initialisation(n_layers: int) -> None:
    """The loops of the released code."""
    d, width = 8, 4
    encoder = RWKV7(d_model=d, n_layers=n_layers, length=16, n_heads=2)
    for layer in range(n_layers):
        time, channel = (encoder.blocks[2 * layer + part].mixer for part in (0, 1))
        assert isinstance(time, TimeMix)
        assert isinstance(channel, ChannelMix)
        up, down = (0.0 if n_layers == 1 else layer / (n_layers - 1)), 1 - layer / n_layers
        assert hasattr(time, "v0") == (layer > 0)
        for i in range(d):
            zigzag = (i % width - (width - 1) / 2) / ((width - 1) / 2)
            zigzag, slope = zigzag * abs(zigzag), i / (d - 1) - 0.5
            wanted = {
                "w0": -6 + 6 * (i / (d - 1)) ** (1 + up**0.3) + 0.5 + 2.5 * zigzag,
                "a0": -0.19 + 0.3 * zigzag + 0.4 * slope,
                "k_k": 0.71 - 0.1 * slope,
                "k_a": 1.02,
            }
            if layer:
                wanted["v0"] = 0.73 - 0.4 * slope
            for letter, power in (("r", 0.2), ("w", 0.9), ("k", 0.7), ("v", 0.7), ("a", 0.9), ("g", 0.2)):
                wanted[f"x_{letter}"] = 1 - (i / d) ** (power * down)
            for name, value in wanted.items():
                assert getattr(time, name)[i].item() == pytest.approx(value, abs=1e-5), name
            assert channel.x_k[i].item() == pytest.approx(1 - (i / d) ** (down**4), abs=1e-6)
        zeros = [getattr(time, name) for name in ("w1", "a1", "g1")] + [time.output.weight, channel.value.weight]
        assert not any(weight.any() for weight in zeros)
        for linear, bound in ((time.receptance, 0.5), (time.key, 0.05), (time.value, 0.5), (channel.key, 0.5)):
            assert 0.7 * bound < linear.weight.abs().max() * d**0.5 <= bound


def test_suggested_ranks() -> None:
    assert [suggested_rank(name, 128) for name in "wavg"] == [32, 32, 32, 64]
    assert [suggested_rank(name, 2048) for name in "wavg"] == [128, 128, 64, 224]


def test_weight_decay_spares_what_is_no_map() -> None:
    encoder = RWKV7(d_model=8, n_layers=2, length=8, n_heads=2)
    for name, _ in encoder.named_parameters():
        pattern = next((p for p in encoder.optim if fnmatch(name, p)), None)
        is_map = name.endswith((".weight", ".bias"))
        assert (pattern is None) == is_map, name
        assert (pattern == "*.w0") == name.endswith(".w0")


test_wrong_arguments_are_named = refuses(RWKV7, d_model=8, n_layers=1, length=8)(
    ({"n_heads": 3}, "n_heads is 3; a divisor of d_model, 8"),
    ({"gate_rank": 0}, "gate_rank is 0; at least 1"),
    ({"block": {"positions": "sinusoidal"}}, r"block\.positions is 'sinusoidal'; 'none'"),
    ({"block": {"ffn": "gelu"}}, r"block\.ffn is 'gelu'; 'none'"),
)
