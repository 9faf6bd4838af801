"""Efficiency of an encoder, cell by cell: work, speed and memory at one length, each cell in a fresh process.

A cell is one file (`Cell.path`: machine, threads, dtype, architecture and shape), so a profile that was interrupted
goes on where it was, and no machine overwrites the cells of another. Memory is what one training step needs in all: on
CUDA what the allocator counted; on a CPU the process's high-water mark above where it stood, after a short step that
loads and compiles everything, plus the parameters and the optimiser's state that were there by then.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.encoder import Encoder
from lra.errors import UserError
from lra.model import Batch, Classifier
from lra.profiling import flops, memory, timing
from lra.profiling.peak import peak_rate
from lra.profiling.timing import measure, together
from lra.registry import architectures
from lra.results import environment
from lra.results import profile as stored
from lra.results.profile import (
    Cell,
    EncoderWork,
    FailedProfile,
    MachinePeak,
    Profile,
    StepMemory,
    Timing,
    Timings,
    agreed,
    machine_name,
)
from lra.results.record import Environment
from lra.task import Protocol

BYTES, CLASSES, SHORT = 256, 2, 64
ROUNDS = 5
"""Times a cell is timed at most."""
LONGEST_STEP = 30.0
"""Seconds: lengths at which a training step is expected to take longer are not tried."""


def profile(
    cells: Iterable[Cell], root: Path, *, timeout: float = 600.0, fresh: bool = False, rounds: int = ROUNDS,
    patience: float = math.inf, on_cell: Callable[[Cell, int, int], None] = lambda *_: None,
) -> list[Profile | FailedProfile]:  # fmt: skip
    """Measure each cell in a process of its own, or read it from its file.

    A cell that fails keeps its reason, and longer ones of its architecture are not tried. Nor are those at which a step
    would take more than LONGEST_STEP, as far as the shorter cells before them tell.

    Other work on a machine, and its neighbours, make whole seconds slow. So every cell is timed again after all the
    others, and once more, up to `rounds` in all, until its two fastest rounds agree; the fastest is what is reported.
    patience: seconds after which nothing is timed a third time. on_cell: called with the cell, how many measurements
    are done, and how many there are in all so far.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    about = msgspec.convert(environment.environment(), Environment)
    entries = [_Entry(cell, root, here, about) for cell in cells]
    failed: dict[tuple[object, ...], int] = {}
    steps: dict[tuple[object, ...], dict[int, float]] = {}
    done, total, end = 0, len(entries), time.monotonic() + patience
    for number in range(1, rounds + 1):
        due = [entry for entry in entries if number == 1 or not entry.settled(rounds)]
        total = done + len(due) if number > 1 else total
        for entry in due:
            if number > 2 and time.monotonic() > end:
                break
            cell = entry.cell
            on_cell(cell, done, total)
            done += 1
            if number > 1:
                entry.time_again(in_process(measure_times, cell, here, timeout))
                continue
            family = (cell.architecture, cell.batch, cell.d_model, cell.n_layers, cell.direction, cell.task, cell.dtype)
            known = steps.setdefault(family, {})
            expected = expected_step(known, cell.length)
            if not fresh and entry.read():
                pass
            elif expected > LONGEST_STEP:
                entry.skip(f"a training step would take about {expected:.0f} s")
            elif failed.get(family, cell.length) < cell.length:
                entry.skip(f"failed at {failed[family]:,}")
            else:
                entry.write_first(in_process(measure_cell, cell, here, timeout))
            if isinstance(entry.profile, Profile):
                known[cell.length] = entry.profile.seconds.train.median
            else:
                failed[family] = min(failed.get(family, cell.length), cell.length)
    return [entry.profile for entry in entries]


def expected_step(known: dict[int, float], length: int) -> float:
    """Seconds of a training step at `length`, by the power law through the two longest lengths below it (a line through
    the origin for a single one); 0 if there is none. known: length -> seconds."""
    shorter = sorted(n for n in known if n < length)[-2:]
    if not shorter:
        return 0.0
    power = 1.0
    if len(shorter) == 2:
        power = max(math.log(known[shorter[1]] / known[shorter[0]]) / math.log(shorter[1] / shorter[0]), 0.0)
    return known[shorter[-1]] * (length / shorter[-1]) ** power


