"""What profiles say: tables, growth with length beside what is declared, charts. A pure function of their files.

exponent    slope of log(time) over log(length), least squares, with its 95 % interval from three lengths on
crossover   the length from which a training step takes less time than the Transformer's at the same shape
MFU         counted forward and backward FLOPs per second over the rate of a large matrix product on this machine
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from scipy import stats

from lra.config.match import shaped
from lra.errors import UserError
from lra.registry import architectures
from lra.reports.plots import Series, chart
from lra.reports.sheets import Cell, Sheet
from lra.results.profiles import problem, read

Profile = dict[str, Any]
Shape = tuple[str, str, int, int, int, str]
BASE = "transformer"
CLOSE = 0.1
"""How far apart the two fastest rounds of a cell may be."""
COLUMNS = (
    "architecture", "L", "params", "GFLOP", "formula %", "fwd ms", "step ms", "IQR %", "decode µs", "tokens/s",
    "MFU %", "MiB", "activations", "tokens/MiB",
)  # fmt: skip
FIELDS = (
    "device", "task", "batch", "d_model", "n_layers", "direction", "architecture", "length", "failed", "parameters",
    "flops_forward", "flops_algorithmic", "flops_forward_backward", "matmul_counted", "matmul_by_formula", "uncounted",
    "forward_seconds", "forward_low", "forward_high", "forward_repeats", "train_seconds", "train_low", "train_high",
    "train_repeats", "step_seconds", "tokens_per_second", "mfu", "peak_bytes", "parameter_bytes", "gradient_bytes",
    "optimiser_bytes", "activation_bytes", "torch", "commit",
)  # fmt: skip


def load(root: Path) -> list[Profile]:
    """Every sound cell below <root>/profile, by device, shape, architecture and length."""
    found = [content for path in _files(root) if not problem(content := read(path))]
    return sorted(found, key=lambda p: (shape_of(p), p["cell"]["architecture"], p["cell"]["length"]))


def problems(root: Path) -> list[str]:
    """What is wrong with the other files there, one line each."""
    return [f"{path}: not a profile: {why}" for path in _files(root) if (why := problem(read(path)))]


def _files(root: Path) -> list[Path]:
    return sorted((root / "profile").rglob("*.json"))


def shape_of(profile: Profile) -> Shape:
    """What profiles have to share to be compared: device and threads, task, batch, width, depth, direction."""
    cell, environment = profile["cell"], profile["environment"]
    threads = environment.get("threads")
    device = environment.get("gpu") or environment["cpu"] + (
        f", {threads} thread{'s' * (threads > 1)}" if threads else ""
    )
    return (device, cell.get("task", ""), *(cell[key] for key in ("batch", "d_model", "n_layers", "direction")))


def by_shape(profiles: Iterable[Profile]) -> dict[Shape, list[Profile]]:
    found: dict[Shape, list[Profile]] = {}
    for profile in profiles:
        found.setdefault(shape_of(profile), []).append(profile)
    return found


def title(shape: Shape) -> str:
    device, task, batch, width, depth, direction = shape
    whole = f"classifier on {task}" if task else "encoder"
    return f"{whole}, batch {batch}, d_model {width}, {depth} layers, {direction}, {device}"


def exponent(lengths: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope of log(value) over log(length), and the half-width of its 95 % interval (NaN for two lengths). Raises
    UserError for fewer than two lengths."""
    if len(lengths) < 2:
        raise UserError("growth needs at least two lengths")
    fit = stats.linregress([math.log(n) for n in lengths], [math.log(v) for v in values])
    half = float(stats.t.ppf(0.975, len(lengths) - 2) * fit.stderr) if len(lengths) > 2 else math.nan
    return float(fit.slope), half


def crossover(values: Mapping[int, float], others: Mapping[int, float]) -> float | None:
    """The first length from which `values` stay below `others`, interpolated on logarithms; None where the last
    is not below. Both: length -> seconds, compared where both are known."""
    lengths = sorted(values.keys() & others.keys())
    gaps = [math.log(values[n] / others[n]) for n in lengths]
    if not gaps or gaps[-1] >= 0:
        return None
    for (n, a), (m, b) in reversed(list(pairwise(zip(lengths, gaps, strict=True)))):
        if a >= 0:
            return math.exp(math.log(n) + a / (a - b) * (math.log(m) - math.log(n)))
    return float(lengths[0])


