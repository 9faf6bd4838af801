"""h3 against tensors of the authors' module, and its recurrence against its convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures.state_space.h3 import H3, H3Mixer

SETS: dict[str, dict[str, Any]] = {
    "h3_head1": {"head_dim": 1},
    "h3_multihead": {"head_dim": 2, "discretization": "bilinear"},
}


def mixer_of(**own: Any) -> H3Mixer:
    mixer = H3(**{"d_model": 4, "n_layers": 1, "length": 48, "state_size": 8, **own}).blocks[0].mixer
    assert isinstance(mixer, H3Mixer)
    return mixer.double()


def loaded(name: str) -> tuple[H3Mixer, dict[str, Tensor]]:
    g = golden(name)
    mixer = mixer_of(**SETS[name])
    state = {key: g[f"param.{key}"] for key in mixer.state_dict() if f"param.{key}" in g}
    state |= {
        "shift_B": g["param.shift.B"],
        "shift_C": g["param.shift.C"][0],
        "diag.log_A_real": g["param.diag.inv_A_real"],
        "diag.B": torch.view_as_real(g["param.diag.B"]),
        "diag.C": torch.view_as_real(g["param.diag.C"]),
    }
    mixer.load_state_dict(state)
    return mixer, g


@pytest.mark.parametrize("name", SETS)
def test_mixer_equals_that_of_the_authors(name: str) -> None:
    mixer, g = loaded(name)
    assert_near(mixer.shift_kernel(), g["mid.kernel_shift"][0, :, :8], "shift kernel")
    assert_near(mixer.diag.kernel(48), g["mid.kernel_diag"], "diagonal kernel")
    x = g["x"].requires_grad_()
    y = mixer(x, everything(x))
    assert_near(y, g["y"], "y")
    (y * g["w"]).sum().backward()
    assert_near(x.grad, g["grad.x"], "grad.x")


@pytest.mark.parametrize("name", SETS)
def test_step_equals_the_authors_output(name: str) -> None:
    mixer, g = loaded(name)
    assert_near(stepped(mixer, g["x"]), g["y"], "y")


def test_gradients_of_every_parameter_equal_the_recurrence() -> None:
    """The stored tensors hold the gradient of x alone."""
    mixer, g = loaded("h3_multihead")
    x = g["x"][:, :19]
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: stepped(mixer, x))


def test_the_shift_state_starts_as_the_last_keys() -> None:
    mixer = mixer_of()
    assert torch.equal(mixer.shift_kernel(), mixer.shift_C)


test_wrong_arguments_are_named = refuses(H3, d_model=8, n_layers=1, length=8)(
    ({"head_dim": 3}, "head_dim is 3"),
    ({"state_size": 7}, "state_size is 7"),
    ({"init": "hippo"}, "lin, inv, legs"),
    ({"init": "diag", "head_dim": 8}, "n_ssm is 1"),
    ({"dt_min": 0.2}, "dt_min is 0.2"),
)
