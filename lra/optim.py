"""Optimiser and schedule, with the encoder's own parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from lra.encoder import Encoder
from lra.errors import UserError
from lra.recipe import Optim

KEYS = ("lr", "lr_scale", "weight_decay")


def parameter_groups(model: nn.Module, encoder: Encoder, recipe: Optim) -> list[dict[str, Any]]:
    """Parameters grouped by (rate, weight decay): the encoder's patterns first, else decay on matrices only.

    Raises UserError for a pattern that matches no parameter or a setting that does not exist.
    """
    patterns = dict(encoder.optim)
    matched = dict.fromkeys(patterns, False)
    for pattern, settings in patterns.items():
        wrong = [key for key in settings if key not in KEYS]
        if wrong:
            raise UserError(f"{type(encoder).__name__}.optim[{pattern!r}] has {wrong[0]!r}; one of {', '.join(KEYS)}")
    inside = {id(p): name for name, p in encoder.named_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        name = inside.get(id(parameter))
        hits = [p for p in patterns if name is not None and fnmatch(name, p)]
        for pattern in hits:
            matched[pattern] = True
        own = patterns[hits[0]] if hits else {}
        rate = min(own.get("lr", recipe.lr), recipe.lr * own.get("lr_scale", 1.0))
        decay = own.get("weight_decay", recipe.weight_decay if parameter.ndim >= 2 else 0.0)
        groups.setdefault((rate, decay), []).append(parameter)
    idle = [p for p, hit in matched.items() if not hit]
    if idle:
        raise UserError(f"{type(encoder).__name__}.optim[{idle[0]!r}] matches no parameter")
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def build(model: nn.Module, encoder: Encoder, recipe: Optim) -> torch.optim.Optimizer:
    groups = parameter_groups(model, encoder, recipe)
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)


def factor(recipe: Optim, steps: int) -> Callable[[int], float]:
    """Multiplier of every group's rate at a step: linear warm-up over `warmup` steps, then the schedule."""

    def at(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        done = min((step - recipe.warmup) / max(steps - recipe.warmup, 1), 1.0)
        if recipe.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if recipe.schedule == "linear":
            return 1 - done
        if recipe.schedule == "rsqrt":
            return math.sqrt(max(recipe.warmup, 1) / max(step, recipe.warmup, 1))
        return 1.0

    return at
