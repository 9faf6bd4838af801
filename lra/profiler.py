"""Efficiency of an encoder, cell by cell: work, speed and memory at one length, each cell in a fresh process.

A cell is one file, `<results>/profile/<device>/<architecture>-d<D>-n<layers>-b<B>-l<L>.json`, so a report that was
interrupted goes on where it was. Peak memory on a CPU is the process's own high-water mark above what the imported
libraries and the built model take; on CUDA it is what the allocator counted.
"""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lra import flops, memory, result
from lra.errors import UserError
from lra.registry import architectures
from lra.timing import Timing, measure

LENGTHS = (1024, 4096)


@dataclass(frozen=True)
class Cell:
    """What is measured: an architecture at one shape. budget: seconds for each timing."""

    architecture: str
    length: int
    batch: int = 1
    d_model: int = 128
    n_layers: int = 4
    direction: str = "bidirectional"
    budget: float = 3.0

    def path(self, root: Path, device: str) -> Path:
        shape = f"d{self.d_model}-n{self.n_layers}-b{self.batch}-l{self.length}-{self.direction}"
        return root / "profile" / device / f"{result.slug(self.architecture)}-{shape}.json"


def profile(
    cells: Iterable[Cell], root: Path, *, timeout: float = 300.0, fresh: bool = False,
    seen: Callable[[Cell], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Measure each cell in a process of its own, or take it from its file; a cell that fails says why and is kept."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lra.profiler"])
    for cell in cells:
        seen(cell)
        path = cell.path(root, here)
        if not fresh and path.is_file():
            kept = _read(path)
            if kept is not None and kept["cell"] == asdict(cell):
                yield kept
                continue
        record = {
            "cell": asdict(cell),
            **_in_process(context, cell, here, timeout),
            "environment": result.environment(),
        }
        with result.atomic(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        yield record


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and "cell" in content else None
    except (OSError, ValueError):
        return None


def _in_process(context: Any, cell: Cell, device: str, timeout: float) -> dict[str, Any]:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, cell, device))
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


def _child(pipe: Any, cell: Cell, device: str) -> None:
    try:
        pipe.send(measure_cell(cell, torch.device(device)))
    except (torch.OutOfMemoryError, MemoryError):
        pipe.send({"failed": "out of memory"})
    except Exception as error:  # noqa: BLE001  (one cell never ends the report)
        text = str(error)
        failed = "out of memory" if "can't allocate memory" in text else f"{type(error).__name__}: {text[:200]}"
        pipe.send({"failed": failed})


def measure_cell(cell: Cell, device: torch.device) -> dict[str, Any]:
    """Work, speed and memory of one cell in this process."""
    torch.manual_seed(0)
    constructor = architectures.get(cell.architecture)
    shape: dict[str, Any] = {"d_model": cell.d_model, "n_layers": cell.n_layers, "length": cell.length}
    if "direction" in constructor.options():
        shape["direction"] = cell.direction
    encoder = constructor(**shape).to(device)
    work = flops.encoder_flops(encoder, 1, cell.length)
    try:
        formula: float | None = encoder.cost(cell.length).matmul
    except NotImplementedError:
        formula = None
    x = torch.randn(cell.batch, cell.length, cell.d_model, device=device)
    mask = torch.ones(cell.batch, cell.length, dtype=torch.bool, device=device)
    optimizer = torch.optim.AdamW(encoder.parameters())

    def forward() -> None:
        with torch.no_grad():
            encoder(x, mask)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = encoder(x, mask).float().square().mean()
        extra = encoder.aux_loss()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()

    # the first step compiles and fills the optimiser's state, which is not what a step needs
    train()
    peak = memory.Peak(device)
    train()
    used = peak.read()
    sizes = {"parameters": _bytes(encoder.parameters()), "gradients": _bytes(p.grad for p in encoder.parameters())}
    sizes["optimiser"] = _bytes(v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    timed = {
        "forward": measure(forward, device, budget=cell.budget),
        "train": measure(train, device, budget=cell.budget),
    }
    decode = _decode(encoder, cell, device)
    return {
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "flops": {
            "forward": work.forward, "forward_backward": work.forward_backward, "matmul": work.matmul,
            "matmul_by_formula": formula, "uncounted": sorted(work.uncounted),
        },
        "seconds": {name: asdict(t) for name, t in timed.items()} | ({"step": asdict(decode)} if decode else {}),
        "memory": used | sizes,
        "tokens_per_second": cell.batch * cell.length / timed["train"].median,
    }  # fmt: skip


def _decode(encoder: nn.Module, cell: Cell, device: torch.device) -> Timing | None:
    """Time of one recurrent step, where this instance has any."""
    try:
        state = encoder.init_state(cell.batch)  # type: ignore[operator]
    except NotImplementedError:
        return None
    token = torch.randn(cell.batch, cell.d_model, device=device)

    def step() -> None:
        with torch.no_grad():
            encoder.step(token, state)  # type: ignore[operator]

    return measure(step, device, budget=cell.budget / 3)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log(value) over log(length), by least squares. Raises UserError for fewer than two lengths."""
    if len(lengths) < 2:
        raise UserError("growth needs at least two lengths")
    xs, ys = [math.log(n) for n in lengths], [math.log(v) for v in values]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)
