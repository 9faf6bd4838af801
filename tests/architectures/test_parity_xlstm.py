"""xlstm against tensors of the authors' code: both cells, the sLSTM layer, both blocks, gradients included."""

from __future__ import annotations

from typing import Any

import torch
from golden_tensors import everything, golden
from recurrences import load
from refusals import refuses
from stepping import run, stepped
from torch import Tensor

from lra.architectures._stack import Block, Layer
from lra.architectures.recurrent.xlstm import XLSTM, GatedFeedForward, MLSTMMixer, SLSTMCell, SLSTMMixer, mlstm


def test_slstm_cell_equals_the_authors() -> None:
    g = golden("slstm_cell")
    cell = SLSTMCell(8, 2, horizon=2).double()
    load(cell, recurrent_kernel=g["param.recurrent_kernel"], bias=g["param.bias"])
    x = g["x"].requires_grad_()
    stepwise, last = run(cell, x)
    for y in (cell(x, everything(x)), stepwise):
        heads = y.unflatten(-1, (2, 4)).transpose(1, 2)
        torch.testing.assert_close(heads, g["y"], rtol=0, atol=1e-12)
        inputs = (x, cell.recurrent_kernel, cell.bias)
        names = ("x", "param.recurrent_kernel", "param.bias")
        for grad, name in zip(torch.autograd.grad((heads * g["w"]).sum(), inputs), names, strict=True):
            torch.testing.assert_close(grad, g[f"grad.{name}"], rtol=0, atol=1e-11)
    final = torch.stack([t.transpose(0, 1).flatten(1) for t in last])
    torch.testing.assert_close(final, g["mid.final_state"], rtol=0, atol=1e-12)


def slstm_mixer(g: dict[str, Tensor], prefix: str, mixer: SLSTMMixer) -> dict[str, Tensor]:
    """Load a stored layer, whose names of the input and the forget gate are swapped; keys by our parameter names."""
    keys = {
        "conv1d.weight": "conv1d.conv.weight", "conv1d.bias": "conv1d.conv.bias", "igate": "fgate.weight",
        "fgate": "igate.weight", "zgate": "zgate.weight", "ogate": "ogate.weight",
        "cell.recurrent_kernel": "slstm_cell._recurrent_kernel_", "cell.bias": "slstm_cell._bias_",
        "group_norm": "group_norm.weight",
    }  # fmt: skip
    own = {name: g[f"param.{prefix}{key}"] for name, key in keys.items()}
    own["group_norm"] = 1 + own["group_norm"]
    load(mixer, **{name.replace(".", "__"): value for name, value in own.items()})
    return {name: f"grad.param.{prefix}{key}" for name, key in keys.items()}  # type: ignore[misc]


def test_slstm_layer_and_every_gradient_equal_the_authors() -> None:
    g = golden("slstm_layer")
    mixer = SLSTMMixer(8, 2, horizon=2).double()
    keys: dict[str, Any] = slstm_mixer(g, "", mixer)
    x = g["x"].requires_grad_()
    for y in (stepped(mixer, x), mixer(x, everything(x))):
        torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
        mixer.zero_grad()
        x.grad = None
        (y * g["w"]).sum().backward()
        torch.testing.assert_close(x.grad, g["grad.x"], rtol=0, atol=1e-10)
        for name, key in keys.items():
            torch.testing.assert_close(
                mixer.get_parameter(name).grad, g[key].view(mixer.get_parameter(name).shape), rtol=0, atol=1e-10
            )


def scale_less(layer: Layer, **weights: Tensor) -> None:
    """Norms of a stored block have a scale less one and no offset."""
    with torch.no_grad():
        for name, value in weights.items():
            layer.get_parameter(f"{name}.weight").copy_(1 + value)


def test_slstm_block_equals_the_authors() -> None:
    g = golden("slstm_block")
    layer = Layer(SLSTMMixer(8, 2, horizon=2), 8, Block(ffn="gelu"), dropout=0.0)
    layer.ffn = GatedFeedForward(8, 16, dropout=0.0)
    layer.double()
    slstm_mixer(g, "xlstm.", layer.mixer)  # type: ignore[arg-type]
    load(layer.ffn, up__weight=g["param.ffn.proj_up.weight"], down__weight=g["param.ffn.proj_down.weight"])
    scale_less(layer, norm=g["param.xlstm_norm.weight"], ffn_norm=g["param.ffn_norm.weight"])
    x = g["x"].requires_grad_()
    y = layer(x, everything(x))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((y * g["w"]).sum(), x)
    torch.testing.assert_close(grad, g["grad.x"], rtol=0, atol=1e-10)


