"""bounded_cnn against tensors of the authors' module, its recurrence, and the window it promises."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from refusals import refuses
from stepping import stepped
from torch import Tensor

from lra.architectures.convolution.bounded_cnn import BoundedCNN, BoundedCNNMixer

THEIRS = {
    "norm.weight": "norm_1.weight",
    "norm.bias": "norm_1.bias",
    "mixer.value.weight": "ff_z2.0.weight",
    "mixer.value.bias": "ff_z2.0.bias",
    "mixer.gate.weight": "ff_z1.0.weight",
    "mixer.gate.bias": "ff_z1.0.bias",
    "mixer.weight": "spatial_layer.kernel",
    "mixer.bias": "spatial_layer.bias",
    "mixer.norm.weight": "norm_2.weight",
    "mixer.norm.bias": "norm_2.bias",
    "mixer.out.weight": "proj_out.0.weight",
    "mixer.out.bias": "proj_out.0.bias",
}


def ours(name: str, t: Tensor) -> Tensor:
    """Their tap k multiplies the token k steps before the latest one: the reverse of ours."""
    return t.flip(-1) if name == "mixer.weight" else t


@pytest.mark.parametrize(("name", "direction"), [("centred", "bidirectional"), ("causal", "causal")])
def test_layer_equals_the_authors(name: str, direction: str) -> None:
    g = {k.removeprefix(f"{name}."): t for k, t in golden("bounded_cnn").items() if k.startswith(f"{name}.")}
    kernel = g["param.spatial_layer.kernel"].shape[1]
    encoder = BoundedCNN(d_model=6, n_layers=1, length=17, direction=direction, kernel=kernel, expand=8 / 6).double()
    layer = encoder.layers[0]
    layer.load_state_dict({own: ours(own, g[f"param.{other}"]) for own, other in THEIRS.items()})
    x = g["x"].clone().requires_grad_()
    y = layer(x, g["mask"])
    torch.testing.assert_close(y[g["mask"]], g["y"][g["mask"]], rtol=1e-11, atol=1e-11)
    (y * g["w"]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-10, atol=1e-10)
    for own, parameter in layer.named_parameters():
        assert parameter.grad is not None
        expected = ours(own, g[f"grad.{THEIRS[own]}"])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10, msg=own)


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_no_token_outside_the_window_is_seen(direction: str) -> None:
    torch.manual_seed(0)
    encoder = BoundedCNN(d_model=4, n_layers=3, length=64, direction=direction, kernel=5).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, 64, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(encoder(x, torch.ones(1, 64, dtype=torch.bool))[0, 32].sum(), x)
    seen = grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert len(seen) == encoder.receptive_field == 13
    assert seen == list(range(20, 33) if direction == "causal" else range(26, 39))


def test_step_equals_forward_over_2048_tokens() -> None:
    torch.manual_seed(0)
    mixer = BoundedCNNMixer(4, kernel=61, hidden=8, causal=True)
    torch.nn.init.normal_(mixer.weight, std=0.2)
    x = torch.randn(1, 2048, 4)
    with torch.no_grad():
        whole = mixer(x, torch.ones(1, 2048, dtype=torch.bool))
    torch.testing.assert_close(stepped(mixer, x), whole, rtol=1e-4, atol=1e-5)


def test_a_block_starts_all_but_closed() -> None:
    torch.manual_seed(0)
    mixer = BoundedCNNMixer(16, kernel=5, hidden=64, causal=False)
    x = torch.randn(2, 32, 16)
    y = mixer(x, torch.ones(2, 32, dtype=torch.bool)) - mixer.out.bias
    assert 0 < y.square().mean().sqrt() < 0.02
    assert (mixer.bias == 1).all()
    assert 0.8e-5 < mixer.weight.std() < 1.2e-5


test_wrong_arguments_are_named = refuses(BoundedCNN, d_model=8, n_layers=1, length=8)(
    ({"kernel": 4}, "kernel is 4"),
    ({"kernel": 1}, "kernel is 1"),
    ({"expand": 0.01}, "expand"),
)
