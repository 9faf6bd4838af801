"""unicornn against tensors of the authors' kernels, and the volume that its steps keep."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from recurrences import load, padded
from refusals import refuses
from stepping import stepped

from lra.architectures.recurrent.unicornn import UnICORNN, UnICORNNMixer


def test_two_layers_equal_the_authors() -> None:
    g = golden("unicornn")
    mixers = [UnICORNNMixer(5, g["cfg.dt"].item(), g["cfg.alpha"].item()).double() for _ in range(2)]
    for i, mixer in enumerate(mixers):
        weight, bias = padded(g[f"param.fc{i}.weight"], 5, 5), g[f"param.fc{i}.bias"]
        load(mixer, fc__weight=weight, fc__bias=bias, weight_hh=g[f"param.w{i}"], c_=g[f"param.c{i}"])
    x, mask = padded(g["x"], 3, 9, 5).requires_grad_(), torch.ones(3, 9, dtype=torch.bool)
    for outputs in (
        [y := mixers[0](x, mask), mixers[1](y, mask)],
        [y := stepped(mixers[0], x), stepped(mixers[1], y)],
    ):
        torch.testing.assert_close(outputs[0], g["mid.y_layer0"], rtol=0, atol=1e-12)
        torch.testing.assert_close(outputs[1], g["y"], rtol=0, atol=1e-12)
        (grad,) = torch.autograd.grad((outputs[1] * g["w"]).sum(), x)
        torch.testing.assert_close(grad[..., :4], g["grad.x"], rtol=0, atol=1e-12)


def test_a_step_keeps_the_volume() -> None:
    """The determinant of the map from one state to the next is 1: nothing is forgotten, whatever the input."""
    torch.manual_seed(0)
    mixer = UnICORNNMixer(3, dt=0.5, alpha=2.0).double()
    x = torch.randn(1, 1, 3, dtype=torch.float64)

    def after(state: torch.Tensor) -> torch.Tensor:
        return torch.cat(mixer.chunk(x, tuple(state.view(2, 1, 3)))[1]).flatten()

    jacobian = torch.autograd.functional.jacobian(after, torch.randn(6, dtype=torch.float64))
    assert torch.linalg.det(jacobian).item() == pytest.approx(1, abs=1e-12)


test_wrong_arguments_are_named = refuses(UnICORNN, d_model=8, n_layers=1, length=16)(
    ({"dt": 0}, "dt is 0"),
    ({"dt": 1.0, "alpha": 5.0}, "overshoot"),
)