def test_mlstm_cell_and_every_gradient_equal_the_authors() -> None:
    g = golden("mlstm_cell")
    names = ("q", "k", "v", "igate_preact", "fgate_preact")
    given = [g[f"in.{name}"].requires_grad_() for name in names]
    q, k, v, i, f = (t.transpose(1, 2) for t in given)
    nothing = torch.zeros(2, 2, 4, 5, dtype=torch.float64), torch.full((2, 2), -torch.inf, dtype=torch.float64)
    h, (memory, m) = mlstm(q, k, v, i.squeeze(-1), f.squeeze(-1), nothing)
    torch.testing.assert_close(h.transpose(1, 2), g["y"], rtol=0, atol=1e-12)
    grads = torch.autograd.grad((h.transpose(1, 2) * g["w"]).sum(), given)
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, g[f"grad.{name}"], rtol=0, atol=1e-10)
    # their recurrent form starts from m = 0 and has another m: what is stored is compared without it
    whole = memory * m.exp()[..., None, None]
    theirs = torch.cat([g["mid.C"], g["mid.n"]], dim=-1) * g["mid.m"].exp()
    torch.testing.assert_close(whole, theirs, rtol=0, atol=1e-11)


def test_mlstm_block_and_every_gradient_equal_the_authors() -> None:
    g = golden("mlstm_block")
    layer = Layer(MLSTMMixer(6, heads=2, inner=12, n_layers=1, bias=True), 6, Block(ffn="none"), dropout=0.0).double()
    own = {key.removeprefix("param.xlstm."): v for key, v in g.items() if key.startswith("param.xlstm.")}
    grads = {key.removeprefix("grad.param.xlstm."): v for key, v in g.items() if key.startswith("grad.param.xlstm.")}

    def ours(values: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = {name.replace("mlstm_cell.", "").replace("conv1d.conv.", "conv1d."): v for name, v in values.items()}
        moved["qkv_bias"] = torch.stack([moved.pop(f"{name}_proj.bias") for name in "qkv"])
        for name in "qkv":
            moved[f"{name}_proj"] = moved.pop(f"{name}_proj.weight")
        moved["outnorm"] = moved.pop("outnorm.weight")
        return moved

    values = ours(own)
    values["outnorm"] = 1 + values["outnorm"]
    load(layer.mixer, **{name.replace(".", "__"): v for name, v in values.items()})
    scale_less(layer, norm=g["param.xlstm_norm.weight"])
    x = g["x"].requires_grad_()
    y = layer(x, everything(x))
    torch.testing.assert_close(y, g["y"], rtol=0, atol=1e-12)
    (y * g["w"]).sum().backward()
    torch.testing.assert_close(x.grad, g["grad.x"], rtol=0, atol=1e-9)
    for name, grad in ours(grads).items():
        torch.testing.assert_close(layer.mixer.get_parameter(name).grad, grad, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.norm.weight.grad, g["grad.param.xlstm_norm.weight"], rtol=0, atol=1e-9)


def test_chunks_of_any_size_equal_the_whole() -> None:
    torch.manual_seed(0)
    mixers: list[Any] = [SLSTMMixer(8, 2, horizon=20), MLSTMMixer(8, heads=2, inner=16, n_layers=1)]
    for mixer in mixers:
        mixer.double()
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        x = torch.randn(2, 23, 8, dtype=torch.float64)
        state, outputs = mixer.init_state(2), []
        for part in x.split([1, 9, 2, 11], dim=1):
            y, state = mixer.chunk(part, state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), mixer(x, everything(x)), rtol=0, atol=1e-11)


def test_large_gates_stay_finite() -> None:
    """Exponential gates far beyond what a float holds."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 20, 2, 4)
    i = 300 * torch.randn(1, 20, 2, requires_grad=True)
    nothing = torch.zeros(1, 2, 4, 5), torch.full((1, 2), -torch.inf)
    h, _ = mlstm(q, k, v, i, torch.randn(1, 20, 2), nothing)
    cell = SLSTMCell(4, 2, horizon=2)
    other = cell(300 * torch.randn(1, 20, 16), torch.ones(1, 20, dtype=torch.bool))
    (h.sum() + other.sum()).backward()
    assert h.isfinite().all()
    assert other.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())


test_wrong_arguments_are_named = refuses(XLSTM, d_model=8, n_layers=1, length=16)(
    ({"pattern": "mx"}, "letters s and m"),
    ({"heads": 3}, "heads is 3"),
)
