"""`recurrent_cell` against published code and torch.nn's own layers, and what only it promises."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite
import numpy as np
import pytest
import torch
from golden_tensors import golden
from llvmlite import binding, ir
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lra.kernels import _dispatch
from lra.kernels.recurrent_cell import GATES, layer, product, recurrent_cell
from lra.kernels.recurrent_cell.activations import sigmoid, tanh
from lra.kernels.recurrent_cell.cpu import compiled
from lra.kernels.recurrent_cell.product import multiply, multiply_plain, multiply_tiles, pack

both = pytest.mark.parametrize("impl", ["reference", "cpu"])


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10)


def meets(z: dict[str, Tensor], x: Tensor, state: tuple[Tensor, ...]) -> None:
    y, h, *c = state
    close(y, z["y"])
    close(h, z["h_n"])
    if c:
        close(c[0], z["c_n"])
    close(torch.autograd.grad(y, x, z["w"])[0], z["grad.x"])


@both
@pytest.mark.parametrize("name", ["lstm_peephole", "lstm_cifg", "lstm_cifg_peephole"])
def test_lstm_variants(name: str, impl: str) -> None:
    """Closed forms of Gers and Schmidhuber 2000 and Greff et al. 2015, cross-checked against onnxruntime."""
    z = golden(name)
    x = z["x"].requires_grad_()
    peephole = [z[f"param.{p}"] for p in ("p_i", "p_f", "p_o") if f"param.{p}" in z]
    state = recurrent_cell(
        F.linear(x, z["param.W"]), z["param.R"], z["param.b"], "lstm_coupled" if "cifg" in name else "lstm", z["h0"],
        c0=z["c0"], peephole=torch.stack(peephole) if peephole else None, return_state=True, impl=impl,
    )  # fmt: skip
    meets(z, x, state)  # type: ignore[arg-type]


@both
@pytest.mark.parametrize("name", ["lstm_layernorm_haste", "lstm_layernorm_torchscript"])
def test_lstm_with_layer_norm(name: str, impl: str) -> None:
    """Carrying c as Ba et al. 2016 do (its source orders gates i, g, f, o), and carrying the normalised c."""
    z = golden(name)
    x = z["x"].requires_grad_()
    if name.endswith("haste"):
        order = torch.arange(20).view(4, 5)[[0, 2, 1, 3]].flatten()
        w, u = (z[f"param.{kernel}"].T[order] for kernel in ("kernel", "recurrent_kernel"))
        gains, b = z["param.gamma"][:, order], z["param.bias"][order]
        offset, cell, of_c = None, "lstm_layernorm", [z["param.gamma_h"], z["param.beta_h"]]
    else:
        w, u, b = z["param.weight_ih"], z["param.weight_hh"], z["param.layernorm_h.bias"]
        gains = torch.stack([z["param.layernorm_i.weight"], z["param.layernorm_h.weight"]])
        offset, cell = z["param.layernorm_i.bias"], "lstm_layernorm_carried"
        of_c = [z["param.layernorm_c.weight"], z["param.layernorm_c.bias"]]
    state = recurrent_cell(
        F.layer_norm(F.linear(x, w), (20,), gains[0], offset), u, b, cell, z["h0"],
        c0=z["c0"], norm=torch.stack([*gains[1].view(4, 5), *of_c]), return_state=True, impl=impl,
    )  # fmt: skip
    meets(z, x, state)  # type: ignore[arg-type]


@both
def test_indrnn(impl: str) -> None:
    z = golden("indrnn")
    x = z["x"].requires_grad_()
    inputs = F.linear(x, z["param.weight_ih"], z["param.bias"])
    state = recurrent_cell(inputs, z["param.weight_hh"], None, "indrnn", z["h0"], return_state=True, impl=impl)
    meets(z, x, state)  # type: ignore[arg-type]


@both
def test_rhn(impl: str) -> None:
    """Three layers per step. The source stacks x over the state and multiplies from the right."""
    z = golden("rhn_depth3")
    x = z["x"].requires_grad_()
    weights = {f"{part}_{layer}": z[f"param.{part}_{layer}.Matrix"].T for layer in range(3) for part in "ht"}
    inputs = F.linear(x, torch.cat([weights["h_0"][:, :4], weights["t_0"][:, :4]]))
    weights |= {part: weights[part][:, 4:] for part in ("h_0", "t_0")}
    b = torch.cat([z[f"param.{part}.Bias"] for part in weights])
    state = recurrent_cell(inputs, torch.cat([*weights.values()]), b, "rhn", z["h0"], return_state=True, impl=impl)
    meets(z, x, state)  # type: ignore[arg-type]


@both
def test_mgu(impl: str) -> None:
    """The source concatenates [h, x]."""
    z = golden("mgu")
    x = z["x"].requires_grad_()
    w, b = torch.cat([z["param.W_f"], z["param.W_h"]]), torch.cat([z["param.b_f"], z["param.b_h"]])
    state = recurrent_cell(F.linear(x, w[:, 5:]), w[:, :5], b, "mgu", z["h0"], return_state=True, impl=impl)
    meets(z, x, state)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cell", "layer"),
    [("lstm", nn.LSTM), ("gru", nn.GRU), ("elman", nn.RNN), ("elman_relu", partial(nn.RNN, nonlinearity="relu"))],
)
def test_torch_layers(cell: str, layer: Any) -> None:
    """The same outputs, last states and gradients of every weight."""
    torch.manual_seed(0)
    rnn = layer(6, 9, batch_first=True, dtype=torch.float64)
    w, u, b, c = rnn.parameters()
    x = torch.randn(5, 40, 6, dtype=torch.float64, requires_grad=True)
    start = [torch.randn(5, 9, dtype=torch.float64, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)]
    h0, c0 = start[0], start[1] if cell == "lstm" else None
    found = recurrent_cell(F.linear(x, w, b), u, c, cell, h0, c0=c0, return_state=True)
    y, last = rnn(x, tuple(s[None] for s in start) if cell == "lstm" else h0[None])
    wanted = y, *(s[0] for s in (last if cell == "lstm" else (last,)))
    cotangents = [torch.randn_like(t) for t in wanted]
    inputs = x, w, u, b, c, *start
    torch.testing.assert_close(tuple(found), wanted, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(outputs, inputs, cotangents) for outputs in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("cell", "free"), [("gru_coupled", "gru"), ("mgu", "gru_reset_first")])
def test_a_coupled_gate_is_the_negated_one(cell: str, free: str) -> None:
    """1 - sigmoid(a) = sigmoid(-a): the uncoupled cell with the second gate's weights negated computes the same."""
    x, U, b = torch.randn(3, 20, 10), torch.randn(10, 5), torch.randn(10)

    def with_second_gate(t: Tensor, dim: int) -> Tensor:
        gate, candidate = t.chunk(2, dim)
        r, z = (gate, -gate) if cell == "mgu" else (-gate, gate)
        return torch.cat([r, z, candidate], dim)

    wanted = recurrent_cell(with_second_gate(x, 2), with_second_gate(U, 0), with_second_gate(b, 0), free)
    torch.testing.assert_close(recurrent_cell(x, U, b, cell), wanted)


