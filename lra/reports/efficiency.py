"""Tables of profiles: cells, and growth with length beside the declared scaling. Functions of the profile files alone.

exponent    slope of log(time) over log(length), least squares, with its 95 % interval from three lengths on
crossover   the length from which a training step takes less time than the Transformer's at the same shape
MFU         counted forward and backward FLOPs per second over the rate of the fastest matrix product at these shapes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from scipy import stats

from lra.config.match import build_on_meta
from lra.errors import UserError
from lra.registry import PLUGIN, architectures
from lra.reports.ranking import Leaderboard
from lra.reports.table import Table, TableCell
from lra.results import profile as stored
from lra.results.profile import CLOSE, AnyProfile, FailedProfile, Profile, agreed, machine_name

Shape = tuple[str, str, str, int, int, int, str]
BASE = "transformer"
OUTSIDE = "outside"
"""Family of an architecture that is not a file of this project."""
COLUMNS = (
    "architecture", "L", "params", "GFLOP", "formula %", "fwd ms", "step ms", "IQR %", "decode µs", "tokens/s",
    "MFU %", "MiB", "activations", "tokens/MiB",
)  # fmt: skip
FIELDS = (
    "device", "dtype", "task", "batch", "d_model", "n_layers", "direction", "architecture", "length", "failed",
    "parameters", "flops_forward", "flops_algorithmic", "flops_forward_backward", "matmul_counted", "matmul_by_formula",
    "uncounted", "forward_seconds", "forward_low", "forward_high", "forward_repeats", "train_seconds", "train_low",
    "train_high", "train_repeats", "step_seconds", "tokens_per_second", "mfu", "peak_bytes", "parameter_bytes",
    "gradient_bytes", "optimiser_bytes", "activation_bytes", "torch", "commit",
)  # fmt: skip


def load(root: Path) -> list[AnyProfile]:
    """Every valid cell below <root>/profile, ordered by device, shape, architecture and length. If a cell is stored
    twice, the file at the newer place (`Cell.path`) counts."""
    profiles, _ = stored.load(root)
    cells = {(shape_of(profile), profile.cell.architecture, profile.cell.length): profile for profile in profiles}
    return [cells[key] for key in sorted(cells)]


def problems(root: Path) -> list[str]:
    """One line for each invalid file below <root>/profile."""
    return stored.load(root)[1]


def shape_of(profile: AnyProfile) -> Shape:
    """The fields that comparable profiles share: device and threads, dtype, task, batch, width, depth, direction."""
    c = profile.cell
    return (machine_name(profile.environment), c.dtype, c.task, c.batch, c.d_model, c.n_layers, c.direction)


def measured(profiles: Iterable[AnyProfile]) -> list[Profile]:
    """The profiles of cells whose measurement did not fail."""
    return [profile for profile in profiles if isinstance(profile, Profile)]


def _place(profile: AnyProfile) -> str:
    return f"{profile.cell.architecture} at {profile.cell.length:,}"


AnyKind = TypeVar("AnyKind", Profile, AnyProfile)


def by_shape(profiles: Iterable[AnyKind]) -> dict[Shape, list[AnyKind]]:
    groups: dict[Shape, list[AnyKind]] = {}
    for profile in profiles:
        groups.setdefault(shape_of(profile), []).append(profile)
    return groups


def title(shape: Shape) -> str:
    device, dtype, task, batch, width, depth, direction = shape
    whole = f"classifier on {task}" if task else "encoder"
    return f"{whole}, batch {batch}, d_model {width}, {depth} layers, {direction}, {dtype}, {device}"


def family(architecture: str) -> str:
    """The family of an architecture; OUTSIDE for one that is not a file of this project."""
    try:
        known = architectures.family(architecture.partition("/")[0])
    except UserError:
        return OUTSIDE
    return OUTSIDE if known == PLUGIN else known


def frame(profiles: Sequence[AnyProfile]) -> pd.DataFrame:
    """One row per cell: the columns of FIELDS, and those of the charts (milliseconds, MiB, GFLOP, family)."""
    # dtype object keeps counts whole in a column with missing values
    table = pd.DataFrame([_values(p) for p in profiles], columns=[*FIELDS, "family", "rounds"], dtype=object)
    times = [f for f in FIELDS if f.endswith(("_seconds", "_low", "_high"))]
    table = table.astype(dict.fromkeys([*times, "tokens_per_second", "mfu"], "float64"))
    return table.assign(
        forward_ms=1e3 * table["forward_seconds"], train_ms=1e3 * table["train_seconds"],
        # a chart has a logarithmic axis
        peak_mib=table["peak_bytes"].astype("float64").clip(lower=1) / 2**20,
        gflop=table["flops_forward"].astype("float64") / 1e9,
    )  # fmt: skip


def _values(p: AnyProfile) -> dict[str, Any]:
    values: dict[str, Any] = dict(zip(FIELDS, shape_of(p), strict=False)) | {
        "architecture": p.cell.architecture, "length": p.cell.length, "failed": "",
        "torch": p.environment.versions.get("torch", ""), "family": family(p.cell.architecture),
        "commit": p.environment.commit.hash[:12],
    }  # fmt: skip
    if isinstance(p, FailedProfile):
        return values | {"failed": p.failed}
    work, seconds, memory = p.flops, p.seconds, p.memory
    formula = work.matmul_by_formula
    values |= {f"flops_{key}": round(getattr(work, key)) for key in ("forward", "algorithmic", "forward_backward")}
    for key, timing in (("forward", seconds.forward), ("train", seconds.train)):
        values |= {f"{key}_low": timing.low, f"{key}_high": timing.high, f"{key}_repeats": timing.repeats}
        values[f"{key}_seconds"] = timing.median
    return values | {
        "parameters": p.parameters, "matmul_counted": round(work.matmul_counted),
        "matmul_by_formula": None if formula is None else round(formula), "uncounted": " ".join(work.uncounted),
        "step_seconds": None if seconds.step is None else seconds.step.median,
        "tokens_per_second": p.tokens_per_second, "mfu": p.mfu, "peak_bytes": round(memory.peak_bytes),
        "parameter_bytes": round(memory.parameters), "gradient_bytes": round(memory.gradients),
        "optimiser_bytes": round(memory.optimiser), "activation_bytes": round(memory.activations),
        "rounds": "agree" if agreed(p.rounds) else "differ",
    }  # fmt: skip


def table_csv(profiles: Sequence[AnyProfile]) -> str:
    """Long format, one cell a row."""
    return frame(profiles)[list(FIELDS)].to_csv(index=False, float_format="%.6g", lineterminator="\n")


def exponent(lengths: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope of log(value) over log(length), and the half-width of its 95 % interval (NaN for two lengths). Raises
    UserError for fewer than two lengths."""
    if len(lengths) < 2:
        raise UserError("growth needs at least two lengths")
    fit = stats.linregress([math.log(n) for n in lengths], [math.log(v) for v in values])
    half = float(stats.t.ppf(0.975, len(lengths) - 2) * fit.stderr) if len(lengths) > 2 else math.nan
    return float(fit.slope), half


