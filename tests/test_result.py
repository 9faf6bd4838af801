"""Records: written whole or not at all, read with suspicion; tables: a pure function of them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from lra import leaderboard, result, statistics
from lra.errors import UserError


def record(architecture: str = "gru", seed: int = 0, accuracy: float = 0.5, **changes: Any) -> dict[str, Any]:
    made = {
        "schema": result.SCHEMA, "id": f"quick-{architecture.replace('/', '-')}-s{seed}-{changes.get('started', 't')}",
        "task": "listops", "architecture": architecture, "protocol": {"name": "strict", "length": 2000},
        "recipe": {"name": "quick"}, "recipe_hash": "a" * 64, "seed": seed, "regime": "scratch",
        "direction": "bidirectional", "test": {"accuracy": accuracy, "n": 2000, "correct": round(2000 * accuracy)},
        "validation": {"accuracy": 0.4, "n": 500}, "collapsed": "",
        "floors": {"majority class": 0.17, "root operator": 0.36},
        "parameters": 12345, "flops": {"forward": 2e9}, "speed": {"examples_per_second": 10.0},
        "memory": {"peak_bytes": 2**28}, "implementations": {}, "data": {}, "wall_seconds": 60.0,
        "environment": {"cpu": "a cpu x2"}, "command": "lra run listops gru", "started": "2026-01-01T00:00:00+00:00",
        "predictions": {},
    }  # fmt: skip
    return made | changes


PREDICTIONS = {"prediction": np.zeros(3, np.uint8)}


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = result.write(record(), PREDICTIONS, tmp_path)
    back = result.read(path)
    assert path == tmp_path / "runs" / "listops" / "gru" / f"{back['id']}.json"
    assert {k: v for k, v in back.items() if k != "predictions"} == {
        k: v for k, v in record().items() if k != "predictions"
    }
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".npz"]


def _truncate(path: Path) -> None:
    path.write_text(path.read_text()[:-40])


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _drop(key: str) -> Callable[[Path], None]:
    def drop(path: Path) -> None:
        content = json.loads(path.read_text())
        del content[key]
        path.write_text(json.dumps(content))

    return drop


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "not a result file"),
        (lambda p: p.write_text("[" * 100_000), "not a result file"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "not a result file"),
        (lambda p: p.write_text("[]"), "not a JSON object"),
        (_edit(schema=99), "schema is 99"),
        (_edit(test={"accuracy": 1.5, "n": 10}), "test.accuracy is 1.5"),
        (_edit(test={"accuracy": 0.5, "n": 0}), "test.n is 0"),
        (_edit(test={"accuracy": float("nan"), "n": 10}), "NaN"),
        (_edit(parameters="many"), "parameters is a str"),
        (_drop("recipe_hash"), "recipe_hash is missing"),
        (lambda p: p.with_suffix(".npz").unlink(), "are missing"),
        (lambda p: p.with_suffix(".npz").write_bytes(b"other"), "checksum"),
        (_edit(predictions={"file": "../../../../etc/passwd", "sha256": "0"}), "are missing"),
    ],
)
def test_a_damaged_record_is_named_and_left_out(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    good = result.write(record("s4d"), PREDICTIONS, tmp_path)
    bad = result.write(record("gru"), PREDICTIONS, tmp_path)
    damage(bad)
    with pytest.raises(UserError, match=message) as error:
        result.read(bad)
    assert str(bad) in str(error.value)
    records, problems = leaderboard.load(tmp_path)
    assert [r["id"] for r in records] == [result.read(good)["id"]]
    assert len(problems) == 1
    assert "\n" not in problems[0]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "table.md"
    target.write_text("old")

    def fail() -> None:
        with result.atomic(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.md"]


def test_results_that_cannot_be_written_are_refused_before_the_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="LRA_RESULTS"):
        result.check_writable(file / "runs")


@pytest.mark.parametrize(
    ("name", "folder"),
    [("s4d", "s4d"), ("s4d/inv", "s4d-inv"), ("../../x.py:Net", "Net"), ("a.b:..", "_"), ("x:é/..", "é-.."), ("", "_")],
)
def test_an_architecture_never_leaves_its_folder(name: str, folder: str) -> None:
    assert result.slug(name) == folder


def test_rows_average_seeds_and_keep_groups_apart(tmp_path: Path) -> None:
    runs = [
        record("gru", 0, 0.40), record("gru", 1, 0.50), record("s4d", 0, 0.60),
        record("gru", 0, 0.90, protocol={"name": "lra2020", "length": 2000}, id="other-protocol"),
        record("gru", 0, 0.90, environment={"cpu": "another x8"}, id="other-device"),
    ]  # fmt: skip
    found = leaderboard.rows(runs)
    assert len(found) == 3
    main = found[leaderboard.group_of(runs[0])]
    assert [row.architecture for row in main] == ["s4d", "gru"]
    assert main[1].seeds == 2
    assert main[1].accuracy.mean == pytest.approx(0.45)
    assert main[1].accuracy.source == "seeds"
    assert main[0].accuracy.source == "test set"


def test_a_rerun_of_one_seed_does_not_count_twice() -> None:
    old, new = record(accuracy=0.4, id="a"), record(accuracy=0.6, id="b", started="2026-02-01T00:00:00+00:00")
    (rows,) = leaderboard.rows([new, old]).values()
    assert (rows[0].seeds, rows[0].accuracy.mean) == (1, 0.6)


def test_tables_say_the_same_in_every_form(tmp_path: Path) -> None:
    runs = [record("gru", 0, 0.40), record("gru", 1, 0.50), record("s4d/inv", 0, 0.1704, collapsed="at chance")]
    text = leaderboard.markdown(runs)
    assert "| gru | 45.00 | " in text
    assert "1/1 at chance" in text
    assert "floors: majority class 17.0, root operator 36.0" in text
    first = next(iter(csv.DictReader(io.StringIO(leaderboard.table_csv(runs)))))
    assert (first["architecture"], first["accuracy"], first["seeds"]) == ("gru", "0.450000", "2")
    console = Console(width=100, record=True, file=io.StringIO())
    for part in leaderboard.terminal(runs):
        console.print(part)
    shown = console.export_text()
    assert "45.00" in shown
    assert "…" not in shown
    assert leaderboard.markdown(list(reversed(runs))) == text


def test_intervals_agree_with_their_definitions() -> None:
    values = [0.5, 0.6, 0.55]
    got = statistics.over_seeds(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert [got.low, got.high] == pytest.approx([low, high])
    one = statistics.of_test_set(0.3, 200)
    z, p, n = stats.norm.ppf(0.975), 0.3, 200
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert [one.low, one.high] == pytest.approx([centre - half, centre + half])
    with pytest.raises(ValueError, match="at least 2"):
        statistics.over_seeds([0.5])


def test_chance_is_told_from_skill() -> None:
    assert statistics.at_chance(0.17, 2000, 0.17)
    assert statistics.at_chance(0.18, 2000, 0.17)
    assert not statistics.at_chance(0.20, 2000, 0.17)