def arguments(cell: str) -> dict[str, Any]:
    gates, width = GATES[cell], 5
    U = torch.rand(width) if cell == "indrnn" else torch.randn(gates * width * (2 if cell == "rhn" else 1), width)
    given = {"x_gates": torch.randn(3, 30, gates * width), "U": U, "b": torch.randn(len(U)), "cell": cell}
    return given | ({"norm": 1 + 0.3 * torch.randn(6, width)} if cell.startswith("lstm_layernorm") else {})


@pytest.mark.parametrize("cell", GATES)
def test_state_passes_from_one_half_to_the_other(cell: str) -> None:
    given = arguments(cell)
    x = given.pop("x_gates")
    whole, first = (recurrent_cell(part, **given, return_state=True) for part in (x, x[:, :11]))
    names = ("h0", "c0")[: len(first) - 1]
    second = recurrent_cell(x[:, 11:], **given, **dict(zip(names, first[1:], strict=True)), return_state=True)
    assert torch.equal(torch.cat([first[0], second[0]], dim=1), whole[0])
    assert all(torch.equal(a, b) for a, b in zip(second[1:], whole[1:], strict=True))


@pytest.mark.parametrize("cell", GATES)
def test_nothing_is_kept_without_a_gradient(cell: str) -> None:
    given, sizes = arguments(cell), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.lra.recurrent_cell.default:
                sizes.append(result[2].numel())
            return result

    with Sizes():
        kept = recurrent_cell(**given)
        with_gradient = recurrent_cell(**given | {"U": given["U"].requires_grad_()})
    assert sizes[0] == 0
    assert (sizes[1] == 0) == (cell in ("elman", "elman_relu", "indrnn"))  # h itself is all that these need
    torch.testing.assert_close(kept, with_gradient.detach(), rtol=0, atol=0)  # type: ignore[union-attr]


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_first", "rhn"])
def test_a_bfloat16_input_leaves_the_loop_in_float32_and_its_weights_a_bfloat16_product(cell: str) -> None:
    given = {name: t.float() if isinstance(t, Tensor) else t for name, t in arguments(cell).items()}
    given["x_gates"] = given["x_gates"].bfloat16()
    found, wide = ({k: t.detach().requires_grad_() for k, t in given.items() if k in ("x_gates", "U")} for _ in "ab")
    y = recurrent_cell(**given | found)  # type: ignore[arg-type]
    expected = recurrent_cell(**given | wide | {"x_gates": wide["x_gates"].float()})  # type: ignore[arg-type]
    assert isinstance(y, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(y, expected)
    w = torch.randn_like(y)
    own, theirs = (torch.autograd.grad(h, tuple(of.values()), w) for h, of in ((y, found), (expected, wide)))
    assert torch.equal(own[0], theirs[0])
    assert own[1].dtype == torch.float32
    error = (own[1] - theirs[1]).norm() / theirs[1].norm()
    assert 0 < error < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 1, 1), (4, 7, 64), (7, 33, 65), (9, 12, 150)])
