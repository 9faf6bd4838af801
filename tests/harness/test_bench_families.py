"""`python -m benchmarks families` and `recall`: rows by family, kept and replaced, and what is not repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import families
from benchmarks.__main__ import app
from lra.conformance import recall as first_token
from lra.results import recall as records

SECONDS = {"gru": 0.4, "lstm": 0.2, "elman": 0.1, "s4d": 0.3}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    return tmp_path


def test_a_row_is_compared_with_the_median_of_its_family(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def in_process(work: Any, cell: Any, device: str, timeout: float) -> dict[str, Any]:
        timed.append(cell.architecture)
        if cell.architecture == "s5":
            return {"failed": "out of memory"}
        seconds = SECONDS[cell.architecture]
        return {
            "peak_bytes": 2**21,
            "parameters": 5000,
            "median": seconds,
            "low": seconds,
            "high": seconds,
            "repeats": 3,
        }

    monkeypatch.setattr(families.profiler, "in_process", in_process)
    done = CliRunner().invoke(app, ["families", *SECONDS, "s5"], catch_exceptions=False)
    assert "out of memory" in done.output
    rows = families.read(place).set_index("architecture")
    assert rows["over_median"].dropna().to_dict() == {"gru": 2.0, "lstm": 1.0, "elman": 0.5, "s4d": 1.0}
    assert (rows.loc["gru", "family"], rows.loc["gru", "mib"], rows.loc["gru", "parameters"]) == ("recurrent", 2, 5000)

    timed.clear()
    CliRunner().invoke(app, ["families", "gru", "s4d"], catch_exceptions=False)
    assert timed == []
    SECONDS["gru"] = 0.2
    CliRunner().invoke(app, ["families", "gru", "--fresh"], catch_exceptions=False)
    assert timed == ["gru"]
    again = families.read(place).set_index("architecture")
    assert (len(again), again.loc["gru", "ms"], again.loc["lstm", "ms"]) == (5, 200, 200)


def test_a_real_step_is_timed(place: Path) -> None:
    cell = families.cell_of("mingru")
    cell = type(cell)(cell.architecture, 64, 2, 16, 1, cell.direction, 0.1, "", "float32")
    measured = families.step(cell, families.torch.device("cpu"))
    assert measured["repeats"] >= 3
    assert 0 < measured["low"] <= measured["median"] <= measured["high"]
    assert measured["peak_bytes"] > 4 * measured["parameters"]


def test_recall_is_measured_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def recall(name: str, *, direction: str, **limits: Any) -> first_token.Recall:
        asked.append((name, direction))
        return first_token.Recall(0.97, 80, 1.5)

    monkeypatch.setattr(first_token, "recall", recall)
    for _ in range(2):
        CliRunner().invoke(app, ["recall", "gru", "fnet"], catch_exceptions=False)
    assert asked == [("gru", "causal"), ("fnet", "bidirectional")]
    assert records.read(place)["gru"].learned
    CliRunner().invoke(app, ["recall", "gru", "--fresh"], catch_exceptions=False)
    assert len(asked) == 3
