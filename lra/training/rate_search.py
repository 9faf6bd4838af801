"""The learning rate of a recipe with a `search` section: short runs, compared on the selection split."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lra import files
from lra.config.recipe import Recipe

Trial = dict[str, Any]
"""lr, steps, accuracy, loss, examples, seconds of one short run."""


def best(trials: list[Trial], selects: str = "accuracy") -> Trial:
    """The trial with the highest validation accuracy; of equals, the one with the lowest validation loss. That one
    alone where the target of the task selects by "loss"."""
    if selects == "loss":
        return min(trials, key=lambda trial: trial["loss"])
    return max(trials, key=lambda trial: (trial["accuracy"], -trial["loss"]))


def search(
    recipe: Recipe,
    model: nn.Module,
    file: Path,
    run_trial: Callable[[Recipe], Trial],
    leads: bool = True,
    selects: str = "accuracy",
) -> tuple[Recipe, dict[str, Any]]:
    """Try every rate from the model's weights. Returns the recipe with the chosen rate and the field of the record.

    file: where finished trials are kept (written by the process that leads), so that an interrupted search continues
    with the next rate. run_trial: trains the model and returns its Trial. Weights and random states are restored after
    each trial, so that a run at the chosen rate does not depend on the search.
    """
    weights = copy.deepcopy(model.state_dict())
    trials: list[Trial] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    for rate in recipe.search.rates[len(trials) :]:
        with torch.random.fork_rng():
            trials.append(run_trial(recipe.trial(rate)))
        model.load_state_dict(weights)
        model.zero_grad(set_to_none=True)
        if not leads:
            continue
        with files.atomic(file) as temporary:
            temporary.write_text(json.dumps(trials) + "\n", encoding="utf-8")
    chosen = best(trials, selects)
    facts = {
        "lr": chosen["lr"],
        "trials": trials,
        "examples": sum(trial["examples"] for trial in trials),
        "seconds": sum(trial["seconds"] for trial in trials),
    }
    return replace(recipe, optim=replace(recipe.optim, lr=chosen["lr"])), facts
