"""mamba against tensors of an independent mixer, its recurrence, and the step sizes and modes it starts with."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from typing import Any

import torch
from golden_tensors import assert_layer_as_stored, golden
from refusals import refuses
from stepping import assert_steps_equal_forward, run
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.state_space.mamba import Mamba, MambaMixer


def mixer_of(**own: Any) -> MambaMixer:
    mixer = Mamba(**{"d_model": 6, "n_layers": 1, "length": 32, **own}).blocks[0].mixer
    assert isinstance(mixer, MambaMixer)
    return mixer


def loaded(g: dict[str, Tensor]) -> MambaMixer:
    mixer = mixer_of(state_size=4, dt_rank=int(g["cfg.dt_rank"]), bias=True).double()
    mixer.load_state_dict({key.removeprefix("param."): t for key, t in g.items() if key.startswith("param.")})
    return mixer


def test_mixer_equals_an_independent_one() -> None:
    g = golden("mamba_block")
    assert_layer_as_stored(loaded(g), g)


def test_step_equals_an_independent_mixer() -> None:
    g = golden("mamba_block")
    mixer = loaded(g)
    y, state = run(mixer, g["x"])
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state[0], g["mid.in_proj"][:, -3:, :12], rtol=1e-11, atol=1e-12)


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    assert_steps_equal_forward(mixer_of(d_model=4, state_size=4), 4)


def test_initialisation() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(d_model=512, n_layers=4)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(1024, 16))
    dt = F.softplus(mixer.dt_proj.bias.double())
    assert dt.min() >= 0.001 * (1 - 1e-4)
    assert dt.max() <= 0.1 * (1 + 1e-4)
    assert 0.0085 < dt.median() < 0.0118  # uniform in the logarithm: the geometric mean, 0.01
    assert mixer.dt_proj.weight.shape == (1024, 32)
    # uniform within R^-1/2
    assert 0.99 < mixer.dt_proj.weight.abs().max() * math.sqrt(32) <= 1
    assert (mixer.D == 1).all()
    # nn.Linear draws within fan_in^-1/2, here over sqrt(n_layers)
    assert 0.99 < mixer.out_proj.weight.abs().max() * math.sqrt(1024 * 4) <= 1 + 1e-6


def test_outer_biases_start_at_zero() -> None:
    mixer = mixer_of(bias=True)
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()


def test_weight_decay_spares_modes_steps_skip_biases_and_norms() -> None:
    encoder = Mamba(d_model=8, n_layers=1, length=8)
    own = {name for name, _ in encoder.named_parameters() if any(fnmatch(name, pattern) for pattern in encoder.optim)}
    rest = {name for name, _ in encoder.named_parameters() if name.endswith("bias") or "norm" in name}
    assert own == {f"layers.0.mixer.{name}" for name in ("A_log", "D", "dt_proj.bias")} | rest
    assert all(settings == {"weight_decay": 0.0} for settings in encoder.optim.values())


test_wrong_arguments_are_named = refuses(Mamba, d_model=8, n_layers=1, length=8)(
    ({"state_size": 0}, "state_size is 0"),
    ({"expand": 0}, "expand is 0"),
    ({"d_conv": 0}, "d_conv is 0"),
    ({"dt_rank": 0}, "dt_rank is 0"),
    ({"dt_min": 0.2}, r"dt_min is 0\.2"),
)
