"""Scaling laws: known parameters come back within their intervals, and thin data are refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import record, write
from typer.testing import CliRunner

import lra
from lra.cli.app import app
from lra.cli.scaling import METRICS
from lra.errors import UserError
from lra.reports import scaling as report
from lra.results.record import RunRecord
from lra.results.scaling import PowerLaw, _objective, _starts, fit_chinchilla, fit_power_law
from lra.results.statistics import Estimate

TRUE = {"E": 1.2, "A": 80.0, "B": 120.0, "alpha": 0.45, "beta": 0.4}
WIDTHS, TOKENS = np.geomspace(1e4, 3e6, 5), np.geomspace(1e5, 3e7, 5)


def grid(noise: float = 0.002, seed: int = 3, **changes: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, tokens and losses of a grid of runs."""
    law = TRUE | changes
    N, D = (a.ravel() for a in np.meshgrid(WIDTHS, TOKENS))
    exact = law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]
    return N, D, exact * np.exp(np.random.default_rng(seed).normal(0, noise, len(N)))


def holds(estimate: Estimate, true: float) -> bool:
    return estimate.low <= true <= estimate.high


@pytest.fixture(scope="module")
def law() -> Any:
    N, D, loss = grid()
    return fit_chinchilla(N, D, loss, flops=7 * N * D, resamples=40)


def test_known_parameters_come_back_within_their_intervals(law: Any) -> None:
    for name, true in TRUE.items():
        assert holds(getattr(law, name), true), (name, getattr(law, name), true)
    # and the intervals say something
    assert law.alpha.high - law.alpha.low < 0.15
    assert holds(law.exponent, TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"]))
    assert law.flops_per == pytest.approx(7)


def test_the_optimum_is_the_lowest_loss_of_its_budget(law: Any) -> None:
    budgets = np.array([1e11, 1e13])
    best = law.optimum(budgets)
    np.testing.assert_allclose(7 * best["parameters"] * best["tokens"], budgets)
    for factor in (0.7, 1.4):
        other = law.loss(factor * best["parameters"], best["tokens"] / factor)
        assert (other > best["loss"]).all()
    assert (best["low"] <= best["loss"]).all()
    assert (best["loss"] <= best["high"]).all()


def test_a_power_law_comes_back_too() -> None:
    x = np.geomspace(1e9, 1e14, 20)
    loss = (900 * x**-0.3 + 1.4) * np.exp(np.random.default_rng(1).normal(0, 0.002, 20))
    found = fit_power_law(x, loss, resamples=40)
    assert holds(found.a, 900)
    assert holds(found.b, 0.3)
    assert holds(found.c, 1.4)
    assert found.b.high - found.b.low < 0.1
    values, low, high = found.at(np.array([1e10, 1e13]))
    np.testing.assert_allclose(values, 900 * np.array([1e10, 1e13]) ** -0.3 + 1.4, rtol=0.01)
    assert (low <= values).all()
    assert (values <= high).all()


def test_the_gradient_is_that_of_the_objective() -> None:
    random = np.random.default_rng(0)
    x, target, weights = random.normal(size=(2, 9)), random.normal(size=9), random.integers(0, 3, 9).astype(float)
    # small residuals, where the loss is a square, and large ones
    for theta in (random.normal(size=5), np.array([-50.0, -50.0, 0.1, 0.3, 0.2])):
        _, gradient = _objective(theta, x, target, weights)
        steps = 1e-7 * np.eye(5)
        numeric = [
            (_objective(theta + s, x, target, weights)[0] - _objective(theta - s, x, target, weights)[0]) / 2e-7
            for s in steps
        ]
        np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-2)
    assert len(_starts(np.zeros(2), 0.0)) == 6 * 6 * 5 * 5 * 5


