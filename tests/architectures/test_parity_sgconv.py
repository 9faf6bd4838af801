"""sgconv against tensors of the authors' module, and its gradients against the sum written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from torch import Tensor

from lra.architectures.convolution.sgconv import SGConv, SGConvMixer

SETS: dict[str, dict[str, Any]] = {
    "sgconv_cat": {},
    "sgconv_cat_bidirectional": {"direction": "bidirectional"},
    "sgconv_learnable_decay": {"decay": "learnt"},
    "sgconv_sum_nearest": {"combine": "sum", "interpolation": "nearest"},
}


def mixer_of(**own: Any) -> SGConvMixer:
    shape = {"d_model": 4, "n_layers": 1, "length": 32, "kernel_dim": 4, "postact": "none"}
    mixer = SGConv(**{**shape, **own}).blocks[0].mixer
    assert isinstance(mixer, SGConvMixer)
    return mixer.double()


def loaded(name: str) -> tuple[SGConvMixer, dict[str, Tensor]]:
    g = golden(name)
    mixer = mixer_of(**SETS[name])
    assert len(mixer.kernel_list) == int(g["param.num_scales"])
    state = {}
    for key, own in mixer.state_dict().items():
        stored = g[f"param.{key.replace('output_linear', 'out')}"]
        state[key] = stored.expand(own.shape) if stored.dim() == 0 else stored.reshape(own.shape)
    mixer.load_state_dict(state)
    return mixer, g


def written_out(mixer: SGConvMixer, x: Tensor) -> Tensor:
    """y_t = D x_t + sum_j k_j x_{t-j} + sum_j k'_j x_{t+1+j}, token by token."""
    kernel, length = mixer.kernel(x.shape[1]), x.shape[1]
    rows = []
    for t in range(length):
        y = mixer.D * x[:, t]
        for j in range(min(t + 1, kernel.shape[-1])):
            y = y + kernel[0, :, j] * x[:, t - j]
        for j in range(min(length - t - 1, kernel.shape[-1]) if len(kernel) == 2 else 0):
            y = y + kernel[1, :, j] * x[:, t + 1 + j]
        rows.append(y)
    return mixer._project(torch.stack(rows, dim=1))


@pytest.mark.parametrize("name", SETS)
def test_mixer_equals_that_of_the_authors(name: str) -> None:
    mixer, g = loaded(name)
    x = g["x"].mT.contiguous().requires_grad_()
    length = x.shape[1]
    kernel, stored = mixer.kernel(length), g["mid.kernel"]
    assert_near(kernel[0], stored[0, :, : kernel.shape[-1]], "kernel")
    if len(kernel) == 2:
        assert_near(kernel[1], stored[0, :, length:].flip(-1)[:, : kernel.shape[-1]], "kernel that looks ahead")
    y = mixer(x, everything(x))
    assert_near(y.mT, g["y"], "y")
    (y * g["w"].mT).sum().backward()
    assert x.grad is not None
    assert_near(x.grad.mT, g["grad.x"], "grad.x")


@pytest.mark.parametrize("name", SETS)
def test_gradients_of_every_parameter_equal_those_of_the_sum(name: str) -> None:
    """The stored tensors hold the gradient of x alone."""
    mixer, g = loaded(name)
    x = g["x"].mT[:, :17]
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: written_out(mixer, x))


def test_every_parameter_learns_from_a_sequence_of_full_length() -> None:
    mixer = mixer_of(decay="learnt", direction="bidirectional")
    x = torch.randn(1, 32, 4, dtype=torch.float64)
    mixer(x, everything(x)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mixer.parameters())


@pytest.mark.parametrize("combine", ["cat", "sum"])
@pytest.mark.parametrize("length", [5, 32, 33, 100])
def test_kernel_starts_with_norm_1_and_covers_the_length(combine: str, length: int) -> None:
    mixer = mixer_of(length=length, combine=combine)
    whole = mixer.kernel(10**6)
    assert_near(whole.norm(dim=-1), torch.ones(1, 4), "norm", 1e-6)
    assert whole.shape[-1] >= length
    assert mixer.kernel(3).shape[-1] == 3


def test_sub_kernels_fade_by_the_multiplier() -> None:
    """With all taps 1 every scale is flat: the kernel falls by m from one to the next."""
    mixer = mixer_of(decay_min=2.0, decay_max=3.0)
    with torch.no_grad():
        for taps in mixer.kernel_list:
            taps.fill_(1)
    kernel = mixer._raw()[0]
    starts = kernel[:, [0, 4, 8, 16]]
    assert_near(starts[:, :-1] / starts[:, 1:], mixer.multiplier.unsqueeze(1).expand(4, 3), "ratio")


def test_cosines_of_whole_periods() -> None:
    mixer = mixer_of(init="cos", kernel_dim=5)
    periods = torch.arange(4).unsqueeze(1) * torch.linspace(0, 1, 5)
    rows = {tuple(row) for row in (2 * torch.pi * periods).cos().round(decimals=5).tolist()}
    for taps in mixer.kernel_list:
        assert {tuple(row) for row in taps.detach()[0].float().round(decimals=5).tolist()} == rows


test_wrong_arguments_are_named = refuses(SGConv, d_model=8, n_layers=1, length=8)(
    ({"combine": "add"}, "cat, sum"),
    ({"interpolation": "cubic"}, "linear, nearest"),
    ({"decay": "none"}, "scale, power, learnt"),
    ({"init": "sin"}, "randn, cos"),
    ({"postact": "relu"}, "glu, none"),
    ({"kernel_dim": 0}, "kernel_dim is 0"),
    ({"init_scale": -1}, "init_scale is -1"),
    ({"decay_min": 3.0}, "decay_min is 3.0"),
)
