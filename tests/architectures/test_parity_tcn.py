"""tcn against tensors of the authors' network and of a public WaveNet block, its recurrence, and its reach."""

from __future__ import annotations

import math

import pytest
import torch
from golden_tensors import golden
from refusals import refuses
from torch import Tensor
from torch.nn import functional as F

from lra.architectures.convolution.tcn import TCN, CausalConv, GatedLevel, TCNLevel, TCNMixer


def load(conv: CausalConv, g: dict[str, Tensor], prefix: str) -> CausalConv:
    conv.double().conv.load_state_dict({name: g[f"{prefix}.{name}"] for name in ("weight_g", "weight_v", "bias")})
    return conv


def test_levels_equal_the_authors() -> None:
    """Their widths change from block to block, through a linear map on the residual; ours never do."""
    g = golden("tcn")
    x = g["x"].clone().requires_grad_()
    h = x
    for i, (d_in, d_out) in enumerate([(4, 6), (6, 6), (6, 5)]):
        level = TCNLevel(d_out, int(g["cfg.kernel_size"]), 2**i, 0.0)
        level.convs[0] = CausalConv(d_in, d_out, int(g["cfg.kernel_size"]), 2**i)
        for j in (0, 1):
            load(level.convs[j], g, f"param.network.{i}.conv{j + 1}")
        if d_in == d_out:
            h = level(h)[0]
        else:
            residual = F.linear(
                h, g[f"param.network.{i}.downsample.weight"][:, :, 0], g[f"param.network.{i}.downsample.bias"]
            )
            h = F.relu(residual + F.relu(level.convs[1](F.relu(level.convs[0](h)))))
        if i == 0:
            torch.testing.assert_close(h, g["mid.block0"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h, g["y"], rtol=1e-12, atol=1e-12)
    (h * g["w"]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)


def test_gated_level_equals_a_public_wavenet() -> None:
    g = golden("wavenet_block")
    level = GatedLevel(4, kernel=3, dilation=2, dropout=0.0, last=False)
    # its gates are narrower than its residual path and its skip path wider
    level.conv = load(CausalConv(4, 6, 3, int(g["cfg.dilation"])), g, "param.conv")
    level.conv1x1_out = load(CausalConv(3, 4), g, "param.conv1x1_out")
    level.conv1x1_skip = load(CausalConv(3, 5), g, "param.conv1x1_skip")
    x = g["x"].clone().requires_grad_()
    y, skip = level(x)
    torch.testing.assert_close(skip, g["mid.skip"], rtol=1e-12, atol=1e-12)
    y = y * math.sqrt(0.5)
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    (y * g["w"]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)


def test_gated_network_equals_a_public_wavenet() -> None:
    """Theirs scales the stream by sqrt(1/2) at each level and the sum over levels by its root: their input is ours over
    those powers, so that both go into the gains and biases of the maps around them. It also starts its dilations over.
    """
    g = golden("wavenet_stack")
    count = int(g["cfg.layers"])
    mixer = TCNMixer(4, levels=count, kernel=2, gated=True, dropout=0.0)
    for i, level in enumerate(mixer.levels):
        conv, out, skip = (f"param.conv_layers.{i}.{n}" for n in ("conv", "conv1x1_out", "conv1x1_skip"))
        shrunk = 0.5 ** (i / 2)
        g[f"{conv}.weight_g"] *= shrunk
        for part in ("weight_g", "bias"):
            g[f"{out}.{part}"] /= shrunk
            g[f"{skip}.{part}"] /= count**0.5
        level.conv = load(CausalConv(5, 6, 2, 2 ** (i % (count // int(g["cfg.stacks"])))), g, conv)
        level.conv1x1_skip = load(CausalConv(3, 7), g, skip)
        level.conv1x1_out = None if level.conv1x1_out is None else load(CausalConv(3, 5), g, out)
    mixer.head = torch.nn.ModuleList(
        load(CausalConv(7, width), g, f"param.last_conv_layers.{place}") for width, place in ((7, 1), (4, 3))
    )
    x = g["x"].clone().requires_grad_()
    y = mixer(load(CausalConv(4, 5), g, "param.first_conv")(x), torch.ones(2, 14, dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(y, x, g["w"])
    torch.testing.assert_close(grad, g["grad.x"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_network_equals_a_loop_over_its_equations(gated: bool) -> None:
    """Token by token from the docstring; outputs and the gradient of every parameter."""
    torch.manual_seed(0)
    mixer = TCNMixer(3, levels=3, kernel=2, gated=gated, dropout=0.0).double()
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn_like(x)

    def conv(part: CausalConv, h: Tensor, d: int = 1) -> Tensor:
        g, v, bias = part.conv.weight_g, part.conv.weight_v, part.conv.bias
        assert bias is not None
        W = g * v / v.square().sum((1, 2), keepdim=True).sqrt()
        taps = W.shape[2]
        rows = []
        for t in range(h.shape[1]):
            y = bias.expand(len(h), -1)
            for k in range(taps):
                if t - (taps - 1 - k) * d >= 0:
                    y = y + h[:, t - (taps - 1 - k) * d] @ W[:, :, k].T
            rows.append(y)
        return torch.stack(rows, 1)

    h, total = x, torch.zeros_like(x)
    for i, level in enumerate(mixer.levels):
        if isinstance(level, GatedLevel):
            f, s = conv(level.conv, h, 2**i).chunk(2, dim=-1)
            u = torch.tanh(f) * torch.sigmoid(s)
            total = total + conv(level.conv1x1_skip, u)
            h = h if level.conv1x1_out is None else h + conv(level.conv1x1_out, u)
        else:
            one, two = level.convs
            h = F.relu(h + F.relu(conv(two, F.relu(conv(one, h, 2**i)), 2**i)))
    if mixer.head is not None:
        h = conv(mixer.head[1], F.relu(conv(mixer.head[0], F.relu(total))))
    y = mixer(x, torch.ones(2, 11, dtype=torch.bool))
    torch.testing.assert_close(y, h, rtol=1e-12, atol=1e-12)
    inputs = (x, *mixer.parameters())
    ours, expected = (torch.autograd.grad((out * w).sum(), inputs) for out in (y, h))
    for own, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("length", "gated", "kernel", "levels"),
    [
        (1024, False, 3, 9),
        (4096, False, 3, 11),
        (1024, True, 2, 10),
        (1025, True, 2, 11),
        (125, False, 3, 5),
        (1, False, 3, 2),
    ],
)
def test_levels_are_as_many_as_the_length_needs(length: int, gated: bool, kernel: int, levels: int) -> None:
    """9 and 11 for 1,024 and 4,096 tokens are those of the published runs of TCN on these tasks."""
    encoder = TCN(d_model=2, n_layers=2, length=length, gated=gated, kernel=kernel)
    assert isinstance(encoder.net, TCNMixer)
    assert len(encoder.net.levels) == levels
    assert encoder.receptive_field >= length
    assert levels == 2 or (encoder.receptive_field - 1) // 2 < length


@pytest.mark.parametrize("gated", [False, True])
def test_last_output_sees_the_whole_past(gated: bool) -> None:
    torch.manual_seed(0)
    encoder = TCN(d_model=4, n_layers=1, length=40, levels=3, gated=gated, kernel=3).double()
    x = torch.rand(1, 40, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(encoder(x, torch.ones(1, 40, dtype=torch.bool))[0, -1].sum(), x)
    seen = grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == list(range(40 - encoder.receptive_field, 40))


test_wrong_arguments_are_named = refuses(TCN, d_model=8, n_layers=1, length=8)(
    ({"kernel": 1}, "kernel is 1"),
    ({"levels": 0}, "levels is 0"),
    ({"direction": "back"}, "direction is 'back'"),
)