class _Entry:
    """A cell and what its file holds."""

    def __init__(self, cell: Cell, root: Path, here: str, about: Environment) -> None:
        self.cell, self.about = cell, about
        self.path = cell.path(root, machine_name(about))
        self.sources = (self.path, cell.earlier_path(root, here))
        self.profile: Profile | FailedProfile = self._failed("not measured")

    def read(self) -> bool:
        """Whether a file holds this cell, measured on this machine with the same number of threads."""
        for path in self.sources:
            try:
                profile = stored.read(path)
            except UserError:
                continue
            if profile.cell != self.cell or machine_name(profile.environment) != machine_name(self.about):
                continue
            if isinstance(profile, Profile) and profile.mfu > 1:
                continue
            self.profile = profile
            return True
        return False

    def skip(self, why: str) -> None:
        """Mark the cell as not tried. Nothing is written, so a later call may try it."""
        self.profile = self._failed(f"not tried: {why}")

    def write_first(self, measured: dict[str, Any]) -> None:
        """Store the first measurement of a cell, or why it failed."""
        if "failed" in measured:
            self.profile = self._failed(measured["failed"])
        else:
            self.profile = self._rated(Profile(
                cell=self.cell, environment=self.about, parameters=measured["parameters"],
                flops=EncoderWork(**measured["flops"]), seconds=_timings(measured["seconds"]),
                memory=StepMemory(**measured["memory"]), machine=MachinePeak(**measured["machine"]),
                rounds=(_medians(measured["seconds"]),), conditions=measured.get("conditions", {}),
                tokens_per_second=0.0, mfu=0.0,
            ))  # fmt: skip
        stored.write(self.profile, self.path)

    def time_again(self, measured: dict[str, Any]) -> None:
        """Add a round of timings; one that fails counts as a round without any."""
        profile = self.profile
        assert isinstance(profile, Profile)
        if "failed" in measured:
            self.profile = msgspec.structs.replace(profile, rounds=(*profile.rounds, {}))
        else:
            now = dict(_timings(measured["seconds"]).items())
            fastest = {name: min(best, now[name], key=lambda t: t.median) for name, best in profile.seconds.items()}
            rate = max(profile.machine.rate, measured["machine"]["rate"])
            self.profile = self._rated(msgspec.structs.replace(
                profile, rounds=(*profile.rounds, _medians(measured["seconds"])), seconds=Timings(**fastest),
                machine=msgspec.structs.replace(profile.machine, rate=rate),
            ))  # fmt: skip
        stored.write(self.profile, self.path)

    def settled(self, rounds: int) -> bool:
        """Whether each timing's two fastest rounds agree, or there will be no more rounds."""
        profile = self.profile
        return isinstance(profile, FailedProfile) or len(profile.rounds) >= rounds or agreed(profile.rounds)

    def _failed(self, why: str) -> FailedProfile:
        return FailedProfile(cell=self.cell, environment=self.about, failed=why)

    def _rated(self, profile: Profile) -> Profile | FailedProfile:
        """With speeds and utilisation; a utilisation above 1 fails the cell, since work or time must be wrong."""
        step, peak = profile.seconds.train.median, profile.machine.rate
        work = self.cell.batch * profile.flops.forward_backward
        if work / step > peak:
            share, counted = 100 * work / step / peak, f"{work / 1e9:.3g} GFLOP counted in {1e3 * step:.3g} ms"
            return self._failed(
                f"utilisation of {share:.0f} %: {counted}, "
                f"the fastest matrix product reaches {peak / 1e9:.3g} GFLOP/s; the count or the timing is wrong"
            )
        return msgspec.structs.replace(
            profile, examples_per_second=self.cell.batch / step,
            tokens_per_second=self.cell.batch * self.cell.length / step, flops_per_second=work / step,
            mfu=work / step / peak,
        )  # fmt: skip


def _timings(seconds: dict[str, Any]) -> Timings:
    return Timings(**{name: Timing(**timing) for name, timing in seconds.items()})


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


