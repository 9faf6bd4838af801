"""What a record may hold, at the edges: the last value that is let through and the first that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from records import record

from lra.reports import report, tables
from lra.results import schema
from lra.results.collection import Collection


def made(**changes: Any) -> dict[str, Any]:
    """A record as it is written, with values at dotted keys replaced, or removed where the value is ABSENT."""
    found = record(n=20, seal="", predictions={"file": "a.npz", "sha256": "0" * 64})
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = found
        for parent in parents:
            place[parent] = place = dict(place[parent])
        if value is schema.ABSENT:
            place.pop(last, None)
        else:
            place[last] = value
    return found


@pytest.mark.parametrize("key", [key for key in schema.REQUIRED if key != "schema"])
def test_each_required_value_is_missed_and_has_its_kind(key: str) -> None:
    dotted = key.replace(".", "__")
    assert schema.check(made(**{dotted: schema.ABSENT})) == f"{key} is missing"
    assert schema.check(made(**{dotted: None})).startswith(f"{key} is a NoneType; expected ")
    assert schema.check(made(**{dotted: True})).startswith(f"{key} is a bool; expected ")


WHOLE = {"curve": [{"step": 0}], "receptive_field": 9}
KEYS = [
    *made(**WHOLE),
    *(f"{key}__{inner}" for key, held in made().items() if isinstance(held, dict) for inner in held),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_record_without_a_value_is_refused_or_can_be_shown(key: str, tmp_path: Path) -> None:
    """Readers take what the schema let through as it is: a field they rely on must be one that it asks for."""
    short = made(**{**WHOLE, key: schema.ABSENT})
    if not schema.check(short):
        collection = Collection([made(id="whole", seed=1), short])
        assert all(tables.build(collection, form) for form in tables.FORMATS)
        assert tables.readme(collection)
        assert "gru" in report.build(collection, tmp_path)


@pytest.mark.parametrize("key", list(schema.OPTIONAL))
def test_an_optional_value_may_be_left_out_and_has_its_kind(key: str) -> None:
    dotted = key.replace(".", "__")
    if schema.at(made(), key) is not schema.ABSENT:
        assert schema.check(made(**{dotted: schema.ABSENT})) == ""
    assert schema.check(made(**{dotted: True})).startswith(f"{key} is a bool; expected ")


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"test__accuracy": 0.0}, {"test__accuracy": 1.0}, {"test__n": 1}, {"test__n": 2**31 - 1},
        {"floors__majority class": 0}, {"floors__majority class": 1}, {"protocol__length": 1},
        {"flops__forward": None}, {"flops__uncounted": []}, {"curve": [{"step": 0}]}, {"seed": 2**63 - 1},
        {"seed": -(2**63) + 1}, {"command": "two\nlines\tand é"}, {"more": nested(15)},
        {"more": [[1, "a", None, True]]},
    ],
)  # fmt: skip
def test_what_is_just_right(changes: dict[str, Any]) -> None:
    assert schema.check(made(**changes)) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": schema.SCHEMA + 1}, "schema is 2; this version reads 1"),
        ({"schema": schema.ABSENT}, "schema is None; this version reads 1"),
        ({"test__accuracy": -0.01}, "test.accuracy is -0.01"), ({"test__accuracy": 1.01}, "test.accuracy is 1.01"),
        ({"test__accuracy": 1}, "test.accuracy is 1;"), ({"test__accuracy": schema.ABSENT}, "test.accuracy is None"),
        ({"test__n": 0}, "test.n is 0"), ({"test__n": 2**31}, "test.n is 2147483648"),
        ({"test__n": 1.0}, "test.n is 1.0"),
        ({"test__n": True}, "test.n is True"),
        ({"floors__majority class": -0.1}, "floors.majority class is -0.1"),
        ({"floors__majority class": 1.1}, "floors.majority class is 1.1"),
        ({"floors__majority class": True}, "floors.majority class is True"),
        ({"protocol__length": 0}, "protocol.length is 0"), ({"flops__uncounted": ["a", 1]}, "flops.uncounted holds"),
        ({"curve": [{"step": 1}, {"step": 1.5}]}, "curve holds"), ({"curve": [3]}, "curve holds"),
        ({"seed": 2**63}, "seed is a number of more than 63 bits"),
        ({"seed": -(2**63)}, "seed is a number of more than 63 bits"),
        ({"wall_seconds": float("inf")}, "wall_seconds is inf, not a finite number"),
        ({"more": [[0, float("nan")]]}, "more[0][1] is nan, not a finite number"),
        ({"command": "a\x07"}, "command holds a control character"),
        ({"recipe__name": "\ud800"}, "recipe.name holds a control character"),
        ({"more": {"a\nb": 1}}, "a key holds a control character"),
        ({"more": nested(16)}, "is nested more than 16 deep"),
    ],
)  # fmt: skip
def test_what_is_just_wrong(changes: dict[str, Any], says: str) -> None:
    found = schema.check(made(**changes))
    assert says in found
    assert "\n" not in found


def test_only_objects_are_records() -> None:
    contents: tuple[Any, ...] = (None, [], "", 3)
    for content in contents:
        assert schema.check(content) == "not a JSON object"
