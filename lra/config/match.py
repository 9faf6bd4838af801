"""Choose the width of a model for a budget: `params=600k`, `flops=1.2G` (forward and backward) or `memory=8G`.

FLOPs count one full-length example and its share of the work done once per batch. Memory is an estimate: weights,
gradients and two optimiser moments in float32, and the activations that the layers keep for a batch. Models are built
on the meta device, so no weights are allocated.
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
"""Sequence length at which `model.budget` counts parameters: the same for all tasks, so that the width is too."""
ACTIVATIONS = 16
"""Activations that a residual block keeps for the backward pass, per token and channel (approximate)."""


def parse_budget(text: str) -> tuple[str, float]:
    """Parse the value of --match: `params=600k` -> ("params", 600000.0). Raises UserError."""
    kind, _, amount = text.partition("=")
    if kind not in ("params", "flops", "memory"):
        raise unknown("budget", kind, ("params", "flops", "memory"), where="--match")
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)", amount)
    if not number or not float(number[1]):
        raise UserError(f"--match {text}: expected a number with k, M, G or T, for example {kind}=600k")
    return kind, float(number[1]) * UNITS[number[2]]


def find_width(text: str, recipe: Recipe, build: Callable[[Recipe], Classifier], protocol: Protocol) -> tuple[int, str]:
    """Find the d_model that comes nearest to a budget.

    Returns it and a line on the deviation. Raises UserError if the architecture cannot be built near the budget.
    """
    kind, budget = parse_budget(text)
    costs: dict[int, float] = {}

    def cost(width: int) -> float | None:
        """Cost at a width; None if the architecture rejects it, for example because its heads do not divide it."""
        if width not in costs:
            sized = replace(recipe, model=replace(recipe.model, d_model=width))
            try:
                costs[width] = _cost(kind, build_on_meta(lambda: build(sized)), sized, protocol)
            except UserError:
                return None
        return costs[width]

    step = next((s for s in (1, 2, 4, 8, 16, 32) if all(cost(s * k) is not None for k in (4, 5, 7))), 0)
    if not step:
        raise UserError(f"--match {text}: {recipe.architecture} cannot be built at multiples of 1, 2, 4, 8, 16 or 32")
    low, high = 1, WIDEST // step
    while low < high:
        middle = (low + high) // 2
        value = cost(middle * step)
        if value is not None and value < budget:
            low = middle + 1
        else:
            high = middle
    candidates = [w for w in (low * step, max(low - 1, 1) * step) if cost(w) is not None]
    if not candidates:
        raise UserError(f"--match {text}: {recipe.architecture} cannot be built near d_model {low * step}")
    width = min(candidates, key=lambda w: abs(costs[w] - budget))
    deviation = 100 * (costs[width] / budget - 1)
    return width, f"d_model {width} has {kind} {costs[width]:,.0f}, {deviation:+.1f} % from the budget of {budget:,.0f}"


def find_shape(
    recipe: Recipe, reference: Recipe, build: Callable[[Recipe], Encoder], reference_build: Callable[[Recipe], Encoder]
) -> tuple[int, int, str]:
    """Find the largest d_model and number of layers with at most `model.budget` times the reference's parameters.

    Counted are the parameters of the encoder that one token uses: a mixture of experts is matched by the work it does,
    not by the experts it holds. Where the recipe's shape meets the budget, layers are added up to `model.max_layers`.
    Otherwise the multiples of `model.width_step` below the recipe's d_model are tried, without those that the
    architecture rejects. Returns d_model, the number of layers and a line on the size. Raises UserError if no width
    meets the budget.
    """
    transformer = build_on_meta(lambda: reference_build(reference)).active_parameters
    allowed, step = recipe.model.budget * transformer, recipe.model.width_step

    def size_of(width: int, layers: int) -> int:
        sized = replace(recipe, width=width, depth=layers)
        return build_on_meta(lambda: build(sized)).active_parameters

    layers, size, reason = recipe.model.n_layers, 0, ""
    for width in (recipe.model.d_model, *range((recipe.model.d_model - 1) // step * step, 0, -step)):
        try:
            size = size_of(width, layers)
        except UserError as error:
            reason = str(error)
            continue
        if size > allowed:
            continue
        while width == recipe.model.d_model and layers < recipe.model.max_layers:
            deeper = size_of(width, layers + 1)
            # some architectures choose their own depth
            if deeper > allowed or deeper == size:
                break
            layers, size = layers + 1, deeper
        shape = f"d_model {width}, {layers} layers"
        return width, layers, f"{shape}: {size / transformer:.2f} times the parameters of the Transformer"
    if not size:
        raise UserError(f"no width of {recipe.architecture} up to {recipe.model.d_model} can be built: {reason}")
    raise UserError(
        f"{recipe.architecture} has {size:,} parameters at its narrowest; recipe {recipe.name} allows {allowed:,.0f}, "
        f"{recipe.model.budget:g} times the Transformer's"
    )


def _size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def build_on_meta(build: Callable[[], Built]) -> Built:
    """Build a model on the meta device, or in memory if its initialisation reads values. Keeps the random state."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (RuntimeError, NotImplementedError):
            return build()


def flops_of_example(model: Classifier, recipe: Recipe, protocol: Protocol) -> float:
    """FLOPs of training on one full-length example, forward and backward, by the formula of the architecture. Raises
    NotImplementedError for one without."""
    size = recipe.data.batch_size / recipe.train.accumulate
    return 3 * model.cost(protocol.length).of_batch(size).total / size


def _cost(kind: str, model: Classifier, recipe: Recipe, protocol: Protocol) -> float:
    parameters = _size(model)
    if kind == "params":
        return float(parameters)
    if kind == "flops":
        try:
            return flops_of_example(model, recipe, protocol)
        except NotImplementedError:
            raise UserError(f"--match flops: {recipe.architecture} declares no cost; match params or memory") from None
    rows = recipe.data.batch_size / recipe.train.accumulate * model.towers
    tokens = rows * protocol.length * recipe.model.d_model
    return 16.0 * parameters + 4.0 * tokens * ACTIVATIONS * (1 if recipe.train.checkpointing else recipe.n_layers)
