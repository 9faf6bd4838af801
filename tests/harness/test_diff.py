"""`lra diff`: every field in which two runs differ, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from records import record, write
from typer.testing import CliRunner

from lra.cli.app import app
from lra.errors import UserError
from lra.reports import comparison, leaderboard
from lra.results.collection import Collection


def test_differences_are_all_and_only_those_that_differ() -> None:
    a = record("gru", recipe={"name": "quick", "optim": {"lr": 0.01, "betas": [0.9, 0.999]}, "encoder": {}})
    b = record("gru", recipe={"name": "quick", "optim": {"lr": 0.02, "betas": [0.9, 0.999]}, "encoder": {"n": 4}})
    assert comparison.differences(a, b) == [
        ("recipe.encoder", "{}", "-"), ("recipe.encoder.n", "-", "4"), ("recipe.optim.lr", "0.01", "0.02"),
    ]  # fmt: skip
    assert comparison.differences(a, a) == []


def test_runs_are_found_by_the_start_of_their_id(tmp_path: Path) -> None:
    path = write(tmp_path, record("gru", 0))
    write(tmp_path, record("gru", 1))
    found = Collection.read(tmp_path)
    assert comparison.find(found, "quick-listops-gru-s0")["seed"] == 0
    assert comparison.find(found, str(path))["seed"] == 0
    for name, says in (("quick-listops", "begins 2 run ids"), ("quick-listops-gru-s0-2026-01-02", "did you mean")):
        with pytest.raises(UserError, match=says):
            comparison.find(found, name)


def test_command_says_what_differs_and_by_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    write(tmp_path, record("gru", 0, 0.5))
    write(tmp_path, record("s4d", 0, 0.6, command="lra run [red]listops"))
    runner = CliRunner()
    same = runner.invoke(app, ["diff", "quick-listops-gru", "quick-listops-gru"])
    assert (same.exit_code, same.stdout.strip()) == (0, "no field differs")
    done = runner.invoke(app, ["diff", "quick-listops-gru", "quick-listops-s4d"])
    assert done.exit_code == 1
    fields = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.count("│") > 2]
    assert {"architecture", "command", "test.accuracy"} <= set(fields)
    assert "seed" not in fields
    assert "[red]" in done.stdout
    assert "McNemar" in done.stdout
    assert runner.invoke(app, ["diff", "nothing", "quick-listops-gru"]).exit_code == 2


def test_predictions_are_compared_on_the_same_examples_only(tmp_path: Path) -> None:
    write(tmp_path, record("gru", 0, 0.5))
    write(tmp_path, record("s4d", 0, 0.6))
    write(tmp_path, record("lru", 0, 0.6, data={"checksum": "other"}))
    found = Collection.read(tmp_path)
    by_name = {r["architecture"]: r for r in found.records}
    right = {name: found.answers[r["id"]].right for name, r in by_name.items()}
    only = int((right["s4d"] & ~right["gru"]).sum())
    assert f"the second alone on {only}" in comparison.predictions(found, by_name["gru"], by_name["s4d"])
    assert comparison.predictions(found, by_name["gru"], by_name["lru"]) == ""
    assert leaderboard.group_of(by_name["gru"]) != leaderboard.group_of(by_name["lru"])