@pytest.mark.parametrize(
    ("x", "loss", "says"),
    [
        ([1, 10, 100], [3, 2, 1.5], "3 runs; at least 6"),
        ([1, 10, 100, 1, 10, 100], [3, 2, 1.5] * 2, "3 different values of compute; at least 4"),
        (np.linspace(1, 2, 8), np.linspace(3, 2, 8), "varies by a factor of 2; at least 8"),
        ([1, 10, 100, 1e3, 1e4, 1e5], [3, 2, 1.5, 1.2, 1.1, float("nan")], "not a finite number above 0"),
        ([1, 10, 100, 1e3], [3, 2], "4 values of compute for 2 losses"),
        (np.geomspace(1, 1e5, 12), 2 + 0.1 * np.sin(np.arange(12) * 2.1), "does not fall measurably with compute"),
    ],
)
def test_thin_data_carry_no_power_law(x: Any, loss: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        fit_power_law(x, loss, what="compute", resamples=8)


def test_thin_data_carry_no_law_in_two_quantities() -> None:
    N, D, loss = grid()
    for part, says in (
        (slice(0, 3), "3 runs; at least 10"),
        (N < 5e4, "2 different values of parameters; at least 3"),
        (D < 2e6, "varies by a factor of"),
    ):
        with pytest.raises(UserError, match=says):
            fit_chinchilla(N[part], D[part] ** 0.4, loss[part])
    together = np.repeat(WIDTHS, 3)
    with pytest.raises(UserError, match=r"vary together \(correlation of their logarithms 1\.00\)"):
        fit_chinchilla(together, 20 * together, np.linspace(3, 2, 15))
    with pytest.raises(UserError, match="24 values of tokens for 25 losses"):
        fit_chinchilla(N, D[1:], loss)
    with pytest.raises(UserError, match="FLOPs: the value of a run is not a finite number above 0"):
        fit_chinchilla(N, D, loss, flops=0 * N)
    flat = grid(noise=0.05, A=1e-6)
    with pytest.raises(UserError, match="does not fall measurably with parameters"):
        fit_chinchilla(*flat, resamples=8)


def test_a_resample_without_an_optimum_does_not_hide_the_interval(law: Any) -> None:
    rising = law.samples.copy()
    rising[0, 3] = -0.01
    best = replace(law, samples=rising).optimum(np.array([1e11, 1e13]))
    assert np.isfinite(best["low"]).all()
    assert np.isfinite(best["high"]).all()


def run_of(architecture: str, N: float, D: float, bits: float, number: int, **changes: Any) -> RunRecord:
    """A language run of N parameters on D tokens."""
    settings: dict[str, Any] = {
        "id": f"language-{architecture}-{number}", "parameters": round(N),
        "protocol": {"name": "chunks", "length": 1024},
        "test": {"accuracy": 0.5, "n": 2000, "correct": 1000, "bits": float(bits)},
        "flops": {"forward": float(2 * N * 1024), "forward_backward": float(6 * N * 1024)},
        "speed": {"examples": round(D / 1024), "examples_per_second": 1.0, "tokens_per_second": float(D / 100),
                  "training_seconds": 100.0},
    }  # fmt: skip
    return record(architecture, number, 0.5, **(settings | changes))


@pytest.fixture(scope="module")
def study() -> report.Study:
    runs = [run_of("gru", *point, number) for number, point in enumerate(zip(*grid(), strict=True))]
    runs += [run_of("s4d", 1e5, D, 3 - 0.1 * k, k) for k, D in enumerate((1e5, 1e6, 1e7))]
    # one width: no law in two quantities, but one in compute
    tokens = np.geomspace(1e5, 1e8, 9)
    runs += [run_of("lru", 1e5, D, 1 + 300 * (6e5 * D) ** -0.2, k) for k, D in enumerate(tokens)]
    (made,) = report.studies(runs, resamples=10)
    return made


def test_a_study_has_a_frontier_where_there_is_a_law_and_a_reason_where_there_is_none(study: report.Study) -> None:
    assert study.metric == "bits"
    assert study.laws["s4d"] == "3 runs; at least 10"
    frontier = study.frontier()
    assert set(frontier["architecture"]) == {"gru", "lru"}
    by_power, frontier = (frontier[frontier["law"] == law] for law in ("power law", "Chinchilla"))
    assert by_power["parameters"].isna().all()
    np.testing.assert_allclose(by_power["loss"], 1 + 300 * by_power["flops"] ** -0.2, rtol=0.01)
    assert (frontier["loss"].diff()[1:] < 0).all()
    np.testing.assert_allclose(6 * frontier["parameters"] * frontier["tokens"], frontier["flops"], rtol=1e-2)
    # not beyond the runs
    own = study.runs[study.runs["architecture"] == "gru"]
    assert frontier["flops"].max() == pytest.approx(own["flops"].max())
    shown, best = study.tables()
    by_name, best_of = (
        {row[0].text: dict(zip(table.columns, (cell.text for cell in row), strict=True)) for row in table.rows}
        for table in (shown, best)
    )
    assert by_name["gru"]["alpha"].startswith("0.4")
    assert by_name["s4d"]["alpha"] == by_name["lru"]["alpha"] == best_of["lru"]["N"] == "-"
    assert by_name["lru"]["b in C"].startswith("0.2")
    assert "s4d" not in best_of
    assert "s4d: no law in parameters and tokens: 3 runs; at least 10" in shown.notes
    specification = study.chart().to_dict()
    assert "FLOPs of training" in str(specification)


def test_of_runs_with_equal_compute_only_the_best_is_on_the_frontier() -> None:
    """The ids of two seeds, which order them, do not matter."""
    tokens = np.geomspace(1e5, 1e8, 9)
    for better in (0, 1):
        runs = [
            run_of("lru", 1e5, D, (1 + 300 * (6e5 * D) ** -0.2) * (1.01 if seed != better else 1), 10 * k + seed)
            for k, D in enumerate(tokens)
            for seed in (0, 1)
        ]
        (made,) = report.studies(runs, resamples=2)
        power = made.powers["lru"]
        assert isinstance(power, PowerLaw)
        assert power.b.count == len(tokens)


def test_compute_is_that_of_the_whole_training() -> None:
    plain = run_of("gru", 1e5, 1e6, 3.0, 0)
    other = [
        run_of("gru", 1e5, 1e6, 2.0, number, **{name: {"id": "another run"}})
        for number, name in enumerate(("compression", "init_from", "distillation"), 1)
    ]
    stages = {"total": {"seconds": 300.0, "examples": 3 * plain.speed.examples, "flops": 1.0}}
    pretrained = run_of("gru", 1e5, 1e6, 2.5, 4, compute=stages)
    frame = report.frame_of([plain, *other, pretrained], "bits")
    assert frame["seed"].tolist() == [0, 4]
    np.testing.assert_allclose(frame["flops"][1] / frame["flops"][0], 3)
    np.testing.assert_allclose(frame["tokens"][1] / frame["tokens"][0], 3)


def test_studies_of_different_data_have_different_names_and_a_loss_of_0_has_no_place_on_the_axis() -> None:
    runs = [run_of("gru", 1e5, 1e6 * k, 3 - k, k, data={"checksum": f"{k}" * 64}) for k in (1, 2, 3)]
    made = report.studies(runs)
    assert [study.title[-13:] for study in made] == ["data 11111111", "data 22222222", "data 33333333"]
    (one,) = report.studies([run_of("gru", 1e5, 1e6 * k, 3 - k, k) for k in (1, 2, 3)])
    scale = next(layer["encoding"]["y"]["scale"] for layer in panels(one.chart().to_dict()) if "encoding" in layer)
    assert scale["domain"] == pytest.approx([1 / 1.05, 2 * 1.05])


def panels(specification: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of every panel of a figure."""
    parts = [part for key in ("layer", "hconcat", "vconcat", "concat") for part in specification.get(key, [])]
    return [specification, *(layer for part in parts for layer in panels(part))]


def test_the_loss_is_that_of_the_selected_checkpoint() -> None:
    curve = [{"step": 100, "validation_loss": 2.0}, {"step": 300, "validation_loss": 1.5}]
    run = record("gru", 0, 0.25, curve=curve)
    assert (report.value(run, "loss"), report.value(run, "error"), report.value(run, "bits")) == (1.5, 0.75, None)
    with pytest.raises(UserError, match="did you mean 'loss'"):
        report.studies([run], "los")
    with pytest.raises(UserError, match="no run with this metric"):
        report.studies([run], "bits")


def test_command_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    for number, point in enumerate(list(zip(*grid(), strict=True))[:5]):
        write(tmp_path, run_of("gru", *point, number), "language")
    done = CliRunner().invoke(app, ["scaling", "listops", "--out", str(tmp_path / "figures")])
    assert done.exit_code == 0, done.output
    assert "5 runs; at least 10" in done.output
    names = {path.suffix for path in (tmp_path / "figures").iterdir()}
    assert names == {".csv", ".svg"}
    (made,) = lra.scaling("listops")
    assert len(made.runs) == 5
    assert CliRunner().invoke(app, ["scaling", "listops", "--metric", "lost"]).exit_code == 2


def test_the_command_knows_the_metrics_of_the_report() -> None:
    assert set(METRICS) == set(report.METRICS)
