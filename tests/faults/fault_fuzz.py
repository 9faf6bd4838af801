"""Fuzzing shared by the doors: how many cases, and damage to bytes and to JSON."""

from __future__ import annotations

from typing import Any

from fault_drills import FULL
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = settings(
    max_examples=10_000 if FULL else 40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
SLOW = settings(CASES, max_examples=1_000 if FULL else 15)
"""For cases that take tens of milliseconds."""

AWKWARD = [
    "", " ", ".", "..", "../..", "/etc/passwd", "a/../../b", "~", "~nobody", "C:\\x", "con", "a" * 300,
    "\u202eabc", "\x00", "\x1b[2J",
    "é", "e\u0301", "\ud800", "[red]x[/]", "[/]", "<script>", "$(id)", "%s%n", "{0}", "nan", "inf", "-0", "1e999",
    "9" * 400, "²", "true", "null", "'", '"', "\n", "-", "--", "--help", "=", "a=b=c", "x:y", ":", "a:", ":b", "s4d/",
    "/s4d", "a" * 300 + ".toml", "a" * 300 + ".py:Net", "\x00.py:Net", ".json", "a" * 300 + ".json",
]  # fmt: skip
texts = st.one_of(st.sampled_from(AWKWARD), st.text(max_size=30))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([2**31, 2**63, -(2**63), 10**400, 0, -1, 1]),
    st.floats(), texts,
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


edits = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "drop", "insert", "repeat")), st.integers(0, 2**24), st.integers(1, 255),
        st.binary(min_size=1, max_size=16),
    ),
    min_size=1, max_size=4,
)  # fmt: skip
"""What `edited` does to bytes: kind, place, amount, what to put in."""


def edited(content: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    """The bytes with a few of them changed, cut, left out, put in or repeated."""
    made = bytearray(content)
    for kind, anywhere, amount, new in changes:
        place = anywhere % max(len(made), 1)
        if kind == "flip" and made:
            made[place] ^= amount
        elif kind == "cut":
            del made[place:]
        elif kind == "drop":
            del made[place : place + amount]
        elif kind == "insert":
            made[place:place] = new
        elif kind == "repeat":
            made[place:place] = made[place : place + 2 * amount]
    return bytes(made)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    return edits.map(lambda changes: edited(content, changes))


def flipped(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with exactly one of them changed."""
    change = st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255))
    return change.map(lambda c: content[: c[0]] + bytes([content[c[0]] ^ c[1]]) + content[c[0] + 1 :])


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with something in it replaced, removed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        what = draw(st.integers(0, 9))
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            return value | {draw(texts): draw(anything)}
        return value | {key: draw(altered(value[key]))}
    return draw(anything)
