"""Scaling studies: loss against compute, parameters and tokens, from the runs of a task.

The runs of a study share task, protocol, data, recipe name, regime and number of test examples. They differ in the
architecture and in the settings that a sweep varies. For each architecture:

    frontier by Chinchilla's law    the best loss, parameters and tokens for a budget C = kappa N D
    power law in compute            fitted to the runs that beat every run of at most their compute

C is the FLOPs of training: forward and backward at the protocol's full length, for all examples seen, those of
self-pretraining included. N is the number of parameters, D the number of training tokens with padding. Neither law is
extrapolated beyond the compute of the runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lra import files
from lra.errors import UserError, unknown
from lra.reports.table import Table, TableCell
from lra.results import result
from lra.results.record import RunRecord
from lra.results.scaling import Chinchilla, PowerLaw, fit_chinchilla, fit_power_law
from lra.results.statistics import Estimate

if TYPE_CHECKING:
    import pandas as pd

PLACES = tuple(place for place in result.PLACES if place != "smoke")
"""The parts of the results folder that studies read."""
METRICS = {
    "bits": "bits per token of the test split",
    "loss": "loss of the selected checkpoint on the selection split",
    "error": "share of wrong test answers",
}
RUNS = ("architecture", "parameters", "tokens", "flops", "loss", "seed", "id")
FRONTIER = ("architecture", "law", "flops", "parameters", "tokens", "loss", "low", "high")
POINTS = 25
"""Budgets of a frontier, from the cheapest to the dearest run."""
LAWS = ("architecture", "runs", "E", "alpha", "beta", "b in C")
BEST = ("architecture", "N ~ C^", "FLOP", "N", "D", "loss")
MISSING = "-"
LAWS_NOTE = (
    "E, alpha, beta: of E + A / N^alpha + B / D^beta; b in C: of a C^-b + c, fitted to the runs that beat every run of "
    "at most their compute. Intervals of 95 %, by bootstrap over runs"
)
BEST_NOTE = (
    "the lowest loss at the compute of the largest run, with its parameters N and training tokens D where there is a "
    "law in both; N ~ C^: the exponent of the best number of parameters. No law is extrapolated beyond the largest run"
)


@dataclass(frozen=True)
class Study:
    """runs: one row for each run, columns as in RUNS, the cheapest first. laws, powers: the law of each architecture,
    or the reason why there is none."""

    title: str
    metric: str
    runs: pd.DataFrame
    laws: Mapping[str, Chinchilla | str]
    powers: Mapping[str, PowerLaw | str]

    def frontier(self) -> pd.DataFrame:
        """The compute-optimal loss of each architecture with its interval, columns as in FRONTIER: by Chinchilla's law
        with parameters and tokens, else by the power law in compute. Architectures without either are left out."""
        import pandas as pd

        parts = []
        for name, own in self.runs.groupby("architecture", sort=True):
            budgets = np.geomspace(own["flops"].min(), own["flops"].max(), POINTS)
            law, power = self.laws[str(name)], self.powers[str(name)]
            if isinstance(law, Chinchilla):
                part = pd.DataFrame(law.optimum(budgets)).assign(law="Chinchilla")
            elif isinstance(power, PowerLaw):
                values, low, high = power.at(budgets)
                part = pd.DataFrame({"loss": values, "low": low, "high": high}).assign(law="power law")
            else:
                continue
            parts.append(part.assign(architecture=name, flops=budgets).reindex(columns=list(FRONTIER)))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(FRONTIER))

    def tables(self) -> list[Table]:
        """The laws of each architecture, with notes on those that are refused, and the compute-optimal allocation of
        its largest budget."""
        laws, refused = [], []
        for name, law in self.laws.items():
            power = self.powers[name]
            cells = dict.fromkeys(LAWS, MISSING) | {"architecture": name}
            cells["runs"] = str(int((self.runs["architecture"] == name).sum()))
            if isinstance(law, Chinchilla):
                cells |= {"E": _interval(law.E), "alpha": _interval(law.alpha), "beta": _interval(law.beta)}
            else:
                refused.append(f"{name}: no law in parameters and tokens: {law}")
            if isinstance(power, PowerLaw):
                cells["b in C"] = _interval(power.b)
            else:
                refused.append(f"{name}: no power law in compute: {power}")
            laws.append([TableCell(cells[column]) for column in LAWS])
        note = f"loss: {METRICS[self.metric]}. {LAWS_NOTE}"
        made = [Table(f"Scaling: {self.title}", LAWS, laws, [note, *refused], hidden=frozenset({"E"}))]
        rows = [self._best(last) for _, last in self.frontier().groupby("architecture", sort=True).tail(1).iterrows()]
        return [*made, Table(f"Compute-optimal: {self.title}", BEST, rows, [BEST_NOTE])] if rows else made

    def _best(self, last: pd.Series) -> list[TableCell]:
        name = str(last["architecture"])
        law, loss = self.laws[name], f"{last['loss']:.3f} [{last['low']:.3f}, {last['high']:.3f}]"
        shown = [name, MISSING, f"{last['flops']:.3g}", MISSING, MISSING, loss]
        if isinstance(law, Chinchilla):
            shown[1], shown[3], shown[4] = _interval(law.exponent), f"{last['parameters']:.3g}", f"{last['tokens']:.3g}"
        return [TableCell(text) for text in shown]

    def chart(self) -> Any:
        """Altair: loss of each run against compute, and the frontiers with their intervals."""
        from lra.reports import charts

        return charts.frontier(self.runs, self.frontier(), METRICS[self.metric], f"Scaling: {self.title}")

    def write(self, folder: Path, formats: Sequence[str]) -> list[Path]:
        """Write runs and frontier as CSV and the chart in each of the formats ("svg", "png", "pdf")."""
        from lra.reports import charts

        stem, written = charts.stem(f"scaling {self.title}"), []
        for name, frame in (("runs", self.runs), ("frontier", self.frontier())):
            path = folder / f"{stem}-{name}.csv"
            with files.atomic(path) as temporary:
                text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
                temporary.write_text(text, encoding="utf-8")
            written.append(path)
        return [*written, *(charts.save(self.chart(), folder / f"{stem}.{form}") for form in formats)]


def studies(records: Iterable[RunRecord], metric: str = "", resamples: int = 200) -> list[Study]:
    """The studies among some runs. metric: one of METRICS, by default bits where the target is the next token, else the
    loss. Raises UserError for an unknown metric, and without runs that have it."""
    if metric and metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in records:
        groups.setdefault(_group(record), []).append(record)
    titles = Counter(_title(runs[0]) for runs in groups.values())
    made = []
    for _, runs in sorted(groups.items()):
        chosen = metric or ("bits" if all(run.test.bits is not None for run in runs) else "loss")
        frame, title = frame_of(runs, chosen), _title(runs[0])
        if titles[title] > 1:
            title += f", data {runs[0].data.checksum[:8]}"
        if len(frame):
            made.append(_study(title, chosen, frame, resamples))
    if not made:
        raise UserError("no run with this metric, training FLOPs and tokens; `lra sweep` makes runs for a study")
    return made


def frame_of(records: Iterable[RunRecord], metric: str) -> pd.DataFrame:
    """One row for each run that has the metric, FLOPs and tokens; columns as in RUNS, the cheapest first.

    Runs that owe their result to another run (compressed, started from its weights, or with a teacher) are left out:
    their compute is not all of their training.
    """
    import pandas as pd

    rows = []
    for run in records:
        loss, speed, work = value(run, metric), run.speed, run.flops.forward_backward
        if run.compression or run.init_from or run.distillation:
            continue
        if loss is None or not (work and speed.tokens_per_second and speed.training_seconds and speed.examples):
            continue
        examples = run.compute["total"].examples if run.compute else speed.examples
        tokens = speed.tokens_per_second * speed.training_seconds * examples / speed.examples
        rows.append((run.architecture, run.parameters, tokens, work * examples, loss, run.seed, run.id))
    return pd.DataFrame(rows, columns=list(RUNS)).sort_values(["flops", "id"], ignore_index=True)


def value(run: RunRecord, metric: str) -> float | None:
    """The metric of a run; None where it was not measured."""
    if metric == "bits":
        return run.test.bits
    if metric == "error":
        return 1 - run.test.share
    best = run.validation.best_step
    return next((point.validation_loss for point in run.curve if point.step == best), None)


def _group(run: RunRecord) -> tuple[Any, ...]:
    return (run.task, run.protocol.name, run.recipe.name, run.regime, run.data.checksum, run.test.n)


def _title(run: RunRecord) -> str:
    return f"{run.task} ({run.protocol.name}), recipe {run.recipe.name}, {run.regime}, n = {run.test.n:,}"


def _study(title: str, metric: str, frame: pd.DataFrame, resamples: int) -> Study:
    laws: dict[str, Chinchilla | str] = {}
    powers: dict[str, PowerLaw | str] = {}
    for name, own in frame.groupby("architecture", sort=True):
        try:
            laws[str(name)] = fit_chinchilla(
                own["parameters"], own["tokens"], own["loss"], flops=own["flops"], resamples=resamples
            )
        except UserError as error:
            laws[str(name)] = str(error)
        # of runs with equal compute, such as seeds, the best one
        own = own.sort_values(["flops", "loss"])
        front = own[own["loss"] < own["loss"].cummin().shift(fill_value=np.inf)]
        try:
            powers[str(name)] = fit_power_law(front["flops"], front["loss"], what="compute", resamples=resamples)
        except UserError as error:
            powers[str(name)] = str(error)
    return Study(title, metric, frame, laws, powers)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
