"""A width for a budget: `params=600k`, `flops=1.2G` (forward and backward) or `memory=8G`.

FLOPs are those of one full-length example, with its share of what is done once for a batch.

The model is built on the meta device, where it has shapes but no numbers. Memory is an estimate: weights, gradients
and the two moments of an optimiser in float32, and, for each example of a batch, what the layers keep.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from lra.config.recipe import Recipe
from lra.errors import UserError, unknown
from lra.model import Classifier
from lra.task import Protocol

Built = TypeVar("Built", bound=nn.Module)
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
WIDEST = 4096
# a residual block keeps about this many activations of its width for each token
KEPT = 16


def wanted(text: str) -> tuple[str, float]:
    """`params=600k` -> ("params", 600000.0). Raises UserError."""
    kind, _, amount = text.partition("=")
    if kind not in ("params", "flops", "memory"):
        raise unknown("budget", kind, ("params", "flops", "memory"), where="--match")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)", amount)
    if not found or not float(found[1]):
        raise UserError(f"--match {text}: expected a number and k, M, G or T, for example {kind}=600k")
    return kind, float(found[1]) * UNITS[found[2]]


def solved(text: str, found: Recipe, build: Callable[[Recipe], Classifier], protocol: Protocol) -> tuple[int, str]:
    """The width that comes nearest to a budget, and a line on how near. Raises UserError where no width is possible."""
    kind, budget = wanted(text)
    known: dict[int, float] = {}

    def cost(width: int) -> float | None:
        """None where the architecture refuses this width, such as one that its heads do not divide."""
        if width not in known:
            sized = replace(found, model=replace(found.model, d_model=width))
            try:
                known[width] = _cost(kind, shaped(lambda: build(sized)), sized, protocol)
            except UserError:
                return None
        return known[width]

    step = next((s for s in (1, 2, 4, 8, 16, 32) if all(cost(s * k) is not None for k in (4, 5, 7))), 0)
    if not step:
        raise UserError(f"--match {text}: no regular series of widths of {found.architecture} can be built")
    low, high = 1, WIDEST // step
    while low < high:
        middle = (low + high) // 2
        value = cost(middle * step)
        if value is not None and value < budget:
            low = middle + 1
        else:
            high = middle
    near = [w for w in (low * step, max(low - 1, 1) * step) if cost(w) is not None]
    if not near:
        raise UserError(f"--match {text}: {found.architecture} cannot be built near d_model {low * step}")
    width = min(near, key=lambda w: abs(known[w] - budget))
    off = known[width] / budget - 1
    return width, f"d_model {width} has {kind} {known[width]:,.0f}, {100 * off:+.1f} % of the {budget:,.0f} asked for"


def shaped(make: Callable[[], Built]) -> Built:
    """The model on the meta device; in memory where its initialisation looks at numbers."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make()
        except (RuntimeError, NotImplementedError):
            return make()


def _cost(kind: str, model: Classifier, found: Recipe, protocol: Protocol) -> float:
    parameters = sum(p.numel() for p in model.parameters())
    if kind == "params":
        return float(parameters)
    size = found.data.batch_size / found.train.accumulate
    if kind == "flops":
        try:
            return 3 * model.cost(protocol.length).of_batch(size).total / size
        except NotImplementedError:
            raise UserError(f"--match flops: {found.architecture} declares no cost") from None
    rows = size * model.towers
    tokens = rows * protocol.length * found.model.d_model
    return 16.0 * parameters + 4.0 * tokens * KEPT * (1 if found.train.checkpointing else found.model.n_layers)
