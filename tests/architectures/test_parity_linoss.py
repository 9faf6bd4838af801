"""linoss against tensors of the authors' layer: its two scans, and its equations token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures.state_space.linoss import LinOSS, LinOSSMixer

NAMES = ("A_diag", "B", "C", "D", "steps")


def mixer_of(d_model: int = 3, state_size: int = 4, **own: Any) -> LinOSSMixer:
    mixer = LinOSS(d_model=d_model, n_layers=1, length=14, state_size=state_size, **own).blocks[0].mixer
    assert isinstance(mixer, LinOSSMixer)
    return mixer.double()


def loaded(kind: str) -> tuple[LinOSSMixer, dict[str, Tensor]]:
    g = golden(f"linoss_{kind}")
    mixer = mixer_of(discretization=kind)
    missing = mixer.load_state_dict({name: g[f"param.{name}"] for name in NAMES}, strict=False)
    assert not missing.unexpected_keys
    return mixer, g


def advanced(mixer: LinOSSMixer, x: Tensor) -> Tensor:
    state, outputs = mixer.init_state(len(x)), []
    for token in x.unbind(1):
        o, state = mixer.advance(token, state)
        outputs.append(o)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("kind", ["im", "imex"])
@pytest.mark.parametrize("way", [LinOSSMixer.ssm, advanced])
def test_layer_equals_that_of_the_authors(kind: str, way: Any) -> None:
    mixer, g = loaded(kind)
    assert (g["param.A_diag"] < 0).any()
    x = g["x"].requires_grad_()
    y = way(mixer, x)
    assert_near(y, g["y"], "y")
    own = dict(mixer.named_parameters())
    assert_gradients(y, g, x, {name: (own[name], g[f"grad.param.{name}"]) for name in NAMES})


@pytest.mark.parametrize("kind", ["im", "imex"])
def test_gradients_of_the_whole_mixer_equal_the_recurrence(kind: str) -> None:
    mixer, g = loaded(kind)
    assert_same_gradients(mixer, g["x"], lambda x: mixer(x, everything(x)), lambda x: stepped(mixer, x))


def test_imex_keeps_the_energy_of_a_free_oscillator_and_im_loses_it() -> None:
    """After one impulse y of imex comes back to its height for as long as one looks; that of im fades."""
    x = torch.zeros(1, 400, 1, dtype=torch.float64)
    x[0, 0] = 1
    late = {}
    for kind in ("im", "imex"):
        torch.manual_seed(0)
        mixer = mixer_of(d_model=1, state_size=1, discretization=kind)
        y = (mixer.ssm(x) - mixer.D * x)[0, :, 0].abs()
        late[kind] = (y[300:].max() / y[:100].max()).item()
    assert late["imex"] > 0.99
    assert late["im"] < 0.01


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(state_size=8, discretization="imex").float()
    x = torch.randn(1, 2048, 3)
    with torch.no_grad():
        assert_near(stepped(mixer, x), mixer(x, everything(x)), "y", 1e-3)


test_wrong_arguments_are_named = refuses(LinOSS, d_model=8, n_layers=1, length=8)(
    ({"state_size": 0}, "state_size is 0"),
    ({"discretization": "ex"}, "im, imex"),
)
