"""From a recipe to a classifier: seeded weights, sizes that are checked before they are allocated."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from lra.config.recipe import Recipe
from lra.encoder import Encoder
from lra.errors import UserError
from lra.model import Classifier, Head
from lra.registry import Constructor
from lra.task import Protocol, Task

BYTES_PER_PARAMETER = 16
"""A weight, its gradient and the two moments of an optimiser, in float32."""
LIGHTNING_SEED = "PL_GLOBAL_SEED"


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the global generators of Python, NumPy and torch, all devices included, as they were before the block."""
    python, numpy, lightning = random.getstate(), np.random.get_state(), os.environ.get(LIGHTNING_SEED)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            os.environ.pop(LIGHTNING_SEED, None)
            if lightning is not None:
                os.environ[LIGHTNING_SEED] = lightning


def seed_everything(seed: int) -> None:
    """Seed the global generators; processes that Lightning starts are seeded alike."""
    os.environ[LIGHTNING_SEED] = str(seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(recipe: Recipe, constructor: Constructor, task: Task, protocol: Protocol, seed: int) -> Classifier:
    """The classifier of a recipe with the weights that `seed` gives it. Seeds the global generators."""
    seed_everything(seed)
    encoder = build_encoder(recipe, constructor, protocol.length)
    model = recipe.model
    head = Head(model.head, model.head_hidden, model.head_activation, model.pair)
    return Classifier(encoder, protocol, task.classes, task.towers, model.pooling, head)


def build_encoder(recipe: Recipe, constructor: Constructor, length: int) -> Encoder:
    """The encoder of a recipe, for sequences of up to `length` tokens."""
    shape: dict[str, Any] = {"d_model": recipe.d_model, "n_layers": recipe.model.n_layers}
    extra = 1 if recipe.model.pooling == "cls" else 0
    if "direction" in constructor.options():
        shape["direction"] = recipe.model.direction
    return constructor(**shape, length=length + extra, dropout=recipe.model.dropout, **recipe.encoder)


def check_weight_memory(recipe: Recipe, device: torch.device) -> None:
    """Raise UserError where the weights cannot fit, before they are allocated.

    Counted is one d_model x d_model matrix in each layer, which is a lower bound for almost every architecture.
    """
    model = recipe.model
    size = BYTES_PER_PARAMETER * model.n_layers * recipe.d_model**2
    _check_fits(size, device, f"model.d_model={recipe.d_model} with model.n_layers={model.n_layers}", "lower them")


def check_batch_memory(recipe: Recipe, device: torch.device, lengths: np.ndarray) -> None:
    """Raise UserError where a batch cannot fit, before it is allocated.

    lengths: (n, towers), tokens of the training examples. Counted is one activation for each layer and token.
    """
    rows = min(recipe.data.batch_size, len(lengths)) / recipe.train.accumulate
    tokens = rows * float(lengths.sum(axis=1).mean())
    size = 4 * tokens * recipe.d_model * recipe.model.n_layers
    what = f"data.batch_size={recipe.data.batch_size} with train.accumulate={recipe.train.accumulate}"
    _check_fits(size, device, what, "lower the first or raise the second")


def _check_fits(size: float, device: torch.device, what: str, advice: str) -> None:
    memory = total_memory(device)
    if memory and size > memory:
        raise UserError(
            f"{what} needs more than {size / 2**30:,.0f} GiB of memory, and this {device.type} has "
            f"{memory / 2**30:,.0f} GiB: {advice}"
        )


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device; 0 where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0
