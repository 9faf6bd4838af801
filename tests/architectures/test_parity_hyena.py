"""hyena against tensors of the authors' operator, and the start of its filters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_tensors import golden
from refusals import refuses

from lra.architectures.convolution.hyena import Hyena, HyenaMixer


@pytest.mark.parametrize("name", ["hyena_order2", "hyena_order3"])
def test_operator_equals_the_authors(name: str) -> None:
    g = golden(name)
    order, length, features = int(g["param.order"]), int(g["param.l_max"]), g["param.filter_fn.pos_emb.z"].shape[2]
    mixer = HyenaMixer(
        4, length, order=order, features=features, width=6, shift=float(g["param.shift"]), learn_z=True
    ).double()
    filters = mixer.filter_fn
    torch.testing.assert_close(filters.z, g["mid.init.z"][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(filters.t, g["mid.init.t"][0, :, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(filters.deltas, g["mid.init.deltas"].flatten(), rtol=1e-6, atol=1e-6)
    own = {
        "in_proj.weight": g["param.in_proj.weight"],
        "in_proj.bias": g["param.in_proj.bias"],
        "short_filter.weight": g["param.short_filter.weight"],
        "short_filter.bias": g["param.short_filter.bias"],
        "skip": g["param.filter_fn.bias"].view(order - 1, 4),
        "out_proj.weight": g["param.out_proj.weight"],
        "out_proj.bias": g["param.out_proj.bias"],
        "filter_fn.z": g["param.filter_fn.pos_emb.z"][0],
        "filter_fn.freq": g["param.filter_fn.implicit_filter.1.freq"][0],
        "filter_fn.last.weight": g["param.filter_fn.implicit_filter.6.weight"],
    }
    for i in range(3):
        for part in ("weight", "bias"):
            own[f"filter_fn.implicit_filter.{i}.{part}"] = g[f"param.filter_fn.implicit_filter.{2 * i}.{part}"]
    mixer.load_state_dict(own)
    filters.deltas, filters.t = (
        g["param.filter_fn.modulation.deltas"].flatten(),
        g["param.filter_fn.pos_emb.t"].flatten(),
    )
    torch.testing.assert_close(filters(48).T, g["mid.filter"], rtol=1e-11, atol=1e-12)
    x = g["x"].clone().requires_grad_()
    y = mixer(x, torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(y, g["y"], rtol=1e-11, atol=1e-12)
    (y * g["w"]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=1e-10, atol=1e-11)


def test_gradients_of_every_parameter_equal_a_dense_convolution() -> None:
    torch.manual_seed(0)
    mixer = HyenaMixer(3, 12, order=3, features=5, width=4, shift=0.1, learn_z=True).double()
    x = torch.randn(2, 10, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn_like(x)
    u = mixer.in_proj(x)
    weight, bias = mixer.short_filter.weight, mixer.short_filter.bias
    assert bias is not None
    short = bias.expand_as(u)
    for j in range(3):
        short = short + weight[:, 0, 2 - j] * torch.nn.functional.pad(u, (0, 0, j, 0))[:, :10]
    x0, x1, x2, v = short.chunk(4, dim=-1)
    h = mixer.filter_fn(10).view(2, 3, 10)
    for n, gate in enumerate((x2, x1)):
        u = v * gate
        rows = [sum(h[n, :, t - s] * u[:, s] for s in range(t + 1)) + mixer.skip[n] * u[:, t] for t in range(10)]
        v = torch.stack(rows, dim=1)
    expected, y = mixer.out_proj(v * x0), mixer(x, torch.ones(2, 10, dtype=torch.bool))
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    inputs = (x, *mixer.parameters())
    ours, others = (torch.autograd.grad((out * w).sum(), inputs, retain_graph=True) for out in (y, expected))
    for one, other in zip(ours, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_windows_fall_to_a_hundredth_within_their_range() -> None:
    filters = HyenaMixer(8, 1001, order=2, features=3, width=4, shift=0.0).filter_fn
    falls = math.log(0.01) / filters.deltas
    torch.testing.assert_close(falls[[0, -1]], torch.tensor([1.5, 0.3]))
    assert (filters.freq == 1).all()
    assert filters.t[0] == 0
    assert filters.t[-1] == 1


def test_positions_and_filters_have_rates_of_their_own() -> None:
    optim = Hyena(d_model=4, n_layers=1, length=8, filter_lr=5e-4, position_lr=1e-5).optim
    assert list(optim.values()) == [{"lr": 1e-5, "weight_decay": 0.0}, {"lr": 5e-4, "weight_decay": 0.0}]


def test_parameters_do_not_grow_with_the_length() -> None:
    sizes = [sum(p.numel() for p in Hyena(d_model=4, n_layers=1, length=n).parameters()) for n in (8, 80)]
    assert sizes[0] == sizes[1]


def lowest_share(**options: Any) -> float:
    """Of the energy of the initial filters over 1,024 steps, that in the lowest 2 of 513 frequencies."""
    torch.manual_seed(0)
    mixer = Hyena(d_model=64, n_layers=1, length=1024, **options).blocks[0].mixer
    assert isinstance(mixer, HyenaMixer)
    with torch.no_grad():
        energy = torch.fft.rfft(mixer.filter_fn(1024)).abs().square()
    return (energy[:, :2].sum(1) / energy.sum(1)).mean().item()


def test_initial_filters_have_detail() -> None:
    """With the three features of the released class, two of them constant, most of a filter is its window; w scales the
    frequencies."""
    assert lowest_share(features=3) > 0.5
    assert lowest_share() < 0.35
    assert lowest_share(w=14.0) < 0.02


test_wrong_arguments_are_named = refuses(Hyena, d_model=8, n_layers=1, length=8)(
    ({"order": 1}, "order is 1"),
    ({"features": 4}, "features is 4"),
    ({"width": 0}, "width is 0"),
    ({"w": 0.0}, "w is 0.0"),
    ({"position_lr": -1.0}, "position_lr is -1.0"),
)
