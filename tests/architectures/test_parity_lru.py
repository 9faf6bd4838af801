"""lru against tensors of its source, its recurrence step by step, and the ring it starts on."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import golden
from refusals import refuses
from stepping import assert_steps_equal_forward, stepped
from torch import Tensor

from lra.architectures.state_space.lru import LRU, LRUMixer, ring


def loaded(g: dict[str, Tensor], prefix: str = "param.", **own: Any) -> LRU:
    """One layer of 8 features and 12 states with the stored recurrence; the gate is the module's own."""
    encoder = LRU(d_model=8, n_layers=1, length=40, state_size=12, **own).double()
    mixer = mixer_of(encoder)
    state = {
        "nu_log": g[f"{prefix}nu_log"],
        "theta_log": g[f"{prefix}theta_log"],
        "gamma_log": g[f"{prefix}gamma_log"],
        "B": torch.stack([g[f"{prefix}B_re"], g[f"{prefix}B_im"]], dim=1),
        "C": torch.stack([g[f"{prefix}C_re"], g[f"{prefix}C_im"]], dim=2).unsqueeze(0),
        "D": g[f"{prefix}D"],
    }
    missing, unexpected = mixer.load_state_dict(state, strict=False)
    assert missing == ["out.weight", "out.bias"]
    assert not unexpected
    return encoder


def mixer_of(encoder: LRU) -> LRUMixer:
    mixer = encoder.blocks[0].mixer
    assert isinstance(mixer, LRUMixer)
    return mixer


def test_recurrence_equals_its_source() -> None:
    g = golden("lru")
    x = g["x"].requires_grad_()
    y = mixer_of(loaded(g)).recurrence(x)
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", ["prenorm", "postnorm"])
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_residual_layer_equals_its_source(kind: str, order: str) -> None:
    """The stored gradient is that of batch norm, before the recurrence."""
    g = golden("lru_layer")
    encoder = loaded(g, "param.seq.", block={"norm": kind, "prenorm": order == "prenorm"})
    layer = encoder.blocks[0]
    norm: Any = layer.norm
    state = {
        "norm.weight": g["param.normalization.scale"],
        "norm.bias": g["param.normalization.bias"],
        "mixer.out.weight": torch.cat([g["param.out1.kernel"].T, g["param.out2.kernel"].T]),
        "mixer.out.bias": torch.cat([g["param.out1.bias"], g["param.out2.bias"]]),
    }
    if kind == "batch":
        state |= {"norm.running_mean": g["param.batch_stats.mean"], "norm.running_var": g["param.batch_stats.var"]}
    else:
        norm.eps = 1e-6  # of flax
    assert not layer.load_state_dict(state, strict=False).unexpected_keys
    x = g["x"].requires_grad_()
    y = layer.eval()(x, torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(y, g[f"mid.y.{kind}norm.{order}"], rtol=1e-11, atol=1e-12)
    if (kind, order) == ("batch", "prenorm"):
        torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(y, x, g["w"])[0], g["grad.x"], rtol=1e-11, atol=1e-12)


def test_bidirectional_adds_a_scan_of_each_reversed_sequence() -> None:
    """Two causal recurrences of the same lambda, gamma and B, one on the reversed real tokens; d x counts once."""
    torch.manual_seed(0)
    mixer = mixer_of(LRU(d_model=6, n_layers=1, length=30, state_size=9, direction="bidirectional")).double()
    ahead, back = (mixer_of(LRU(d_model=6, n_layers=1, length=30, state_size=9)).double() for _ in range(2))
    for way, one in enumerate((ahead, back)):
        one.load_state_dict({**mixer.state_dict(), "C": mixer.C[way : way + 1]})
    x, mask = torch.randn(2, 30, 6, dtype=torch.float64), torch.arange(30) < torch.tensor([[30], [17]])
    x = x.masked_fill(~mask.unsqueeze(-1), 0)
    y = mixer.recurrence(x)
    for row, length in enumerate((30, 17)):
        own = x[row : row + 1, :length]
        twice = ahead.recurrence(own) + back.recurrence(own.flip(1)).flip(1)
        torch.testing.assert_close(y[row : row + 1, :length], twice - mixer.D * own, rtol=1e-12, atol=1e-12)


