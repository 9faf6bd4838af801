"""Profiles of encoders, as they are stored in `results/profile/`: the one definition that profiler and reports share.

Each file is one cell: an architecture at one shape on one device. It holds a `Profile`, or a `FailedProfile` with the
reason where the measurement failed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from lra.errors import UserError
from lra.files import atomic
from lra.results import result, validation
from lra.results.record import Environment, Number
from lra.results.validation import Part

CLOSE = 0.1
"""Relative difference up to which the two fastest rounds of a cell agree."""
DTYPES = ("float32", "bfloat16", "float16")

Positive = Annotated[float, Meta(gt=0)]
Amount = Annotated[float, Meta(ge=0, lt=2**63)]
"""Bytes, or floating-point operations."""
Count = Annotated[int, Meta(ge=1)]


class Cell(Struct, frozen=True):
    """What is measured: an architecture at one shape. task: "" for the encoder alone, "bytes" for a classifier of byte
    sequences with two classes; budget: seconds for each timing; dtype: of the arithmetic, by autocast unless float32.
    """

    architecture: str
    length: Count
    batch: Count = 1
    d_model: int = 128
    n_layers: int = 4
    direction: str = "bidirectional"
    budget: Number = 3.0
    task: str = ""
    dtype: str = "float32"

    def path(self, root: Path, machine: str) -> Path:
        """`<root>/profile/<machine>-<dtype>/<architecture>-d<D>-n<layers>-b<B>-l<L>-<direction>.json`. machine: name of
        the device with its threads (`machine_name`)."""
        return root / "profile" / f"{_slug(machine)}-{self.dtype}" / self._file()

    def earlier_path(self, root: Path, device: str) -> Path:
        """Path of the file in releases up to 0.1: in a folder named by the kind of device, "cpu" or "cuda"."""
        return root / "profile" / device / self._file()

    def _file(self) -> str:
        task = f"-{self.task}" if self.task else ""
        shape = f"d{self.d_model}-n{self.n_layers}-b{self.batch}-l{self.length}-{self.direction}{task}"
        return f"{result.slug(self.architecture)}-{shape}.json"


class Timing(Struct, frozen=True):
    """Seconds: median and quartiles of `repeats` calls."""

    median: Positive
    low: Positive
    high: Positive
    repeats: Count


class Timings(Part, frozen=True, kw_only=True):
    """A forward pass, a training step and, where there is a recurrent mode, the decoding of one token."""

    forward: Timing
    train: Timing
    step: Timing | None = None

    def items(self) -> list[tuple[str, Timing]]:
        """(name, timing) of those that were measured."""
        return [(name, timing) for name in self.__struct_fields__ if (timing := getattr(self, name)) is not None]


class EncoderWork(Part, frozen=True, kw_only=True):
    """Floating-point operations of one sequence. forward: counted; algorithmic: without attention scores that a causal
    mask discards; matmul_counted, matmul_by_formula: of matrix products and our own kernels, counted and as `cost()`
    declares it; counted_on: device of the count."""

    forward: Amount
    algorithmic: Amount
    forward_backward: Amount
    matmul_counted: Amount
    matmul_by_formula: Amount | None
    uncounted: tuple[str, ...]
    counted_on: str = ""


class StepMemory(Part, frozen=True, kw_only=True):
    """Bytes of a training step. activations: what the peak holds beside parameters, gradients and optimiser state."""

    peak_bytes: Annotated[float, Meta(gt=0, lt=2**63)]
    parameters: Amount
    gradients: Amount
    optimiser: Amount
    activations: Amount
    reserved_bytes: int | None = None
    method: str = ""


class MachinePeak(Part, frozen=True, kw_only=True):
    """Limits of the machine: rate of the fastest matrix product in FLOP/s, bandwidth of a sum in bytes/s."""

    rate: Number
    bandwidth: Number | None = None


class Profile(Part, frozen=True, kw_only=True):
    """Work, speed and memory of a cell.

    seconds: of the fastest round; rounds: median seconds of each round by timing, empty for a round that failed; mfu:
    counted forward and backward FLOP/s over the rate of the machine; conditions: clocks, temperature and power.
    """

    cell: Cell
    environment: Environment
    parameters: Annotated[int, Meta(ge=0)]
    flops: EncoderWork
    seconds: Timings
    memory: StepMemory
    machine: MachinePeak
    rounds: tuple[dict[str, Positive], ...]
    tokens_per_second: Number
    mfu: Number
    examples_per_second: Number | None = None
    flops_per_second: Number | None = None
    conditions: dict[str, Number] = field(default_factory=dict)


class FailedProfile(Part, frozen=True, kw_only=True):
    """A cell that could not be measured. failed: the reason."""

    cell: Cell
    environment: Environment
    failed: str


AnyProfile = Profile | FailedProfile


def machine_name(environment: Environment) -> str:
    """The GPU, or the CPU with the number of threads: what profiles are grouped by."""
    if environment.hardware == environment.gpu:
        return environment.gpu
    threads = environment.threads
    return environment.cpu + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")


def nearest_steps(profiles: Iterable[AnyProfile], machine: str, dtype: str, length: int) -> dict[str, Profile]:
    """Architecture -> profile of its encoder on a machine (`machine_name`) and in a dtype.

    All are of one length, the nearest to `length`, and of one shape, that with most cells, so that they can be
    compared. Of two profiles of one cell the last counts.
    """
    shapes: dict[tuple[int, int, int, str], dict[tuple[str, int], Profile]] = {}
    for profile in profiles:
        cell = profile.cell
        if isinstance(profile, Profile) and not cell.task and (machine_name(profile.environment), cell.dtype) == (
            machine, dtype
        ):  # fmt: skip
            shape = (cell.batch, cell.d_model, cell.n_layers, cell.direction)
            shapes.setdefault(shape, {})[cell.architecture, cell.length] = profile
    cells = max(shapes.values(), key=len, default={})
    if not cells or not length:
        return {}
    nearest = min({measured for _, measured in cells}, key=lambda measured: abs(math.log(measured / length)))
    return {name: profile for (name, measured), profile in cells.items() if measured == nearest}


def agreed(rounds: Sequence[Mapping[str, float]]) -> bool:
    """Whether the two lowest medians of each timing differ by at most CLOSE. rounds: timing -> median seconds."""
    for name in rounds[0]:
        lowest = sorted(medians[name] for medians in rounds if name in medians)[:2]
        if len(lowest) < 2 or lowest[1] > (1 + CLOSE) * lowest[0]:
            return False
    return True


def from_json(content: Any) -> Profile | FailedProfile:
    """A profile from JSON content. Raises ValueError with one line on what is wrong."""
    failed = isinstance(content, dict) and "failed" in content
    profile = validation.convert(content, FailedProfile) if failed else validation.convert(content, Profile)
    # a cell that is about to be measured has defaults, a stored one is complete
    for key in ("batch", "d_model", "n_layers", "direction"):
        if key not in content["cell"]:
            raise ValueError(f"cell.{key} is missing")
    if isinstance(profile, Profile):
        _check_rounds(profile)
    return profile


def _check_rounds(profile: Profile) -> None:
    names = {name for name, _ in profile.seconds.items()}
    first, *others = profile.rounds or [{}]
    # a later round may have failed, and is empty then
    if set(first) != names or any(set(medians) not in (names, set()) for medians in others):
        raise ValueError(f"rounds holds other timings than {', '.join(sorted(names))}")


def read(path: Path) -> Profile | FailedProfile:
    """The profile of a file. Raises UserError with the path and what is wrong."""
    try:
        content = validation.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a profile: not JSON: {error}") from None
    try:
        return from_json(content)
    except ValueError as error:
        raise UserError(f"{path}: not a profile: {error}") from None


def write(profile: Profile | FailedProfile, path: Path) -> None:
    """Store a profile, replacing what the file held."""
    content = msgspec.to_builtins(profile)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load(root: Path) -> tuple[list[Profile | FailedProfile], list[str]]:
    """All profiles below <root>/profile, those at `Cell.earlier_path` first, and one line for each file that is not a
    profile."""
    profiles, problems = [], []
    for path in sorted((root / "profile").rglob("*.json"), key=lambda p: (p.parent.name not in ("cpu", "cuda"), p)):
        try:
            profiles.append(read(path))
        except UserError as error:
            problems.append(str(error))
    return profiles, problems


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
