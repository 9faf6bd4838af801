"""Times of the operators, compared with the limits of the machine and with other packages, in one process.

The limits are the bandwidth of an element-wise sum and the FLOP rate of a square matrix product. The floor of an
operator is the larger of its bytes (arguments, outputs and gradients) over the bandwidth and its FLOPs over the rate;
other packages are compared with the same floor. Limits and implementations are timed in turns, so that other load on
the machine affects all of them alike.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
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
class Measurement:
    """One measurement of an implementation on a case.

    passes: "forward" or "forward+backward"; bytes, flops: the work of the operator, whatever the implementation does;
    machine: limits measured in the same turns.
    """

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
        """Seconds that the operator takes at least on this machine."""
        return max(self.bytes / self.machine.bandwidth, self.flops / self.machine.rate)


@dataclass(frozen=True)
class Contender:
    """An implementation and its arguments. backward: also time the backward pass."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    backward: bool = True


Peers = Callable[[str, dict[str, Any], str], Iterable[Contender]]
"""peers(op, arguments, own): other packages' implementations of `op`, compared with our implementation `own`."""


def no_peers(op: str, arguments: dict[str, Any], own: str) -> Iterable[Contender]:
    """Compare with no other package."""
    return ()


def bench(
    ops: Iterable[str], device: torch.device, *, budget: float = 10.0, peers: Peers = no_peers,
    on_case: Callable[[str], None] = lambda _: None,
) -> Iterator[Measurement]:  # fmt: skip
    """Measure operators, case by case.

    budget: seconds per measurement; peers: implementations of other packages; on_case: called with the name of each
    case before it is measured. Raises UserError for an unknown operator.
    """
    names = list(ops)
    for op in names:
        if op not in parity.operators():
            raise unknown("operator", op, parity.operators())
    memory.keep_freed()
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    cases = [(op, case, dtype) for op in names for case in parity.cases_of(op, "bench") for dtype in dtypes]

    # a generator of its own: an unknown operator is reported at the call
    def measurements() -> Iterator[Measurement]:
        for number, (op, case, dtype) in enumerate(cases, start=1):
            on_case(f"{number} of {len(cases)}: {op} {case.name}")
            yield from measure_case(op, case, dtype, device, budget, peers)

    return measurements()


def measure_case(
    op: str, case: Case, dtype: torch.dtype, device: torch.device, budget: float, peers: Peers
) -> Iterator[Measurement]:
    """Measure our implementations of one case and those of other packages, forward and with the backward pass."""
    module = importlib.import_module(f"lra.kernels.{op}")
    arguments = parity.arguments_of(case, dtype, device)
    own: list[Contender] = []
    for name in dict.fromkeys(("gpu" if device.type == "cuda" else "cpu", "cpu")):
        # an implementation may reject these arguments: then the call raises ValueError
        with contextlib.suppress(ValueError):
            choose(op, name, device, portable=module.PORTABLE, has_gpu=module.HAS_GPU)
            own.append(Contender(name, partial(parity.operator(op), impl=name), arguments))
            forward(own[-1])()
    contenders = [*own, *(c for c in peers(op, arguments, own[0].name) if _supports(op, c))]
    size = sum(t.nbytes for t in [*arguments.values(), *forward(own[0])()] if isinstance(t, Tensor))
    probes = Machine.probes(device, dtype)
    for passes, bind, moved in (("forward", forward, size), ("forward+backward", forward_backward, 3 * size)):
        with FlopCounterMode(display=False) as counter:
            bind(own[0])()
        flops = float(counter.get_total_flops())
        calls = {c.name: bind(c) for c in contenders if c.backward or passes == "forward"}
        timings = together({**probes, **calls}, device, budget=budget)
        machine = Machine.among(timings, device)
        for name in calls:
            yield Measurement(op, case.name, name, str(dtype)[6:], passes, timings[name], moved, flops, machine)


def _supports(op: str, contender: Contender) -> bool:
    """Whether another package's operator runs with these arguments. Warns if it does not."""
    try:
        forward(contender)()
    except Exception as error:  # noqa: BLE001  (another package may raise anything)
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"{op}: {contender.name} is left out: {type(error).__name__}: {reason}", RuntimeWarning, stacklevel=2
        )
        return False
    return True


def forward(contender: Contender) -> Callable[[], list[Tensor]]:
    """A call of the forward pass."""

    def call() -> list[Tensor]:
        with torch.no_grad():
            return parity.outputs_of(contender.call(**contender.arguments))

    return call


def forward_backward(contender: Contender) -> Callable[[], object]:
    """A call of both passes."""
    names = parity.differentiable(contender.arguments)
    cotangents: list[Tensor] = []  # created in the first call, which is not timed
    tracked = contender.arguments | {n: contender.arguments[n].detach().requires_grad_() for n in names}

    def call() -> object:
        outputs = [t for t in parity.outputs_of(contender.call(**tracked)) if t.requires_grad]
        cotangents.extend(torch.ones_like(t) for t in outputs[len(cotangents) :])
        return torch.autograd.grad(outputs, [tracked[n] for n in names], cotangents, allow_unused=True)

    return call


def to_frame(measurements: Iterable[Measurement], device: torch.device) -> pd.DataFrame:
    """A data frame with one row per measurement, with hardware and versions."""
    rows = [
        {
            "op": m.op, "case": m.case, "implementation": m.implementation, "dtype": m.dtype, "pass": m.passes,
            **timing_columns(m.timing), "bytes": m.bytes, "flops": f"{m.flops:.0f}",
            "floor_seconds": f"{m.floor:.6g}", **machine_columns(device),
        }
        for m in measurements
    ]  # fmt: skip
    return pd.DataFrame(rows)


def timing_columns(timing: Timing) -> dict[str, object]:
    """CSV columns of a timing: median, quartiles and number of repeats."""
    times = {"seconds": timing.median, "low": timing.low, "high": timing.high}
    return {**{name: f"{value:.6g}" for name, value in times.items()}, "repeats": timing.repeats}


def machine_columns(device: torch.device) -> dict[str, object]:
    """CSV columns of hardware, torch version, commit and date."""
    machine = environment.environment()
    hardware = machine["gpu"] if device.type == "cuda" else machine["cpu"]
    commit, date = machine["commit"]["hash"][:12], datetime.now(UTC).date().isoformat()
    return {"device": hardware, "torch": torch.__version__, "commit": commit, "date": date}


def write_csv(rows: pd.DataFrame, name: str, root: Path) -> Path:
    """Write `<root>/bench/<name>.csv` and return its path. Raises UserError if it cannot be written."""
    path = root / "bench" / f"{name}.csv"
    try:
        with files.atomic(path) as temporary:
            rows.to_csv(temporary, index=False, lineterminator="\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path
