"""The checks of a task: what `lra check parity` and `lra check my_task.py:MyTask` run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lra.conformance.context import Broken
from lra.conformance.suite import Finding
from lra.data import prepared_sets
from lra.errors import describe
from lra.target import target_of
from lra.task import UNSCORED, DataError, Protocol, Split, Task, silent

LONGEST = 2000
"""Characters of a description."""


@dataclass
class TaskContext:
    """A task under one protocol, prepared in temporary folders. source: folder with the raw files."""

    task: Task
    protocol: Protocol
    source: Path | None
    _folders: ExitStack
    _first: Path | None = field(default=None)

    def prepared(self, workers: int) -> Path:
        """A folder with the splits, prepared now by so many workers."""
        folder = Path(self._folders.enter_context(tempfile.TemporaryDirectory(prefix="lra-check-")))
        self.task.prepare(folder, self.protocol, source=self.source, workers=workers, progress=silent)
        return folder

    @property
    def folder(self) -> Path:
        self._first = self._first or self.prepared(1)
        return self._first

    def split(self, name: str) -> Split:
        return self.task.load(self.folder, name)

    def checksums(self, folder: Path) -> dict[str, str]:
        return {name: prepared_sets.split_checksum(self.task.load(folder, name)) for name in self.protocol.splits}


def same_for_any_number_of_workers(context: TaskContext) -> None:
    """two preparations, by one and by two workers, write the same bytes"""
    once, again = context.checksums(context.folder), context.checksums(context.prepared(2))
    if changed := [name for name in once if once[name] != again[name]]:
        raise Broken(f"{', '.join(changed)} differ between two preparations; draw them from a seed of their own")


def drawn_from_seed_and_step(context: TaskContext) -> str | None:
    """a training batch depends on seed and step alone, and differs from step to step and from seed to seed"""
    task, protocol = context.task, context.protocol
    if not task.generated:
        return "training examples are read from the prepared split"
    first = task.training_batch(protocol, 8, 1, 5)
    other = [task.training_batch(protocol, 8, *at)[0] for at in ((1, 6), (2, 5))]
    again = type(task)().training_batch(protocol, 8, 1, 5)
    if not all(np.array_equal(a, b) for a, b in zip(first, again, strict=True)):
        raise Broken("the batch of seed 1, step 5 differs when it is drawn again; use only the generator that is given")
    for values in other:
        # lengths may differ from step to step
        common = min(first[0].shape[1], values.shape[1])
        if np.array_equal(first[0][:, :common], values[:, :common]):
            raise Broken("two steps or two seeds give the same batch; draw from the generator that is given")
    return None


def in_range(context: TaskContext) -> None:
    """values, labels and lengths are those that protocol and target declare"""
    task, protocol = context.task, context.protocol
    try:
        counts, sums = prepared_sets.measure_splits(task, protocol, context.folder, silent)
    except DataError as error:
        raise Broken(str(error)) from None
    if problems := prepared_sets.protocol_mismatches(task, protocol, counts, sums):
        raise Broken("; ".join(problems))
    channels = max(protocol.channels, 1)
    for name in protocol.splits:
        longest = int(np.diff(context.split(name).offsets).max()) // channels
        if task.generated and longest > protocol.length:
            raise Broken(f"{name} has {longest} positions; the protocol declares a length of {protocol.length}")
    if task.generated:
        _check_batch(task, protocol, *task.training_batch(protocol, 8, 0, 0))


def _check_batch(task: Task, protocol: Protocol, values: np.ndarray, labels: np.ndarray) -> None:
    shape = (8, values.shape[1]) if task.target in ("position", "next") else (8,)
    if values.shape[0] != 8 or values.shape[2:] != ((protocol.channels,) if protocol.channels else ()):
        raise Broken(f"a batch of 8 has values of shape {values.shape}; (8, L{', channels' * bool(protocol.channels)})")
    if labels.shape != shape:
        raise Broken(f"a batch of 8 has labels of shape {labels.shape}; the target {task.target!r} has {shape}")
    low = UNSCORED if task.target in ("position", "next") else 0
    if task.target != "value" and not low <= labels.min() <= labels.max() < task.classes:
        raise Broken(f"a batch has labels from {labels.min()} to {labels.max()}; the task declares {task.classes}")
    if protocol.vocabulary and not 0 <= values.min() <= values.max() < protocol.vocabulary:
        raise Broken(f"a batch has tokens from {values.min()} to {values.max()} of {protocol.vocabulary}")


def disjoint(context: TaskContext) -> None:
    """almost no test example occurs in training or validation"""
    hashes = {name: prepared_sets.example_hashes(context.split(name)) for name in context.protocol.splits}
    earlier = ("train",) if context.protocol.selection == "test" else ("train", "validation")
    for name in context.protocol.splits:
        if name in ("train", "validation"):
            continue
        for other in earlier:
            shared = prepared_sets.count_shared(hashes[other], hashes[name])
            if shared > prepared_sets.MAX_OVERLAP * len(hashes[name]):
                raise Broken(f"{shared:,} of the {len(hashes[name]):,} examples of {name} also occur in {other}")


def chance_is_stated(context: TaskContext) -> str:
    """the accuracies of a guess and of the baselines without a sequence model are stated"""
    task, protocol = context.task, context.protocol
    chance, prior = task.chance(protocol), target_of(task, protocol).prior
    floors = task.floors(context.split("train"), context.split("test"))
    if chance is not None and not 0 < chance < 1:
        raise Broken(f"chance is {chance}; a share above 0 and below 1")
    if prior not in floors:
        raise Broken(
            f"floors has no {prior!r}, the baseline that decides whether a run is at chance: "
            f"{', '.join(floors) or 'it is empty'}"
        )
    for name, share in {**floors, **task.plateaus(protocol)}.items():
        if not 0 <= share <= 1:
            raise Broken(f"{name} is {share}; a share from 0 to 1")
    stated = "" if chance is None else f"chance {100 * chance:.1f} %, "
    return f"{stated}{prior} {100 * floors[prior]:.1f} %"


def describes_an_example(context: TaskContext) -> str:
    """one example is one readable line"""
    line = context.task.describe(context.split("test"), 0)
    if not isinstance(line, str) or not line.strip() or "\n" in line or len(line) > LONGEST:
        raise Broken(f"describe returns {line!r:.60}; one line of at most {LONGEST} characters")
    return line if len(line) < 70 else f"{line[:66]} ..."


CHECKS: tuple[Callable[[TaskContext], str | None], ...] = (
    same_for_any_number_of_workers, drawn_from_seed_and_step, in_range, disjoint, chance_is_stated,
    describes_an_example,
)  # fmt: skip


def check(task: Task, protocols: list[str] | None = None, source: str | Path | None = None) -> list[Finding]:
    """Run the checks of a task under some of its protocols, by default all that need no raw files, else the first.

    source: folder with the raw files (else LRA_DATA). Raises UserError for a folder that does not exist.
    """
    generated = [name for name, protocol in task.protocols.items() if not protocol.raw]
    findings = []
    for name in protocols or generated or list(task.protocols)[:1]:
        task, protocol = prepared_sets.resolve(task, name)
        with ExitStack() as folders:
            raw = prepared_sets.source_folder(source) if protocol.raw else None
            context = TaskContext(task, protocol, raw, folders)
            findings += [_run(function, context, name) for function in CHECKS]
    return findings


def _run(function: Callable[[TaskContext], str | None], context: TaskContext, protocol: str) -> Finding:
    started, label = time.perf_counter(), f"{protocol}: {function.__name__.replace('_', ' ')}"
    try:
        status, message = "pass", function(context) or (function.__doc__ or "").strip()
    except Broken as broken:
        status, message = "fail", str(broken)
    except Exception as error:  # noqa: BLE001  (a user's task may raise anything)
        status, message = "fail", describe(error)
    return Finding(label, status, message, time.perf_counter() - started)