def sheets(profiles: Sequence[Profile]) -> list[Sheet]:
    """For each shape: the cells, and growth with length where there are two lengths."""
    found = []
    for shape, cells in by_shape(profiles).items():
        notes = [failure(p) for p in cells if "failed" in p]
        notes += [
            f"{p['cell']['architecture']}: not counted: {', '.join(p['flops']['uncounted'])}"
            for p in cells if "failed" not in p and p["flops"]["uncounted"]
        ]  # fmt: skip
        notes += [_agreement(cells), *_unsteady(cells), NOTE]
        lines = [[Cell(text) for text in texts(p)] for p in cells if "failed" not in p]
        hidden = frozenset({"formula %", "IQR %", "tokens/MiB", "activations"})
        found.append(Sheet(f"Efficiency: {title(shape)}", COLUMNS, lines, notes, hidden))
        growth = [line for line in _growth(cells) if line]
        if growth:
            found.append(Sheet(f"Growth with length: {title(shape)}", GROWTH, growth, [GROWTH_NOTE]))
    return found


def _agreement(cells: Sequence[Profile]) -> str:
    """How far apart the two numbers of FLOPs are, where they are furthest."""
    worst, where = 0.0, ""
    for p in cells:
        formula = None if "failed" in p else p["flops"]["matmul_by_formula"]
        if formula and (apart := abs(p["flops"]["matmul_counted"] / formula - 1)) >= worst:
            worst, where = apart, f"{p['cell']['architecture']} at {p['cell']['length']:,}"
    return f"matrix work counted and by formula: at most {100 * worst:.2f} % apart ({where})" if where else "no formula"


def agreed(rounds: Sequence[Mapping[str, float]]) -> bool:
    """Whether the two lowest medians of each timing differ by at most CLOSE. rounds: timing -> median seconds."""
    for name in rounds[0]:
        lowest = sorted(taken[name] for taken in rounds if name in taken)[:2]
        if len(lowest) < 2 or lowest[1] > (1 + CLOSE) * lowest[0]:
            return False
    return True


def _unsteady(cells: Sequence[Profile]) -> list[str]:
    """Which cells no two rounds measured alike."""
    apart = [
        f"{p['cell']['architecture']} at {p['cell']['length']:,}"
        for p in cells if "failed" not in p and not agreed(p["rounds"])
    ]  # fmt: skip
    return [f"two fastest rounds more than {100 * CLOSE:.0f} % apart: {', '.join(apart)}"] if apart else []


NOTE = (
    "times: median of the fastest of several rounds; GFLOP: forward of one sequence, multiply-add = 2; formula: matrix "
    "work counted over what cost() says; IQR: of the training step, over its median; MiB: peak of a training step, "
    "activations: what it takes beside parameters, gradients and optimiser; MFU: of the rate of a large float32 matrix "
    "product here"
)


def failure(p: Profile) -> str:
    return f"{p['cell']['architecture']} at {p['cell']['length']:,}: {p['failed']}"


def texts(p: Profile) -> list[str]:
    """A profile's row, in the order of COLUMNS."""
    seconds, memory, work = p["seconds"], p["memory"], p["flops"]
    train, formula, step = seconds["train"], work["matmul_by_formula"], seconds.get("step")
    return [
        p["cell"]["architecture"], f"{p['cell']['length']:,}", f"{p['parameters'] / 1e3:,.0f}k",
        f"{work['forward'] / 1e9:.3g}", "-" if not formula else f"{100 * work['matmul_counted'] / formula:.1f}",
        f"{1e3 * seconds['forward']['median']:.1f}", f"{1e3 * train['median']:.1f}",
        f"{100 * (train['high'] - train['low']) / train['median']:.0f}",
        "-" if step is None else f"{1e6 * step['median']:,.0f}", f"{p['tokens_per_second']:,.0f}",
        f"{100 * p['mfu']:.1f}", f"{memory['peak_bytes'] / 2**20:,.0f}", f"{memory['activations'] / 2**20:,.0f}",
        f"{p['cell']['batch'] * p['cell']['length'] / (memory['peak_bytes'] / 2**20):,.0f}",
    ]  # fmt: skip


GROWTH = ("architecture", "lengths", "declared", "work", "time", "±", "memory", "faster than transformer")
GROWTH_NOTE = (
    "exponents of length: work counted, time and peak memory of a training step, with the half-width of the 95 % "
    "interval of that of time; last: from which length on a step is faster than the Transformer's"
)


