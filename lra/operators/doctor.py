"""Diagnosis: which implementations of an operator run on this machine, and whether they match the reference.

Diagnoses are cached per hardware, versions and source. Before a run, `require_parity` checks the operators that it
uses: an implementation whose error exceeds the tolerance is disabled for this process, with a warning, and the
dispatcher chooses the next one.
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
from lra.files import cache_root
from lra.kernels import _dispatch
from lra.operators import parity
from lra.results import environment

DTYPE = torch.float32


@dataclass(frozen=True)
class Diagnosis:
    """status: "right", "wrong" or "absent"; error: largest RMS(error) / RMS(reference); detail: case or reason."""

    op: str
    implementation: str
    status: str
    error: float
    detail: str


def diagnose(op: str, implementation: str, device: torch.device) -> Diagnosis:
    """Compare one implementation with the reference on the small and edge cases of an operator."""
    module = import_module(f"lra.kernels.{op}")
    try:
        _dispatch.choose(op, implementation, device, portable=module.PORTABLE, has_gpu=module.HAS_GPU)
    except ValueError as error:
        return Diagnosis(op, implementation, "absent", 0.0, str(error).partition("cannot run: ")[2] or str(error))
    worst, where = 0.0, ""
    for case in parity.cases_of(op, "small", "edge"):
        try:
            errors = parity.errors_of(op, case, DTYPE, device, impl=implementation)
        except Exception as error:  # noqa: BLE001  (a broken kernel may raise anything)
            return Diagnosis(op, implementation, "wrong", float("inf"), f"{case.name}: {type(error).__name__}: {error}")
        name, largest = max(errors.items(), key=lambda item: item[1])
        if largest > worst:
            worst, where = largest, f"{name} of case {case.name}"
    status = "right" if worst < parity.TOLERANCE[DTYPE] else "wrong"
    return Diagnosis(op, implementation, status, worst, where)


def examine(
    ops: Iterable[str],
    device: torch.device,
    *,
    fresh: bool = False,
    on_operator: Callable[[str], None] = lambda _: None,
) -> list[Diagnosis]:
    """Diagnose the cpu and gpu implementations of operators.

    Uses cached diagnoses of the same hardware, versions and source unless `fresh`. on_operator: called with the name of
    each operator before it is checked.
    """
    cached = {} if fresh else _read_cache()
    diagnoses = []
    for op in ops:
        on_operator(op)
        key = _cache_key(op, device)
        if key not in cached:
            cached[key] = [asdict(diagnose(op, name, device)) for name in ("cpu", "gpu")]
            _write_cache(key, cached[key])
        diagnoses += [Diagnosis(**d) for d in cached[key]]
    return diagnoses


def require_parity(ops: Iterable[str], device: torch.device) -> list[str]:
    """Disable the implementations of `ops` that do not match the reference. Warns, and returns one line for each."""
    lines = []
    for d in examine(ops, device):
        if d.status == "wrong":
            reason = f"it failed its parity check on this machine ({d.detail}, error {d.error:.1e})"
            _dispatch.refuse(d.op, d.implementation, reason)
            lines.append(f"{d.op}: the {d.implementation} implementation is refused: {reason}")
    for line in lines:
        warnings.warn(line, RuntimeWarning, stacklevel=2)
    return lines


def _cache_path() -> Path:
    return cache_root() / "doctor.json"


def _read_cache() -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(_cache_path().read_text(encoding="utf-8"))
        return {k: [asdict(Diagnosis(**d)) for d in v] for k, v in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_cache(key: str, diagnoses: list[dict[str, Any]]) -> None:
    # without a cache the next run repeats the check
    with suppress(OSError), files.atomic(_cache_path()) as temporary:
        temporary.write_text(json.dumps(_read_cache() | {key: diagnoses}), encoding="utf-8")


def _cache_key(op: str, device: torch.device) -> str:
    """Hash of the operator's name, the hardware, the versions and the source of the operators."""
    digest = hashlib.sha256()
    # all operators: some run on another's kernels
    for path in sorted([*parity.KERNELS.rglob("*.py"), Path(__file__)]):
        digest.update(path.read_bytes())
    machine = environment.environment()
    hardware = machine.get("gpu") if device.type == "cuda" else machine["cpu"]
    versions = {name: machine["versions"].get(name) for name in ("torch", "numba", "triton", "numpy")}
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
