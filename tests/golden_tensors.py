"""Stored tensors of other people's code, and the comparison of a mixer with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from golden_coverage import FOLDER, READ, is_result
from torch import Tensor, nn


class Result(Tensor):
    """A stored output or gradient. The first operation on it notes that it is used, and gives plain tensors."""

    origin: tuple[str, str]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            value = func(*args, **(kwargs or {}))
        if isinstance(value, Tensor) or func.__name__ != "__get__":  # not a look at the shape or the type
            for operand in (*args, *(kwargs or {}).values()):
                for tensor in operand if isinstance(operand, (list, tuple)) else (operand,):
                    if isinstance(tensor, Result):
                        READ[tensor.origin[0]].add(tensor.origin[1])
        return value


def golden(name: str) -> dict[str, Tensor]:
    """The tensors of tests/golden/<name>.npz by key."""
    READ.setdefault(name, set())
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        tensors = {key: torch.from_numpy(file[key]) for key in file.files}
    for key in filter(is_result, tensors):
        tensors[key] = result = tensors[key].as_subclass(Result)
        result.origin = name, key
    return tensors


def everything(x: Tensor) -> Tensor:
    """The mask of a batch without padding."""
    return torch.ones(x.shape[:2], dtype=torch.bool)


def assert_near(actual: Tensor | None, expected: Tensor, name: str, tolerance: float = 1e-9) -> None:
    """Largest difference at most `tolerance` times the largest expected value, or times 1 where that is smaller."""
    assert actual is not None, f"{name} is missing"
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.detach() - expected.detach()).abs().max().item()
    assert difference <= tolerance * max(expected.abs().max().item(), 1.0), f"{name} differs by {difference:.2g}"


def assert_gradients(
    y: Tensor, g: Mapping[str, Tensor], x: Tensor, parameters: Mapping[str, tuple[Tensor, Tensor]],
    tolerance: float = 1e-9,
) -> None:  # fmt: skip
    """Gradients of sum(y w) against the stored ones. parameters: name -> (parameter, expected gradient)."""
    (y * g["w"]).sum().backward()
    assert_near(x.grad, g["grad.x"], "grad.x", tolerance)
    for name, (parameter, expected) in parameters.items():
        assert_near(parameter.grad, expected, f"grad.{name}", tolerance)


def assert_same_gradients(
    module: nn.Module, x: Tensor, one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor],
    tolerance: float = 1e-9,
) -> None:  # fmt: skip
    """Two ways through one module agree in output and in the gradient of x and of every parameter."""
    w = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    names, leaves = ["x"], [x.detach().requires_grad_()]
    for name, parameter in module.named_parameters():
        names.append(name)
        leaves.append(parameter)
    y, z = one(leaves[0]), other(leaves[0])
    assert_near(y, z, "output", tolerance)
    gradients = (torch.autograd.grad((t * w).sum(), leaves) for t in (y, z))
    for name, mine, reference in zip(names, *gradients, strict=True):
        assert_near(mine, reference, f"grad.{name}", tolerance)


def assert_close(own: Tensor | None, stored: Tensor, atol: float = 1e-11, name: str = "") -> None:
    assert own is not None, name
    torch.testing.assert_close(own, stored, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}" if name else text)


def assert_stored_gradients(module: nn.Module, stored: Mapping[str, Tensor], atol: float = 1e-11) -> None:
    """Every parameter of `module` has the stored gradient of its name, and no other is stored."""
    parameters = dict(module.named_parameters())
    assert parameters.keys() == stored.keys()
    for name, parameter in parameters.items():
        assert_close(parameter.grad, stored[name].view_as(parameter), atol, name)


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
