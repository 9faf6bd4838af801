"""The doctor finds a wrong operator and refuses it; the bench measures what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from lra.errors import UserError
from lra.kernels import _dispatch
from lra.kernels._case import KINDS, Case
from lra.operators import bench, doctor, parity

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
        (line,) = doctor.require_parity(["linear_scan"], CPU)
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
    monkeypatch.setattr(doctor, "_cache_key", lambda *_: "another machine")
    with pytest.raises(AssertionError, match="again"):
        doctor.examine(["linear_scan"], CPU)


def test_a_damaged_memory_is_forgotten(one_case: None, tmp_path: Path) -> None:
    (tmp_path / "doctor.json").write_text("{")
    assert next(d.status for d in doctor.examine(["linear_scan"], CPU)) == "right"


def test_bench_measures_both_passes_against_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    small = parity.cases_of("linear_scan", "small")[:1]
    monkeypatch.setattr(parity, "cases_of", lambda *_: small)
    lines = [x for x in bench.bench(["linear_scan"], CPU, budget=0.05) if x.implementation == "cpu"]
    assert all(x.machine.bandwidth > 1e8 and x.machine.rate > 1e8 for x in lines)
    assert [x.passes for x in lines] == ["forward", "forward+backward"]
    assert all(x.floor > 0 and x.timing.median > 0 and x.bytes > 0 for x in lines)
    rows = bench.to_frame(lines, CPU).to_dict("records")
    assert [row["op"] for row in rows] == ["linear_scan"] * 2
    assert all(row["torch"] == torch.__version__ and row["date"] for row in rows)
    assert all(row["dtype"] == "float32" for row in rows)
    with pytest.raises(UserError, match="did you mean 'linear_scan'"):
        bench.bench(["linear_scn"], CPU)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("causal_conv1d", "length 65"), ("band_attention", "strided"), ("linear_scan", "length 1000"),
        ("selective_scan", "length 1000"), ("recurrent_cell", "B16 L1024 H128 lstm"),
        ("recurrent_cell", "B16 L1024 H128 gru"), ("recurrent_cell", "B16 L1024 H128 mgu"),
    ],
)  # fmt: skip
def test_what_is_timed_beside_an_operator_does_its_work(op: str, case: str) -> None:
    """Of the same arguments the same values come out, and both ways from a layer's input are one."""
    (chosen,) = (c for c in parity.cases_of(op, *KINDS) if c.name == case)
    arguments = parity.arguments_of(chosen, torch.float32)
    if op == "recurrent_cell":
        arguments["x_gates"] = arguments["x_gates"][:2, :40]
    wanted = {id(arguments): parity.operator(op)(**arguments)}
    for peer in peers.peers(op, arguments, "cpu"):
        # the floor of a scan and a scan of another b are not the same work
        if peer.backward and "|b|" not in peer.name:
            found = peer.call(**peer.arguments)
            torch.testing.assert_close(found, wanted.setdefault(id(peer.arguments), found), rtol=1e-3, atol=1e-4)


def test_a_peer_that_fails_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(op: str, arguments: dict[str, Any], own: str) -> list[bench.Contender]:
        return [bench.Contender("broken", lambda **_: 1 / 0, arguments)]

    small = parity.cases_of("wkv", "small")[:1]
    monkeypatch.setattr(parity, "cases_of", lambda *_: small)
    with pytest.warns(RuntimeWarning, match="wkv: broken is left out: ZeroDivisionError"):
        lines = list(bench.bench(["wkv"], CPU, budget=0.01, peers=broken))
    assert {x.implementation for x in lines} == {"cpu"}
