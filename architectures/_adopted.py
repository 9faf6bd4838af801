"""A stranger's layer: any nn.Module that maps (B, L, D) to (B, L, D), wrapped as the mixer of a residual stack."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lra.architectures._stack import Block, Stack
from lra.encoder import Card, Cost, Mixer

WIDTHS = ("d_model", "dim", "hidden_size", "embed_dim", "input_size", "channels", "width")


class AdoptedMixer(Mixer):
    """Calls the layer with x, and with the mask where its forward takes an argument called `mask`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer
        self.takes_mask = "mask" in inspect.signature(layer.forward).parameters

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.inner(x, mask=mask) if self.takes_mask else self.inner(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"{type(self.inner).__name__} returned {got}; expected a tensor of shape {tuple(x.shape)}")
        return y

    def cost(self, length: int) -> Cost:
        raise NotImplementedError(f"{type(self.inner).__name__} declares no cost")


def adopt(layer: Any, name: str) -> type[Stack]:
    """An Encoder class around `layer`, a class whose constructor takes the width (under one of WIDTHS, or first).

    The wrapped class has the arguments of any stack; the layer's own are given as `layer={...}`.
    Raises TypeError when `layer` cannot be such a module.
    """
    if not (inspect.isclass(layer) and issubclass(layer, nn.Module)):
        raise TypeError(f"{name} is not a class derived from torch.nn.Module")
    if layer.forward is nn.Module.forward:
        raise TypeError(f"{name} defines no forward")
    parameters = inspect.signature(layer).parameters
    width = next((w for w in WIDTHS if w in parameters), next(iter(parameters), None))
    if width is None:
        raise TypeError(f"the constructor of {name} takes no width; give it an argument d_model")

    class Adopted(Stack):
        card = Card(
            title=name, year=0, url="", family="adopted", scaling="not declared", causal=False,
        )  # fmt: skip
        block = Block()

        def __init__(
            self,
            *,
            d_model: int,
            n_layers: int,
            length: int,
            dropout: float = 0.0,
            block: Mapping[str, Any] | None = None,
            layer: Mapping[str, Any] | None = None,
        ) -> None:
            own = dict(layer or {})
            if "length" in parameters:
                own.setdefault("length", length)
            super().__init__(
                lambda _: AdoptedMixer(made(**{str(width): d_model}, **own)),
                d_model=d_model, n_layers=n_layers, length=length, dropout=dropout,
                direction="bidirectional", native=True, block=block,
            )  # fmt: skip

    made = layer
    Adopted.__name__ = Adopted.__qualname__ = name
    return Adopted
