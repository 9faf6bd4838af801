"""Checked conversion of JSON content to the types of this package, with errors that name the field."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from bisect import bisect_left
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lra.errors import brief

DEEPEST = 16
"""Levels of nesting that a file may have."""
Kind = TypeVar("Kind")


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything that is stored as a JSON object. Fields at their default are not written."""


def parse(text: str) -> Any:
    """JSON content. Raises ValueError for text that is not JSON, NaN and infinity included."""
    try:
        return json.loads(text, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load(path: Path) -> Any:
    """JSON content of a file. Raises OSError and ValueError."""
    return parse(path.read_text(encoding="utf-8"))


def convert(content: Any, kind: type[Kind]) -> Kind:
    """The content as `kind`; fields that `kind` does not have are ignored.

    Raises ValueError with one line that says which field is wrong, what it holds and what is expected.
    """
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    check_printable(content)
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ValueError(_explain(str(error), content, kind)) from None


def check_printable(value: Any, path: str = "", depth: int = 0) -> None:
    """Raise ValueError for numbers that are not finite or exceed 63 bits, control characters, and deep nesting."""
    if depth > DEEPEST:
        raise ValueError(f"{path[:60]} is nested more than {DEEPEST} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}, not a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{path} is a number of more than 63 bits")
    if isinstance(value, str) and not _is_printable(value):
        raise ValueError(f"{path} holds a control character")
    if isinstance(value, dict):
        for key, part in value.items():
            # keys are part of one-line messages
            if "\n" in key or not _is_printable(key):
                raise ValueError("a key holds a control character")
            check_printable(part, f"{path}.{key}".lstrip("."), depth + 1)
    if isinstance(value, list | tuple):
        for number, part in enumerate(value):
            check_printable(part, f"{path}[{number}]", depth + 1)


def _is_printable(text: str) -> bool:
    if text.isascii() and text.isprintable():
        return True
    return not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text)


def _explain(message: str, content: dict[str, Any], kind: type) -> str:
    """A message of msgspec, such as "Expected `int`, got `str` - at `$.test.n`", as "test.n is 'x'; expected int"."""
    reason, _, location = message.partition(" - at `$")
    path = _path(location, content, kind)
    if missing := re.fullmatch(r"Object missing required field `(\w+)`", reason):
        return f"{_dotted([*path, missing[1]])} is missing"
    value: Any = content
    for key in path:
        value = value[key]
    expected = reason.removeprefix("Expected ").partition(", got")[0].replace("`", "")
    return f"{_dotted(path)} is {brief(value)}; expected {expected}"


def _path(location: str, content: dict[str, Any], kind: type) -> list[str | int]:
    """Keys and indices of a location such as `.rounds[0][...]`, where msgspec hides the key of a mapping as [...]."""
    path: list[str | int] = []
    place: Any = content
    for name, index, _ in re.findall(r"(\w+)|\[(\d+)\]|(\[\.\.\.\])", location):
        path.append(name or (int(index) if index else _wrong_key(path, place, content, kind)))
        place = place[path[-1]]
    return path


def _wrong_key(path: list[str | int], mapping: dict[str, Any], content: dict[str, Any], kind: type) -> str:
    """The first key of a mapping whose value is wrong, by bisection."""
    keys = list(mapping)

    def fails(count: int) -> bool:
        try:
            msgspec.convert(_replaced(content, path, {key: mapping[key] for key in keys[:count]}), kind)
        except msgspec.ValidationError:
            return True
        return False

    return keys[bisect_left(range(1, len(keys)), True, key=fails)]


def _replaced(content: Any, path: list[str | int], value: Any) -> Any:
    """The content with another value at a path."""
    if not path:
        return value
    changed = content.copy()
    changed[path[0]] = _replaced(content[path[0]], path[1:], value)
    return changed


def _dotted(path: list[str | int]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
