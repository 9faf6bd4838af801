"""Lower bounds of the memory that a request needs: a model or batch that cannot fit is an error before allocation."""

from __future__ import annotations

import math
import os
from contextlib import suppress

import numpy as np

from lra.config.recipe import Recipe
from lra.errors import UserError

BYTES_PER_PARAMETER = 16
"""A weight, its gradient and the two moments of an optimiser, in float32."""


def total_memory(device: str) -> int:
    """Bytes of memory of a device, "cpu" or "cuda"; 0 if it is unknown. torch is imported for "cuda" only."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def check_weights(recipe: Recipe, device: str) -> None:
    """Raise UserError where the weights cannot fit. Counted is one d_model x d_model matrix in each layer, which is a
    lower bound for almost every architecture."""
    width, layers = recipe.d_model, recipe.n_layers
    memory = total_memory(device)
    if memory and (size := BYTES_PER_PARAMETER * layers * width**2) > memory:
        widest = math.isqrt(memory // (BYTES_PER_PARAMETER * layers))
        deepest = memory // (BYTES_PER_PARAMETER * width**2)
        fits = [f"model.d_model={widest}"] if widest else []
        fits += [f"model.n_layers={deepest}"] if deepest else []
        raise UserError(
            f"{_too_large(f'model.d_model={width} with model.n_layers={layers}', size, memory, device)}: at most "
            f"{' or '.join(fits) or 'smaller values of both'} can fit"
        )


def check_parameters(count: int, device: str) -> None:
    """Raise UserError where `count` parameters cannot be trained."""
    memory = total_memory(device)
    if memory and (size := BYTES_PER_PARAMETER * count) > memory:
        raise UserError(
            f"{_too_large(f'a model of {count:,} parameters', size, memory, device)}: at most "
            f"{memory // BYTES_PER_PARAMETER:,} can fit; lower model.d_model, model.n_layers or the encoder's own sizes"
        )


def check_batches(recipe: Recipe, device: str, lengths: np.ndarray, evaluated: int) -> None:
    """Raise UserError where a batch cannot fit.

    lengths: (n, towers), tokens of the training examples; evaluated: number of examples of the largest evaluation.
    Counted is one activation for each token, and when training for each layer.
    """
    memory = total_memory(device)
    if not memory:
        return
    example = 4 * float(lengths.sum(axis=1).mean()) * recipe.d_model
    parts = recipe.train.accumulate
    trained = example * recipe.n_layers / parts
    pretrained = recipe.pretrain.batch_size if recipe.pretrain.objective != "none" else 0
    for key, batch, rows, each in (
        ("data.batch_size", recipe.data.batch_size, len(lengths), trained),
        ("pretrain.batch_size", pretrained, len(lengths), trained),
        ("data.evaluation_batch_size", recipe.data.evaluation_batch_size, evaluated, example),
    ):
        if (size := min(batch, rows) * each) > memory:
            with_parts = f" with train.accumulate={parts}" if key != "data.evaluation_batch_size" else ""
            raise UserError(
                f"{_too_large(f'{key}={batch}{with_parts}', size, memory, device)}: at most {key}="
                f"{max(1, int(memory // each))} can fit"
            )


def _too_large(what: str, size: float, memory: int, device: str) -> str:
    return f"{what} needs more than {size / 2**30:,.0f} GiB of memory, and this {device} has {memory / 2**30:,.0f} GiB"
