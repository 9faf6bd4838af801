"""What a record may hold, at the edges: the last value that is accepted and the first that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from records import content

from lra.reports import leaderboard
from lra.reports.ranking import Leaderboard
from lra.results import json_schema
from lra.results import record as records
from lra.results.collection import Collection
from lra.results.record import RunRecord

ROOT = Path(__file__).parents[2]
ABSENT = object()


def made(**changes: Any) -> dict[str, Any]:
    """JSON content of a record, with values at dotted keys replaced, or removed where the value is ABSENT."""
    whole = content(n=20, seal="", predictions={"file": "a.npz", "sha256": "0" * 64})
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = whole
        for parent in parents:
            place[parent] = place = dict(place[parent])
        if value is ABSENT:
            place.pop(last, None)
        else:
            place[last] = value
    return whole


def problem(**changes: Any) -> str:
    """What is wrong with a record; empty if nothing is."""
    try:
        records.from_json(made(**changes))
    except ValueError as error:
        return str(error)
    return ""


REQUIRED = [
    "id", "task", "architecture", "protocol", "recipe", "recipe_hash", "seed", "regime", "direction", "test",
    "validation", "floors", "parameters", "flops", "speed", "memory", "implementations", "data", "environment",
    "command", "started", "predictions", "wall_seconds", "protocol__name", "recipe__name", "environment__cpu",
    "speed__examples_per_second", "speed__examples", "memory__peak_bytes", "predictions__file", "predictions__sha256",
    "test__accuracy", "test__n",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_required_values_are_missed_and_have_their_type(key: str) -> None:
    name = key.replace("__", ".")
    assert problem(**{key: ABSENT}) == f"{name} is missing"
    assert problem(**{key: None}).startswith(f"{name} is None; expected ")
    assert problem(**{key: True}).startswith(f"{name} is True; expected ")


WHOLE = {"curve": [{"step": 0}], "receptive_field": 9}
KEYS = [
    *made(**WHOLE),
    *(f"{key}__{inner}" for key, held in made().items() if isinstance(held, dict) for inner in held),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_record_without_a_value_is_refused_or_can_be_shown(key: str) -> None:
    """The tables rely on the type: a field that they need must be one that it requires."""
    if not problem(**{**WHOLE, key: ABSENT}):
        short = records.from_json(made(**{**WHOLE, key: ABSENT}))
        board = Leaderboard.of(Collection([records.from_json(made(id="whole", seed=1)), short]))
        assert all("gru" in leaderboard.build(board, form) for form in leaderboard.FORMATS)
        assert "gru" in leaderboard.readme(board)


@pytest.mark.parametrize(
    "key",
    [
        "collapsed", "protocol__length", "validation__accuracy", "flops__forward", "flops__forward_backward",
        "flops__uncounted", "environment__gpu", "environment__device", "environment__versions", "environment__commit",
        "data__checksum", "curve", "receptive_field", "changed",
    ],
)  # fmt: skip
def test_an_optional_value_may_be_left_out_and_has_its_type(key: str) -> None:
    assert problem(**{key: ABSENT}) == ""
    assert problem(**{key: True}).startswith(f"{key.replace('__', '.')} is True; expected ")


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
def test_the_last_values_that_are_accepted(changes: dict[str, Any]) -> None:
    assert problem(**changes) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": records.SCHEMA + 1}, "schema is 2; this version reads 1"),
        ({"schema": ABSENT}, "schema is None; this version reads 1"), ({"schema": True}, "schema is True"),
        ({"test__accuracy": -0.01}, "test.accuracy is -0.01"), ({"test__accuracy": 1.01}, "test.accuracy is 1.01"),
        ({"test__n": 0}, "test.n is 0"), ({"test__n": 2**31}, "test.n is 2147483648"),
        ({"test__n": 1.0}, "test.n is 1.0; expected int"),
        ({"floors__majority class": -0.1}, "floors.majority class is -0.1; expected float >= 0.0"),
        ({"floors__majority class": 1.1}, "floors.majority class is 1.1; expected float <= 1.0"),
        ({"floors__majority class": True}, "floors.majority class is True; expected float"),
        ({"floors": {"a": 0.1, "b": 0.2, "c": "d", "e": "f"}}, "floors.c is 'd'"),
        ({"implementations": {"a": ["cpu"], "b": ["cpu", 3]}}, "implementations.b[1] is 3; expected str"),
        ({"protocol__length": 0}, "protocol.length is 0"),
        ({"flops__uncounted": ["a", 1]}, "flops.uncounted[1] is 1; expected str"),
        ({"curve": [{"step": 1}, {"step": 1.5}]}, "curve[1].step is 1.5; expected int"),
        ({"curve": [3]}, "curve[0] is 3; expected object"), ({"curve": [{}]}, "curve[0].step is missing"),
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
def test_the_first_values_that_are_refused(changes: dict[str, Any], says: str) -> None:
    assert says in problem(**changes)
    assert "\n" not in problem(**changes)


def test_only_objects_are_records() -> None:
    contents: tuple[Any, ...] = (None, [], "", 3)
    for value in contents:
        with pytest.raises(ValueError, match="not a JSON object"):
            records.from_json(value)


def test_the_wrong_entry_of_a_large_mapping_is_found_quickly() -> None:
    floors: dict[str, Any] = {str(i): 0.5 for i in range(100_000)}
    assert problem(floors=floors | {"70000": 7}) == "floors.70000 is 7; expected float <= 1.0"


def test_committed_records_read_as_they_were_written() -> None:
    """Every value of a committed file is in its record, and what the record writes reads as the same record."""
    paths = sorted((ROOT / "results" / "runs").rglob("*.json"))
    assert paths
    for path in paths:
        stored = json.loads(path.read_text(encoding="utf-8"))
        record = records.from_json(stored)
        written = records.to_json(record)
        assert records.from_json(written) == record
        assert lost(stored, written) == []


def lost(stored: dict[str, Any], written: dict[str, Any], path: str = "") -> list[str]:
    """Fields that differ, apart from those that hold nothing and are left out."""
    names = []
    for key, value in stored.items():
        if isinstance(value, dict) and key in written:
            names += lost(value, written[key], f"{path}{key}.")
        elif key in written:
            plain = json.loads(json.dumps(written[key]))
            names += [] if plain == value else [path + key]
        elif value not in ("", [], {}, False, None):
            names.append(path + key)
    return names


def test_the_exported_schema_is_that_of_the_types() -> None:
    path = ROOT / "results" / json_schema.FILE
    assert json.loads(path.read_text(encoding="utf-8")) == json_schema.json_schema(), (
        f"results/{json_schema.FILE} is out of date: run `python -m lra.results.json_schema`"
    )
    run = json_schema.json_schema()["$defs"]["RunRecord"]
    assert set(run["properties"]) == set(RunRecord.__struct_fields__)
    assert {"id", "test", "recipe_hash"} <= set(run["required"])
    assert "collapsed" not in run["required"]
