"""Errors a user can act on: shown as one line, exit code 2, never as a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, 60, 60, 60


class UserError(Exception):
    """Anything a user can act on: the message says what is wrong, where, and what is right."""


class DataError(UserError):
    """Data that are missing, damaged or not what their protocol defines."""


class Interrupted(UserError):
    """Training stopped before its last step (Ctrl-C, SIGTERM or a time limit) and left a checkpoint.

    command: the shell command that resumes the run; empty until the run that was stopped is known.
    """

    def __init__(self, message: str, command: str = "") -> None:
        super().__init__(message)
        self.command = command


def brief(value: object) -> str:
    """A value as a message shows it: 60 characters at most, however long or deeply nested it is."""
    return _SHORT.repr(value)[:60]


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """An unknown name, answered with the nearest right one, or with all of them where none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + (", ".join(names) or "none")
    return UserError(f"unknown {kind} {brief(name)}{f' in {where}' if where else ''}; {hint}")
