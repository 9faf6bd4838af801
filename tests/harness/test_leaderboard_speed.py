"""Speed and memory in the tables of the leaderboard: those of one machine's profile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from records import profile_content, record, write

from lra.reports import efficiency, leaderboard
from lra.reports.ranking import Leaderboard
from lra.results.collection import Collection

PRECISION = {"cpu": "a cpu x2", "threads": 2, "precision": "32-true"}


def test_speed_in_a_table_is_that_of_one_machine(tmp_path: Path) -> None:
    """Of several machines, the one that knows most of the rows."""
    (tmp_path / "profile" / "a").mkdir(parents=True)
    for cpu, names in (("a cpu x2", ["gru"]), ("another x2", ["gru", "s4d"])):
        for name in names:
            made = profile_content(name, 1024, 0.5, environment={"cpu": cpu, "threads": 2})
            (tmp_path / "profile" / "a" / f"{name} {cpu}.json").write_text(json.dumps(made))
    for name in ("gru", "s4d"):
        write(tmp_path, record(name, environment=PRECISION))
    (rows,) = Leaderboard.of(Collection.read(tmp_path)).groups.values()
    assert [row.profile.environment.cpu for row in rows if row.profile] == ["another x2", "another x2"]


@pytest.mark.parametrize(
    ("environment", "found"),
    [({}, True), ({"threads": 1}, False), ({"precision": "bf16-mixed"}, False), ({"cpu": "another x2"}, True)],
    ids=["the same", "threads", "dtype", "machine"],
)
def test_speed_and_memory_are_those_of_a_profile_with_threads_and_dtype_of_the_runs(
    environment: dict[str, Any], found: bool, tmp_path: Path
) -> None:
    """The run's own speed and memory, which may be those of a shared machine, are in no table."""
    made = profile_content("gru", 1024, 0.5, environment={"cpu": "a cpu x2", "threads": 2})
    (tmp_path / "profile" / "a").mkdir(parents=True)
    (tmp_path / "profile" / "a" / "gru.json").write_text(json.dumps(made))
    for name in ("gru", "s4d"):
        write(tmp_path, record(name, environment=PRECISION | environment))
    collection = Collection.read(tmp_path)
    (shown,) = leaderboard.all_tables(Leaderboard.of(collection))
    cells = {row[1].text: dict(zip(shown.columns, (cell.text for cell in row), strict=True)) for row in shown.rows}
    assert (cells["s4d"]["tok/s"], cells["s4d"]["MiB"]) == ("-", "-")
    assert (cells["gru"]["tok/s"], cells["gru"]["MiB"]) == (("2,048", "16") if found else ("-", "-"))
    assert cells["gru"]["threads"] == str((PRECISION | environment)["threads"])
    note = "profiled step: 1,024 tokens, batch 1, d_model 64, 2 layers, bidirectional, float32, on a cpu x2, 2 threads"
    assert shown.notes == ([note] if found else [])
    frame = leaderboard.frame(collection).set_index("architecture")
    assert frame.loc["gru", "tokens_per_second"] == (2048 if found else pytest.approx(math.nan, nan_ok=True))


def test_runs_in_different_dtypes_share_a_table_that_names_them(tmp_path: Path) -> None:
    """`precision = "auto"` takes what the machine has; the speeds are all of one dtype, which the note names."""
    (tmp_path / "profile" / "a").mkdir(parents=True)
    for dtype, names in (("bfloat16", ["gru"]), ("float32", ["gru", "s4d"])):
        for name in names:
            made = profile_content(name, 1024, 0.5, environment={"cpu": "a cpu x2", "threads": 2})
            made["cell"]["dtype"] = dtype
            (tmp_path / "profile" / "a" / f"{name}-{dtype}.json").write_text(json.dumps(made))
    write(tmp_path, record("gru", environment=PRECISION | {"precision": "bf16-mixed"}))
    write(tmp_path, record("s4d", environment=PRECISION))
    board = Leaderboard.of(Collection.read(tmp_path))
    (shown,) = leaderboard.all_tables(board)
    by_name = {row[1].text: row[shown.columns.index("dtype")].text for row in shown.rows}
    assert {name: by_name[name] for name in ("gru", "s4d")} == {"gru": "bfloat16", "s4d": "float32"}
    (rows,) = board.groups.values()
    assert {row.profile.cell.dtype for row in rows if row.profile} == {"float32"}
    assert "bidirectional, float32, on" in shown.notes[0]


def test_efficiency_metrics_are_empty_where_nothing_was_measured(tmp_path: Path) -> None:
    (tmp_path / "profile" / "a").mkdir(parents=True)
    for length, seconds in ((1024, 0.5), (8192, 6.0)):
        made = profile_content("gru", length, seconds, environment={"cpu": "a cpu x2", "threads": 2})
        (tmp_path / "profile" / "a" / f"gru {length}.json").write_text(json.dumps(made))
    for name in ("gru", "s4d"):
        write(tmp_path, record(name, accuracy=0.5, environment=PRECISION))
    collection = Collection.read(tmp_path)
    frame = efficiency.metrics(Leaderboard.of(collection), collection.profiles)
    rows = frame.set_index("architecture")
    assert rows.loc["s4d", ["longest_length", "longest_per_peak_mib", "tokens_per_second"]].isna().all()
    # 2e9 FLOPs for 2,000 tokens are 1 MFLOP each
    assert rows["points_per_mflop_per_token"].tolist() == pytest.approx([50.0, 50.0])
    assert rows["flops_per_token"].tolist() == pytest.approx([1e6, 1e6])
    # the step nearest to 2,000 tokens tells the speed, the longest one the memory
    assert rows.loc["gru", "tokens_per_second"] == pytest.approx(2048)
    assert rows.loc["gru", "longest_length"] == 8192
    assert rows.loc["gru", "longest_per_peak_mib"] == pytest.approx(8192 / 128)
    (table,) = efficiency.metric_tables(frame)
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert cells["gru"] == ["50.00", "1", "50", "8,192", "128", "64", "2,048"]
    assert cells["s4d"] == ["50.00", "1", "50", "-", "-", "-", "-"]


def test_efficiency_of_runs_on_different_data_is_in_different_tables(tmp_path: Path) -> None:
    for name, digit in (("gru", "1"), ("s4d", "2")):
        write(tmp_path, record(name, data={"checksum": digit * 64}))
    collection = Collection.read(tmp_path)
    tables = efficiency.metric_tables(efficiency.metrics(Leaderboard.of(collection), collection.profiles))
    assert [[row[0].text for row in table.rows] for table in tables] == [["gru"], ["s4d"]]
    assert "data 11111111" in tables[0].title


def test_a_token_of_either_sequence_counts_where_a_task_has_two(tmp_path: Path) -> None:
    write(tmp_path, record("gru", accuracy=0.5, task="retrieval"))
    ((row,),) = Leaderboard.of(Collection.read(tmp_path)).groups.values()
    # 2e9 FLOPs for 2 x 2,000 tokens
    assert row.flops_per_token == pytest.approx(5e5)
    assert row.points_per_work == pytest.approx(100)
