"""ccnn against tensors of the authors' network and of their convolution both ways, and a loop over the equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures.convolution.ccnn import CCNN, FlexConv, MAGNet


def load(module: nn.Module, g: dict[str, Tensor], names: dict[str, str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Fill `module` with the stored tensors, whose dimensions of size 1 do not count. names: beginning of own names ->
    of theirs. Returns every parameter with its stored gradient, by own name."""
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    state = module.double().state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            own = max((key for key in names if name.startswith(key)), key=len)
            theirs = names[own] + name.removeprefix(own)
            tensor.copy_(g[f"param.{theirs}"].view_as(tensor))
            if "running" not in name:
                expected[name] = module.get_parameter(name), g[f"grad.{theirs}"].view_as(tensor)
    return expected


def test_network_equals_that_of_the_authors() -> None:
    g = golden("ccnn")
    kernel: dict[str, Any] = {"kernel_hidden": 5, "kernel_layers": 2, "omega": 1.5, "window": 0.4}
    net = CCNN(d_model=4, n_layers=2, length=24, block={"norm": "batch"}, **kernel).eval()
    names = {"": "", "norm.": "out_norm."}
    for i in range(2):
        names |= {f"layers.{i}.mixer.": f"blocks.{i}.", f"layers.{i}.norm.": f"blocks.{i}.norm1."}
    parameters = load(net, g, names)
    # theirs has the oldest tap first, and none that the window leaves out
    sampled = net.conv1.kernel(24)
    taps = g["mid.kernel"].shape[1]
    assert_near(sampled[:, :taps].flip(1), g["mid.kernel"], "kernel")
    assert taps == 11
    assert not sampled[:, taps:].any()
    x = g["x"].requires_grad_()
    y = net(x, everything(x))
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, parameters)


def test_convolution_both_ways_equals_that_of_the_authors() -> None:
    g = golden("ccnn_centred")
    conv = FlexConv(4, length=12, causal=False, hidden=5, layers=2, omega=1.5, window=0.3, threshold=0.1)
    parameters = load(conv, g, {"": ""})
    back, ahead = conv.kernel(12)
    middle = g["mid.kernel"].shape[1] // 2
    assert middle == 7
    assert_near(back[:, : middle + 1].flip(1), g["mid.kernel"][:, : middle + 1], "kernel of the past")
    assert_near(ahead[:, :middle], g["mid.kernel"][:, middle + 1 :], "kernel of the future")
    x = g["x"].requires_grad_()
    y = conv(x)
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, parameters)


def tap(conv: FlexConv, p: float, centre: float) -> Tensor:
    """Kernel at a position under the window around `centre`: (D,)."""
    net, width = conv.Kernel, conv.mask_width_param[0]
    window = torch.exp(-((p - centre) ** 2) / (2 * width**2 + 2e-8))

    def gabor(i: int) -> Tensor:
        f = net.filters[i]
        return torch.exp(-((f.gamma * (p - f.mu)) ** 2) / 2) * torch.sin(f.linear.weight[:, 0] * p + f.linear.bias)

    h = gabor(0)
    for i, linear in enumerate(net.linears):
        h = gabor(i + 1) * (linear.weight @ h + linear.bias)
    return (net.output_linear.weight @ h + net.output_linear.bias) * window


def convolved(conv: FlexConv, x: Tensor) -> Tensor:
    length, whole = x.shape[1], max(conv.length - 1, 1)
    rows = []
    for t in range(length):
        y: Tensor = conv.bias
        for s in range(t + 1 if conv.causal else length):
            p = 1 - 2 * (t - s) / whole if conv.causal else (s - t) / whole
            y = y + tap(conv, p, float(conv.causal)) * x[:, s]
        rows.append(y @ conv.channel_mixer.weight.T + conv.channel_mixer.bias)
    return torch.stack(rows, 1)


def written_out(net: CCNN, x: Tensor) -> Tensor:
    def normed(norm: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[2],), norm.weight, norm.bias)

    x = F.gelu(normed(net.norm1, convolved(net.conv1, x)))
    for layer in net.blocks:
        mixer: Any = layer.mixer
        h = F.gelu(convolved(mixer.conv1, normed(layer.norm, x)))
        x = x + F.gelu(h @ mixer.linear1.weight.T + mixer.linear1.bias)
    return normed(net.norm, x)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("length", [1, 6, 7])
