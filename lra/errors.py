"""Errors that a user can correct: one line and exit code 2, no traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr

PACKAGES = ("site-packages", "dist-packages")
# lra/ and the folders that its links lead to
PROJECT = [(Path(__file__).parent / part).resolve() for part in (".", "architectures", "kernels", "tasks")]
SHOWN = 20
"""Number of names that a message lists if none is similar."""
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, 60, 60, 60


class UserError(Exception):
    """An error that a user can correct. The message states what is wrong, where, and what is right."""


class DataError(UserError):
    """Data that are missing, damaged or different from the definition of their protocol."""


class Interrupted(UserError):
    """Training was stopped before its last step (Ctrl-C, SIGTERM or a time limit) and has a checkpoint.

    command: the shell command that resumes the run; empty until it is known.
    """

    def __init__(self, message: str, command: str = "") -> None:
        super().__init__(message)
        self.command = command


def brief(value: object) -> str:
    """A value as text of at most 60 characters, however long or deeply nested it is."""
    return _SHORT.repr(value)[:60]


def is_users(filename: str) -> bool:
    """Whether a source file belongs to a user: neither to an installed package nor to this project."""
    folders = Path(filename).resolve().parents
    return not any(part in filename for part in PACKAGES) and not any(part in folders for part in PROJECT)


def user_line(error: BaseException) -> str:
    """The last line of a user's code in the traceback of an exception, as " (net.py:12)"; empty without one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def describe(error: BaseException) -> str:
    """An exception in one line, with the last line of a user's code, else of this project's."""
    if isinstance(error, UserError):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(p in f.filename for p in PACKAGES)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}{user_line(error) or place}"


def unknown(kind: str, name: str, known: Iterable[str], where: str = "") -> UserError:
    """The error of an unknown name. It suggests the most similar known name, or lists known names."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    hint = f"did you mean {near[0]!r}?" if near else "known: " + (", ".join(names[:SHOWN]) + more or "none")
    return UserError(f"unknown {kind} {brief(name)}{f' in {where}' if where else ''}; {hint}")
