"""Losses and counts that a forward pass leaves on its module, for the trainer to ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def unless_exporting(keep: Callable[P, None]) -> Callable[P, None]:
    """`keep`, which leaves something on its module, without effect in an exported graph, where nothing can be left."""

    @wraps(keep)
    def keep_unless_exporting(*args: P.args, **kwargs: P.kwargs) -> None:
        if not torch.compiler.is_exporting():
            keep(*args, **kwargs)

    return keep_unless_exporting


def added(counts: Tensor | None, now: Tensor) -> Tensor:
    """Counts so far and those of this forward, on the device of the latter."""
    return now if counts is None else counts.to(now.device) + now
