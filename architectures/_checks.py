"""Checks of constructor arguments, with messages that name the argument."""

from __future__ import annotations

from collections.abc import Collection


def at_least(least: int, **numbers: float | None) -> None:
    """ValueError for the first of the named numbers that is below `least`; None stands for one that is not given."""
    for name, value in numbers.items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; at least {least}")


def one_of(known: Collection[str], **names: str) -> None:
    """ValueError for the first of the named values that is not in `known`."""
    for name, value in names.items():
        if value not in known:
            raise ValueError(f"{name} is {value!r}; one of {', '.join(known)}")


def divides(whole: str, size: int, **parts: int) -> None:
    """ValueError for the first of the named parts that does not divide `size`, which is called `whole`."""
    for name, value in parts.items():
        if value < 1 or size % value:
            raise ValueError(f"{name} is {value}; a divisor of {whole}, {size}")
