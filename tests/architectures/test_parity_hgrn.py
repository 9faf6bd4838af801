"""hgrn against tensors of the authors' layers and of flash-linear-attention's gates, and the bounds it starts with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, assert_stored_gradients, everything, golden
from stepping import run
from torch import Tensor

from lra.architectures._bounds import LowerBounds
from lra.architectures.linear_attention.hgrn import HGRN, HGRNMixer

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"direction": "bidirectional"},
    "real": {"complex_state": False},
}


def second_of_two(bound: Tensor, **options: Any) -> tuple[HGRNMixer, LowerBounds]:
    """The second layer of a stack of two, whose lower bound is `bound`: the second row of the softmax of two."""
    encoder = HGRN(d_model=len(bound), n_layers=2, length=32, **options).double()
    with torch.no_grad():
        encoder.bounds.lower_bounds.copy_(torch.stack([torch.zeros_like(bound), bound.logit()]))
    mixer = encoder.blocks[1].mixer
    assert isinstance(mixer, HGRNMixer)
    return mixer, encoder.bounds


def of_bound(bounds: LowerBounds, bound: Tensor) -> Tensor:
    """The gradient of the bound itself; that of the table is it times bound (1 - bound)."""
    assert bounds.lower_bounds.grad is not None
    return bounds.lower_bounds.grad[1] / (bound * (1 - bound))


def named(g: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Stored tensors below a prefix under our names."""
    return {
        key.removeprefix(prefix).replace("theta_forward", "theta"): value.squeeze()
        for key, value in g.items()
        if key.startswith(prefix)
    }


@pytest.mark.parametrize("kind", OPTIONS)
def test_layer_equals_the_authors(kind: str) -> None:
    g = golden("hgrn_layer")
    bound, x, w = g["in.lower_bound"], g["x"].transpose(0, 1).requires_grad_(), g["w"].transpose(0, 1)
    mixer, bounds = second_of_two(bound, **OPTIONS[kind])
    mixer.load_state_dict(named(g, f"{kind}.param."))
    y = mixer(x, everything(x))
    assert_close(y, g[f"{kind}.y"].transpose(0, 1), 1e-12)
    (y * w).sum().backward()
    assert_close(x.grad, g[f"{kind}.grad.x"].transpose(0, 1))
    assert_close(of_bound(bounds, bound), g[f"{kind}.grad.lower_bound"])
    assert_stored_gradients(mixer, named(g, f"{kind}.grad.param."))


@pytest.mark.parametrize("kind", ["causal", "real"])
def test_step_equals_the_authors(kind: str) -> None:
    g = golden("hgrn_layer")
    mixer, _ = second_of_two(g["in.lower_bound"], **OPTIONS[kind])
    mixer.load_state_dict(named(g, f"{kind}.param."))
    assert_close(run(mixer, g["x"].transpose(0, 1))[0], g[f"{kind}.y"].transpose(0, 1), 1e-12)


def test_gates_and_recurrence_equal_flash_linear_attention() -> None:
    """Their logits are inputs: here they are the two halves of x, taken apart by maps of zeros and ones."""
    g = golden("hgrn_gated")
    bound, width = g["in.lower_bound"], len(g["in.lower_bound"])
    mixer, bounds = second_of_two(torch.cat([bound, bound]), complex_state=False)
    eye = torch.eye(2 * width, dtype=torch.float64)
    with torch.no_grad():
        for linear, half in ((mixer.input_proj, eye), (mixer.lambda_proj, eye.roll(width, 1))):
            linear.weight.copy_(half)
            linear.bias.zero_()
    states = []
    mixer.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    x = torch.cat([g["in.i"], g["in.f_logit"]], -1).requires_grad_()
    mixer(x, everything(x))
    y = states[0][..., :width]
    assert_close(y, g["y"], 1e-12)
    (y * g["w"]).sum().backward()
    assert_close(x.grad, torch.cat([g["grad.i"], g["grad.f_logit"]], -1))
    assert_close(of_bound(bounds, torch.cat([bound, bound]))[:width], g["grad.lower_bound"])
    assert_close(run(mixer, x.detach())[1][:, :width], g["mid.final_state"], 1e-12)


def test_bounds_rise_from_zero_in_equal_steps_and_angles_are_those_of_rotary_positions() -> None:
    encoder = HGRN(d_model=8, n_layers=4, length=32, direction="bidirectional")
    assert encoder.bounds(0) is None
    for layer in (1, 2, 3):
        torch.testing.assert_close(encoder.bounds(layer), torch.full((8,), layer / 4))
    mixer = encoder.blocks[0].mixer
    assert isinstance(mixer, HGRNMixer)
    angles = torch.tensor([10000 ** (-2 * j / 8) for j in range(8)])
    for theta in (mixer.theta, mixer.theta_reverse):
        torch.testing.assert_close(theta, angles)


def test_a_layer_keeps_at_least_its_lower_bound() -> None:
    """Where the gate is shut, a state of layer l shrinks by gamma_l and no more."""
    encoder = HGRN(d_model=8, n_layers=4, length=32, complex_state=False)
    for layer, block in enumerate(encoder.blocks):
        mixer = block.mixer
        assert isinstance(mixer, HGRNMixer)
        with torch.no_grad():
            mixer.lambda_proj.bias.fill_(-100.0)
        keep, _ = mixer._terms(torch.zeros(1, 8))
        torch.testing.assert_close(keep, torch.full((1, 8), layer / 4))


def test_one_table_serves_all_layers_and_a_copy_has_its_own() -> None:
    import copy

    encoder = HGRN(d_model=8, n_layers=3, length=32)
    assert [name for name, _ in encoder.named_parameters() if "lower_bounds" in name] == ["bounds.lower_bounds"]
    other = copy.deepcopy(encoder)
    mixer = other.blocks[1].mixer
    assert isinstance(mixer, HGRNMixer)
    assert mixer._bounds[0] is other.bounds is not encoder.bounds
