"""mamba2 against tensors of an independent mixer, its recurrence, and the step sizes and decays it starts with."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from golden_tensors import assert_layer_as_stored, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, run
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.state_space.mamba2 import Mamba2, Mamba2Mixer


def mixer_of(**own: Any) -> Mamba2Mixer:
    mixer = Mamba2(**{"d_model": 8, "n_layers": 1, "length": 32, "state_size": 4, "head_dim": 4, **own}).blocks[0].mixer
    assert isinstance(mixer, Mamba2Mixer)
    return mixer


def loaded(g: dict[str, Tensor]) -> Mamba2Mixer:
    mixer = mixer_of(n_groups=int(g["cfg.n_groups"]), bias="param.in_proj.bias" in g).double()
    mixer.load_state_dict({key.removeprefix("param."): t for key, t in g.items() if key.startswith("param.")})
    return mixer


@pytest.mark.parametrize("name", ["mamba2_mixer", "mamba2_mixer_nogroup"])
def test_mixer_equals_an_independent_one(name: str) -> None:
    g = golden(name)
    assert_layer_as_stored(loaded(g), g, atol=1e-11, of_gradients=1e-10)


@pytest.mark.parametrize("name", ["mamba2_mixer", "mamba2_mixer_nogroup"])
def test_step_equals_an_independent_mixer(name: str) -> None:
    g = golden(name)
    mixer = loaded(g)
    y, state = run(mixer, g["x"])
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state[0], g["mid.in_proj"][:, -3:, 16:-4], rtol=1e-11, atol=1e-12)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(mixer_of(d_model=4), 4, rtol=1e-4, atol=2e-5)


def test_initialisation() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(d_model=2000, n_layers=4)
    A = mixer.A_log.exp()
    assert A.min() >= 1
    assert A.max() <= 16 * (1 + 1e-6)
    assert abs(A.mean().item() - 8.5) < 0.5
    dt = F.softplus(mixer.dt_bias.double())
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert 0.0085 < dt.median() < 0.0118  # uniform in the logarithm: the geometric mean, 0.01
    assert (mixer.D == 1).all()
    assert (mixer.norm.weight == 1).all()
    # nn.Linear draws within fan_in^-1/2, here over sqrt(n_layers)
    assert 0.99 < mixer.out_proj.weight.abs().max() * math.sqrt(4000 * 4) <= 1 + 1e-6


def test_head_width_fits_the_model() -> None:
    heads = {d: Mamba2(d_model=d, n_layers=1, length=8).blocks[0].mixer.n_heads for d in (16, 112, 128)}
    assert heads == {16: 1, 112: 7, 128: 4}


def test_outer_biases_start_at_zero() -> None:
    mixer = mixer_of(bias=True)
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()


def test_weight_decay_spares_decays_steps_skip_biases_and_norms() -> None:
    encoder = Mamba2(d_model=8, n_layers=1, length=8)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    rest = {name for name, _ in encoder.named_parameters() if name.endswith("bias") or "norm" in name}
    assert own == {f"layers.0.mixer.{name}" for name in ("A_log", "D", "dt_bias")} | rest
    assert all(settings == {"weight_decay": 0.0} for settings in encoder.optim.values())


test_wrong_arguments_are_named = refuses(Mamba2, d_model=8, n_layers=1, length=8)(
    ({"state_size": 0}, "state_size is 0"),
    ({"expand": 0}, "expand is 0"),
    ({"d_conv": 0}, "d_conv is 0"),
    ({"head_dim": 5}, "head_dim is 5"),
    ({"n_groups": 3}, "n_groups is 3"),
    ({"dt_min": 0.2}, r"dt_min is 0\.2"),
)
