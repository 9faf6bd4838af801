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
from lra.target import target_of
from lra.task import Protocol, Task
from lra.towers import Contrast
from lra.training import sizes

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
    """The classifier of a recipe with the weights that `seed` gives it. Seeds the global generators.

    Raises UserError for an encoder that would see the answers: one that is not causal, on a task that asks for that.
    """
    seed_everything(seed)
    encoder = build_encoder(recipe, constructor, protocol.length)
    if needs_causal(task) and not encoder.causal:
        remedy = "set model.direction=causal, or choose an architecture that can be causal"
        if not constructor.declared:
            remedy = "if no output of the layer depends on later positions, write `causal = True` in its class"
        raise UserError(f"{task.name} needs a causal encoder, and {constructor.name} is {encoder.direction}; {remedy}")
    model, target = recipe.model, target_of(task, protocol)
    if target.per_position and task.towers > 1:
        raise UserError(f"{task.name} has {task.towers} sequences an example, and a class for each position of one")
    head = Head(model.head, model.head_hidden, model.head_activation, model.pair)
    contrast = Contrast(model.contrastive, model.temperature) if model.contrastive else None
    return Classifier(
        encoder, protocol, target.outputs, task.towers, model.pooling, head, target.per_position, model.tie, contrast
    )


def needs_causal(task: Task) -> bool:
    """Whether a task needs a causal encoder, because later positions contain its labels or change the problem."""
    return task.causal or task.target == "next"


def build_encoder(recipe: Recipe, constructor: Constructor, length: int) -> Encoder:
    """The encoder of a recipe, for sequences of up to `length` tokens."""
    shape: dict[str, Any] = {"d_model": recipe.d_model, "n_layers": recipe.n_layers}
    extra = 1 if recipe.model.pooling == "cls" else 0
    if "direction" in constructor.options():
        shape["direction"] = recipe.model.direction
    return constructor(**shape, length=length + extra, dropout=recipe.model.dropout, **recipe.encoder)


def check_memory(recipe: Recipe, constructor: Constructor, length: int, device: str) -> None:
    """Raise UserError where the encoder of a recipe cannot fit, before it is allocated."""
    sizes.check_weights(recipe, device)
    # an encoder whose initialisation reads values cannot be built without memory
    count = 0
    with suppress(Exception), kept_random_state(), torch.device("meta"):
        count = sum(p.numel() for p in build_encoder(recipe, constructor, length).parameters())
    sizes.check_parameters(count, device)
