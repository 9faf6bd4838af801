"""Sizes of memory as a user writes them."""

from __future__ import annotations

import re

from lra.errors import UserError

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def budget_of(text: str) -> int:
    """ "2GiB" -> bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB)", text)
    if not match:
        raise UserError(f"--fit is {text!r}; expected a number and a unit, for example 512MiB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])
