"""Golden tensors read, and gradients held against them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def everything(x: Tensor) -> Tensor:
    """The mask of a batch without padding: (B, L, ...) -> (B, L)."""
    return torch.ones(x.shape[:2], dtype=torch.bool)


def assert_close(own: Tensor | None, stored: Tensor, atol: float = 1e-11, name: str = "") -> None:
    assert own is not None, name
    torch.testing.assert_close(own, stored, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}" if name else text)


def assert_gradients(module: nn.Module, stored: Mapping[str, Tensor], atol: float = 1e-11) -> None:
    """Every parameter of `module` has the stored gradient of its name, and no other is stored."""
    parameters = dict(module.named_parameters())
    assert parameters.keys() == stored.keys()
    for name, parameter in parameters.items():
        assert_close(parameter.grad, stored[name].view_as(parameter), atol, name)
