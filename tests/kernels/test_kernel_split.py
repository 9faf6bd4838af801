"""Recurrences in segments: how many, and that their number does not matter."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from lra.kernels import _split
from lra.kernels._case import Case
from lra.kernels._split import cut, segments, totals
from lra.kernels.linear_scan.cases import _inputs as linear
from lra.kernels.selective_scan.cases import _inputs as selective
from lra.kernels.wkv.cases import _inputs as wkv
from lra.operators.parity import arguments_of, faults_of, operator, run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("programs", "processors", "length", "count"),
    [
        (264, 132, 65_536, 1),  # twice the processors
        (263, 132, 65_536, 2),
        (16, 132, 65_536, 17),  # 272 programs
        (1, 132, 65_536, 128),  # none shorter than 512 steps
        (16, 132, 8_192, 16),
        (16, 132, 1_024, 2),
        (16, 132, 1_023, 1),
        (1, 132, 1, 1),
        (1, 0, 65_536, 1),  # no GPU
    ],
)
def test_the_number_of_segments(programs: int, processors: int, length: int, count: int) -> None:
    assert segments(programs, processors, length) == count


@pytest.mark.parametrize("length", [1, 16, 17, 2_048, 65_535])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_segments_are_whole_tiles_and_none_is_empty(length: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_split, "segments", lambda *_: count)
    cuts, steps = cut(1, length, 16, CPU)
    assert steps % 16 == 0
    assert 1 <= cuts <= count
    assert (cuts - 1) * steps < length <= cuts * steps


def test_a_sequence_on_a_cpu_is_not_cut() -> None:
    assert cut(1, 65_536, 16, CPU) == (1, 65_536)


def test_totals_of_segments_leave_out_what_is_not_there() -> None:
    x = torch.arange(14.0).view(1, 7, 2)
    assert totals(x, 3, 3).tolist() == [[[6.0, 9.0], [24.0, 27.0], [12.0, 13.0]]]


SPLIT = ("linear_scan", "selective_scan", "wkv", "decay_attention", "delta_rule")


@pytest.mark.parametrize("op", SPLIT)
def test_three_segments(op: str, interpreted: Callable[..., Any]) -> None:
    for name, found in interpreted("segments", op, 3, 3).items():
        assert not faults_of(found, torch.float32), name


@pytest.mark.parametrize("op", ["linear_scan", "selective_scan", "wkv"])
def test_one_row_is_work_for_every_core(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 channels; what the cores find is what one finds."""
    module, threads = import_module(f"lra.kernels.{op}.cpu"), torch.get_num_threads()
    make = {"linear_scan": linear(1, 9, 64), "selective_scan": selective(1, 9, 64, 3), "wkv": wkv(1, 9, 64)}[op]
    arguments = arguments_of(Case("one row", "edge", make), torch.float64)
    wanted, asked = run(operator(op), arguments, impl="cpu"), []
    over_rows = module.over_rows

    def spied(kernel: Any, rows: int, *given: Any) -> None:
        asked.append(rows)
        over_rows(kernel, rows, *given)

    monkeypatch.setattr(module, "over_rows", spied)
    torch.set_num_threads(2)
    try:
        found = run(operator(op), arguments, impl="cpu")
    finally:
        torch.set_num_threads(threads)
    assert asked == [2, 2], "forward and backward"
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("op", SPLIT)
def test_any_number_of_segments(op: str, interpreted: Callable[..., Any]) -> None:
    for name, found in interpreted("segments", op, 8, 1, 2, 3, 5, 8).items():
        assert not faults_of(found, torch.float32), name
