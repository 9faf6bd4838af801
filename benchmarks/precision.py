"""Training steps in float32 and under bfloat16 autocast, in turns: `python -m benchmarks precision`.

The model is the one that recipe `standard` trains on a task, at the batch size of the recipe, on random examples as
long as the protocol allows. What counts is the CPU time of this process, which other work on the machine lengthens
less than the time on the clock.
"""

from __future__ import annotations

import json
import statistics
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lra import files
from lra.data import prepared_sets
from lra.errors import UserError
from lra.model import Batch
from lra.operators.bench import machine_columns
from lra.profiling import memory
from lra.registry import architectures, tasks
from lra.training import construction, optimisers
from lra.training.request import Request, resolve

LENGTH = 1024
"""Tokens of an example at most."""
CAMPAIGN = Path(__file__).parents[1] / "results" / "campaign.toml"


def names() -> list[str]:
    """The architectures of the standard comparison."""
    return tomllib.loads(CAMPAIGN.read_text(encoding="utf-8"))["part"][0]["architectures"]


@dataclass(frozen=True)
class Step:
    """CPU seconds of a training step (forward, backward, optimiser), the medians of `rounds` steps of either kind."""

    architecture: str
    d_model: int
    parameters: int
    float32: float
    bfloat16: float
    rounds: int

    @property
    def ratio(self) -> float:
        return self.float32 / self.bfloat16


class Workload:
    """The classifier of a recipe with its optimiser and one batch of random examples."""

    def __init__(self, architecture: str, task_name: str) -> None:
        recipe, _ = resolve(Request(task=task_name, architecture=architecture, recipe="standard"))
        task, protocol = prepared_sets.resolve(tasks.get(task_name)(), None)
        self.model = construction.build(recipe, architectures.get(architecture), task, protocol, 0)
        self.d_model = recipe.d_model
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimiser = optimisers.build(self.model, self.model.encoder, recipe.optim)
        batch, length = recipe.data.batch_size, min(LENGTH, protocol.length)
        shape = (batch, task.towers, length, *([protocol.channels] if protocol.channels else []))
        self.batch = Batch(
            torch.randint(protocol.vocabulary or 256, shape), torch.ones(shape[:3], dtype=torch.bool),
            torch.randint(task.classes, (batch,)), torch.arange(batch),
        )  # fmt: skip

    def step(self, bfloat16: bool) -> Tensor:
        self.optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = self.model(self.batch)
            extra = self.model.encoder.aux_loss()
            loss = F.cross_entropy(logits.float(), self.batch.labels)
            loss = loss if extra is None else loss + extra
        loss.backward()
        self.optimiser.step()
        return loss.detach()


def bench(chosen: Iterable[str], task: str, rounds: int) -> Iterator[Step]:
    """One measurement for each of the architectures `chosen`. Raises UserError for an unknown one."""
    memory.keep_freed()
    for name in chosen:
        with construction.kept_random_state():
            workload = Workload(name, task)
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for turn in range(rounds + 1):
                for kind, taken in seconds.items():
                    start = time.process_time()
                    workload.step(kind)
                    if turn:  # the first of each compiles and allocates
                        taken.append(time.process_time() - start)
        float32, bfloat16 = (statistics.median(seconds[kind]) for kind in (False, True))
        yield Step(name, workload.d_model, workload.parameters, float32, bfloat16, rounds)


def write(steps: Iterable[Step], task: str, root: Path) -> Path:
    """Write `<root>/bench/precision-cpu.json`, with hardware and versions, and return its path. Raises UserError."""
    path = root / "bench" / "precision-cpu.json"
    rows = [asdict(step) | {"ratio": round(step.ratio, 3)} for step in steps]
    content = {"task": task, "threads": torch.get_num_threads(), **machine_columns(torch.device("cpu")), "steps": rows}
    try:
        with files.atomic(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    return path
