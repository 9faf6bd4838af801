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
from lra.encoder import Encoder
from lra.errors import UserError, unknown
from lra.model import Classifier
from lra.task import Protocol

Built = TypeVar("Built", bound=nn.Module)
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
WIDEST = 4096
LENGTH = 1024
"""Sequence length for which `model.budget` counts parameters, so that a width does not depend on the task."""
# a residual block keeps about this many activations of its width for each token
KEPT = 16


def wanted(text: str) -> tuple[str, float]:
    """`params=600k` -> ("params", 600000.0). Raises UserError."""
    kind, _, amount = text.partition("=")
    if kind not in ("params", "flops", "memory"):
        raise unknown("budget", kind, ("params", "flops", "memory"), where="--match")
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)", amount)
    if not number or not float(number[1]):
        raise UserError(f"--match {text}: expected a number and k, M, G or T, for example {kind}=600k")
    return kind, float(number[1]) * UNITS[number[2]]


def solved(text: str, recipe: Recipe, build: Callable[[Recipe], Classifier], protocol: Protocol) -> tuple[int, str]:
    """The width that comes nearest to a budget, and a line on how near. Raises UserError where no width is possible."""
    kind, budget = wanted(text)
    known: dict[int, float] = {}

    def cost(width: int) -> float | None:
        """None where the architecture refuses this width, such as one that its heads do not divide."""
        if width not in known:
            sized = replace(recipe, model=replace(recipe.model, d_model=width))
            try:
                known[width] = _cost(kind, shaped(lambda: build(sized)), sized, protocol)
            except UserError:
                return None
        return known[width]

    step = next((s for s in (1, 2, 4, 8, 16, 32) if all(cost(s * k) is not None for k in (4, 5, 7))), 0)
    if not step:
        raise UserError(f"--match {text}: no regular series of widths of {recipe.architecture} can be built")
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
        raise UserError(f"--match {text}: {recipe.architecture} cannot be built near d_model {low * step}")
    width = min(near, key=lambda w: abs(known[w] - budget))
    off = known[width] / budget - 1
    return width, f"d_model {width} has {kind} {known[width]:,.0f}, {100 * off:+.1f} % of the {budget:,.0f} asked for"


def within_budget(
    recipe: Recipe, reference: Recipe, build: Callable[[Recipe], Encoder], reference_build: Callable[[Recipe], Encoder]
) -> tuple[int, str]:
    """The widest d_model with at most `model.budget` times the parameters of the reference's encoder, and a line on it.

    Tries the recipe's own d_model, then the multiples of `model.width_step` below it, without widths that the
    architecture refuses. Raises UserError where none of them meets the budget.
    """
    allowed = recipe.model.budget * _size(shaped(lambda: reference_build(reference)))
    step = recipe.model.width_step
    size, refusal = 0, ""
    for width in (recipe.model.d_model, *range((recipe.model.d_model - 1) // step * step, 0, -step)):
        sized = replace(recipe, width=width)
        try:
            size = _size(shaped(lambda sized=sized: build(sized)))  # type: ignore[misc]
        except UserError as error:
            refusal = str(error)
            continue
        if size <= allowed:
            share = size / (allowed / recipe.model.budget)
            return width, f"d_model {width} has {share:.2f} times the parameters of the Transformer"
    if not size:
        raise UserError(f"no width of {recipe.architecture} up to {recipe.model.d_model} can be built: {refusal}")
    raise UserError(
        f"{recipe.architecture} has {size:,} parameters at its narrowest; recipe {recipe.name} allows {allowed:,.0f}, "
        f"{recipe.model.budget:g} times the Transformer's"
    )


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shaped(make: Callable[[], Built]) -> Built:
    """The model on the meta device; in memory where its initialisation looks at numbers."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return make()
        except (RuntimeError, NotImplementedError):
            return make()


def _cost(kind: str, model: Classifier, recipe: Recipe, protocol: Protocol) -> float:
    parameters = sum(p.numel() for p in model.parameters())
    if kind == "params":
        return float(parameters)
    size = recipe.data.batch_size / recipe.train.accumulate
    if kind == "flops":
        try:
            return 3 * model.cost(protocol.length).of_batch(size).total / size
        except NotImplementedError:
            raise UserError(f"--match flops: {recipe.architecture} declares no cost") from None
    rows = size * model.towers
    tokens = rows * protocol.length * recipe.model.d_model
    return 16.0 * parameters + 4.0 * tokens * KEPT * (1 if recipe.train.checkpointing else recipe.model.n_layers)
