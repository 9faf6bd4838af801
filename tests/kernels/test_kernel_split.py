"""Recurrences in segments: how many, and that their number does not matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lra.kernels import _split
from lra.kernels._split import cut, segments, totals
from lra.operators.parity import faults_of

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


# a minute of the interpreter for each operator
@pytest.mark.slow
@pytest.mark.parametrize("op", SPLIT)
def test_any_number_of_segments(op: str) -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parents[1] / "segmented_kernel.py"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, op], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout).items():
        assert not faults_of(found, torch.float32), name
