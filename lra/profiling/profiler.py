"""Efficiency of an encoder, cell by cell: work, speed and memory at one length, each cell in a fresh process.

A cell is one file, `<results>/profile/<device>/<architecture>-d<D>-n<layers>-b<B>-l<L>-<direction>.json`, so a report
that was interrupted goes on where it was. Memory is what one training step needs in all: on CUDA what the allocator
counted; on a CPU the process's high-water mark above where it stood, after a short step that loads and compiles
everything, plus the parameters and the optimiser's state that were there by then.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra import files
from lra.encoder import Encoder
from lra.model import Batch, Classifier
from lra.profiling import flops, memory, timing
from lra.profiling.peak import Machine
from lra.profiling.timing import Timing, measure
from lra.registry import architectures
from lra.reports.efficiency import agreed
from lra.results import environment, profiles, result
from lra.task import Protocol

BYTES, CLASSES, SHORT = 256, 2, 64
ROUNDS = 5
"""Times a cell is timed at most."""


@dataclass(frozen=True)
class Cell:
    """What is measured: an architecture at one shape. task: "" for the encoder alone, "bytes" for a classifier of
    byte sequences into two classes around it; budget: seconds for each timing."""

    architecture: str
    length: int
    batch: int = 1
    d_model: int = 128
    n_layers: int = 4
    direction: str = "bidirectional"
    budget: float = 3.0
    task: str = ""

    def path(self, root: Path, device: str) -> Path:
        task = f"-{self.task}" if self.task else ""
        shape = f"d{self.d_model}-n{self.n_layers}-b{self.batch}-l{self.length}-{self.direction}{task}"
        return root / "profile" / device / f"{result.slug(self.architecture)}-{shape}.json"


def profile(
    cells: Iterable[Cell], root: Path, *, timeout: float = 300.0, fresh: bool = False, rounds: int = ROUNDS,
    patience: float = math.inf, seen: Callable[[Cell, int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure each cell in a process of its own, or take it from its file; a cell that fails says why and is kept, and
    longer ones of its architecture are not tried.

    What else a machine does, and its neighbours, makes whole seconds slow. So every cell is timed again after all the
    others, and once more, up to `rounds` in all, until its two fastest rounds agree; the fastest is what is reported.
    patience: seconds after which nothing is timed a third time. seen: called with the cell, how many measurements are
    done, and how many there are in all so far.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    found = [_Kept(cell, cell.path(root, here)) for cell in cells]
    machine: Machine | None = None
    failed: dict[tuple[object, ...], int] = {}
    done, total, end = 0, len(found), time.monotonic() + patience
    for number in range(1, rounds + 1):
        due = [kept for kept in found if number == 1 or not kept.settled(rounds)]
        total = done + len(due) if number > 1 else total
        for kept in due:
            if number > 2 and time.monotonic() > end:
                break
            cell = kept.cell
            seen(cell, done, total)
            done += 1
            line = (cell.architecture, cell.batch, cell.d_model, cell.n_layers, cell.direction, cell.task)
            if number == 1 and not fresh and kept.read():
                pass
            elif failed.get(line, cell.length) < cell.length:
                kept.record = {"cell": asdict(cell), "failed": f"not tried: failed at {failed[line]:,}"}
                kept.record |= {"environment": environment.environment()}
            elif number == 1:
                machine = machine or Machine.measured(torch.device(here))
                kept.first(in_process(measure_cell, cell, here, timeout), machine)
            else:
                kept.again(in_process(measure_times, cell, here, timeout))
            if "failed" in kept.record:
                failed[line] = min(failed.get(line, cell.length), cell.length)
    return [kept.record for kept in found]


class _Kept:
    """A cell and what its file holds."""

    def __init__(self, cell: Cell, path: Path) -> None:
        self.cell, self.path = cell, path
        self.record: dict[str, Any] = {}

    def read(self) -> bool:
        """Whether the file holds this very cell, measured with as many threads."""
        content = profiles.read(self.path)
        if profiles.problem(content) or content["cell"] != asdict(self.cell):
            return False
        if content["environment"].get("threads") != torch.get_num_threads():
            return False
        self.record = content
        return True

    def first(self, measured: dict[str, Any], machine: Machine) -> None:
        self.record = {"cell": asdict(self.cell), **measured, "environment": environment.environment()}
        if "failed" not in measured:
            self.record |= {"machine": asdict(machine), "rounds": [_medians(measured["seconds"])]}
            self._rated()
        self._write()

    def again(self, measured: dict[str, Any]) -> None:
        """Another round of timings; one that fails counts as a round that says nothing."""
        self.record["rounds"].append({} if "failed" in measured else _medians(measured))
        for name, now in ({} if "failed" in measured else measured).items():
            self.record["seconds"][name] = min(self.record["seconds"][name], now, key=lambda t: t["median"])
        self._rated()
        self._write()

    def settled(self, rounds: int) -> bool:
        """Whether each timing's two fastest rounds agree, or there will be no more rounds."""
        return "failed" in self.record or len(self.record["rounds"]) >= rounds or agreed(self.record["rounds"])

    def _rated(self) -> None:
        step = self.record["seconds"]["train"]["median"]
        rate = self.cell.batch * self.record["flops"]["forward_backward"] / step
        self.record |= {
            "examples_per_second": self.cell.batch / step,
            "tokens_per_second": self.cell.batch * self.cell.length / step,
            "flops_per_second": rate, "mfu": rate / self.record["machine"]["rate"],
        }  # fmt: skip

    def _write(self) -> None:
        with files.atomic(self.path) as temporary:
            temporary.write_text(json.dumps(self.record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _medians(seconds: dict[str, Any]) -> dict[str, float]:
    return {name: timing["median"] for name, timing in seconds.items()}


def in_process(
    work: Callable[[Cell, torch.device], dict[str, Any]], cell: Cell, device: str, timeout: float, limit: int = 0
) -> dict[str, Any]:
    """work(cell, device) in a fresh process, or {"failed": why}. limit: bytes it may take in all, 0 for no limit."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lra.profiling.profiler"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, work, cell, device, limit))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            return {"failed": f"took longer than {timeout:.0f} s"}
        answer: dict[str, Any] = ours.recv()
        return answer
    except EOFError:
        process.join(10)
        killed = process.exitcode in (-9, 137)
        return {"failed": "out of memory" if killed else f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _child(pipe: Any, work: Callable[..., dict[str, Any]], cell: Cell, device: str, limit: int) -> None:
    if limit and device == "cpu":
        resource.setrlimit(resource.RLIMIT_AS, (limit + memory.status("VmSize"),) * 2)
    elif limit:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    try:
        pipe.send(work(cell, torch.device(device)))
    except (torch.OutOfMemoryError, MemoryError):
        pipe.send({"failed": "out of memory"})
    except Exception as error:  # noqa: BLE001  (one cell never ends the report)
        text = str(error)
        failed = "out of memory" if "can't allocate memory" in text else f"{type(error).__name__}: {text[:200]}"
        pipe.send({"failed": failed})


class Subject:
    """A model of a cell, its optimiser and what it is fed."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        torch.manual_seed(0)
        constructor = architectures.get(cell.architecture)
        shape: dict[str, Any] = {"d_model": cell.d_model, "n_layers": cell.n_layers, "length": cell.length}
        if "direction" in constructor.options():
            shape["direction"] = cell.direction
        self.cell, self.device = cell, device
        self.encoder: Encoder = constructor(**shape).to(device)
        self.model: nn.Module = self.encoder
        if cell.task:
            protocol = Protocol("bytes", cell.length, vocabulary=BYTES)
            self.model = Classifier(self.encoder, protocol, CLASSES, 1, "mean").to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def inputs(self, length: int) -> tuple[Any, ...]:
        cell, device = self.cell, self.device
        mask = torch.ones(cell.batch, length, dtype=torch.bool, device=device)
        if not cell.task:
            return torch.randn(cell.batch, length, cell.d_model, device=device), mask
        values = torch.randint(BYTES, (cell.batch, 1, length), device=device, dtype=torch.uint8)
        labels = torch.arange(cell.batch, device=device)
        return (Batch(values, mask.unsqueeze(1), labels % CLASSES, labels),)

    def train(self, given: tuple[Any, ...]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        found = self.model(*given)
        loss = F.cross_entropy(found, given[0].labels) if self.cell.task else found.float().square().mean()
        extra = self.encoder.aux_loss()
        (loss if extra is None else loss + extra).backward()
        self.optimizer.step()


def measure_memory(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Bytes a training step takes in this process, which has to be fresh, and what for."""
    return _memory(Subject(cell, device))


def _memory(subject: Subject) -> dict[str, Any]:
    # compiles, loads libraries and fills the optimiser's state, at a length that takes no memory to speak of
    subject.train(subject.inputs(min(SHORT, subject.cell.length)))
    subject.optimizer.zero_grad(set_to_none=True)
    given = subject.inputs(subject.cell.length)
    state = (v for s in subject.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    sizes = {"parameters": _bytes(subject.model.parameters()), "optimiser": _bytes(state)}
    peak = memory.Peak(subject.device)
    subject.train(given)
    used = peak.read()
    sizes["gradients"] = _bytes(p.grad for p in subject.model.parameters())
    if str(used["method"]).startswith("process high-water"):
        used["peak_bytes"] = int(used["peak_bytes"]) + sizes["parameters"] + sizes["optimiser"]
    return used | sizes | {"activations": max(int(used["peak_bytes"]) - sum(sizes.values()), 0)}


def measure_cell(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Work, speed and memory of one cell in this process."""
    subject = Subject(cell, device)
    sizes = _memory(subject)
    given = subject.inputs(cell.length)
    # for the whole batch, because some work is done once for it; reported for one sequence
    work, size = flops.count(subject.model, *given), cell.batch
    try:
        declared: float | None = subject.model.cost(cell.length).of_batch(size).matmul  # type: ignore[operator]
    except NotImplementedError:
        declared = None
    products = work.matmul if declared is None else work.counterpart(declared)

    return {
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "flops": {
            "forward": work.forward / size, "algorithmic": work.algorithmic / size,
            "forward_backward": work.forward_backward / size, "matmul_counted": products / size,
            "matmul_by_formula": None if declared is None else declared / size,
            "uncounted": sorted(work.uncounted), "counted_on": work.device,
        },
        "seconds": _times(subject, given),
        "memory": sizes,
        "conditions": timing.conditions(device),
    }  # fmt: skip


def measure_times(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Speed alone, in this process."""
    subject = Subject(cell, device)
    return _times(subject, subject.inputs(cell.length))


def _times(subject: Subject, given: tuple[Any, ...]) -> dict[str, Any]:
    memory.keep_freed()
    device, budget = subject.device, subject.cell.budget

    def forward() -> None:
        with torch.no_grad():
            subject.model(*given)

    timed = {
        "forward": measure(forward, device, budget=budget),
        "train": measure(lambda: subject.train(given), device, budget=budget),
    }
    if (decode := _decode(subject)) is not None:
        timed["step"] = decode
    return {name: asdict(t) for name, t in timed.items()}


def first_of(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first example of a batch; an encoder's input with a gradient, as it has inside a model."""
    if isinstance(given[0], Batch):
        return (Batch(*(t[:1] for t in given[0])),)
    return given[0][:1].clone().requires_grad_(), given[1][:1]


def _decode(subject: Subject) -> Timing | None:
    """Time of one recurrent step, where this instance has any."""
    try:
        state = subject.encoder.init_state(subject.cell.batch)
    except NotImplementedError:
        return None
    token = torch.randn(subject.cell.batch, subject.cell.d_model, device=subject.device)

    def step() -> None:
        with torch.no_grad():
            subject.encoder.step(token, state)

    return measure(step, subject.device, budget=subject.cell.budget / 3)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
