"""`lra compare`: the paired difference of two runs, and the settings that differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import modified, record, write
from scipy import optimize, stats
from typer.testing import CliRunner

from lra.cli.app import app
from lra.errors import UserError
from lra.reports.comparison import compare, find, ladder
from lra.results.collection import Collection
from lra.results.statistics import mcnemar, paired_difference


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.repeat([True, True, False, False], [both, only_a, only_b, neither])
    return a, np.repeat([True, False, True, False], [both, only_a, only_b, neither])


def profile_score(n: int, only_a: int, only_b: int, delta: float) -> float:
    """Score statistic with the nuisance parameter, P(only b is right), found by maximising the likelihood."""

    def loss(q: float) -> float:
        p = q + delta
        rest = 1 - q - p
        if min(p, q, rest) <= 0:
            return math.inf
        return -(only_a * math.log(p) + only_b * math.log(q) + (n - only_a - only_b) * math.log(rest))

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (only_a - only_b - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))


@pytest.mark.parametrize("table", [(36, 12, 2, 0), (43, 3, 1, 2), (100, 30, 45, 60), (1, 5, 1, 4)])
def test_the_interval_ends_where_the_score_is_significant(table: tuple[int, int, int, int]) -> None:
    estimate = paired_difference(*answers(*table))
    n, only_a, only_b = sum(table), table[1], table[2]
    assert estimate.mean == pytest.approx((only_a - only_b) / n)
    assert profile_score(n, only_a, only_b, estimate.low) == pytest.approx(1.959964, abs=1e-3)
    assert profile_score(n, only_a, only_b, estimate.high) == pytest.approx(-1.959964, abs=1e-3)
    turned = paired_difference(*reversed(answers(*table)))
    assert (turned.low, turned.high) == pytest.approx((-estimate.high, -estimate.low))


def test_the_interval_is_that_of_the_literature_and_holds_at_the_edges() -> None:
    # Tango 1998, Statistics in Medicine 17, the table with 36, 12, 2 and 0 pairs
    estimate = paired_difference(*answers(36, 12, 2, 0))
    assert (round(estimate.low, 3), round(estimate.high, 3)) == (0.061, 0.345)
    same = paired_difference(*answers(20, 0, 0, 20))
    z = 1.959963984540054
    assert [same.mean, same.low, same.high] == pytest.approx([0, -z * z / (40 + z * z), z * z / (40 + z * z)])
    one_sided = paired_difference(*answers(0, 10, 0, 0))
    assert (one_sided.mean, one_sided.high) == (1.0, 1.0)
    assert 0.4 < one_sided.low < 0.5


def test_two_runs_are_compared_on_the_same_examples(tmp_path: Path) -> None:
    paths = [write(tmp_path, record("gru", 0, 0.5)), write(tmp_path, record("s4d", 0, 0.6))]
    collection = Collection.read(tmp_path)
    by_name = {r.architecture: r for r in collection.records}
    correct = {name: collection.predictions[r.id].correct for name, r in by_name.items()}
    runs = compare(by_name["s4d"], by_name["gru"], collection)
    assert runs.difference
    assert runs.difference == paired_difference(correct["s4d"], correct["gru"])
    assert runs.p == mcnemar(correct["s4d"], correct["gru"])
    assert runs.only_a == int((correct["s4d"] & ~correct["gru"]).sum())
    assert runs.only_b == int((correct["gru"] & ~correct["s4d"]).sum())
    assert "difference +10.00 points" in str(runs)
    assert compare(paths[0], paths[1]).difference == compare(paths[0], paths[1].as_posix()).difference == compare(
        "quick-listops-gru", "quick-listops-s4d", collection).difference  # fmt: skip


def test_ids_are_found_in_every_place_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    write(tmp_path, record("gru", 0, 0.5), "smoke")
    write(tmp_path, record("s4d", 0, 0.6), "diagnostics")
    assert "difference -10.00 points" in str(compare("quick-listops-gru", "quick-listops-s4d"))


def test_runs_on_other_data_have_no_paired_difference(tmp_path: Path) -> None:
    write(tmp_path, record("gru", 0, 0.5))
    write(tmp_path, record("lru", 0, 0.6, data={"checksum": "other"}))
    runs = compare("quick-listops-gru", "quick-listops-lru", Collection.read(tmp_path))
    assert (runs.difference, runs.p, runs.only_a, runs.only_b) == (None,) * 4
    assert "not tested on the same examples" in str(runs)


def test_fields_are_settings_and_only_those_that_differ() -> None:
    a, b = modified("quick", lr=0.01, betas=[0.9, 0.99]), modified("quick", lr=0.02, betas=[0.9, 0.99])
    fields = compare(a, b, Collection(())).fields
    assert {key: pair for key, pair in fields.items() if key != "recipe hash"} == {"optim.lr": ("0.01", "0.02")}
    assert compare(a, a, Collection(())).fields == {}
    curve = record("gru", curve=[{"step": 1, "validation_accuracy": 0.3}], wall_seconds=3)
    assert compare(curve, record("gru"), Collection(())).fields == {}


def test_runs_are_named_by_the_start_of_their_id(tmp_path: Path) -> None:
    path = write(tmp_path, record("gru", 0))
    write(tmp_path, record("gru", 1))
    collection = Collection.read(tmp_path)
    assert find(collection, "quick-listops-gru-s0").seed == 0
    for name, says in (("quick-listops", "2 run ids begin with"), ("quick-listops-gru-s0-2026-01-02", "did you mean")):
        with pytest.raises(UserError, match=says):
            find(collection, name)
    path.write_text("{}")
    with pytest.raises(UserError, match="schema is None"):
        compare(path, path)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    write(tmp_path, record("gru", 0, 0.5))
    write(tmp_path, record("s4d", 0, 0.6, direction="[red]causal"))
    runner = CliRunner()
    same = runner.invoke(app, ["compare", "quick-listops-gru", "quick-listops-gru"])
    assert same.exit_code == 0, same.output
    assert "no setting differs" in same.stdout
    done = runner.invoke(app, ["compare", "quick-listops-gru", "quick-listops-s4d"])
    assert done.exit_code == 0, done.output
    assert {"-10.00 points", "McNemar", "[red]"} <= {
        word for word in ("-10.00 points", "McNemar", "[red]") if word in done.stdout
    }
    assert "architecture" in done.stdout
    assert "validation_accuracy" not in done.stdout
    assert runner.invoke(app, ["compare", "nothing", "quick-listops-gru"]).exit_code == 2


def test_two_sources_are_told_apart(tmp_path: Path) -> None:
    files = [{"net.py": "a" * 64, "helper.py": "b" * 64}, {"net.py": "a" * 64, "helper.py": "c" * 64}]
    first, second = (
        record("net.py:Net", seed, source={"sha256": str(seed) * 64, "files": files[seed]}) for seed in (0, 1)
    )
    compared = compare(first, second, Collection((first, second)))
    assert str(compared).endswith("another source: helper.py; these are two models, not two runs of one")
    assert compared.fields["source"] == ("0" * 8, "1" * 8)
    same = compare(first, first, Collection((first,)))
    assert "source" not in str(same)


def rungs(root: Path, accuracies: dict[str, list[float]], **changes: Any) -> list[Path]:
    return [
        write(root, record(name, seed, accuracy, **changes))
        for name, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_a_ladder_compares_each_row_with_the_one_before(tmp_path: Path) -> None:
    runs = rungs(tmp_path, {"gru": [0.5, 0.52], "s4d": [0.6, 0.63], "lru": [0.6]})
    table = ladder(runs)
    shown = [dict(zip(table.columns, (cell.text for cell in row), strict=True)) for row in table.rows]
    assert [row["architecture"] for row in shown] == ["gru", "s4d", "lru"]
    assert [row["seeds"] for row in shown] == ["2", "2", "1"]
    assert shown[0]["difference"] == "-"
    expected = stats.ttest_ind([60, 63], [50, 52], equal_var=False).confidence_interval()
    assert (shown[1]["difference"], shown[1]["over"]) == ("+10.50", "seeds")
    assert float(shown[1]["low"]) == pytest.approx(expected.low, abs=0.01)
    assert float(shown[1]["high"]) == pytest.approx(expected.high, abs=0.01)
    # one seed: over the test examples of the first run of each
    pair = compare(runs[4], runs[2]).difference
    assert pair
    assert (shown[2]["difference"], shown[2]["over"]) == ("+0.00", "test set")
    assert float(shown[2]["high"]) == pytest.approx(100 * pair.high, abs=0.01)
    assert shown[0]["FLOP"] == f"{6e9 * 6400:.3g}"
    assert not any("not equal" in note for note in table.notes)


def test_a_ladder_says_where_compute_or_tests_differ(tmp_path: Path) -> None:
    runs = [*rungs(tmp_path, {"gru": [0.5]}), *rungs(tmp_path, {"s4d": [0.6]}, flops={"forward_backward": 9e9})]
    assert any("by a factor of 1.50" in note for note in ladder(runs).notes)
    with pytest.raises(UserError, match="at least two rows"):
        ladder(runs[:1])
    with pytest.raises(UserError, match=r"was tested on listops strict other"):
        ladder([*runs, *rungs(tmp_path, {"lru": [0.5]}, data={"checksum": "other"})])


def test_a_ladder_of_language_models_is_in_bits() -> None:
    runs = [
        record(name, test={"accuracy": 0.5, "n": 2000, "bits": bits, "bits_low": bits - 0.03, "bits_high": bits + 0.03})
        for name, bits in (("gru", 2.5), ("s4d", 2.4))
    ]
    table = ladder(runs, Collection(()))
    last = [cell.text for cell in table.rows[1]]
    assert last[4:] == ["2.400", "-0.100", "-0.142", "-0.058", "test set"]
    assert "bits per token" in table.notes[0]


def test_more_than_two_runs_are_a_ladder_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    rungs(tmp_path, {"gru": [0.5], "s4d": [0.6], "lru": [0.7]})
    names = [f"quick-listops-{name}" for name in ("gru", "s4d", "lru")]
    done = CliRunner().invoke(app, ["compare", *names])
    assert done.exit_code == 0, done.output
    assert "+10.00" in done.output
    alone = CliRunner().invoke(app, ["compare", names[0]])
    assert alone.exit_code == 2
    assert "at least two runs" in alone.output
