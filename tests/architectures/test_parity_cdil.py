"""cdil against tensors of the authors' network, a loop over rings of several lengths, and what an output sees."""

from __future__ import annotations

import pytest
import torch
from golden_tensors import golden
from refusals import refuses
from torch.nn import functional as F

from lra.architectures.convolution.cdil import CDIL, CDILLevel


def test_levels_equal_the_authors() -> None:
    """Their widths change from level to level, through a linear map on the residual; ours never do."""
    g = golden("cdil_cnn")
    kernel = int(g["cfg.kernel_size"])
    x = g["x"].clone().requires_grad_()
    h, mask = x, torch.ones(x.shape[:2], dtype=torch.bool)
    for i, (d_in, d_out) in enumerate([(4, 6), (6, 6), (6, 5)]):
        level = CDILLevel(d_in, d_out=d_out, kernel=kernel, dilation=2**i, dropout=0.0).double()
        names = "weight_g", "weight_v", "bias"
        level.conv.load_state_dict({name: g[f"param.conv_net.{i}.conv.{name}"] for name in names})
        if d_in == d_out:
            h = level(h, mask)
        else:
            res = g[f"param.conv_net.{i}.res.weight"][:, :, 0], g[f"param.conv_net.{i}.res.bias"]
            h = F.relu(level.convolve(h, mask)) + F.linear(h, *res)
    torch.testing.assert_close(h, g["y"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h.mean(1), g["mid.pooled"], rtol=1e-12, atol=1e-12)
    (h * g["w"]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-11, atol=1e-12)


def test_rings_of_several_lengths_equal_a_loop() -> None:
    """Each row is a ring of its own length, also where the dilation goes around it more than once."""
    torch.manual_seed(0)
    encoder = CDIL(d_model=3, n_layers=3, length=8, kernel=5).double()
    x = torch.randn(3, 8, 3, dtype=torch.float64, requires_grad=True)
    lengths = [8, 5, 1]
    mask = torch.arange(8) < torch.tensor(lengths).unsqueeze(1)
    w = torch.randn_like(x) * mask.unsqueeze(-1)
    rows = []
    for row, length in zip(x, lengths, strict=True):
        h = row[:length]
        for i, level in enumerate(encoder.levels):
            g, v = level.conv.weight_g, level.conv.weight_v
            W = g * v / v.square().sum((1, 2), keepdim=True).sqrt()
            places = [[(t + (k - 2) * 2**i) % length for k in range(5)] for t in range(length)]
            c = [sum((W[:, :, k] @ h[p] for k, p in enumerate(ps)), level.conv.bias) for ps in places]
            h = h + F.relu(torch.stack(c))
        rows.append(F.pad(h, (0, 0, 0, 8 - length)))
    y, expected = encoder(x, mask).masked_fill(~mask.unsqueeze(-1), 0), torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = (x, *encoder.parameters())
    ours, others = (torch.autograd.grad((out * w).sum(), inputs) for out in (y, expected))
    for own, other in zip(ours, others, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("length", "kernel"), [(64, 3), (33, 3), (50, 5)])
def test_every_output_sees_every_token(length: int, kernel: int) -> None:
    torch.manual_seed(0)
    encoder = CDIL(d_model=8, n_layers=1, length=length, kernel=kernel).double()
    for level in encoder.levels:
        torch.nn.init.constant_(level.get_parameter("conv.bias"), 5.0)  # no relu shuts a path
    x = torch.randn(1, length, 8, dtype=torch.float64, requires_grad=True)
    for t in (0, length // 3):
        (grad,) = torch.autograd.grad(encoder(x, torch.ones(1, length, dtype=torch.bool))[0, t].sum(), x)
        assert (grad[0].abs().sum(-1) > 0).all()
    fewer = CDIL(d_model=8, n_layers=1, length=length, kernel=kernel, levels=len(encoder.levels) - 1).double()
    (grad,) = torch.autograd.grad(fewer(x, torch.ones(1, length, dtype=torch.bool))[0, 0].sum(), x)
    assert not (grad[0].abs().sum(-1) > 0).all()


def test_turning_the_ring_turns_the_output() -> None:
    torch.manual_seed(0)
    encoder = CDIL(d_model=4, n_layers=1, length=21).double()
    x, mask = torch.randn(2, 21, 4, dtype=torch.float64), torch.ones(2, 21, dtype=torch.bool)
    torch.testing.assert_close(encoder(x.roll(5, 1), mask), encoder(x, mask).roll(5, 1), rtol=1e-12, atol=1e-12)


test_wrong_arguments_are_named = refuses(CDIL, d_model=8, n_layers=1, length=8)(
    ({"kernel": 4}, "kernel is 4"),
    ({"levels": 0}, "levels is 0"),
    ({"direction": "causal"}, "direction is 'causal'"),
)
