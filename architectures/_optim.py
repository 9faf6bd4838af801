"""Parameters without weight decay, whatever the recipe sets."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn


def undecayed(encoder: nn.Module, *names: str) -> Mapping[str, Mapping[str, float]]:
    """Patterns for `Encoder.optim`: no weight decay of parameters with these last names, of biases and of norms.

    Decay pulls a step size, a decay rate or a skip towards a value that means nothing in particular: with softplus a
    bias of 0 is a step of 0.69 tokens, where the initialisation chose 0.001 to 0.1.
    """
    patterns = [f"*.{name}" for name in names]
    left = [name for name, _ in encoder.named_parameters() if not any(fnmatchcase(name, p) for p in patterns)]
    for pattern in ("*bias", "*norm*"):
        if any(fnmatchcase(name, pattern) for name in left):
            patterns.append(pattern)
            left = [name for name in left if not fnmatchcase(name, pattern)]
    return {pattern: {"weight_decay": 0.0} for pattern in patterns}
