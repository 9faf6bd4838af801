"""What is profiled, where its file lies, and when its timings agree. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lra.results import result

CLOSE = 0.1
"""How far apart the two fastest rounds of a cell may be."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Cell:
    """An architecture at one shape. task: "" for the encoder alone, "bytes" for a classifier of byte sequences into two
    classes around it; budget: seconds for each timing; dtype: of the arithmetic, by autocast where it is not float32.
    """

    architecture: str
    length: int
    batch: int = 1
    d_model: int = 128
    n_layers: int = 4
    direction: str = "bidirectional"
    budget: float = 3.0
    task: str = ""
    dtype: str = "float32"

    def path(self, root: Path, machine: str) -> Path:
        """`<root>/profile/<machine>-<dtype>/<architecture>-d<D>-n<layers>-b<B>-l<L>-<direction>.json`. machine: name of
        the device with its threads (`machine_name`)."""
        return root / "profile" / f"{_slug(machine)}-{self.dtype}" / self._file()

    def earlier_path(self, root: Path, device: str) -> Path:
        """Where releases up to 0.1 kept the file, by the kind of device ("cpu" or "cuda") alone."""
        return root / "profile" / device / self._file()

    def _file(self) -> str:
        task = f"-{self.task}" if self.task else ""
        shape = f"d{self.d_model}-n{self.n_layers}-b{self.batch}-l{self.length}-{self.direction}{task}"
        return f"{result.slug(self.architecture)}-{shape}.json"


def machine_name(environment: Mapping[str, Any]) -> str:
    """The GPU, or the CPU with the number of threads, as profiles are grouped by it."""
    if "gpu" in environment:
        return str(environment["gpu"])
    threads = environment.get("threads")
    return environment["cpu"] + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def agreed(rounds: Sequence[Mapping[str, float]]) -> bool:
    """Whether the two lowest medians of each timing differ by at most CLOSE. rounds: timing -> median seconds."""
    for name in rounds[0]:
        lowest = sorted(taken[name] for taken in rounds if name in taken)[:2]
        if len(lowest) < 2 or lowest[1] > (1 + CLOSE) * lowest[0]:
            return False
    return True


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
