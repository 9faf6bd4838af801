"""The doctor finds a wrong operator and refuses it; bench and profile measure what they say and can be resumed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lra import bench, doctor, parity, profiler
from lra.errors import UserError
from lra.kernels import _dispatch
from lra.kernels._case import Case
from lra.timing import measure

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path))
    before = _dispatch.refused()
    yield
    _dispatch._refused.clear()
    _dispatch._refused.update(before)
    _dispatch._warned.clear()


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    original = parity.cases_of

    def first(op: str, *kinds: str) -> list[Case]:
        return original(op, "small")[:1]

    monkeypatch.setattr(parity, "cases_of", first)


def inject(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Make the public operator `broken` return values that are off by a thousandth."""
    original = parity.operator

    def operator(op: str) -> Callable[..., Any]:
        right = original(op)
        if op != broken:
            return right

        def wrong(**arguments: Any) -> Any:
            result = right(**arguments)
            return result * 1.001 if isinstance(result, Tensor) else (result[0] * 1.001, *result[1:])

        return wrong

    monkeypatch.setattr(parity, "operator", operator)


@pytest.mark.parametrize("op", parity.operators())
def test_an_injected_bug_is_found_and_named(op: str, one_case: None, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = doctor.diagnose(op, "cpu", CPU)
    assert (healthy.status, healthy.error < 1e-5) == ("right", True), healthy
    inject(monkeypatch, op)
    ill = doctor.diagnose(op, "cpu", CPU)
    assert ill.status == "wrong"
    assert ill.error > 1e-4
    assert "case" in ill.detail


def test_a_refused_path_is_not_used_and_the_next_one_is_said_aloud(
    one_case: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, "linear_scan")
    with pytest.warns(RuntimeWarning, match="refused"):
        (line,) = doctor.gate(["linear_scan"], CPU)
    assert "linear_scan" in line
    monkeypatch.undo()
    with pytest.raises(ValueError, match="failed its parity check"):
        _dispatch.choose("linear_scan", "cpu", CPU)
    with pytest.warns(RuntimeWarning, match="reference path instead of cpu"):
        assert _dispatch.choose("linear_scan", "auto", CPU) == "reference"


def test_a_diagnosis_is_remembered_until_the_code_changes(one_case: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = doctor.examine(["linear_scan"], CPU)

    def never(*_: object) -> None:
        raise AssertionError("diagnosed again")

    monkeypatch.setattr(doctor, "diagnose", never)
    assert doctor.examine(["linear_scan"], CPU) == first
    with pytest.raises(AssertionError, match="again"):
        doctor.examine(["linear_scan"], CPU, fresh=True)
    monkeypatch.setattr(doctor, "_key", lambda *_: "another machine")
    with pytest.raises(AssertionError, match="again"):
        doctor.examine(["linear_scan"], CPU)


def test_a_damaged_memory_is_forgotten(one_case: None, tmp_path: Path) -> None:
    (tmp_path / "doctor.json").write_text("{")
    assert next(d.status for d in doctor.examine(["linear_scan"], CPU)) == "right"


def test_bench_measures_both_passes_against_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    small = parity.cases_of("linear_scan", "small")[:1]
    monkeypatch.setattr(parity, "cases_of", lambda *_: small)
    machine, measured = bench.bench(["linear_scan"], CPU, budget=0.05)
    lines = [x for x in measured if x.implementation == "cpu"]
    assert machine.bandwidth > 1e8
    assert machine.rate > 1e8
    assert [x.passes for x in lines] == ["forward", "forward+backward"]
    assert all(x.floor > 0 and x.timing.median > 0 and x.bytes > 0 for x in lines)
    rows = list(csv.DictReader(io.StringIO(bench.table_csv(lines, CPU))))
    assert [row["op"] for row in rows] == ["linear_scan"] * 2
    assert all(row["torch"] == torch.__version__ and row["date"] for row in rows)
    with pytest.raises(UserError, match="did you mean 'linear_scan'"):
        bench.bench(["linear_scn"], CPU)


def test_timing_warms_up_and_repeats() -> None:
    calls: list[int] = []
    found = measure(lambda: calls.append(1), CPU, repeats=7, budget=5.0)
    assert found.repeats == 7
    assert 8 <= len(calls) <= 12
    assert found.low <= found.median <= found.high


def test_a_profile_cell_holds_work_speed_and_memory() -> None:
    cell = profiler.Cell("transformer", length=32, batch=2, d_model=16, n_layers=1, direction="causal", budget=0.05)
    found = profiler.measure_cell(cell, CPU)
    assert found["flops"]["matmul"] == pytest.approx(found["flops"]["matmul_by_formula"], rel=0.01)
    assert found["memory"]["parameters"] == 4 * found["parameters"]
    assert found["memory"]["optimiser"] >= 2 * found["memory"]["gradients"]
    assert set(found["seconds"]) == {"forward", "train", "step"}
    assert found["tokens_per_second"] == pytest.approx(64 / found["seconds"]["train"]["median"])


def test_a_profile_goes_on_where_it_was_and_keeps_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [profiler.Cell(name, length=32, d_model=16, n_layers=1, budget=0.01) for name in ("gru", "transformer")]
    asked: list[str] = []

    def answer(_: object, cell: profiler.Cell, *rest: object) -> dict[str, Any]:
        asked.append(cell.architecture)
        return {"failed": "out of memory"} if cell.architecture == "gru" else {"parameters": 1}

    monkeypatch.setattr(profiler, "_in_process", answer)
    first = list(profiler.profile(cells, tmp_path))
    assert [r.get("failed") for r in first] == ["out of memory", None]
    assert list(profiler.profile(cells, tmp_path)) == first
    assert asked == ["gru", "transformer"]
    next(tmp_path.rglob("gru*.json")).write_text("{")
    list(profiler.profile(cells, tmp_path))
    assert asked == ["gru", "transformer", "gru"]


def test_growth_is_the_slope_in_log_log() -> None:
    assert profiler.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    with pytest.raises(UserError, match="two lengths"):
        profiler.exponent([1], [1])
