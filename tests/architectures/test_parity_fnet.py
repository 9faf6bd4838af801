"""fnet against tensors of Hugging Face's transform and torch.fft.fft2 of each sequence alone."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden

from lra.architectures.attention.fnet import FNet, FNetMixer, fourier


def test_transform_equals_hugging_face() -> None:
    g = golden("fnet_mixing")
    x = g["x"].requires_grad_()
    y = FNetMixer(12)(x, torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((y * g["w"]).sum(), x)[0], g["grad.x"], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (1, 2), (2, 1), (8, 6), (7, 5), (5, 8), (64, 3)])
def test_mirrored_half(length: int, width: int) -> None:
    x = torch.randn(2, length, width, dtype=torch.float64)
    torch.testing.assert_close(fourier(x), torch.fft.fft2(x).real, rtol=0, atol=1e-12)


def test_every_sequence_is_transformed_alone() -> None:
    lengths = (9, 5, 9, 1, 5)
    mask = torch.arange(10) < torch.tensor(lengths).unsqueeze(1)
    x = torch.randn(5, 10, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn_like(x)
    y = FNetMixer(6)(x * mask.unsqueeze(-1), mask)
    for b, n in enumerate(lengths):
        other = torch.fft.fft2(x[b, :n]).real
        torch.testing.assert_close(y[b, :n], other, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad((t * w[b, :n]).sum(), x, retain_graph=True)[0] for t in (y[b, :n], other)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


def test_blocks_are_the_paper_s() -> None:
    """Norms after each part, and no parameters in the mixing."""
    encoder = FNet(d_model=8, n_layers=1, length=8, positions="none").double()
    layer = encoder.blocks[0]
    assert not list(layer.mixer.parameters())
    assert layer.ffn is not None
    assert layer.ffn_norm is not None
    x, mask = torch.randn(2, 8, 8, dtype=torch.float64), torch.ones(2, 8, dtype=torch.bool)
    h = layer.norm(x + torch.fft.fft2(x).real)
    torch.testing.assert_close(encoder(x, mask), layer.ffn_norm(h + layer.ffn(h)))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="direction is 'causal'; bidirectional"):
        FNet(d_model=8, n_layers=1, length=8, direction="causal")
    with pytest.raises(ValueError, match="positions is 'rope'; one of"):
        FNet(d_model=8, n_layers=1, length=8, positions="rope")