def test_bidirectional_shares_all_but_a_second_output_matrix() -> None:
    sizes = {}
    for direction in ("causal", "bidirectional"):
        encoder = LRU(d_model=64, n_layers=2, length=64, direction=direction)
        sizes[direction] = sum(p.numel() for p in encoder.parameters())
    assert sizes["bidirectional"] - sizes["causal"] == 2 * 64 * 64 * 2
    assert sizes["bidirectional"] < 1.4 * sizes["causal"]


def test_gradients_of_every_parameter_equal_the_recurrence() -> None:
    """The stored tensors hold the gradient of x alone; the recurrence step by step gives those of the parameters."""
    g = golden("lru")
    mixer = mixer_of(loaded(g))
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    recurrent = torch.autograd.grad((stepped(mixer, g["x"]) * g["w"]).sum(), parameters)
    y = mixer(g["x"], torch.ones(g["x"].shape[:2], dtype=torch.bool))
    for name, own, other in zip(names, torch.autograd.grad((y * g["w"]).sum(), parameters), recurrent, strict=True):
        assert torch.allclose(own, other, rtol=1e-9, atol=1e-10), name


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(
        mixer_of(LRU(d_model=4, n_layers=1, length=2048, state_size=16)), 4, rtol=1e-4, atol=2e-5
    )


def test_ring_equals_its_source() -> None:
    g = golden("lru")
    limits = (float(g["param.r_min"]), float(g["param.r_max"]), float(g["param.max_phase"]))
    nu, theta, gamma = ring(g["mid.init.u_nu"], g["mid.init.u_theta"], *limits)
    torch.testing.assert_close(nu, g["mid.init.nu_log"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(theta, g["mid.init.theta_log"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gamma, g["mid.init.gamma_log"], rtol=1e-11, atol=1e-11)


def test_start_is_uniform_over_the_ring_and_keeps_variance() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(LRU(d_model=64, n_layers=1, length=8, state_size=4000, r_min=0.5, r_max=0.9, max_phase=1.0))
    decay = mixer._decay()
    assert decay.abs().min() >= 0.5 * (1 - 1e-5)
    assert decay.abs().max() <= 0.9 * (1 + 1e-5)
    assert abs(decay.abs().square().mean().item() - (0.25 + 0.81) / 2) < 0.01  # uniform over the area
    assert decay.angle().min() > 0
    assert decay.angle().max() <= 1
    assert abs(decay.angle().mean().item() - 0.5) < 0.02
    # white input of variance 1: a state has variance gamma^2 |B|^2 / (1 - |lambda|^2), 1 on average
    variance = (mixer.gamma_log.exp()[:, None, None] * mixer.B).square().sum((1, 2)) / (1 - decay.abs().square())
    assert abs(variance.mean().item() - 1) < 0.01
    assert abs(mixer.C.std().item() * math.sqrt(4000) - 1) < 0.02


def test_optimiser_settings_reach_the_recurrence_alone() -> None:
    encoder = LRU(d_model=8, n_layers=1, length=8, recurrent_lr_scale=0.1)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    assert own == {f"layers.0.mixer.{name}" for name in ("nu_log", "theta_log", "gamma_log", "B")}
    assert all(settings == {"lr_scale": 0.1, "weight_decay": 0.0} for settings in encoder.optim.values())


test_wrong_arguments_are_named = refuses(LRU, d_model=8, n_layers=1, length=8)(
    ({"state_size": 0}, "state_size is 0"),
    ({"r_min": 0.9, "r_max": 0.8}, r"r_max 0\.8"),
    ({"r_max": 1.2}, r"r_max 1\.2"),
    ({"max_phase": 7.0}, r"max_phase is 7\.0"),
)
