"""Groups comparable results and ranks them.

Runs are compared only if task, protocol, data, recipe, regime, kind of device and number of test examples agree, and
only if they used the shipped recipe without changes; other runs are listed apart and have no rank. Rows that do not
differ significantly share a rank. Runs of several machines are compared, and each row names its dtype; speed and memory
are those of one machine's profile in one dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lra import registry
from lra.results.collection import Collection, Predictions
from lra.results.literature import Reported
from lra.results.official import OWN, Settings
from lra.results.profile import AnyProfile, Profile, machine_name, nearest_steps
from lra.results.record import RunRecord
from lra.results.statistics import Estimate, Runs, estimate, ranks, seeds_needed, task_average

if TYPE_CHECKING:
    import pandas as pd

LRA = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
AVERAGES = {"avg 5": LRA[:5], "avg 6": LRA}
FIELDS = (
    "task", "protocol", "data", "recipe", "regime", "device", "n", "architecture", "recipe_hash", "rank", "accuracy",
    "low", "high", "interval", "deviation", "seeds", "collapsed", "seeds_to_1_point", "examples", "parameters",
    "flops_forward", "flops_forward_backward", "points_per_mflop_per_token", "profile_length", "tokens_per_second",
    "peak_bytes", "tokens_per_peak_mib", "threads", "dtype", "minutes", "direction", "source",
)  # fmt: skip
"""Columns of `Leaderboard.frame`."""


@dataclass(frozen=True, order=True)
class Group:
    """Key of a table: runs are comparable only if all of these agree. device: CPU or GPU; tested: number of test
    examples; data: first digits of the checksum of the prepared data; shipped: whether the recipe is one of this
    package."""

    task: str
    protocol: str
    recipe: str
    regime: str
    device: str
    tested: int
    data: str
    shipped: bool = True

    @property
    def recipe_name(self) -> str:
        return self.recipe if self.shipped else f"{self.recipe} (not shipped)"


Overall = tuple[str, str, str, str]
"""Key of a table over tasks: protocol, recipe, regime and device."""
Key = tuple[Group, str, str, str]
"""Key of a row: group, architecture, the recipe's hash if it distinguishes rows, and the source of a user's class."""


@dataclass(frozen=True)
class Row:
    """One architecture in a group; its runs differ only in the seed.

    label: the architecture, followed by the first digits of the recipe's hash or of the source if the group has several
    of them. flops, minutes and `seen`, the number of training examples with repeats, are means over the runs. profile:
    a profiled training step at the length nearest to that of the group, on a machine and in a dtype that all rows of
    the group share. Speed and memory of the runs themselves, which may have shared their machine, are in their records
    only. dtype: of the arithmetic of the runs. hardware: machines of the runs.
    """

    architecture: str
    label: str
    rank: int
    accuracy: Estimate
    runs: tuple[RunRecord, ...]
    seen: float
    parameters: int
    flops: float | None
    flops_backward: float | None
    profile: Profile | None
    threads: str
    dtype: str
    minutes: float
    direction: str
    hardware: str

    @property
    def seeds(self) -> int:
        return len(self.runs)

    @property
    def collapsed(self) -> int:
        """Number of runs at chance. They count in the mean like all others."""
        return sum(run.at_chance for run in self.runs)

    @property
    def accuracies(self) -> list[float]:
        return [run.test.accuracy for run in self.runs]

    @property
    def succeeded(self) -> list[float]:
        """Accuracies of the runs above chance."""
        return [run.test.accuracy for run in self.runs if not run.at_chance]

    @property
    def length(self) -> int | None:
        return self.runs[0].protocol.length

    @property
    def flops_per_token(self) -> float | None:
        """Forward FLOPs of an example over its tokens, those of both sequences where the task has two."""
        if not (self.flops and self.length):
            return None
        return self.flops / (self.length * _towers(self.runs[0].task))

    @property
    def points_per_work(self) -> float | None:
        """Accuracy in points per forward MFLOP and token."""
        per_token = self.flops_per_token
        return 100 * self.accuracy.mean / (per_token / 1e6) if per_token else None

    @property
    def memory_score(self) -> float | None:
        """Tokens of the profiled training step per MiB of its peak memory."""
        if self.profile is None:
            return None
        cell = self.profile.cell
        return cell.batch * cell.length / (self.profile.memory.peak_bytes / 2**20)


@dataclass(frozen=True)
class ModifiedRow:
    """A row that is not ranked, because its settings are not those of the shipped recipe."""

    group: Group
    row: Row
    settings: Settings


@dataclass(frozen=True)
class Leaderboard:
    """groups: ranked rows by group, best first; modified: rows with other settings; reported: the literature."""

    groups: Mapping[Group, Sequence[Row]]
    modified: Sequence[ModifiedRow] = ()
    reported: Sequence[Reported] = ()

    @classmethod
    def of(cls, collection: Collection) -> Leaderboard:
        """Group and rank the results of a collection. If several runs have the same settings and seed, only the newest
        counts."""
        official: dict[Key, dict[int, RunRecord]] = {}
        modified: dict[Key, dict[int, RunRecord]] = {}
        for record in sorted(collection.records, key=lambda r: (r.started, r.id)):
            settings = collection.settings[record.id]
            group = group_of(record, shipped=settings.status != OWN)
            # the hash of an official run may differ in how its protocol was named
            version = record.recipe_hash if settings.status == OWN or not settings.ranked else ""
            by_row = official if settings.ranked else modified
            key = (group, record.architecture, version, record.source_key)
            by_row.setdefault(key, {})[record.seed] = record
        runs_of: dict[Group, list[RunRecord]] = {}
        for key, by_seed in [*official.items(), *modified.items()]:
            runs_of.setdefault(key[0], []).extend(by_seed.values())
        labels = _labels(official) | _labels(modified)
        profiles = {group: _profiles(collection.profiles, runs) for group, runs in runs_of.items()}
        groups: dict[Group, list[Row]] = {}
        for key, by_seed in official.items():
            groups.setdefault(key[0], []).append(_row(labels[key], by_seed, profiles[key[0]]))
        ranked = {
            group: _rank(sorted(groups[group], key=lambda row: (-row.accuracy.mean, row.label)), collection.predictions)
            for group in sorted(groups)
        }
        apart = []
        for key in sorted(modified):
            row = _row(labels[key], modified[key], profiles[key[0]])
            apart.append(ModifiedRow(key[0], row, collection.settings[row.runs[-1].id]))
        return cls(ranked, apart, collection.reported)

    def frame(self) -> pd.DataFrame:
        """One row for each ranked row, ordered by group and rank; columns as in FIELDS. Accuracies are from 0 to 1."""
        import pandas as pd

        rows = [_fields(group, row) for group, ranked in self.groups.items() for row in ranked]
        frame = pd.DataFrame(rows, columns=list(FIELDS))
        return frame.astype(
            dict.fromkeys(("seeds_to_1_point", "profile_length"), "Int64") | dict.fromkeys(OPTIONAL, "float64")
        )

    @cached_property
    def by_task(self) -> dict[Overall, dict[str, dict[str, Row]]]:
        """Table over tasks -> architecture -> LRA task -> row, for tables of at least two tasks.

        If a task has two groups, the one with more test examples counts. An architecture with two recipes of the same
        name for a task is left out of that task, because it is ambiguous which of them belongs to its other tasks.
        """
        overall: dict[Overall, dict[str, dict[str, Row]]] = {}
        for group, rows in sorted(self.groups.items(), key=lambda item: item[0].tested):
            if group.task in LRA:
                key = (group.protocol, group.recipe_name, group.regime, group.device)
                rows_of = overall.setdefault(key, {})
                for tasks in rows_of.values():
                    tasks.pop(group.task, None)
                for row in rows:
                    if row.label == row.architecture:
                        rows_of.setdefault(row.architecture, {})[group.task] = row
        return {k: v for k, v in sorted(overall.items()) if len({t for tasks in v.values() for t in tasks}) > 1}

    @cached_property
    def averages(self) -> dict[Overall, dict[str, dict[str, Estimate | None]]]:
        """Table over tasks -> architecture -> name in AVERAGES -> mean over its tasks; None where a task is missing."""
        return {
            key: {
                name: {column: average(rows, tasks) for column, tasks in AVERAGES.items()}
                for name, rows in by_architecture.items()
            }
            for key, by_architecture in self.by_task.items()
        }


OPTIONAL = (
    "deviation", "flops_forward", "flops_forward_backward", "points_per_mflop_per_token", "tokens_per_second",
    "peak_bytes", "tokens_per_peak_mib",
)  # fmt: skip


def group_of(record: RunRecord, shipped: bool = True) -> Group:
    """The group of a run. shipped: whether its recipe is one of this package."""
    used = record.environment
    device = "GPU" if used.hardware == used.gpu else "CPU"
    return Group(
        record.task, record.protocol.name, record.recipe.name, record.regime, device, record.test.n,
        record.data.checksum[:8], shipped,
    )  # fmt: skip


@cache
def _towers(task: str) -> int:
    """Number of sequences in an example of a task; 1 for a task that is not registered."""
    return int(registry.tasks.get(task).cls.towers) if task in registry.tasks.names() else 1


def average(by_task: Mapping[str, Row], tasks: Sequence[str]) -> Estimate | None:
    """Mean over exactly these tasks; None if one is missing."""
    if any(task not in by_task for task in tasks):
        return None
    return task_average({task: by_task[task].accuracies for task in tasks})


def _labels(keys: Iterable[Key]) -> dict[Key, str]:
    """Label of each row: the architecture, with the first digits of hash or source if a group has it twice."""
    keys = list(keys)
    hashes, sources = ({k[:2]: {o[place] for o in keys if o[:2] == k[:2]} for k in keys} for place in (2, 3))
    labels = {}
    for key in keys:
        group, architecture, version, source = key
        version_text = f" #{version[:6]}" if len(hashes[group, architecture]) > 1 else ""
        source_text = f" source {source[:6]}" if len(sources[group, architecture]) > 1 else ""
        labels[key] = architecture + version_text + source_text
    return labels


def _profiles(profiles: Sequence[AnyProfile], runs: Sequence[RunRecord]) -> Mapping[str, Profile]:
    """Architecture -> profile of a training step, for the runs of a group: all of one machine and dtype, at the length
    nearest to that of the runs, with a number of threads and a dtype that some run has. If several machines qualify,
    the one with most of the architectures is taken."""
    names, threads = {run.architecture for run in runs}, {run.environment.threads for run in runs}
    dtypes, length = {run.environment.dtype for run in runs}, runs[0].protocol.length or 0
    measured = {
        (machine_name(p.environment), p.cell.dtype)
        for p in profiles if p.environment.threads in threads and p.cell.dtype in dtypes
    }  # fmt: skip
    steps = [nearest_steps(profiles, machine, dtype, length) for machine, dtype in sorted(measured)]
    return max(steps, key=lambda by_name: len(names & by_name.keys()), default={})


def _row(label: str, by_seed: Mapping[int, RunRecord], profiles: Mapping[str, Profile]) -> Row:
    def mean(values: Iterable[float]) -> float:
        listed = list(values)
        return math.fsum(listed) / len(listed)

    def work(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return mean(known) if len(known) == len(runs) else None

    runs = [by_seed[seed] for seed in sorted(by_seed)]
    first = runs[0]
    return Row(
        architecture=first.architecture,
        label=label,
        rank=1,
        accuracy=estimate([run.test.accuracy for run in runs], first.test.n),
        runs=tuple(runs),
        seen=mean(run.speed.examples for run in runs),
        parameters=first.parameters,
        flops=work(run.flops.forward for run in runs),
        flops_backward=work(run.flops.forward_backward for run in runs),
        profile=profiles.get(first.architecture),
        threads=", ".join(sorted({str(run.environment.threads or "-") for run in runs})),
        dtype=", ".join(sorted({run.environment.dtype or "-" for run in runs})),
        minutes=mean(run.wall_seconds for run in runs) / 60,
        direction=first.direction,
        hardware=", ".join(sorted({run.hardware for run in runs})),
    )


def _rank(rows: list[Row], predictions: Mapping[str, Predictions]) -> list[Row]:
    stored = [predictions[run.id] for row in rows for run in row.runs if run.id in predictions]

    def runs(row: Row) -> Runs:
        own = [predictions.get(run.id) for run in row.runs]
        same = [p for p in own if p is not None and np.array_equal(p.example, stored[0].example)]
        return Runs(row.accuracies, np.stack([p.correct for p in same]) if len(same) == len(own) else None)

    return [replace(row, rank=rank) for row, rank in zip(rows, ranks([runs(r) for r in rows]), strict=True)]


def _fields(group: Group, row: Row) -> tuple[Any, ...]:
    a = row.accuracy
    return (
        group.task, group.protocol, group.data, group.recipe, group.regime, group.device, group.tested,
        row.architecture, row.runs[0].recipe_hash, row.rank, a.mean, a.low, a.high, a.source, a.deviation, row.seeds,
        row.collapsed, None if a.deviation is None else seeds_needed(a.deviation, 0.01, row.seeds), row.seen,
        row.parameters, row.flops, row.flops_backward, row.points_per_work, *_profiled(row.profile), row.memory_score,
        row.threads, row.dtype, row.minutes, row.direction, row.runs[0].source_key,
    )  # fmt: skip


def _profiled(profile: Profile | None) -> tuple[int | None, float | None, float | None]:
    """Length, tokens per second and peak bytes of a profiled training step."""
    if profile is None:
        return None, None, None
    return profile.cell.length, profile.tokens_per_second, profile.memory.peak_bytes