class Workload:
    """The model of a cell, its optimiser and its inputs."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        torch.manual_seed(0)
        constructor = architectures.get(cell.architecture)
        shape: dict[str, Any] = {"d_model": cell.d_model, "n_layers": cell.n_layers, "length": cell.length}
        if "direction" in constructor.options():
            shape["direction"] = cell.direction
        self.cell, self.device, self.dtype = cell, device, getattr(torch, cell.dtype)
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

    def precision(self) -> Any:
        """Autocast to the cell's dtype; nothing for float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def forward(self, given: tuple[Any, ...]) -> None:
        with torch.no_grad(), self.precision():
            self.model(*given)

    def train(self, given: tuple[Any, ...]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            output = self.model(*given)
            loss = F.cross_entropy(output, given[0].labels) if self.cell.task else output.float().square().mean()
            extra = self.encoder.aux_loss()
        (loss if extra is None else loss + extra).backward()
        self.optimizer.step()

    def products(self) -> list[tuple[int, int, int]]:
        """Shapes (m, k, n) of its usual matrix products: tokens by width, to the same and to four times the width."""
        tokens, width = self.cell.batch * self.cell.length, self.cell.d_model
        return [(tokens, width, width), (tokens, width, 4 * width), (tokens, 4 * width, width)]


def measure_memory(cell: Cell, device: torch.device) -> dict[str, Any]:
    """`memory_of` the workload of a cell."""
    return memory_of(Workload(cell, device))


def memory_of(workload: Workload) -> dict[str, Any]:
    """Peak memory of a training step in this process, which must be fresh, and the sizes of its parts."""
    # compiles, loads libraries and fills the optimiser's state, at a length that needs little memory
    workload.train(workload.inputs(min(SHORT, workload.cell.length)))
    workload.optimizer.zero_grad(set_to_none=True)
    given = workload.inputs(workload.cell.length)
    state = (v for s in workload.optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    sizes = {"parameters": _bytes(workload.model.parameters()), "optimiser": _bytes(state)}
    peak = memory.Peak(workload.device)
    workload.train(given)
    used = peak.read()
    sizes["gradients"] = _bytes(p.grad for p in workload.model.parameters())
    if str(used["method"]).startswith("process high-water"):
        used["peak_bytes"] = int(used["peak_bytes"]) + sizes["parameters"] + sizes["optimiser"]
    return used | sizes | {"activations": max(int(used["peak_bytes"]) - sum(sizes.values()), 0)}


def measure_cell(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Work, speed and memory of one cell in this process."""
    workload = Workload(cell, device)
    sizes = memory_of(workload)
    given = workload.inputs(cell.length)
    # for the whole batch, because some work is done once for it; reported for one sequence
    work, size = flops.count(workload.model, *given), cell.batch
    try:
        declared: float | None = work.declared(workload.model.cost(cell.length).of_batch(size))  # type: ignore[operator]
    except NotImplementedError:
        declared = None
    return {
        "parameters": sum(p.numel() for p in workload.model.parameters()),
        "flops": {
            "forward": work.forward / size, "algorithmic": work.algorithmic / size,
            "forward_backward": work.forward_backward / size, "matmul_counted": (work.products + work.kernels) / size,
            "matmul_by_formula": None if declared is None else declared / size,
            "uncounted": tuple(sorted(work.uncounted)), "counted_on": work.device,
        },
        **_times(workload, given),
        "memory": sizes,
        "conditions": timing.conditions(device),
    }  # fmt: skip


def measure_times(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Speed alone, in this process."""
    workload = Workload(cell, device)
    return _times(workload, workload.inputs(cell.length))


def _times(workload: Workload, given: tuple[Any, ...]) -> dict[str, Any]:
    """Timings, and the rate of matrix products around them. A forward pass that seems slower than the whole step was
    disturbed, and both are timed once more."""
    memory.keep_freed()
    device, budget = workload.device, workload.cell.budget
    if workload.dtype == torch.float32 and device.type == "cuda":
        # TensorFloat-32, cuDNN's default, is another arithmetic with another peak
        torch.backends.cudnn.allow_tf32 = False
    calls = {"forward": lambda: workload.forward(given), "train": lambda: workload.train(given)}
    rate = peak_rate(workload.products(), device, workload.dtype)
    timed = together(calls, device, budget=budget)
    if timed["forward"].median > timed["train"].median:
        again = together(calls, device, budget=budget)
        timed = {name: min(t, again[name], key=lambda t: t.median) for name, t in timed.items()}
    if (decode := _decode(workload)) is not None:
        timed["step"] = decode
    rate = max(rate, peak_rate(workload.products(), device, workload.dtype))
    return {"seconds": {name: msgspec.structs.asdict(t) for name, t in timed.items()}, "machine": {"rate": rate}}


def first_of(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first example of a batch; an encoder's input with a gradient, as it has inside a model."""
    if isinstance(given[0], Batch):
        return (Batch(*(t[:1] for t in given[0])),)
    return given[0][:1].clone().requires_grad_(), given[1][:1]


def _decode(workload: Workload) -> Timing | None:
    """Time of one recurrent step, where this instance has any."""
    try:
        state = workload.encoder.init_state(workload.cell.batch)
    except NotImplementedError:
        return None
    token = torch.randn(workload.cell.batch, workload.cell.d_model, device=workload.device)

    def step() -> None:
        with torch.no_grad():
            workload.encoder.step(token, state)

    return measure(step, workload.device, budget=workload.cell.budget / 3)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
