"""rwkv4 against tensors of an independent block, the plain recurrence, and the numbers it starts with."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import everything, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, run, stepped
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures.linear_attention.rwkv4 import RWKV4, ChannelMix, TimeMix

PARTS = {
    "norm_0": "pre_ln",
    "layers.0.norm": "ln1",
    "layers.0.mixer": "attention",
    "layers.1.norm": "ln2",
    "layers.1.mixer": "feed_forward",
}
NAMES = {
    "time_mix_r": "time_mix_receptance",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_decay": "time_decay",
    "time_first": "time_first",
}


def theirs(own: str) -> str:
    part = next(part for part in PARTS if own.startswith(f"{part}."))
    name = own.removeprefix(f"{part}.")
    return f"param.{PARTS[part]}.{NAMES.get(name, name)}"


def loaded(g: dict[str, Tensor]) -> RWKV4:
    """One layer with the stored parameters, and without the norm that follows the last layer."""
    encoder = RWKV4(d_model=8, n_layers=1, length=12, channel_dim=12).double()
    encoder.norm = nn.Identity()
    encoder.load_state_dict({own: g[theirs(own)].view_as(p) for own, p in encoder.named_parameters()})
    return encoder


def random(**own: Any) -> RWKV4:
    """Two layers whose three widths differ, every parameter drawn, so that nothing is hidden behind a zero."""
    torch.manual_seed(0)
    encoder = RWKV4(**{"d_model": 6, "n_layers": 2, "length": 20, "time_dim": 10, "channel_dim": 14, **own}).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.7)
    return encoder


def test_block_equals_an_independent_one() -> None:
    g, encoder = golden("rwkv4_block"), loaded(golden("rwkv4_block"))
    x = g["x"].requires_grad_()
    inside: dict[str, Tensor] = {}
    first, second = (layer.mixer for layer in encoder.blocks)
    assert isinstance(first, TimeMix)
    assert isinstance(second, ChannelMix)
    first.register_forward_hook(lambda *a: inside.update(time_mix=a[2]))
    first.output.register_forward_hook(lambda *a: inside.update(gated_wkv=a[1][0]))
    second.register_forward_hook(lambda *a: inside.update(channel_mix=a[2]))
    y = encoder(x, everything(x))
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    for name, found in inside.items():
        torch.testing.assert_close(found, g[f"mid.{name}"], rtol=1e-12, atol=1e-12)
    assert len(inside) == 3
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-11)
    for own, parameter in encoder.named_parameters():
        assert parameter.grad is not None
        expected = g[f"grad.{theirs(own)}"].view_as(parameter)
        assert torch.allclose(parameter.grad, expected, rtol=1e-11, atol=1e-11), own


def test_step_equals_an_independent_block() -> None:
    g = golden("rwkv4_block")
    y, _ = run(loaded(g), g["x"])
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)


def plain(encoder: RWKV4, x: Tensor) -> Tensor:
    """The equations token by token, the sums of wkv as they are written."""
    p, width = dict(encoder.named_parameters()), x.shape[-1]

    def norm(name: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, (width,), p[f"{name}.weight"], p[f"{name}.bias"])

    def view(part: str, name: str, matrix: str, now: Tensor, last: Tensor) -> Tensor:
        mu = p[f"{part}.time_mix_{name}"]
        return (mu * now + (1 - mu) * last) @ p[f"{part}.{matrix}.weight"].T

    parts = [f"layers.{i}.mixer" for i in range(len(encoder.blocks))]
    last = {part: torch.zeros_like(x[:, 0]) for part in parts}
    above = {part: torch.zeros((), dtype=x.dtype) for part in parts}
    below, outputs = dict(above), []
    for token in x.unbind(1):
        h = norm("norm_0", token)
        for i, part in enumerate(parts):
            now, before = norm(f"layers.{i}.norm", h), last[part]
            r = 1 / (1 + torch.exp(-view(part, "r", "receptance", now, before)))
            k = view(part, "k", "key", now, before)
            if i % 2:
                h = h + r * (k.clamp(min=0) ** 2 @ p[f"{part}.value.weight"].T)
            else:
                v = view(part, "v", "value", now, before)
                bonus, kept = torch.exp(p[f"{part}.time_first"] + k), torch.exp(-torch.exp(p[f"{part}.time_decay"]))
                average = (above[part] + bonus * v) / (below[part] + bonus)
                h = h + (r * average) @ p[f"{part}.output.weight"].T
                above[part] = kept * above[part] + torch.exp(k) * v
                below[part] = kept * below[part] + torch.exp(k)
            last[part] = now
        outputs.append(norm("norm", h))
    return torch.stack(outputs, dim=1)


def test_outputs_and_gradients_equal_the_plain_recurrence() -> None:
    encoder = random()
    x, weight = torch.randn(2, 2, 19, 6, dtype=torch.float64)
    x.requires_grad_()
    names, parameters = zip(*encoder.named_parameters(), strict=True)
    found, expected = encoder(x, everything(x)), plain(encoder, x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    grads = [torch.autograd.grad((y * weight).sum(), (x, *parameters)) for y in (found, expected)]
    for name, own, other in zip(("x", *names), *grads, strict=True):
        assert torch.allclose(own, other, rtol=1e-10, atol=1e-10), name


def test_step_equals_forward_over_2048_tokens() -> None:
    assert_steps_equal_forward(random().float(), 6, rtol=1e-3, atol=1e-4)


def test_step_equals_forward_where_keys_are_far_below_zero() -> None:
    """A sum that is empty has no exponent: e^k may vanish beside any other."""
    encoder = random(n_layers=1)
    time = encoder.blocks[0].mixer
    assert isinstance(time, TimeMix)
    with torch.no_grad():
        time.key.weight *= 1e4
        x = torch.randn(2, 9, 6, dtype=torch.float64)
        torch.testing.assert_close(stepped(encoder, x), encoder(x, everything(x)), rtol=1e-11, atol=1e-11)


def test_state_is_that_of_the_equations_at_any_time() -> None:
    """Two tokens and E sums with their exponent, in each of two layers, float32."""
    encoder = RWKV4(d_model=6, n_layers=2, length=20, time_dim=10)
    assert encoder.state_bytes() == encoder.state_bytes(9) == 2 * 4 * (6 + 3 * 10 + 6)
    assert encoder.bfloat16().init_state(1)[1][0][1].dtype == torch.float32


@pytest.mark.parametrize("n_layers", [1, 3])
def test_initialisation(n_layers: int) -> None:
    """The loops of the released code."""
    torch.manual_seed(0)
    encoder, d = RWKV4(d_model=8, n_layers=n_layers, length=16), 8
    for layer in range(n_layers):
        time, channel = (encoder.blocks[2 * layer + part].mixer for part in (0, 1))
        assert isinstance(time, TimeMix)
        assert isinstance(channel, ChannelMix)
        up, down = (0.0 if n_layers == 1 else layer / (n_layers - 1)), 1 - layer / n_layers
        for i in range(d):
            p = (i / d) ** down
            assert time.time_decay[i].item() == pytest.approx(-5 + 8 * (i / (d - 1)) ** (0.7 + 1.3 * up), abs=1e-5)
            assert time.time_first[i].item() == pytest.approx(math.log(0.3) + (-0.5, 0, 0.5)[(i + 1) % 3], abs=1e-6)
            assert time.time_mix_r[i].item() == pytest.approx((i / d) ** (0.5 * down), abs=1e-6)
            assert time.time_mix_v[i].item() == pytest.approx(p + 0.3 * up, abs=1e-6)
            for mu in (time.time_mix_k, channel.time_mix_k, channel.time_mix_r):
                assert mu[i].item() == pytest.approx(p, abs=1e-6)
        for linear in (time.receptance, time.key, time.output, channel.receptance, channel.value):
            assert not linear.weight.any()
        torch.testing.assert_close(time.value.weight.T @ time.value.weight, torch.eye(8), rtol=0, atol=1e-5)
        torch.testing.assert_close(channel.key.weight.T @ channel.key.weight, 4 * torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", ["causal", "bidirectional", "add"])
def test_it_starts_as_the_identity_and_every_map_learns_within_three_steps(direction: str) -> None:
    torch.manual_seed(0)
    encoder = RWKV4(d_model=8, n_layers=2, length=16, direction=direction)
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    x, target = torch.randn(2, 4, 16, 8)
    y = encoder(x, everything(x))
    torch.testing.assert_close(y, encoder.norm(encoder.norm_0(x)))
    for _ in range(3):
        optimizer.zero_grad()
        (encoder(x, everything(x)) - target).square().mean().backward()
        optimizer.step()
    assert [name for name, p in encoder.named_parameters() if torch.equal(p, before[name])] == []


def test_weight_decay_spares_decays_bonuses_shifts_biases_and_norms() -> None:
    encoder = RWKV4(d_model=8, n_layers=1, length=8)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    time, channel = (f"layers.{i}.mixer." for i in (0, 1))
    wanted = {time + name for name in ("time_decay", "time_first", "time_mix_r", "time_mix_k", "time_mix_v")}
    wanted |= {channel + "time_mix_r", channel + "time_mix_k"}
    rest = {name for name, _ in encoder.named_parameters() if name.endswith("bias") or "norm" in name}
    assert own == wanted | rest
    assert all(settings == {"weight_decay": 0.0} for settings in encoder.optim.values())


test_wrong_arguments_are_named = refuses(RWKV4, d_model=8, n_layers=1, length=8)(
    ({"n_layers": 0}, "n_layers is 0; at least 1"),
    ({"n_layers": -1}, "n_layers is -1; at least 1"),
    ({"d_model": 0}, "d_model is 0; at least 1"),
    ({"time_dim": 0}, "time_dim is 0; at least 1"),
    ({"channel_dim": 0}, "channel_dim is 0; at least 1"),
    ({"block": {"ffn": "gelu"}}, r"block\.ffn is 'gelu'; 'none'"),
)
