"""hgrn2 against tensors of flash-linear-attention's layer, of the authors' Long Range Arena layer, and its gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tensors import assert_close, assert_layer_as_stored, assert_stored_gradients, everything, golden
from stepping import run
from torch import Tensor

from lra.architectures.linear_attention.hgrn2 import HGRN2, HGRN2Mixer, advance, gates


def layer_of(g: dict[str, Tensor], **options: Any) -> tuple[HGRN2, HGRN2Mixer]:
    """The stored layer of a stack with the stored bounds."""
    n_layers, d_model = g["param.lower_bounds"].shape
    encoder = HGRN2(
        d_model=d_model, n_layers=n_layers, length=32, n_heads=int(g["cfg.heads"]), **options
    ).double()  # fmt: skip
    mixer = encoder.blocks[int(g["cfg.layer"])].mixer
    assert isinstance(mixer, HGRN2Mixer)
    with torch.no_grad():
        encoder.bounds.lower_bounds.copy_(g["param.lower_bounds"])
    return encoder, mixer


def gathered(g: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors of flash-linear-attention under our names: three projections are rows of one map here."""
    return {
        "in_proj.weight": torch.cat([g[f"{prefix}{p}_proj.weight"] for p in "iqf"]),
        "norm.weight": g[f"{prefix}g_norm.weight"],
        "out_proj.weight": g[f"{prefix}o_proj.weight"],
    }


def named(g: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value
        for key, value in g.items()
        if key.startswith(prefix) and key != f"{prefix}lower_bounds"
    }


def test_layer_equals_flash_linear_attention() -> None:
    g = golden("hgrn2_layer")
    encoder, mixer = layer_of(g)
    mixer.load_state_dict(gathered(g, "param."))
    assert_layer_as_stored(mixer, g, gathered(g, "grad.param."))
    assert_close(encoder.bounds.lower_bounds.grad, g["grad.param.lower_bounds"])


def test_step_equals_flash_linear_attention() -> None:
    g = golden("hgrn2_layer")
    _, mixer = layer_of(g)
    mixer.load_state_dict(gathered(g, "param."))
    y, state = run(mixer, g["x"])
    assert_close(y, g["y"], 1e-12)
    assert_close(state, g["mid.final_state"], 1e-12)


def test_the_first_layer_has_no_bound() -> None:
    g = golden("hgrn2_layer")
    encoder, _ = layer_of(g)
    first = encoder.blocks[0].mixer
    first.load_state_dict(gathered(g, "param."))
    assert_close(first(g["x"], everything(g["x"])), g["mid.y_layer0"], 1e-12)


def test_lra_layer_equals_the_authors() -> None:
    g = golden("hgrn2_lra_layer")
    encoder, mixer = layer_of(g, lra=True)
    mixer.load_state_dict(named(g, "param."))
    x = g["x"].transpose(0, 1).requires_grad_()
    y = mixer(x, everything(x))
    assert_close(y, g["y"].transpose(0, 1), 1e-12)
    (y * g["w"].transpose(0, 1)).sum().backward()
    assert_close(x.grad, g["grad.x"].transpose(0, 1))
    assert_stored_gradients(mixer, named(g, "grad.param."))
    assert_close(encoder.bounds.lower_bounds.grad, g["grad.param.lower_bounds"])
    assert_close(run(mixer, x.detach())[0], g["y"].transpose(0, 1), 1e-12)


def test_two_directions_equal_the_authors_with_and_without_padding() -> None:
    g = golden("hgrn2_lra_layer")
    _, mixer = layer_of(g, lra=True, direction="bidirectional")
    mixer.load_state_dict(named(g, "param."))
    x, y = g["x"].transpose(0, 1), g["mid.y_bidirectional"].transpose(0, 1)
    assert_close(mixer(x, everything(x)), y, 1e-12)
    longer = torch.cat([x, torch.randn(len(x), 5, x.shape[-1], dtype=x.dtype)], 1)
    mask = torch.arange(longer.shape[1]).expand(len(x), -1) < x.shape[1]
    assert_close(mixer(longer, mask)[:, : x.shape[1]], y, 1e-12)


def test_gates_and_recurrence_equal_flash_linear_attention() -> None:
    g = golden("hgrn2")
    names = ("q", "f_logit", "v", "lower_bound")
    q, z, v, bound = inputs = [g[f"in.{name}"].requires_grad_() for name in names]
    log_f, k = gates(z, bound)
    assert_close(log_f, g["mid.log_f"], 1e-12)
    assert_close(k, g["mid.k"], 1e-12)
    S, outputs = v.new_zeros(g["mid.final_state"].shape), []
    for t in range(q.shape[1]):
        o, S = advance(torch.nn.functional.silu(q[:, t]), k[:, t], v[:, t], log_f[:, t], S, q.shape[-1] ** -0.5)
        outputs.append(o)
    y = torch.stack(outputs, 1)
    assert_close(y, g["y"], 1e-12)
    assert_close(S, g["mid.final_state"], 1e-12)
    for name, grad in zip(names, torch.autograd.grad(y, inputs, g["w"]), strict=True):
        assert_close(grad, g[f"grad.{name}"], name=name)


def test_a_gate_that_is_shut_has_finite_gradients() -> None:
    z = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    for bound in (None, torch.tensor([0.5, 0.5, 0.5])):
        log_f, k = gates(z, bound)
        (grad,) = torch.autograd.grad((log_f.exp() + k).sum(), z)
        torch.testing.assert_close(log_f.exp() + k, torch.ones(3))
        assert grad.isfinite().all()


def test_wrong_arguments_are_named() -> None:
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"n_heads is {heads}; a divisor of d_model, 8"):
            HGRN2(d_model=8, n_layers=1, length=8, n_heads=heads)
