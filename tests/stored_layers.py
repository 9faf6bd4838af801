"""A layer beside the stored output and gradients of other people's code."""

from __future__ import annotations

from collections.abc import Mapping

from golden_tensors import assert_close, assert_stored_gradients, everything
from torch import Tensor, nn


def assert_layer_as_stored(
    layer: nn.Module, g: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None, atol: float = 1e-12,
    of_gradients: float = 1e-11,
) -> None:  # fmt: skip
    """`y` of `x`, and the gradients of sum(y w): of x `grad.x`, and of every parameter that of its name in `gradients`,
    or `grad.param.<name>`."""
    x = g["x"].clone().requires_grad_()
    y = layer(x, everything(x))
    assert_close(y, g["y"], atol, "y")
    (y * g["w"]).sum().backward()
    assert_close(x.grad, g["grad.x"], of_gradients, "grad.x")
    if gradients is None:
        gradients = {name: g[f"grad.param.{name}"] for name, _ in layer.named_parameters()}
    assert_stored_gradients(layer, gradients, of_gradients)