def test_network_equals_the_equations(length: int, direction: str) -> None:
    """Under windows so wide that no tap is left out."""
    torch.manual_seed(0)
    net = CCNN(d_model=3, n_layers=2, length=7, direction=direction, kernel_hidden=4, omega=1.0, window=1.1).double()
    x = torch.randn(2, length, 3, dtype=torch.float64)
    assert_same_gradients(net, x, lambda x: net(x, everything(x)), lambda x: written_out(net, x))


@pytest.mark.parametrize("causal", [True, False])
def test_taps_end_where_the_window_falls_below_the_threshold(causal: bool) -> None:
    conv = FlexConv(2, length=2048, causal=causal, hidden=4, layers=1, omega=9.0, window=0.03, threshold=0.1)
    kernel = conv.kernel(2048)
    # as many as the authors' code samples: 67 causal, 263 in both directions
    ahead = torch.tensor([], dtype=torch.int64) if causal else kernel[1].abs().sum(0).nonzero().flatten()
    back = (kernel if causal else kernel[0]).abs().sum(0).nonzero().flatten()
    assert (back.max().item() + 1, len(ahead)) == ((67, 0) if causal else (132, 131))
    # a negative width is the same window
    with torch.no_grad():
        conv.mask_width_param.neg_()
    torch.testing.assert_close(conv.kernel(2048), kernel)


@pytest.mark.parametrize(("causal", "taps"), [(True, 67), (False, 263)])
def test_start_is_that_of_the_authors(causal: bool, taps: int) -> None:
    torch.manual_seed(0)
    conv = FlexConv(128, length=2048, causal=causal, hidden=32, layers=3, omega=784.655, window=0.03, threshold=0.1)
    net = conv.Kernel
    bound = (3 / 32) ** 0.5
    assert 0.98 * bound < net.output_linear.weight.abs().max() * taps**0.5 <= bound * (1 + 1e-6)
    for i, gabor in enumerate(net.filters):
        if i:
            assert 0.98 * bound < net.linears[i - 1].weight.abs().max() <= bound * (1 + 1e-6)
            assert (net.linears[i - 1].bias == 1).all()
        scaled = gabor.linear.weight[:, 0] / (2 * math.pi * 784.655 * gabor.gamma)
        assert 0.8 < scaled.abs().max() <= 1 + 1e-6
        assert not gabor.linear.bias.any()
        # Gamma(a, 1) has the mean a and the variance a
        assert abs(gabor.gamma.mean() - 6 / (i + 1)) < 3 * (6 / (i + 1) / 32) ** 0.5
        lowest, highest = (1 - 1.667 * 0.03, 1.0) if causal else (-1.667 * 0.03, 1.667 * 0.03)
        assert lowest <= gabor.mu.min() < lowest + 0.01
        assert highest - 0.01 < gabor.mu.max() <= highest
    assert isinstance(net, MAGNet)
    assert not net.output_linear.bias.any()
    assert not conv.bias.any()
    assert 0.9 < conv.channel_mixer.weight.std() / (2 / 128) ** 0.5 < 1.1


test_bad_arguments = refuses(CCNN, d_model=4, n_layers=1, length=8)(
    ({"kernel_hidden": 0}, "kernel_hidden is 0; at least 1"),
    ({"kernel_layers": 0}, "kernel_layers is 0; at least 1"),
    ({"omega": 0.0}, r"omega is 0\.0; more than 0"),
    ({"window": -0.1}, r"window is -0\.1; more than 0"),
    ({"threshold": 1.0}, r"threshold is 1\.0; between 0 and 1"),
    ({"direction": "sideways"}, "direction is 'sideways'; one of causal"),
)


def test_longer_sequences_are_refused() -> None:
    x = torch.randn(1, 9, 4)
    with pytest.raises(ValueError, match="length 9 exceeds the 8 taps"):
        CCNN(d_model=4, n_layers=1, length=8)(x, everything(x))
