"""All results below a folder, read with suspicion: what cannot be trusted is left out and named, never averaged.

Taking in somebody else's results is copying their files under `runs/`: where a file lies does not matter, what it says
does. The same record twice counts once; two records that share an id and differ are both left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lra.errors import UserError, unknown
from lra.results import literature, result
from lra.results.literature import Reported

Record = dict[str, Any]
FILTERS = ("task", "protocol", "recipe", "regime", "device")


@dataclass(frozen=True)
class Answers:
    """One run on the test set, in order of example: which examples, and whether each was answered right."""

    example: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Collection:
    """records: in order of id; problems: one line per file or row that was left out; answers: id -> what the stored
    predictions say, where they say it; reported: the literature."""

    records: Sequence[Record]
    problems: Sequence[str] = ()
    answers: Mapping[str, Answers] = field(default_factory=dict)
    reported: Sequence[Reported] = ()

    @classmethod
    def read(cls, root: Path, place: str = "runs") -> Collection:
        """Everything in one place of a results folder: "runs", or "smoke" for smoke tests. Never raises for
        the content of a file."""
        found: dict[str, Record] = {}
        paths: dict[str, Path] = {}
        clashing: set[str] = set()
        problems: list[str] = []
        for path in sorted((root / place).rglob("*.json")):
            try:
                record = result.read(path)
            except UserError as error:
                problems.append(f"left out {error}")
                continue
            identity = record["id"]
            if identity not in found:
                found[identity], paths[identity] = record, path
            elif found[identity] == record:
                problems.append(f"counted once: {path} is a copy of {paths[identity]}")
            else:
                problems.append(f"left out {path}: it has the id of {paths[identity]} and differs from it")
                clashing.add(identity)
        for identity in sorted(clashing):
            problems.append(f"left out {paths[identity]}: another record has its id {identity} and differs from it")
            del found[identity]
        answers = {}
        for identity in sorted(found):
            known, problem = _answers(paths[identity], found[identity])
            if problem:
                problems.append(f"left out {paths[identity]}: {problem}")
                del found[identity]
            elif known is not None:
                answers[identity] = known
        reported_rows: list[Reported] = []
        try:
            reported_rows = literature.load(root)
        except UserError as error:
            problems.append(f"left out the literature: {error}")
        return cls([found[key] for key in sorted(found)], problems, answers, reported_rows)

    def only(self, **wanted: str) -> Collection:
        """The records that match: task, protocol, recipe and regime by name, device by a part of its name in any case.
        Raises UserError for a value no record has."""
        kept = list(self.records)
        for key, value in wanted.items():
            if not value:
                continue
            known = sorted({facts(r)[key] for r in self.records})
            if key == "device":
                kept = [r for r in kept if value.lower() in facts(r)[key].lower()]
                if not any(value.lower() in name.lower() for name in known):
                    raise UserError(f"no result of a device like {value!r}; known: {', '.join(known) or 'none'}")
            elif value not in known:
                raise unknown(key, value, known, where="the results")
            else:
                kept = [r for r in kept if facts(r)[key] == value]
        return replace(self, records=kept)


def facts(record: Record) -> dict[str, str]:
    """What results are grouped and filtered by."""
    environment = record["environment"]
    on_gpu = environment.get("device", "cuda" if "gpu" in environment else "cpu") == "cuda"
    return {
        "task": record["task"],
        "protocol": record["protocol"]["name"],
        "recipe": record["recipe"]["name"],
        "regime": record["regime"],
        "device": environment["gpu"] if on_gpu and "gpu" in environment else environment["cpu"],
        "data": str(record["data"].get("checksum", ""))[:8],
    }


def _answers(path: Path, record: Record) -> tuple[Answers | None, str]:
    """What the stored predictions say, or what is wrong with them. Records without labels say nothing."""
    place = path.with_name(Path(record["predictions"]["file"]).name)
    try:
        with np.load(place, allow_pickle=False) as file:
            if not {"prediction", "label", "example"} <= set(file):
                return None, ""
            prediction, label, example = (file[key] for key in ("prediction", "label", "example"))
    except (OSError, ValueError, KeyError) as error:
        return None, f"its predictions cannot be read: {error}"
    if not prediction.shape == label.shape == example.shape == (record["test"]["n"],):
        return None, f"it tells of {record['test']['n']} test examples and stores {prediction.shape} predictions"
    order = np.argsort(example, kind="stable")
    right = (prediction == label)[order]
    if abs(right.mean() - record["test"]["accuracy"]) > 1e-9:
        return None, f"its predictions are {right.mean():.4f} right, its accuracy is {record['test']['accuracy']:.4f}"
    return Answers(example[order], right), ""