def _growth(cells: Sequence[Profile]) -> list[list[Cell]]:
    measured = _by_architecture(cells)
    base = {n: p["seconds"]["train"]["median"] for n, p in measured.get(BASE, {}).items()}
    lines = []
    for name, by_length in sorted(measured.items()):
        lengths = sorted(by_length)
        if len(lengths) < 2:
            continue
        taken = {n: by_length[n]["seconds"]["train"]["median"] for n in lengths}
        slope, half = exponent(lengths, list(taken.values()))
        work, _ = exponent(lengths, [max(by_length[n]["flops"]["forward"], 1.0) for n in lengths])
        memory, _ = exponent(lengths, [max(by_length[n]["memory"]["peak_bytes"], 1) for n in lengths])
        at = None if name == BASE else crossover(taken, base)
        words = [
            name, f"{lengths[0]:,} .. {lengths[-1]:,}", declared(name), f"{work:.2f}", f"{slope:.2f}",
            "-" if math.isnan(half) else f"{half:.2f}", f"{memory:.2f}",
            "-" if name == BASE or not base else "not up to there" if at is None
            else f"from {at:,.0f}" if at > lengths[0] else "everywhere",
        ]  # fmt: skip
        lines.append([Cell(word) for word in words])
    return lines


def declared(name: str) -> str:
    """The scaling an architecture declares with the arguments of its variant; "-" for what is not of this project."""
    try:
        if "scaling" in architectures.facts(name.partition("/")[0]):
            return shaped(lambda: architectures.get(name)(d_model=64, n_layers=1, length=64)).scaling
    except UserError:
        pass
    return "-"


def _by_architecture(cells: Iterable[Profile]) -> dict[str, dict[int, Profile]]:
    found: dict[str, dict[int, Profile]] = {}
    for p in cells:
        if "failed" not in p:
            found.setdefault(p["cell"]["architecture"], {})[p["cell"]["length"]] = p
    return found


def charts(profiles: Sequence[Profile]) -> list[tuple[str, str]]:
    """(caption, SVG): time and memory of a training step against length, for each shape with several lengths."""
    found = []
    for shape, cells in by_shape(profiles).items():
        for what, label, values in curves(cells):
            series = [Series(name, points, colour=i) for i, (name, points) in enumerate(values)]
            svg = chart(what, "length", label, series, log_x=True, log_y=True, powers_of_two=True)
            found.append((f"{what}: {title(shape)}", svg))
    return found


Curve = tuple[str, list[tuple[float, float]]]


def curves(cells: Sequence[Profile]) -> list[tuple[str, str, list[Curve]]]:
    """(what, axis label, curves) of architectures that were measured at several lengths."""
    several = {name: by_length for name, by_length in sorted(_by_architecture(cells).items()) if len(by_length) > 1}
    if not several:
        return []
    time: list[Curve] = []
    memory: list[Curve] = []
    for name, by_length in several.items():
        time.append((name, [(n, 1e3 * by_length[n]["seconds"]["train"]["median"]) for n in sorted(by_length)]))
        memory.append((name, [(n, max(by_length[n]["memory"]["peak_bytes"], 1) / 2**20) for n in sorted(by_length)]))
    return [("Training step", "ms", time), ("Peak memory of a training step", "MiB", memory)]


def table_csv(profiles: Sequence[Profile]) -> str:
    """Long format, one cell a row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for p in profiles:
        device, task, batch, width, depth, direction = shape_of(p)
        head = [device, task, batch, width, depth, direction, p["cell"]["architecture"], p["cell"]["length"]]
        environment = p["environment"]
        tail = [environment.get("versions", {}).get("torch", ""), environment.get("commit", {}).get("hash", "")[:12]]
        if "failed" in p:
            writer.writerow([*head, p["failed"], *[""] * (len(FIELDS) - len(head) - 1 - len(tail)), *tail])
            continue
        work, seconds, memory = p["flops"], p["seconds"], p["memory"]
        timed = [f"{seconds[k][q]:.6g}" if q != "repeats" else seconds[k][q]
                 for k in ("forward", "train") for q in ("median", "low", "high", "repeats")]  # fmt: skip
        writer.writerow([
            *head, "", p["parameters"], *(f"{work[k]:.0f}" for k in ("forward", "algorithmic", "forward_backward",
            "matmul_counted")), "" if work["matmul_by_formula"] is None else f"{work['matmul_by_formula']:.0f}",
            " ".join(work["uncounted"]), *timed,
            f"{seconds['step']['median']:.6g}" if "step" in seconds else "", f"{p['tokens_per_second']:.1f}",
            f"{p['mfu']:.4f}", memory["peak_bytes"], memory["parameters"], memory["gradients"], memory["optimiser"],
            memory["activations"], *tail,
        ])  # fmt: skip
    return out.getvalue()
