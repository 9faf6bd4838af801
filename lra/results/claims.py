"""Published claims about architectures, and what the runs on diagnostic tasks say about them.

A claim is a file `results/claims/<id>.toml`:

    statement, source, published, remark    texts; published: the numbers of the source
    task, protocol, split, measure          what is compared: "whole" examples, "positions" or the "last" position
    solves, fails                           the share from which a task is solved, and up to which it is not
    [[cells]]                               architecture, expect ("solves" or "fails"), and where they differ from the
                                            claim's: task, protocol, settings (of the recipe `diagnostic`)
"""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lra.config.recipe import OF_FAMILY
from lra.errors import UserError, brief, unknown
from lra.results import diagnosis, result, statistics
from lra.results.record import RunRecord, Score
from lra.results.statistics import Estimate

RECIPE = OF_FAMILY["diagnostics"]
MEASURES = ("whole", "positions", "last")
TEXTS = ("statement", "source", "published", "task", "protocol")
OPTIONAL = {"remark": "", "split": "test", "measure": "positions"}


@dataclass(frozen=True)
class Cell:
    """One architecture of a claim. expect: "solves" or "fails"."""

    architecture: str
    expect: str
    task: str
    protocol: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def command(self, seed: int) -> str:
        """The shell command of a run that the claim needs."""
        words = ["lra", "run", self.task, self.architecture, "--recipe", RECIPE, "--protocol", self.protocol]
        for key, value in self.settings.items():
            words += ["--set", f"{key}={value}"]
        return shlex.join([*words, "--seed", str(seed)])

    def matches(self, record: RunRecord) -> bool:
        """Whether a run is one of this cell: task, protocol, architecture, and exactly these settings changed."""
        same = (record.task, record.protocol.name, record.architecture, record.recipe.name)
        if same != (self.task, self.protocol, self.architecture, RECIPE):
            return False
        return set(record.changed or {}) == set(self.settings) and all(
            _setting(record, key) == value for key, value in self.settings.items()
        )


@dataclass(frozen=True)
class Claim:
    id: str
    statement: str
    source: str
    published: str
    remark: str
    split: str
    measure: str
    solves: float
    fails: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Finding:
    """The result of a cell. outcome: "agrees", "disagrees", or "undecided"; reason: one line if undecided."""

    cell: Cell
    seeds: tuple[int, ...]
    estimate: Estimate | None
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class Judgement:
    """outcome: "agree" where every cell does, "disagree" where one is measured otherwise, else "undecided"."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> str:
        outcomes = {finding.outcome for finding in self.findings}
        return "disagree" if "disagrees" in outcomes else "agree" if outcomes == {"agrees"} else "undecided"


def folder() -> Path:
    """The folder of the claims: that of the results, else that of the checkout."""
    own = result.folder() / "claims"
    return own if own.is_dir() else Path(__file__).parents[2] / "results" / "claims"


def names() -> list[str]:
    """Ids of the claims, C2 before C10."""
    return sorted((path.stem for path in folder().glob("*.toml")), key=lambda name: (len(name), name))


def read(name: str) -> Claim:
    """A claim by id. Raises UserError for an unknown id and for a file that is not a claim."""
    if name not in names():
        raise unknown("claim", name, names())
    path = folder() / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    known = (*TEXTS, *OPTIONAL, "solves", "fails", "cells")
    for key in content:
        if key not in known:
            raise unknown("key", key, known, where=path.name)
    for key in (*TEXTS, "solves", "fails", "cells"):
        if key not in content:
            raise UserError(f"{path.name} lacks {key}")
    content = OPTIONAL | content
    if content["measure"] not in MEASURES:
        raise unknown("measure", content["measure"], MEASURES, where=path.name)
    if not 0 <= content["fails"] <= content["solves"] <= 1:
        raise UserError(
            f"{path.name}: fails is {content['fails']}, solves {content['solves']}; 0 <= fails <= solves <= 1"
        )
    cells = tuple(_cell(entry, content, path.name) for entry in content["cells"])
    texts = {key: content[key] for key in ("statement", "source", "published", *OPTIONAL, "solves", "fails")}
    return Claim(id=name, cells=cells, **texts)


def _cell(entry: Mapping[str, Any], claim: Mapping[str, Any], where: str) -> Cell:
    known = ("architecture", "expect", "task", "protocol", "settings")
    for key in entry:
        if key not in known:
            raise unknown("key", f"cells.{key}", [f"cells.{k}" for k in known], where=where)
    if entry.get("expect") not in ("solves", "fails"):
        raise UserError(f"{where}: cells.expect is {brief(entry.get('expect'))}; 'solves' or 'fails'")
    return Cell(**{"task": claim["task"], "protocol": claim["protocol"]} | dict(entry))


def judge(claim: Claim, records: Iterable[RunRecord]) -> Judgement:
    """Compare a claim with the runs: each cell by its 95 % interval, over seeds if there are several."""
    records = list(records)
    return Judgement(claim, tuple(_judge_cell(claim, cell, records) for cell in claim.cells))


def _judge_cell(claim: Claim, cell: Cell, records: Sequence[RunRecord]) -> Finding:
    runs = {record.seed: record for record in records if cell.matches(record)}
    scores = [run.test if claim.split == "test" else run.tests.get(claim.split) for run in runs.values()]
    values = [_measured(score, claim.measure) for score in scores if score is not None]
    if not values or len(values) < len(runs):
        return Finding(cell, (), None, "undecided", f"no run: `{cell.command(0)}`")
    seeds = tuple(sorted(runs))
    estimate = statistics.estimate(values, min(score.n for score in scores if score is not None))
    solved, failed = estimate.low >= claim.solves, estimate.high <= claim.fails
    # the curve of a run shows the shares on validation: it may rise while a longer split stays at chance
    if failed and cell.expect == "fails" and claim.split == "test" and claim.measure != "last":
        for run in runs.values():
            if (verdict := diagnosis.verdict(run)).word == "undecided":
                return Finding(cell, seeds, estimate, "undecided", verdict.reason)
    if solved or failed:
        return Finding(cell, seeds, estimate, "agrees" if solved == (cell.expect == "solves") else "disagrees")
    between = f"between {100 * claim.fails:g} and {100 * claim.solves:g} %, or too few runs"
    return Finding(cell, seeds, estimate, "undecided", between)


def _measured(score: Score, measure: str) -> float:
    """Whole examples, right positions or the last position; of a target without positions, the examples."""
    last = score.accuracy if score.last is None else score.last
    return {"whole": score.accuracy, "positions": score.share, "last": last}[measure]


def _setting(record: RunRecord, key: str) -> Any:
    """The value of a dotted key of the recipe, such as encoder.layer.n_heads."""
    section, *path = key.split(".")
    value: Any = getattr(record.recipe, section, {})
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
