"""Templates of a new architecture and a new task: working examples that pass every conformance check."""

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

    def __init__(self, *, d_model: int, **stack: Any) -> None:
        super().__init__(lambda _: {title}Mixer(d_model), d_model=d_model, **stack)
'''


TASK = '''"""{title}: one sentence on what a model has to do.

Source of the task; how examples are drawn, with shapes and ranges; what is scored.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from lra.task import Protocol
from lra.tasks.generated import COUNTS, GeneratedTask, longer


class {title}(GeneratedTask):
    name = "{name}"
    title = "{summary}"
    classes = {classes}
    target = "{target}"{tolerance}
    protocols: ClassVar = {{
        # trained on 8 to 32 positions, tested at 32 and, as a further split, at 64
        "32": Protocol("32", length=64, {input}, counts=COUNTS, law={{"length": (8, 32)}}, tests=longer(64)),
    }}

    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        values = {values}
        return values, {labels}
'''
TARGETS = {
    "class": {
        "summary": "does the first token occur last?", "classes": "2", "tolerance": "", "input": "vocabulary=4",
        "values": 'random.integers(0, 4, (count, law["length"]))', "labels": "values[:, 0] == values[:, -1]",
    },
    "position": {
        "summary": "the largest token so far", "classes": "8", "tolerance": "", "input": "vocabulary=8",
        "values": 'random.integers(0, 8, (count, law["length"]))', "labels": "np.maximum.accumulate(values, axis=1)",
    },
    "value": {
        "summary": "mean of the values", "classes": "1", "tolerance": "\n    tolerance = 0.05",
        "input": "channels=1, real=True", "values": 'random.random((count, law["length"], 1), np.float32)',
        "labels": "values.mean(axis=(1, 2))",
    },
}  # fmt: skip
"""The parts of TASK by target."""


def task(name: str, target: str) -> Path:
    """Write `<name>.py` to the working directory and return its path. Raises UserError for an unknown target, a file
    that exists and a name that is not a module name."""
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    _check_name(name, "task", registry.tasks.names())
    path = Path(f"{name}.py")
    if path.exists():
        raise UserError(f"{path} exists; choose another name")
    with files.atomic(path) as temporary:
        temporary.write_text(TASK.format(name=name, title=class_name(name), target=target, **TARGETS[target]))
    return path


def architecture(name: str, family: str) -> Path:
    """Write `architectures/<family>/<name>.py` and return its path. Raises UserError for an unknown family, a name that
    is taken and a name that is not a module name."""
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    _check_name(name, "architecture", registry.architectures.names())
    path = registry.ROOT / "architectures" / family / f"{name}.py"
    with files.atomic(path) as temporary:
        temporary.write_text(ARCHITECTURE.format(title=class_name(name)), encoding="utf-8")
    return path


def class_name(name: str) -> str:
    """The name of the class in the file of a name: my_task -> MyTask."""
    return "".join(part.capitalize() for part in name.split("_"))


def _check_name(name: str, kind: str, taken: list[str]) -> None:
    article = "an" if kind == "architecture" else "a"
    valid = name.isidentifier() and name.isascii() and name == name.lower() and name[0] != "_"
    if not valid or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} cannot be {article} {kind}'s name; use lower-case letters, digits and _, first a letter"
        )
    if name in taken:
        raise UserError(f"{article} {kind} named {name} exists; choose another name")
