"""Triton kernels compile for an H200 as their operators launch them, and fit it. Nothing is run: no GPU is needed.

`make test` takes what `make bench` times, in bfloat16, and each kernel of an operator's own once; `make test-all` takes
all cases in all dtypes.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_kernel import DTYPES, SHARED, Launch, beyond, distinct, fault, launches

from lra.operators.parity import cases_of, operators

OPS = [op for op in operators() if import_module(f"lra.kernels.{op}").HAS_GPU]


def obstacle() -> str:
    """Why nothing can be compiled here, or nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1: kernels are not made for the compiler"
    if find_spec("triton") is None:
        return "Triton is not installed"
    from triton import knobs

    try:
        return "" if knobs.nvidia.ptxas.path and knobs.nvidia.cuobjdump.path else "no ptxas"
    except RuntimeError as error:
        return f"Triton came without NVIDIA's tools: {error}"


pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


@pytest.fixture(autouse=True)
def compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def faults(found: dict[tuple[Any, ...], tuple[str, Launch]]) -> list[str]:
    return [f"{launch.name} ({where}): {why}" for where, launch in found.values() if (why := fault(launch))]


# a thread holds one number of a step, so that neighbouring threads, not vectors, make up the reads
ONE_NUMBER = {
    f"{module}.gpu.{name}_{way}" for way in ("forward", "backward")
    for module, name in (("selective_scan", ""), ("recurrent_cell", "_diagonal"))
} | {"selective_scan.gpu._adjoints", "wkv.gpu._carry"}  # fmt: skip


def one_of_each(op: str) -> dict[tuple[Any, ...], tuple[str, Launch]]:
    """The last launch of each kernel of the operator's own; of two walks over segments, the one that stores all."""
    large = distinct(op, (torch.bfloat16,), "bench")
    assert large
    assert not any(beyond(launch) for _, launch in large.values())
    last = {launch.name: key for key, (_, launch) in large.items() if launch.name.startswith(f"{op}.")}
    return {key: large[key] for key in last.values()}


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_an_h200_and_fit_it(op: str) -> None:
    large = one_of_each(op)
    assert not faults(large)
    read = {launch.name: launch.needs for _, launch in large.values()}
    narrow = {name for name, used in read.items() if not used.load_128 + used.load_64}
    assert narrow <= ONE_NUMBER, "no vector is read, at sizes that are multiples of 16"


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_of_every_case_compile_for_an_h200_and_fit_it(op: str) -> None:
    assert not faults(distinct(op, DTYPES, "small", "edge", "long", "bench"))


def test_forward_and_backward_of_a_case_are_recorded_as_they_would_be_launched() -> None:
    case = next(case for case in cases_of("linear_scan", "bench") if case.name == "B16 L2048 D256")
    made = launches("linear_scan", case, torch.bfloat16)
    names = ["_totals", "_forward", "_forward", "_totals", "_forward", "_backward"]
    assert [launch.name for launch in made] == [f"linear_scan.gpu.{name}" for name in names]
    assert [launch.grid for launch in made] == [(8, 16, 3), (8, 16, 1), (8, 16, 3)] * 2, "three segments"
    forward, backward = made[2], made[5]
    assert [forward.arguments[n].dtype for n in (0, 1, 3)] == [torch.bfloat16] * 3
    assert forward.options["T"] == 64, "the tile of a GPU, not of the interpreter"
    assert 0 < forward.needs.shared < backward.needs.shared < SHARED
    assert forward.needs.load_128 > 0 == forward.needs.load_16


@pytest.mark.parametrize(
    ("kernel", "size", "grid", "why"),
    [
        ("changes_type", 16, (1,), "Loop-carried variable total has initial type"),
        ("takes_memory", 128, (1,), "bytes of shared memory; at most 163,840"),
        ("takes_memory", 16, (1, 65_536), "a grid of (1, 65536)"),
        ("takes_memory", 16, (65_536, 1), ""),
        ("holds_much", 65_536, (1,), "bytes of stack; at most 128"),
    ],
)
def test_what_an_h200_would_not_run_is_refused(kernel: str, size: int, grid: tuple[int, ...], why: str) -> None:
    broken = getattr(import_module("broken_kernels"), kernel)
    found = fault(Launch(broken, grid, (torch.empty(0, dtype=torch.bfloat16), 3), {"T": size, "num_stages": 5}))
    assert why in found
    assert bool(found) == bool(why)
