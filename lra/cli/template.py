"""The template of a new architecture, a working example that passes every conformance check."""

from __future__ import annotations

import keyword
from pathlib import Path

from lra import files, registry
from lra.encoder import FAMILIES
from lra.errors import UserError, unknown

ARCHITECTURE = '''"""{title}: one sentence on what is special.

Author year, arXiv:0000.00000. Equations with shapes:

    y_t = a * y_(t-1) + (1 - a) * x_t W          (B, L, D), a = sigmoid(rate) in (0, 1), one per channel

Initialisation: values and reasons. Departures from the paper: none. Checked against: the equations as a float64 loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lra.architectures._stack import Stack
from lra.encoder import Card, Cost, Mixer
from lra.kernels.linear_scan import linear_scan


class {title}Mixer(Mixer):
    """(B, L, D) -> (B, L, D)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.map = nn.Linear(d_model, d_model)
        self.rate = nn.Parameter(torch.linspace(0.0, 4.0, d_model))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        a = torch.sigmoid(self.rate)
        return linear_scan(a.expand_as(x), (1 - a) * self.map(x))

    def cost(self, length: int) -> Cost:
        width = self.map.in_features
        return Cost.linear(length, width, width) + Cost(other=3.0 * length * width)

    def init_state(self, batch: int) -> Any:
        return torch.zeros(batch, len(self.rate), dtype=self.rate.dtype, device=self.rate.device)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        a = torch.sigmoid(self.rate)
        y = a * state + (1 - a) * self.map(x)
        return y, y


class {title}(Stack):
    card = Card(
        title="Title of the paper",
        year=2026,
        url="https://arxiv.org/abs/0000.00000",
        scaling="L",
        causal=True,
    )

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        block: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            lambda _: {title}Mixer(d_model),
            d_model=d_model,
            n_layers=n_layers,
            length=length,
            dropout=dropout,
            direction=direction,
            block=block,
        )
'''


def architecture(name: str, family: str) -> Path:
    """Write `architectures/<family>/<name>.py` and return its path. Raises UserError for an unknown family, a name that
    is taken and a name that is not a module name."""
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    if (
        not name.isidentifier()
        or not name.isascii()
        or name != name.lower()
        or name[0] == "_"
        or keyword.iskeyword(name)
    ):
        raise UserError(
            f"{name!r} cannot be an architecture's name; use lower-case letters, digits and _, first a letter"
        )
    if name in registry.architectures.names():
        raise UserError(f"an architecture named {name} exists; choose another name")
    path = registry.ROOT / "architectures" / family / f"{name}.py"
    title = "".join(part.capitalize() for part in name.split("_"))
    with files.atomic(path) as temporary:
        temporary.write_text(ARCHITECTURE.format(title=title), encoding="utf-8")
    return path
