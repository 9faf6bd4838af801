"""How fast each operator runs, beside what the machine could do and beside other packages, all in one process.

Floors are measured in turns with what is held against them, so that whatever else the machine does meets both: the
bandwidth of an element-wise sum and the rate of a square matrix product. An operator's own floor is the larger of its
bytes (arguments, outputs, and gradients where there are any) over that bandwidth and its FLOPs over that rate; other
packages are held against the same floor. All that do the same work are timed in turns.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lra import files
from lra.errors import UserError, unknown
from lra.kernels._case import Case
from lra.kernels._dispatch import choose
from lra.operators import parity
from lra.profiling import memory
from lra.profiling.peak import Machine
from lra.profiling.timing import Timing, together
from lra.results import environment


@dataclass(frozen=True)
class Line:
    """One measurement. passes: "forward" or "forward+backward"; bytes and flops: the operator's own, whoever does it;
    machine: as it was meanwhile."""

    op: str
    case: str
    implementation: str
    dtype: str
    passes: str
    timing: Timing
    bytes: int
    flops: float
    machine: Machine

    @property
    def floor(self) -> float:
        """Seconds the machine would need at least."""
        return max(self.bytes / self.machine.bandwidth, self.flops / self.machine.rate)


@dataclass(frozen=True)
class Contender:
    """A call and the arguments it is timed with; both passes, or the forward pass alone."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    backward: bool = True


Peers = Callable[[str, dict[str, Any], str], Iterable[Contender]]
"""peers(op, arguments, own): other implementations of `op` for these arguments, to time beside our `own`."""


def no_peers(op: str, arguments: dict[str, Any], own: str) -> Iterable[Contender]:
    return ()


def bench(
    ops: Iterable[str], device: torch.device, *, budget: float = 10.0, peers: Peers = no_peers,
    seen: Callable[[str], None] = lambda _: None,
) -> Iterator[Line]:  # fmt: skip
    """The measurements case by case; budget: seconds for each of them; peers: what is timed beside our implementations.

    Raises UserError for an unknown operator.
    """
    chosen = list(ops)
    for op in chosen:
        if op not in parity.operators():
            raise unknown("operator", op, parity.operators())
    memory.keep_freed()
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    todo = [(op, case, dtype) for op in chosen for case in parity.cases_of(op, "bench") for dtype in dtypes]

    def lines() -> Iterator[Line]:
        for number, (op, case, dtype) in enumerate(todo, start=1):
            seen(f"{number} of {len(todo)}: {op} {case.name}")
            yield from _case(op, case, dtype, device, budget, peers)

    return lines()


def _case(
    op: str, case: Case, dtype: torch.dtype, device: torch.device, budget: float, peers: Peers
) -> Iterator[Line]:  # fmt: skip
    module = importlib.import_module(f"lra.kernels.{op}")
    arguments = parity.arguments_of(case, dtype, device)
    own: list[Contender] = []
    for name in dict.fromkeys(("gpu" if device.type == "cuda" else "cpu", "cpu")):
        # a path may take this operator but not these arguments: the call itself says so
        with contextlib.suppress(ValueError):
            choose(op, name, device, portable=module.PORTABLE, has_gpu=module.HAS_GPU)
            own.append(Contender(name, _bound(parity.operator(op), impl=name), arguments))
            _forward(own[-1])()
    contenders = [*own, *(c for c in peers(op, arguments, own[0].name) if _runs(op, c))]
    size = sum(t.nbytes for t in [*arguments.values(), *_forward(own[0])()] if isinstance(t, Tensor))
    probes = Machine.probes(device, dtype)
    for passes, work, moved in (("forward", _forward, size), ("forward+backward", _both, 3 * size)):
        with FlopCounterMode(display=False) as counter:
            work(own[0])()
        flops = float(counter.get_total_flops())
        calls = {c.name: work(c) for c in contenders if c.backward or passes == "forward"}
        timings = together({**probes, **calls}, device, budget=budget)
        machine = Machine.among(timings, device)
        for name in calls:
            yield Line(op, case.name, name, str(dtype)[6:], passes, timings[name], moved, flops, machine)


def _runs(op: str, contender: Contender) -> bool:
    """Whether another package's operator takes these arguments; if not, that is said, and it is left out."""
    try:
        _forward(contender)()
    except Exception as error:  # noqa: BLE001  (whatever it raises is not ours to mend)
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"{op}: {contender.name} left out: {type(error).__name__}: {reason}", RuntimeWarning, stacklevel=2
        )
        return False
    return True


def _bound(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda **arguments: function(**arguments, **options)


def _forward(contender: Contender) -> Callable[[], list[Tensor]]:
    def work() -> list[Tensor]:
        with torch.no_grad():
            return parity.outputs_of(contender.call(**contender.arguments))

    return work


def _both(contender: Contender) -> Callable[[], object]:
    names = parity.differentiable(contender.arguments)
    cotangents: list[Tensor] = []  # made in the first call: they are no part of the work
    tracked = contender.arguments | {n: contender.arguments[n].detach().requires_grad_() for n in names}

    def work() -> object:
        outputs = [t for t in parity.outputs_of(contender.call(**tracked)) if t.requires_grad]
        cotangents.extend(torch.ones_like(t) for t in outputs[len(cotangents) :])
        return torch.autograd.grad(outputs, [tracked[n] for n in names], cotangents, allow_unused=True)

    return work


def frame(lines: Iterable[Line], device: torch.device) -> pd.DataFrame:
    """One measurement a row, with hardware and versions."""
    rows = [
        {
            "op": line.op, "case": line.case, "implementation": line.implementation, "dtype": line.dtype,
            "pass": line.passes, **timing_columns(line.timing), "bytes": line.bytes, "flops": f"{line.flops:.0f}",
            "floor_seconds": f"{line.floor:.6g}", **machine_columns(device),
        }
        for line in lines
    ]  # fmt: skip
    return pd.DataFrame(rows)


def timing_columns(timing: Timing) -> dict[str, object]:
    """The columns of a CSV file that say how long something took."""
    times = {"seconds": timing.median, "low": timing.low, "high": timing.high}
    return {**{name: f"{value:.6g}" for name, value in times.items()}, "repeats": timing.repeats}


def machine_columns(device: torch.device) -> dict[str, object]:
    """The columns of a CSV file that say where and when something was measured."""
    known = environment.environment()
    hardware = known["gpu"] if device.type == "cuda" else known["cpu"]
    commit, date = known["commit"]["hash"][:12], datetime.now(UTC).date().isoformat()
    return {"device": hardware, "torch": torch.__version__, "commit": commit, "date": date}


def write(rows: pd.DataFrame, name: str, root: Path) -> Path:
    """Write the CSV as `<root>/bench/<name>.csv`. Raises UserError where that is not possible."""
    path = root / "bench" / f"{name}.csv"
    try:
        with files.atomic(path) as temporary:
            rows.to_csv(temporary, index=False, lineterminator="\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path
