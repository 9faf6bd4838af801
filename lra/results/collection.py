"""All results below a folder. Results that fail a check are left out and reported, never averaged.

To add somebody else's results, copy their files below `runs/`; the subfolder does not matter. A record that is there
twice counts once. If two records share an id and differ, both are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lra.errors import UserError, unknown
from lra.results import literature, profile, result
from lra.results.literature import Reported
from lra.results.official import Settings, settings_of
from lra.results.profile import AnyProfile
from lra.results.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

FILTERS: dict[str, Callable[[RunRecord], str]] = {
    "task": lambda record: record.task,
    "protocol": lambda record: record.protocol.name,
    "recipe": lambda record: record.recipe.name,
    "regime": lambda record: record.regime,
    "device": lambda record: record.hardware,
}
"""Filters of results: name -> value of a record."""


@dataclass(frozen=True)
class Predictions:
    """Test predictions of one run, ordered by example: the examples' numbers, and whether each prediction is right."""

    example: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class Collection:
    """records: ordered by id; problems: one line for each file or row that was left out; predictions: by id of the
    run, where they are stored with labels; reported: the literature; root: the results folder, for its profiles."""

    records: Sequence[RunRecord]
    problems: Sequence[str] = ()
    predictions: Mapping[str, Predictions] = field(default_factory=dict)
    reported: Sequence[Reported] = ()
    root: Path | None = None

    @classmethod
    def read(cls, root: Path, *places: str) -> Collection:
        """Everything in some places of a results folder (`lra.results.result.PLACES`), by default in "runs". Damaged
        files are reported in `problems` and never raise."""
        records: dict[str, RunRecord] = {}
        predictions: dict[str, Predictions] = {}
        paths: dict[str, Path] = {}
        clashes: set[str] = set()
        problems: list[str] = []
        for path in sorted(path for place in places or ("runs",) for path in (root / place).rglob("*.json")):
            try:
                record, stored = load_run(path)
            except UserError as error:
                problems.append(f"left out {error}")
                continue
            if record.id not in records:
                records[record.id], paths[record.id] = record, path
                if stored is not None:
                    predictions[record.id] = stored
            elif records[record.id].seal == record.seal:
                problems.append(f"counted once: {path} is a copy of {paths[record.id]}")
            else:
                problems.append(f"left out {path}: it has the id of {paths[record.id]} and differs from it")
                clashes.add(record.id)
        for identity in sorted(clashes):
            problems.append(f"left out {paths[identity]}: another record has its id {identity} and differs from it")
            del records[identity]
            predictions.pop(identity, None)
        reported: list[Reported] = []
        try:
            reported = literature.load(root)
        except UserError as error:
            problems.append(f"left out the literature: {error}")
        return cls([records[key] for key in sorted(records)], problems, predictions, reported, root)

    def only(self, **wanted: str) -> Collection:
        """The records that match: task, protocol, recipe and regime by name, device by a part of its name in any case.
        Raises UserError for a value that no record has."""
        selected = list(self.records)
        for key, value in wanted.items():
            if not value:
                continue
            value_of = FILTERS[key]
            known = sorted({value_of(record) for record in self.records})
            if key == "device":
                matches = [name for name in known if value.lower() in name.lower()]
                if not matches:
                    raise UserError(f"no result of a device like {value!r}; known: {', '.join(known) or 'none'}")
            elif value not in known:
                raise unknown(key, value, known, where="the results")
            else:
                matches = [value]
            selected = [record for record in selected if value_of(record) in matches]
        return replace(self, records=selected)

    @cached_property
    def profiles(self) -> Sequence[AnyProfile]:
        """The profiles in the results folder: where tables take speed and memory from."""
        return [] if self.root is None else profile.load(self.root)[0]

    @cached_property
    def settings(self) -> Mapping[str, Settings]:
        """Id -> relation of the run to the shipped recipe of its name."""
        return {record.id: settings_of(record) for record in self.records}

    def frame(self) -> pd.DataFrame:
        """One row for each run, ordered by id; columns as in COLUMNS. Accuracies are from 0 to 1, `status` says whether
        the run used the shipped recipe, and `changed` lists the settings in which it departs from it."""
        import pandas as pd

        frame = pd.DataFrame([_row(record, self.settings[record.id]) for record in self.records], columns=list(COLUMNS))
        started = pd.to_datetime(frame["started"], format="ISO8601", errors="coerce", utc=True)
        return frame.assign(started=started)


COLUMNS = (
    "id", "task", "protocol", "recipe", "recipe_hash", "status", "changed", "regime", "architecture", "direction",
    "seed", "accuracy", "n", "at_chance", "validation_accuracy", "best_step", "parameters", "flops_forward",
    "flops_forward_backward", "examples", "examples_per_second", "peak_bytes", "minutes", "device", "threads", "data",
    "source", "started", "command",
)  # fmt: skip
"""Columns of `Collection.frame`."""


def _row(record: RunRecord, settings: Settings) -> tuple[Any, ...]:
    return (
        record.id, record.task, record.protocol.name, record.recipe.name, record.recipe_hash, settings.status,
        settings.describe(), record.regime, record.architecture, record.direction, record.seed, record.test.accuracy,
        record.test.n, record.at_chance, record.validation.accuracy, record.validation.best_step, record.parameters,
        record.flops.forward, record.flops.forward_backward, record.speed.examples, record.speed.examples_per_second,
        record.memory.peak_bytes, record.wall_seconds / 60, record.hardware, record.environment.threads,
        record.data.checksum, record.source_key, record.started, record.command,
    )  # fmt: skip


def load_run(path: Path) -> tuple[RunRecord, Predictions | None]:
    """A record and its test predictions; None if they are stored without labels. Raises UserError if the file is
    damaged or the predictions contradict the record."""
    record, arrays = result.read_with_predictions(path)
    if not {"prediction", "label", "example"} <= arrays.keys():
        return record, None
    prediction, label, example = (arrays[key] for key in ("prediction", "label", "example"))
    wrong = UserError(f"{path}: it names {record.test.n} test examples and stores {prediction.shape} predictions")
    if not prediction.shape == label.shape == example.shape or prediction.ndim != 1 or not len(example):
        raise wrong
    order = np.argsort(example, kind="stable")
    correct, example = right_answers(record, prediction, label)[order], example[order]
    if record.test.positions is not None:
        example, starts = np.unique(example, return_index=True)
        correct = np.logical_and.reduceat(correct, starts)
    if len(correct) != record.test.n:
        raise wrong
    if abs(correct.mean() - record.test.accuracy) > 1e-9:
        raise UserError(
            f"{path}: {correct.mean():.4f} of its predictions are right, but its accuracy is {record.test.accuracy:.4f}"
        )
    return record, Predictions(example, correct)


def right_answers(record: RunRecord, prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Whether each stored prediction is right: equal to its label, or within the tolerance of a real value."""
    if record.test.tolerance is None:
        return prediction == label
    return np.abs(prediction - label) <= np.float32(record.test.tolerance)
