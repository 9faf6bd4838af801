"""Errors a user can act on: shown as one line, exit code 2, never as a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Wrong input: the message says what is wrong, where, and what is right."""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """An unknown name, answered with the nearest right one, or with all of them where none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + (", ".join(names) or "none")
    return UserError(f"unknown {kind} {name!r}{f' in {where}' if where else ''}; {hint}")