def crossover(values: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """The first length from which `values` stay below `others`, interpolated on logarithms; None if they are not below
    at the longest length. Both: length -> seconds, compared at the lengths that both have."""
    lengths = sorted(values.keys() & others.keys())
    gaps = [math.log(values[n] / others[n]) for n in lengths]
    if not gaps or gaps[-1] >= 0:
        return None
    for (n, a), (m, b) in reversed(list(pairwise(zip(lengths, gaps, strict=True)))):
        if a >= 0:
            return math.exp(math.log(n) + a / (a - b) * (math.log(m) - math.log(n)))
    return float(lengths[0])


def tables(profiles: Sequence[AnyProfile]) -> list[Table]:
    """For each shape: the cells, and growth with length if there are two lengths."""
    made = []
    for shape, cells in by_shape(profiles).items():
        good = measured(cells)
        notes = [failure(p) for p in cells if isinstance(p, FailedProfile)]
        notes += [
            f"{p.cell.architecture}: not counted: {', '.join(p.flops.uncounted)}" for p in good if p.flops.uncounted
        ]
        notes += [_agreement(good), *_suspect(good), NOTE]
        rows = [[TableCell(text) for text in texts(p)] for p in good]
        hidden = frozenset({"formula %", "IQR %", "tokens/MiB", "activations"})
        made.append(Table(f"Efficiency: {title(shape)}", COLUMNS, rows, notes, hidden))
        if growth := _growth(good):
            made.append(Table(f"Growth with length: {title(shape)}", GROWTH, growth, [GROWTH_NOTE]))
    return made


def _agreement(cells: Sequence[Profile]) -> str:
    """The largest difference between counted and declared FLOPs, and its cell."""
    worst, where = 0.0, ""
    for p in cells:
        formula = p.flops.matmul_by_formula
        if formula and (apart := abs(p.flops.matmul_counted / formula - 1)) >= worst:
            worst, where = apart, _place(p)
    return f"work counted and by formula: at most {100 * worst:.2f} % apart ({where})" if where else "no formula"


def _suspect(cells: Sequence[Profile]) -> list[str]:
    """A line for each reason to distrust timings, with the cells."""
    reasons = {
        f"two fastest rounds more than {100 * CLOSE:.0f} % apart": [p for p in cells if not agreed(p.rounds)],
        "forward timed slower than the whole step": [
            p for p in cells if p.seconds.forward.median > p.seconds.train.median
        ],
        "MFU left out, above 100 % of a peak measured at other shapes": [p for p in cells if p.mfu > 1],
    }
    return [f"{why}: {', '.join(map(_place, wrong))}" for why, wrong in reasons.items() if wrong]


NOTE = (
    "times: median of the fastest of several rounds; GFLOP: forward of one sequence, multiply-add = 2; formula: work "
    "of matrix products and kernels, counted, in % of cost(); IQR: of the training step, over its median; MiB: peak of "
    "a training step; activations: its memory without parameters, gradients and optimiser states; MFU: relative to the "
    "rate of the fastest matrix product at these shapes and in this dtype"
)


def failure(p: FailedProfile) -> str:
    return f"{_place(p)}: {p.failed}"


def texts(p: Profile) -> list[str]:
    """A profile's row, in the order of COLUMNS."""
    seconds, memory, work = p.seconds, p.memory, p.flops
    train, formula, step = seconds.train, work.matmul_by_formula, seconds.step
    return [
        p.cell.architecture, f"{p.cell.length:,}", f"{p.parameters / 1e3:,.0f}k",
        f"{work.forward / 1e9:.3g}", "-" if not formula else f"{100 * work.matmul_counted / formula:.1f}",
        f"{1e3 * seconds.forward.median:.1f}", f"{1e3 * train.median:.1f}",
        f"{100 * (train.high - train.low) / train.median:.0f}",
        "-" if step is None else f"{1e6 * step.median:,.0f}", f"{p.tokens_per_second:,.0f}",
        "-" if p.mfu > 1 else f"{100 * p.mfu:.1f}", f"{memory.peak_bytes / 2**20:,.0f}",
        f"{memory.activations / 2**20:,.0f}",
        f"{p.cell.batch * p.cell.length / (memory.peak_bytes / 2**20):,.0f}",
    ]  # fmt: skip


GROWTH = ("architecture", "lengths", "declared", "work", "time", "±", "memory", "faster than transformer")
GROWTH_NOTE = (
    "exponents of length: counted work, time and peak memory of a training step; ±: half-width of the 95 % interval of "
    "the exponent of time. Only lengths at which two rounds agree. Last column: the length from which a step is faster "
    "than the Transformer's"
)


def _growth(cells: Sequence[Profile]) -> list[list[TableCell]]:
    by_name = _by_architecture(p for p in cells if agreed(p.rounds))
    base = {n: p.seconds.train.median for n, p in by_name.get(BASE, {}).items()}
    rows = []
    for name, by_length in sorted(by_name.items()):
        lengths = sorted(by_length)
        if len(lengths) < 2:
            continue
        seconds = {n: by_length[n].seconds.train.median for n in lengths}
        slope, half = exponent(lengths, list(seconds.values()))
        work, _ = exponent(lengths, [max(by_length[n].flops.forward, 1.0) for n in lengths])
        memory, _ = exponent(lengths, [max(by_length[n].memory.peak_bytes, 1) for n in lengths])
        at = None if name == BASE else crossover(seconds, base)
        words = [
            name, f"{lengths[0]:,} .. {lengths[-1]:,}", declared(name), f"{work:.2f}", f"{slope:.2f}",
            "-" if math.isnan(half) else f"{half:.2f}", f"{memory:.2f}",
            "-" if name == BASE or not seconds.keys() & base else "not up to there" if at is None
            else f"from {at:,.0f}" if at > lengths[0] else "everywhere",
        ]  # fmt: skip
        rows.append([TableCell(word) for word in words])
    return rows


def declared(name: str) -> str:
    """The scaling that an architecture of the project declares with the arguments of its variant; "-" for others."""
    try:
        if "scaling" in architectures.facts(name.partition("/")[0]):
            return build_on_meta(lambda: architectures.get(name)(d_model=64, n_layers=1, length=64)).scaling
    except UserError:
        pass
    return "-"


def _by_architecture(cells: Iterable[Profile]) -> dict[str, dict[int, Profile]]:
    by_name: dict[str, dict[int, Profile]] = {}
    for p in cells:
        by_name.setdefault(p.cell.architecture, {})[p.cell.length] = p
    return by_name


def by_architecture(profiles: Iterable[AnyProfile]) -> dict[tuple[Shape, str], list[Profile]]:
    """The measured cells of each shape and architecture, shortest first."""
    found: dict[tuple[Shape, str], list[Profile]] = {}
    for p in measured(profiles):
        found.setdefault((shape_of(p), p.cell.architecture), []).append(p)
    return {key: sorted(cells, key=lambda p: p.cell.length) for key, cells in found.items()}


CURVES = {"training": ("train_ms", "Training step", "ms"), "memory": ("peak_mib", "Peak memory of a step", "MiB")}
"""Figures against length: key -> (column, title, unit)."""


def curves(profiles: Sequence[AnyProfile]) -> dict[Shape, pd.DataFrame]:
    """For each shape the cells of architectures measured at two or more lengths, as `charts.by_length` takes them."""
    charted = {}
    for shape, cells in by_shape(measured(profiles)).items():
        table = frame(cells)
        lengths = table.groupby("architecture")["length"].transform("nunique") if len(table) else table["length"]
        if len(table := table[lengths > 1]):
            charted[shape] = table[list(CHARTED)].astype({"length": "int64"})
    return charted


CHARTED = (
    "architecture", "family", "length", "train_ms", "forward_ms", "peak_mib", "tokens_per_second", "gflop", "rounds",
)  # fmt: skip


def figures(profiles: Sequence[AnyProfile]) -> Iterator[tuple[str, Any]]:
    """(file name without its ending, figure) for each shape and entry of CURVES, by family. Raises ImportError without
    Altair."""
    from lra.reports import charts

    for shape, table in curves(profiles).items():
        device, dtype, task, batch, width, depth, direction = shape
        stem = charts.stem(f"{device}-{dtype}-{task or 'encoder'}-d{width}-n{depth}-b{batch}-{direction}")
        for key, (column, what, unit) in CURVES.items():
            panels = charts.growth(table, column, unit, interactive=False)
            yield f"{stem}-{key}", charts.figure(panels, f"{what}: {title(shape)}")


METRICS = (
    "task", "protocol", "data", "recipe", "regime", "device", "n", "architecture", "accuracy", "flops_per_token",
    "points_per_mflop_per_token", "longest_length", "longest_peak_bytes", "longest_per_peak_mib", "tokens_per_second",
)  # fmt: skip
METRIC_COLUMNS = ("architecture", "acc %", "MFLOP/token", "points/MFLOP", "longest", "MiB", "tokens/MiB", "tokens/s")
METRICS_NOTE = (
    "points/MFLOP: accuracy in points over forward MFLOPs per token; tokens/MiB: tokens of the longest profiled "
    "sequence over the peak memory of its training step; tokens/s: of the profiled training step nearest in length. "
    "Profile of one machine; - without a measurement"
)


def metrics(board: Leaderboard, profiles: Sequence[AnyProfile]) -> pd.DataFrame:
    """Performance over FLOPs per token, longest sequence over peak memory, and tokens per second of each ranked row.

    Columns as in METRICS; empty without a measurement. The longest sequence is that of the profiles of an architecture
    at the shape and on the machine of its row; tokens of a batch are added up.
    """
    cells = by_architecture(profiles)
    rows = []
    for group, ranked in board.groups.items():
        for row in ranked:
            speed = longest = peak = ratio = None
            if row.profile is not None:
                last = cells[shape_of(row.profile), row.profile.cell.architecture][-1]
                speed, longest, peak = row.profile.tokens_per_second, last.cell.length, last.memory.peak_bytes
                ratio = last.cell.batch * longest / (peak / 2**20)
            rows.append(
                (group.task, group.protocol, group.data, group.recipe_name, group.regime, group.device, group.tested,
                 row.label, row.accuracy.mean, row.flops_per_token, row.points_per_work, longest, peak, ratio, speed)
            )  # fmt: skip
    frame = pd.DataFrame(rows, columns=list(METRICS))
    numbers = [name for name in METRICS[8:] if name != "longest_length"]
    return frame.astype({"longest_length": "Int64"} | dict.fromkeys(numbers, "float64"))


def metric_tables(frame: pd.DataFrame) -> list[Table]:
    """The tables of `metrics`, one for each group of comparable rows."""
    made = []
    for key, rows in frame.groupby(list(METRICS[:7]), sort=False):
        task, protocol, data, recipe, regime, device, n = key
        forms: tuple[tuple[str, Callable[[Any], str]], ...] = (
            ("architecture", str), ("accuracy", lambda v: f"{100 * v:.2f}"),
            ("flops_per_token", lambda v: f"{v / 1e6:.3g}"), ("points_per_mflop_per_token", "{:.3g}".format),
            ("longest_length", "{:,}".format), ("longest_peak_bytes", lambda v: f"{v / 2**20:,.0f}"),
            ("longest_per_peak_mib", "{:,.0f}".format),
            ("tokens_per_second", "{:,.0f}".format),
        )  # fmt: skip
        cells = [
            [TableCell("-" if pd.isna(row[name]) else form(row[name])) for name, form in forms]
            for _, row in rows.iterrows()
        ]
        title = f"Efficiency: {task} ({protocol}, data {data}), recipe {recipe}, {regime}, n = {n:,}, {device}"
        made.append(Table(title, METRIC_COLUMNS, cells, [METRICS_NOTE]))
    return made


OVERVIEW = ("transformer", "local", "performer", "hyena", "gru", "s4d", "mamba", "moe")
"""One well-known architecture of each family, and two more."""


def overview(profiles: Sequence[AnyProfile]) -> Any:
    """Time of a training step against length for OVERVIEW, of the shape with most cells; None without profiles."""
    from lra.reports import charts

    chosen = {shape: table[table["architecture"].isin(OVERVIEW)] for shape, table in curves(profiles).items()}
    shape = max(chosen, key=lambda shape: len(chosen[shape]), default=None)
    if shape is None or not len(chosen[shape]):
        return None
    chart = charts.by_length(chosen[shape], "train_ms", "", "ms", interactive=False)
    words = charts.wrapped(title(shape))
    return chart.properties(width=430, height=240, title={"text": "Time of a training step", "subtitle": words})


def write_figures(profiles: Sequence[AnyProfile], folder: Path, suffix: str = ".png") -> list[Path]:
    """Save `figures`, and `overview` as overview.svg, which the README shows."""
    from lra.reports import charts

    written = [charts.save(figure, folder / f"{stem}{suffix}") for stem, figure in figures(profiles)]
    chart = overview(profiles)
    return [*written, charts.save(chart, folder / "overview.svg")] if chart else written
