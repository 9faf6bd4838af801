"""Whether each operator's implementations are here, and right, on this very machine; cached per hardware and version.

A run asks `gate` about the operators it is about to use: an implementation that departs from the definition by more
than the tolerance is refused in this process, which is said and recorded, and the next one takes its place.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from lra import files
from lra.data import prepared_sets
from lra.kernels import _dispatch
from lra.operators import parity
from lra.results import environment

DTYPE = torch.float32


@dataclass(frozen=True)
class Diagnosis:
    """status: "right", "wrong" or "absent"; error: worst RMS(error) / RMS(reference); detail: where, or why."""

    op: str
    implementation: str
    status: str
    error: float
    detail: str


def diagnose(op: str, implementation: str, device: torch.device) -> Diagnosis:
    """Compare one implementation with the definition on the operator's small and edge cases."""
    module = import_module(f"lra.kernels.{op}")
    try:
        _dispatch.choose(op, implementation, device, portable=module.PORTABLE, has_gpu=module.HAS_GPU)
    except ValueError as error:
        return Diagnosis(op, implementation, "absent", 0.0, str(error).partition("cannot run: ")[2] or str(error))
    worst, where = 0.0, ""
    for case in parity.cases_of(op, "small", "edge"):
        try:
            errors = parity.errors_of(op, case, DTYPE, device, impl=implementation)
        except Exception as error:  # noqa: BLE001  (whatever a broken kernel raises is the finding)
            return Diagnosis(op, implementation, "wrong", float("inf"), f"{case.name}: {type(error).__name__}: {error}")
        name, error_ = max(errors.items(), key=lambda item: item[1])
        if error_ > worst:
            worst, where = error_, f"{name} of case {case.name}"
    status = "right" if worst < parity.TOLERANCE[DTYPE] else "wrong"
    return Diagnosis(op, implementation, status, worst, where)


def examine(
    ops: Iterable[str], device: torch.device, *, fresh: bool = False, seen: Callable[[str], None] = lambda _: None
) -> list[Diagnosis]:
    """Diagnoses of the cpu and gpu paths of each operator, from the cache where hardware and code are the same."""
    known = {} if fresh else _cached()
    diagnoses = []
    for op in ops:
        seen(op)
        key = _key(op, device)
        if key not in known:
            own = [diagnose(op, name, device) for name in ("cpu", "gpu")]
            known[key] = [asdict(d) for d in own]
            _remember(key, known[key])
        diagnoses += [Diagnosis(**d) for d in known[key]]
    return diagnoses


def gate(ops: Iterable[str], device: torch.device) -> list[str]:
    """Refuse every wrong implementation of `ops`, aloud; one line for each."""
    lines = []
    for d in examine(ops, device):
        if d.status == "wrong":
            reason = f"it failed its parity check on this machine ({d.detail}, error {d.error:.1e})"
            _dispatch.refuse(d.op, d.implementation, reason)
            lines.append(f"{d.op}: the {d.implementation} path is refused: {reason}")
    for line in lines:
        warnings.warn(line, RuntimeWarning, stacklevel=2)
    return lines


def _place() -> Path:
    return prepared_sets.cache_root() / "doctor.json"


def _cached() -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(_place().read_text(encoding="utf-8"))
        return {k: [asdict(Diagnosis(**d)) for d in v] for k, v in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(key: str, diagnoses: list[dict[str, Any]]) -> None:
    # a cache that cannot be written to costs the next run the time of the check
    with suppress(OSError), files.atomic(_place()) as temporary:
        temporary.write_text(json.dumps(_cached() | {key: diagnoses}), encoding="utf-8")


def _key(op: str, device: torch.device) -> str:
    """Hardware, versions and the operator's own source: what a diagnosis holds for."""
    digest = hashlib.sha256()
    for path in sorted([*(parity.KERNELS / op).glob("*.py"), *parity.KERNELS.glob("_*.py"), Path(__file__)]):
        digest.update(path.read_bytes())
    known = environment.environment()
    hardware = known.get("gpu") if device.type == "cuda" else known["cpu"]
    versions = {name: known["versions"].get(name) for name in ("torch", "numba", "triton", "numpy")}
    parts = [
        op,
        device.type,
        hardware,
        versions,
        platform.python_version(),
        _dispatch.interpreting(),
        digest.hexdigest(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
