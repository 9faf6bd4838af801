"""b2s6 against Algorithm 2 of the paper around an independent scan, and its chunks against its recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures.state_space import b2s6
from lra.architectures.state_space.b2s6 import B2S6, B2S6Mixer


def mixer_of(**own: Any) -> B2S6Mixer:
    shape = {"d_model": 6, "n_layers": 1, "length": 14, "state_size": 4, "n_blocks": 3}
    mixer = B2S6(**{**shape, **own}).blocks[0].mixer
    assert isinstance(mixer, B2S6Mixer)
    return mixer.double()


def loaded(complex: bool) -> tuple[B2S6Mixer, dict[str, Tensor]]:
    g = golden("b2s6")
    mixer = mixer_of(complex=complex)
    state = {"A_log": (-g["param.A"]).log()} | {name: g[f"param.{name}"] for name in ("w", "b", "C")}
    for name in ("B_weight", "B_bias"):
        imaginary = [g[f"in.{name}_imag"]] if complex else []
        state[name] = torch.stack([g[f"param.{name}"], *imaginary], dim=-1)
    if complex:
        state["A_imag"] = g["in.A_imag"]
    assert not mixer.load_state_dict(state, strict=False).unexpected_keys
    return mixer, g


def test_unit_equals_algorithm_2() -> None:
    mixer, g = loaded(complex=False)
    x = g["x"].requires_grad_()
    assert_near(mixer.step_sizes(x.unflatten(-1, (3, 2))).flatten(-2), g["mid.delta"], "dt")
    y = mixer.unit(x)
    assert_near(y, g["y"], "y")
    own = dict(mixer.named_parameters())
    expected = {name: g[f"grad.param.{name}"] for name in ("w", "b", "C")}
    expected |= {name: g[f"grad.param.{name}"].unsqueeze(-1) for name in ("B_weight", "B_bias")}
    expected["A_log"] = g["grad.param.A"] * g["param.A"]  # A = -exp(A_log)
    assert_gradients(y, g, x, {name: (own[name], gradient) for name, gradient in expected.items()})


def test_unit_with_complex_parameters_equals_algorithm_2() -> None:
    mixer, g = loaded(complex=True)
    assert_near(mixer.unit(g["x"]), g["mid.y_complex"], "y")


@pytest.mark.parametrize("complex", [False, True])
def test_chunks_equal_the_recurrence(complex: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """14 tokens in chunks of 4: outputs and every gradient, through states that are made again."""
    monkeypatch.setattr(b2s6, "CHUNK", 4)
    mixer, g = loaded(complex)
    assert_same_gradients(mixer, g["x"], lambda x: mixer(x, everything(x)), lambda x: stepped(mixer, x))


def test_step_sizes_start_in_their_range() -> None:
    torch.manual_seed(0)
    dt = mixer_of(d_model=2000, n_blocks=8).step_sizes(torch.zeros(8, 250, dtype=torch.float64))
    assert dt.min() >= 0.001 * (1 - 1e-3)
    assert dt.max() <= 0.1 * (1 + 1e-3)
    assert 0.008 < dt.median() < 0.0125  # uniform in the logarithm


test_wrong_arguments_are_named = refuses(B2S6, d_model=8, n_layers=1, length=8)(
    ({"state_size": 0}, "state_size is 0"),
    ({"n_blocks": 3}, "n_blocks is 3"),
    ({"dt_min": 0.2}, "dt_min is 0.2"),
)
