"""longconv against tensors of the authors' modules, and its gradients against the sum written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from torch import Tensor

from lra.architectures.convolution.longconv import LongConv, LongConvMixer

SETS: dict[str, dict[str, Any]] = {
    "longconv_causal_smooth": {"smoothing": 5},
    "longconv_bidirectional": {"direction": "bidirectional"},
    "longconv_standalone": {},
}


def mixer_of(**own: Any) -> LongConvMixer:
    mixer = LongConv(**{"d_model": 4, "n_layers": 1, "length": 48, "channels": 2, **own}).blocks[0].mixer
    assert isinstance(mixer, LongConvMixer)
    return mixer.double()


def loaded(name: str) -> tuple[LongConvMixer, dict[str, Tensor]]:
    g = golden(name)
    mixer = mixer_of(lam=float(g["param.lam"]), **SETS[name])
    mixer.load_state_dict({key: g[f"param.{key.replace('output_linear', 'out')}"] for key in mixer.state_dict()})
    return mixer, g


def written_out(mixer: LongConvMixer, x: Tensor) -> Tensor:
    """y_t = D x_t + sum_j k_j x_{t-j} + sum_j k'_j x_{t+1+j} of each channel's kernels, token by token."""
    length = x.shape[1]
    kernels = mixer.squashed(length)
    rows = []
    for t in range(length):
        parts = []
        for c in range(mixer.channels):
            y = mixer.D[c] * x[:, t]
            for j in range(t + 1):
                y = y + kernels[c, :, j] * x[:, t - j]
            for j in range(0 if mixer.causal else length - t - 1):
                y = y + kernels[mixer.channels + c, :, j] * x[:, t + 1 + j]
            parts.append(y)
        rows.append(torch.cat(parts, dim=-1))
    return mixer._project(torch.stack(rows, dim=1))


@pytest.mark.parametrize("name", ["longconv_causal_smooth", "longconv_bidirectional"])
def test_mixer_equals_that_of_the_authors(name: str) -> None:
    mixer, g = loaded(name)
    assert_near(mixer.squashed(48), g["mid.kernel_squashed"], "kernel")
    x = g["x"].requires_grad_()
    y = mixer(x, everything(x))
    assert_near(y, g["y"], "y")
    (y * g["w"]).sum().backward()
    assert_near(x.grad, g["grad.x"], "grad.x")


def test_mixer_equals_the_standalone_class_where_its_kernel_does_not_wrap() -> None:
    mixer, g = loaded("longconv_standalone")
    assert_near(mixer.squashed(48), g["mid.kernel_squashed"], "kernel")
    x = g["mid.x_double"].mT
    assert_near(mixer(x, everything(x)).mT, g["mid.y_double"], "y")


def test_mixer_equals_the_standalone_class_where_its_kernel_wraps() -> None:
    """On half the taps' length the second half of theirs, reversed, looks ahead: a bidirectional layer."""
    (causal, g), length = loaded("longconv_standalone"), 24
    mixer = mixer_of(lam=causal.lam, length=length, direction="bidirectional")
    back, ahead = causal.kernel.split(length, dim=-1)
    mixer.load_state_dict({**causal.state_dict(), "kernel": torch.cat([back, ahead.flip(-1)])})
    x = g["x"].mT.contiguous().requires_grad_()
    y = mixer(x, everything(x))
    assert_near(y.mT, g["y"], "y")
    (y.mT * g["w"]).sum().backward()
    assert x.grad is not None
    assert_near(x.grad.mT, g["grad.x"], "grad.x")


@pytest.mark.parametrize("name", ["longconv_causal_smooth", "longconv_bidirectional"])
def test_gradients_of_every_parameter_equal_those_of_the_sum(name: str) -> None:
    """The stored tensors hold the gradient of x alone."""
    mixer, g = loaded(name)
    x = g["x"][:, :17]
    assert_same_gradients(mixer, x, lambda x: mixer(x, everything(x)), lambda x: written_out(mixer, x))


def test_dropout_leaves_out_taps_in_training_alone() -> None:
    torch.manual_seed(0)
    mixer = mixer_of(kernel_dropout=0.5, lam=0.0)
    x = torch.randn(1, 48, 4, dtype=torch.float64)
    one, two = (mixer.train()(x, everything(x)) for _ in range(2))
    assert not torch.equal(one, two)
    one, two = (mixer.eval()(x, everything(x)) for _ in range(2))
    assert torch.equal(one, two)


test_wrong_arguments_are_named = refuses(LongConv, d_model=8, n_layers=1, length=8)(
    ({"channels": 0}, "channels is 0"),
    ({"lam": -0.1}, "lam is -0.1"),
    ({"smoothing": 4}, "smoothing is 4"),
    ({"kernel_dropout": 1.0}, "kernel_dropout is 1.0"),
)


def test_a_sequence_longer_than_the_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="length 49 exceeds the 48 taps"):
        mixer_of().squashed(49)
