"""Shared by the maps of published weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def number_of_layers(tensors: Iterable[str], prefix: str) -> int:
    """Number of different indices after `prefix` in the names of tensors. Raises ValueError if there are none."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    if not numbers:
        raise ValueError(f"no tensor is named {prefix}0.*")
    return len(numbers)


def first_prefix(tensors: Iterable[str], *prefixes: str) -> str:
    """The first of the prefixes that the name of a tensor starts with, the last one if none does."""
    names = list(tensors)
    return next((p for p in prefixes if any(name.startswith(p) for name in names)), prefixes[-1])


def same_names(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    """For every tensor whose name starts with `theirs`: its name, which starts with `ours` here -> the tensor."""
    return {ours + name.removeprefix(theirs): (name,) for name in tensors if name.startswith(theirs)}
