"""How fast each operator runs, beside what the machine could do and beside other packages, all in one process.

Floors are measured in the same run: the bandwidth of an element-wise sum and the rate of a square matrix product. An
operator's own floor is the larger of its bytes (arguments, outputs, and gradients where there are any) over that
bandwidth and its FLOPs over that rate.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lra import parity, result
from lra.errors import UserError, unknown
from lra.kernels._case import Case
from lra.kernels._dispatch import choose
from lra.timing import Timing, measure

FIELDS = (
    "op", "case", "implementation", "pass", "seconds", "low", "high", "repeats", "bytes", "flops", "floor_seconds",
    "device", "torch", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One measurement. passes: "forward" or "forward+backward"; floor: seconds the machine would need at least."""

    op: str
    case: str
    implementation: str
    passes: str
    timing: Timing
    bytes: int
    flops: float
    floor: float


@dataclass(frozen=True)
class Machine:
    """bandwidth in bytes/s of c = a + b on 32 MiB tensors; rate in FLOP/s of a 1024 x 1024 float32 product."""

    bandwidth: float
    rate: float

    @classmethod
    def measured(cls, device: torch.device) -> Machine:
        a, b = (torch.rand(2**23, device=device) for _ in range(2))
        c = torch.empty_like(a)
        copy = measure(lambda: torch.add(a, b, out=c), device, budget=2.0)
        m, n = (torch.rand(1024, 1024, device=device) for _ in range(2))
        out = torch.empty_like(m)
        product = measure(lambda: torch.mm(m, n, out=out), device, budget=2.0)
        return cls(3 * a.nbytes / copy.median, 2 * 1024**3 / product.median)


def bench(
    ops: Iterable[str], device: torch.device, *, budget: float = 10.0, seen: Callable[[str], None] = lambda _: None
) -> tuple[Machine, Iterator[Line]]:
    """The machine, and the measurements one by one. Raises UserError for an unknown operator."""
    chosen = list(ops)
    for op in chosen:
        if op not in parity.operators():
            raise unknown("operator", op, parity.operators())
    machine = Machine.measured(device)

    def lines() -> Iterator[Line]:
        for op in chosen:
            for case in parity.cases_of(op, "bench"):
                seen(f"{op} {case.name}")
                yield from _case(op, case, device, machine, budget)

    return machine, lines()


def _case(op: str, case: Case, device: torch.device, machine: Machine, budget: float) -> Iterator[Line]:
    module = importlib.import_module(f"lra.kernels.{op}")
    arguments = parity.arguments_of(case, torch.float32, device)
    own = "gpu" if device.type == "cuda" else "cpu"
    for name in dict.fromkeys((own, "cpu")):
        try:
            choose(op, name, device, portable=module.PORTABLE, has_gpu=module.HAS_GPU)
        except ValueError:
            continue
        yield from _both(
            op, case.name, name, _bound(parity.operator(op), impl=name), arguments, device, machine, budget
        )
    for name, call in peers(op):
        yield from _both(op, case.name, name, call, arguments, device, machine, budget)


def _bound(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda **arguments: function(**arguments, **options)


def _both(
    op: str, case: str, name: str, call: Callable[..., Any], arguments: dict[str, Any], device: torch.device,
    machine: Machine, budget: float,
) -> Iterator[Line]:  # fmt: skip
    names = parity.differentiable(arguments)
    tracked = arguments | {n: arguments[n].detach().requires_grad_() for n in names}

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return parity.outputs_of(call(**arguments))

    def both() -> None:
        outputs = [t for t in parity.outputs_of(call(**tracked)) if t.requires_grad]
        torch.autograd.grad(
            outputs, [tracked[n] for n in names], [torch.ones_like(t) for t in outputs], allow_unused=True
        )

    size = sum(t.nbytes for t in [*arguments.values(), *forward()] if isinstance(t, Tensor))
    for passes, work, moved in (("forward", forward, size), ("forward+backward", both, 3 * size)):
        with FlopCounterMode(display=False) as counter:
            work()
        flops = float(counter.get_total_flops())
        floor = max(moved / machine.bandwidth, flops / machine.rate)
        yield Line(op, case, name, passes, measure(work, device, budget=budget), moved, flops, floor)


def peers(op: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The same operation by other packages, where they are installed, taking our arguments."""
    if op == "linear_scan" and find_spec("mambapy"):
        pscan = importlib.import_module("mambapy.pscan").pscan

        def mambapy(a: Tensor, b: Tensor, **_: Any) -> Tensor:
            # (B, L, D, N) there; it writes into its arguments
            return pscan(a.unsqueeze(-1).clone(), b.unsqueeze(-1).clone()).squeeze(-1)

        yield "mambapy", mambapy
    if op == "selective_scan" and find_spec("mambapy"):
        pscan = importlib.import_module("mambapy.pscan").pscan

        def scan(
            u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, **_: Any
        ) -> Tensor:
            step = torch.exp(delta.unsqueeze(-1) * A)
            h = pscan(step, (delta * u).unsqueeze(-1) * B.unsqueeze(2))
            y = (h @ C.unsqueeze(-1)).squeeze(-1)
            return y if D is None else y + D * u

        yield "mambapy", scan


def table_csv(lines: Iterable[Line], device: torch.device) -> str:
    """Long format, one measurement a row, with hardware and versions."""
    known = result.environment()
    hardware = known.get("gpu") if device.type == "cuda" else known["cpu"]
    tail = [hardware, torch.__version__, known["commit"]["hash"][:12], datetime.now(UTC).date().isoformat()]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for x in lines:
        times = [f"{s:.6g}" for s in (x.timing.median, x.timing.low, x.timing.high)]
        writer.writerow(
            [x.op, x.case, x.implementation, x.passes, *times, x.timing.repeats, x.bytes, f"{x.flops:.0f}",
             f"{x.floor:.6g}", *tail]
        )  # fmt: skip
    return out.getvalue()


def write(lines: Iterable[Line], device: torch.device, root: Path) -> Path:
    """Write the CSV as `<root>/bench/<device type>.csv`. Raises UserError where that is not possible."""
    path = root / "bench" / f"{device.type}.csv"
    try:
        with result.atomic(path) as temporary:
            temporary.write_text(table_csv(lines, device), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path
