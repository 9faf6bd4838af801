"""A stranger's layer: any nn.Module that maps (B, L, D) to (B, L, D), wrapped as the mixer of a residual stack.

Nothing has to be inherited. What the layer may say of itself, under the names `Mixer` uses, is passed on:

    forward(x, mask)                     a second argument `mask`, (B, L) bool, True = real, if there is one
    causal = True                        class attribute: no output depends on later tokens
    cost(length) -> Cost                 analytic forward work for a sequence, and for a batch
    init_state(batch), step(x, state)    recurrent mode, and chunk(x, state) where it has one
    published(tensors, given)            class method: the map of `Encoder.published`; in its names the i-th copy of the
                                         layer is `layers.i.mixer.inner`
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer, Published

WIDTHS = ("d_model", "dim", "hidden_size", "embed_dim", "input_size", "channels", "width")
LENGTHS = ("length", "seq_len", "max_len", "max_length", "max_seq_len", "l_max")


class AdoptedMixer(Mixer):
    """Calls the layer with x, and with the mask where its forward takes an argument called `mask`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer
        self.takes_mask = "mask" in inspect.signature(layer.forward).parameters

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.inner(x, mask=mask) if self.takes_mask else self.inner(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(f"{type(self.inner).__name__} returned {got}; expected a tensor of shape {tuple(x.shape)}")
        return y

    def cost(self, length: int) -> Cost:
        return self._own("cost")(length)

    def init_state(self, batch: int) -> Any:
        return self._own("init_state")(batch)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._own("step")(x, state)

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        own = getattr(self.inner, "chunk", None)  # often the name of a number
        return own(x, state) if callable(own) else super().chunk(x, state)

    def _own(self, method: str) -> Any:
        if not hasattr(self.inner, method):
            raise NotImplementedError(f"{type(self.inner).__name__} declares no {method}")
        return getattr(self.inner, method)


@cache  # a copy that pickle makes is of the same class
def adopt(layer: Any, name: str) -> type[Stack]:
    """An Encoder class around `layer`, a class whose constructor takes the width (under one of WIDTHS, or first) and,
    if it likes, the longest length (under one of LENGTHS).

    The wrapped class has the arguments of any stack; the layer's own are given as `layer={...}`.
    Raises TypeError when `layer` cannot be such a module.
    """
    if not (inspect.isclass(layer) and issubclass(layer, nn.Module)):
        raise TypeError(f"{name} is not a class derived from torch.nn.Module")
    if layer.forward is nn.Module.forward:
        raise TypeError(f"{name} defines no forward")
    known = inspect.signature(layer).parameters
    named = [p.name for p in known.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    width = next((w for w in WIDTHS if w in named), next(iter(named), None))
    if width is None:
        raise TypeError(f"the constructor of {name} takes no width; give it an argument d_model")
    longest = next((n for n in LENGTHS if n in named), None)
    required = [n for n in named if known[n].default is inspect.Parameter.empty]

    def build(d_model: int, length: int, own: Mapping[str, Any]) -> nn.Module:
        given = {width: d_model, **({longest: length} if longest else {}), **own}
        for key in own:
            if key not in named and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                near = get_close_matches(key, named, n=1)
                raise ValueError(
                    f"{name} takes no {key!r}; {f'did you mean {near[0]!r}?' if near else ', '.join(named)}"
                )
        missing = [n for n in required if n not in given]
        if missing:
            raise ValueError(f"{name} also needs {', '.join(missing)}: give a default, or set encoder.layer")
        return layer(**given)

    adopted, direction = layer, getattr(layer, "causal", None)
    declares = {"cost"} if hasattr(layer, "cost") else set()
    declares |= {"step"} if hasattr(layer, "step") and hasattr(layer, "init_state") else set()
    declares |= {"direction"} if isinstance(direction, bool) else set()

    class Adopted(Stack):
        card = Card(title=name, year=0, url="", scaling="not declared", causal=direction is True)
        declares: ClassVar[frozenset[str]]

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
            super().__init__(
                lambda _: AdoptedMixer(build(d_model, length, layer or {})),
                d_model=d_model, n_layers=n_layers, length=length, dropout=dropout,
                direction="causal" if direction is True else "bidirectional", native=True, block=block,
            )  # fmt: skip

        @classmethod
        def published(cls, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Published:
            own = getattr(adopted, "published", super().published)
            return own(tensors, given)

        def __reduce__(self) -> tuple[Any, ...]:
            return _blank, (adopted, name), self.__dict__

    Adopted.declares = frozenset(declares)
    Adopted.__name__ = Adopted.__qualname__ = name
    return Adopted


def _blank(layer: Any, name: str) -> Stack:
    """An instance without attributes, for pickle, which cannot find a class made in a function by its name."""
    cls = adopt(layer, name)
    return cls.__new__(cls)