@pytest.mark.parametrize("multiply", [multiply_tiles, multiply_plain])
def test_product(dtype: torch.dtype, rows: int, depth: int, width: int, multiply: Callable[..., None]) -> None:
    """Whole blocks of rows and the rest, whole tiles of columns and the rest."""
    v, matrix = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, width, dtype=dtype)
    packed = pack(matrix)
    out = torch.full((rows, packed.shape[0] * packed.shape[2]), 7.0, dtype=dtype)
    multiply(v.numpy(), packed.numpy(), out.numpy())
    torch.testing.assert_close(out[:, :width], v @ matrix)
    assert not out[:, width:].any()


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_of_the_product_with_typed_and_with_opaque_pointers(dtype: torch.dtype, typed: bool) -> None:
    """The versions of llvmlite differ in the pointers that they have; compiled here without Numba."""
    number: ir.Type = ir.FloatType() if dtype == torch.float32 else ir.DoubleType()
    module = product.tile_module(dtype.itemsize * 8, 4, number.as_pointer() if typed else ir.PointerType())
    machine = binding.Target.from_default_triple().create_target_machine(cpu=binding.get_host_cpu_name())
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    v, matrix = torch.randn(6, 5, dtype=dtype), torch.randn(5, 150, dtype=dtype)
    packed = pack(matrix)
    tiles, _, columns = packed.shape
    out = torch.zeros(6, tiles * columns, dtype=dtype)
    address, count = ctypes.c_void_p, ctypes.c_int64
    kind = ctypes.CFUNCTYPE(None, address, count, address, count, address, count, count)
    kind(engine.get_function_address("tile"))(
        out.data_ptr(), tiles * columns, v.data_ptr(), 5, packed.data_ptr(), 2, tiles - 1
    )
    last = slice((tiles - 1) * columns, 150)
    torch.testing.assert_close(out[2:, last], (v @ matrix)[2:, last])
    out[2:, last] = 0
    assert not out.any()


def test_the_installed_llvmlite_takes_the_vectors() -> None:
    """Another version may not: then products are plain loops, which are slower, and the import says so."""
    assert not product.obstacle(), f"llvmlite {llvmlite.__version__}"
    assert multiply is multiply_tiles


def test_a_llvmlite_that_does_not_take_the_vectors_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise ValueError("GEP lacks type.")

    monkeypatch.setattr(product, "emit_tile", refused)
    with pytest.warns(
        RuntimeWarning, match=r"llvmlite \d.* does not take vector code \(ValueError: GEP lacks type\.\)"
    ):
        assert product.chosen() is multiply_plain


@compiled
def activated(x, through_sigmoid, through_tanh):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        through_sigmoid[i], through_tanh[i] = sigmoid(x[i]), tanh(x[i])


