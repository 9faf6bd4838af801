"""Triton kernels in Triton's interpreter. Each line of the standard input is a question, a JSON list of the name of a
function below and its arguments; the answer is a line of JSON.

A process of its own, because TRITON_INTERPRET has to be set before Triton is imported, and one for all questions,
because its imports take longer than most answers:
`echo '["parity", "wkv", true]' | TRITON_INTERPRET=1 PYTHONPATH=. python tests/interpreted_kernel.py`.
"""

from __future__ import annotations

import json
import sys
import traceback
from unittest import mock

import torch
from interpreted_scan import over_tiles
from segmented_cases import cases

from lra.kernels import _split
from lra.kernels._case import Case
from lra.kernels.linear_scan import linear_scan
from lra.operators.parity import cases_of, errors_of


def parity(op: str, quick: bool) -> dict[str, dict[str, float]]:
    """Errors of the small and edge cases, either those for every day or the others, which a kernel takes."""
    found = {}
    for case in cases_of(op, "small", "edge"):
        if case.interpreted == quick:
            try:
                found[case.name] = errors_of(op, case, torch.float32, impl="gpu")
            except ValueError as error:
                if quick or "it has no Triton kernel" not in str(error):
                    raise
    return found


def segments(op: str, tiles: int, *counts: int) -> dict[str, dict[str, float]]:
    """Errors in so many segments, as a GPU with idle processors would have."""
    found = {}
    for name, make in cases(op, tiles).items():
        for count in counts:
            with mock.patch.object(_split, "segments", side_effect=lambda *_, count=count: count) as asked:
                found[f"{name}, {count}"] = errors_of(op, Case(name, "edge", make), torch.float32, impl="gpu")
            assert asked.called
    return found


def growth() -> bool:
    """Whether states stay 0 beside factors of 1e4, whose product over a tile is infinite."""
    a, b = torch.full((1, 16, 2), 1e4), torch.zeros(1, 16, 2)
    b[:, -1] = 1.0
    kinds = torch.float32, torch.complex64
    return all(linear_scan(a.to(kind), b.to(kind), impl="gpu").equal(b.to(kind)) for kind in kinds)


def main() -> None:
    torch.set_num_threads(1)
    with over_tiles():
        for question in sys.stdin:
            name, *arguments = json.loads(question)
            try:
                answer = {"found": globals()[name](*arguments)}
            except Exception:  # noqa: BLE001  the test shows it
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
