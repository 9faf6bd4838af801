"""ckconv against tensors of the authors' convolution and block, and a loop over the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_gradients, assert_near, assert_same_gradients, everything, golden
from refusals import refuses
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures.convolution.ckconv import CKBlock, CKConv, CKConv1d, CKMixer


def load(conv: CKConv1d, g: dict[str, Tensor], prefix: str) -> CKConv1d:
    """The authors' first layer has a weight norm over single numbers."""
    theirs = f"param.{prefix}Kernel.kernel_net"
    state = {"bias": g[f"param.{prefix}bias"]}
    state["Kernel.first.weight"] = g[f"{theirs}.0.weight_g"] * g[f"{theirs}.0.weight_v"].sign()
    state["Kernel.first.bias"] = g[f"{theirs}.0.bias"]
    for own, number in (("second", 4), ("last", 8)):
        state |= {f"Kernel.{own}.{key}": g[f"{theirs}.{number}.{key}"] for key in ("weight_g", "weight_v", "bias")}
    conv.double().load_state_dict(state)
    return conv


def test_convolution_equals_that_of_the_authors() -> None:
    g = golden("ckconv")
    conv = load(CKConv1d(3, 4, length=12, hidden=6, omega=float(g["cfg.omega_0"])), g, "")
    # their kernel has the oldest tap first
    assert_near(conv.kernel(12).flip(-1), g["mid.kernel"], "kernel")
    x = g["x"].requires_grad_()
    y = conv(x)
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, {})


class Whole(nn.Module):
    """Their norm: over all features of all tokens of a sequence."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.mT, 1, self.weight, self.bias, 1e-12).mT


def test_block_equals_that_of_the_authors_under_their_norm() -> None:
    g = golden("ckcnn_block")
    kernel: dict[str, Any] = {"length": 12, "hidden": 6, "omega": float(g["cfg.omega_0"])}
    block = CKBlock(4, 0.0, kernel)
    block.cconv1 = load(CKConv1d(3, 4, **kernel), g, "cconv1.")
    load(block.cconv2, g, "cconv2.")
    for number in (1, 2):
        theirs = f"param.norm{number}.layer_norm"
        setattr(block, f"norm{number}", Whole(g[f"{theirs}.weight"], g[f"{theirs}.bias"]))
    x = g["x"].requires_grad_()
    # theirs changes the width: what it adds is its shortcut's, and what it convolves the narrower input
    block.cconv1.register_forward_pre_hook(lambda _, given: (x,))
    y = block(F.conv1d(x.mT, g["param.shortcut.0.weight"], g["param.shortcut.0.bias"]).mT)
    assert_near(y, g["y"], "y")
    assert_gradients(y, g, x, {})


def written_out(net: CKMixer, x: Tensor) -> Tensor:
    for block in net.blocks:
        h = x
        for conv, norm in ((block.cconv1, block.norm1), (block.cconv2, block.norm2)):
            kernel, rows = conv.Kernel, []
            for t in range(h.shape[1]):
                y = conv.bias
                for j in range(t + 1):
                    p = torch.tensor([1.0 - 2 * j / (conv.length - 1)], dtype=x.dtype)
                    a = torch.sin(kernel.omega * (kernel.first.weight[..., 0] @ p + kernel.first.bias))
                    v, g = kernel.second.weight_v[..., 0], kernel.second.weight_g[..., 0]
                    a = torch.sin(kernel.omega * (g * v / v.norm(dim=1, keepdim=True) @ a + kernel.second.bias))
                    v, g = kernel.last.weight_v[..., 0], kernel.last.weight_g[..., 0]
                    taps = g * v / v.norm(dim=1, keepdim=True) @ a + kernel.last.bias
                    y = y + h[:, t - j] @ taps.view(len(conv.bias), -1).T
                rows.append(y)
            h = F.relu(F.layer_norm(torch.stack(rows, 1), (x.shape[2],), norm.weight, norm.bias))
        x = F.relu(x + h)
    return x


@pytest.mark.parametrize("length", [1, 7, 10])
def test_network_equals_the_equations(length: int) -> None:
    torch.manual_seed(0)
    net = CKConv(d_model=4, n_layers=2, length=10, kernel_hidden=5, omega=3.0).net.double()
    assert isinstance(net, CKMixer)
    x = torch.randn(2, length, 4, dtype=torch.float64)
    assert_same_gradients(net, x, lambda x: net(x, everything(x)), lambda x: written_out(net, x))


def test_start_is_that_of_a_siren() -> None:
    conv = CKConv1d(8, 8, length=64, hidden=32, omega=30.0)
    net, bound = conv.Kernel, (6 / 32) ** 0.5 / 30
    assert 0.9 < net.first.weight.abs().max() <= 1
    for layer in (net.second, net.last):
        assert 0.95 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
    biases = {name: p for name, p in net.named_parameters() if name.endswith("bias")}
    assert len(biases) == 3
    assert all(0.8 < p.abs().max() <= 1 for p in biases.values())
    assert not conv.bias.any()


test_bad_arguments = refuses(CKConv, d_model=4, n_layers=1, length=8)(
    ({"kernel_hidden": 0}, "kernel_hidden is 0; at least 1"),
    ({"omega": 0.0}, r"omega is 0\.0; more than 0"),
    ({"direction": "sideways"}, "direction is 'sideways'; one of causal"),
)


def test_longer_sequences_are_refused() -> None:
    x = torch.randn(1, 9, 4)
    with pytest.raises(ValueError, match="length 9 exceeds the 8 taps"):
        CKConv(d_model=4, n_layers=1, length=8)(x, everything(x))