def test_activations_keep_their_digits() -> None:
    """Relative error, for arguments of every size, saturation and what is not a number."""
    sizes = np.logspace(-30, 2, 4000, dtype=np.float32)
    x = np.concatenate([-sizes[::-1], sizes, np.array([0.0, np.inf, -np.inf, np.nan], np.float32)])
    found = np.empty((2, len(x)), np.float32)
    activated(x, *found)
    wide = torch.from_numpy(x).double()
    for y, wanted in zip(found, (torch.sigmoid(wide), torch.tanh(wide)), strict=True):
        large = wanted.abs() > 1e-37
        torch.testing.assert_close(torch.from_numpy(y).double()[large], wanted[large], rtol=4e-7, atol=0)
        assert np.isnan(y[-1])
        assert abs(y[~large.numpy()][:-1]).max() < 1e-30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": "ltsm"}, "cell is 'ltsm'; expected one of elman, "),
        ({"x_gates": torch.zeros(3, 30, 16)}, r"x_gates is \(3, 30, 16\); expected \(B, L, 3 \* H\)"),
        ({"U": torch.zeros(5, 15)}, r"U is \(5, 15\); expected \(15, 5\)"),
        ({"b": torch.zeros(5)}, r"b is \(5,\); expected \(15,\)"),
        ({"h0": torch.zeros(1, 3, 5)}, r"h0 is \(1, 3, 5\); expected \(3, 5\)"),
        ({"c0": torch.zeros(3, 5)}, r"c0 is \(3, 5\); expected None for gru"),
        ({"peephole": torch.zeros(2, 5)}, r"peephole is \(2, 5\); expected None for gru"),
        ({"norm": torch.zeros(6, 5)}, r"norm is \(6, 5\); expected None for gru"),
        ({"x_gates": torch.zeros(3, 30, 20), "cell": "lstm_layernorm"}, r"U is \(15, 5\); expected \(20, 5\)"),
        (
            {"x_gates": torch.zeros(3, 30, 20), "U": torch.zeros(20, 5), "b": None, "cell": "lstm_layernorm"},
            r"norm is None; expected \(6, 5\) for lstm_layernorm",
        ),
        (
            {"x_gates": torch.zeros(3, 30, 4), "cell": "lstm_layernorm"},
            r"x_gates is .*; expected \(B, L, 4 \* H\) with H > 1 for",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"recurrent_cell: {message}"):
        recurrent_cell(**arguments("gru") | changes)


@pytest.mark.parametrize("cell", layer.LAYERS)
def test_layers_of_pytorch_are_our_cells(cell: str) -> None:
    """What cuDNN is given on a GPU, here on the CPU: values and gradients of every argument."""
    torch.manual_seed(0)
    rows = 5 * GATES[cell]
    shapes = {"x": (2, 7, 3), "W": (rows, 3), "b_x": (rows,), "U": (rows, 5), "b": (rows,), "h0": (2, 5), "c0": (2, 5)}
    x, W, b_x, U, b, h0, c0 = given = [torch.randn(shape).double().requires_grad_() for shape in shapes.values()]
    if cell != "lstm":
        given.pop()
    ours = layer.recurrent_layer(x, W, b_x, U, b, cell, h0, c0=c0 if cell == "lstm" else None)
    theirs = layer.in_pytorch(x, W, b_x, U, b, cell, h0, c0)
    close(theirs, ours)
    w = torch.randn_like(ours)
    for name, found, wanted in zip(
        list(shapes)[: len(given)], *(torch.autograd.grad(y, given, w) for y in (theirs, ours)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-10, msg=name)


def test_cudnn_is_chosen_by_name_and_a_fallback_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_used", {})
    monkeypatch.setattr(_dispatch, "_warned", set())
    cuda, there = torch.device("cuda"), True
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: there)
    assert _dispatch.choose("recurrent_cell", "auto", cuda, has_gpu=False, has_cudnn=True) == "cudnn"
    assert _dispatch.used() == {"recurrent_cell": ["cudnn"]}
    assert _dispatch.choose("recurrent_cell", "auto", torch.device("cpu"), has_cudnn=True) == "cpu"
    there = False
    with pytest.warns(RuntimeWarning, match="recurrent_cell: gpu path instead of cudnn: cuDNN is not available"):
        assert _dispatch.choose("recurrent_cell", "auto", cuda, has_cudnn=True) == "gpu"
    with pytest.raises(ValueError, match="impl='cudnn' cannot run: tensors are on cpu, cuDNN needs cuda"):
        layer.recurrent_layer(
            torch.ones(1, 2, 3), torch.ones(3, 3), None, torch.ones(3, 3), None, "elman", impl="cudnn"
        )
    with pytest.raises(ValueError, match="impl='cudnn' cannot run: cuDNN does not have it"):
        recurrent_cell(torch.ones(1, 2, 3), torch.ones(3, 3), None, "elman", impl="cudnn")
