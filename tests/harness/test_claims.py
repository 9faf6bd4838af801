"""Verdicts on diagnostic runs, their table, and published claims beside them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from records import diagnostic as run
from records import record
from typer.testing import CliRunner

from lra.cli.app import app
from lra.config import recipe as recipes
from lra.errors import UserError
from lra.registry import architectures, tasks
from lra.reports import diagnostics
from lra.results import claims, diagnosis
from lra.results import record as records
from lra.results.record import RunRecord
from lra.sweeps import local
from lra.sweeps.plans import Cell


def curve(*accuracies: float) -> list[dict[str, float]]:
    return [{"step": 100 * (n + 1), "validation_accuracy": a} for n, a in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("made", "word", "reason"),
    [
        (run(whole=0.98, positions=0.999), "solved", "98.0 % of the examples right after 1,500 steps"),
        (run(whole=0.905, positions=0.99), "undecided", "too close to 90 %"),
        (run(whole=0.0, positions=0.6, curve=curve(0.5, 0.6, 0.6, 0.6, 0.6, 0.6)), "failed", "0.0 %"),
        (run(whole=0.0, positions=0.6, curve=curve(0.5, 0.5, 0.5, 0.5, 0.5, 0.6)), "undecided", "+10.0 points"),
        (run(whole=0.0, positions=0.27, plateaus={"one of four": 0.25}), "undecided", "27.0 % is a plateau: one"),
        (run(whole=0.0, positions=0.6, plateaus={"one of four": 0.25}), "failed", "0.0 %"),
    ],
)  # fmt: skip
def test_verdicts(made: RunRecord, word: str, reason: str) -> None:
    found = diagnosis.verdict(made)
    assert found.word == word
    assert reason in found.reason


@pytest.mark.parametrize(
    ("at_40", "further", "expected"),
    [(1.0, (0.95, 0.92, 0.5), 128), (1.0, (0.8, 0.95, 0.5), 40), (0.8, (0.95, 0.95, 0.95), 0), (1.0, (1, 1, 1), 256)],
)
def test_reach_ends_where_a_length_is_lost(at_40: float, further: tuple[float, ...], expected: int) -> None:
    tests = {f"length-{n}": {"accuracy": 0.0, "n": 9, "positions": share, "length": n}
             for n, share in zip((64, 128, 256), further, strict=True)}  # fmt: skip
    tests["sparse"] = {"accuracy": 0.0, "n": 9, "positions": 0.1, "length": 40}
    assert diagnosis.reach(run(positions=at_40, tests=tests)) == expected
    assert diagnosis.reach(run()) is None


def test_a_row_counts_the_verdicts_of_its_seeds() -> None:
    rows = diagnostics.table([run(whole=1.0, positions=1.0), run(seed=1), run("lstm")]).rows
    texts = [[cell.text for cell in row] for row in rows]
    assert [row[0] for row in texts] == ["parity (dense)"] * 2
    assert texts[0][1:4] == ["gru", "50.0", "80.0"]
    assert texts[0][-2:] == ["2", "solved 1, failed 1"]
    assert texts[1][-1] == "failed"


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    (tmp_path / "claims").mkdir()
    path = tmp_path / "claims" / "C1.toml"
    path.write_text("""
statement = "Gated networks learn parity; Transformers do not."
source = "a paper"
published = "100 and 52"
task = "parity"
protocol = "dense"
solves = 0.95
fails = 0.85
[[cells]]
architecture = "gru"
expect = "solves"
[[cells]]
architecture = "transformer"
expect = "fails"
""")
    return path


@pytest.mark.parametrize(
    ("gru", "transformer", "outcomes", "outcome"),
    [
        ([1.0], [0.6], ["agrees", "agrees"], "agree"),
        ([1.0], [1.0], ["agrees", "disagrees"], "disagree"),
        ([0.9], [0.6], ["undecided", "agrees"], "undecided"),
        ([1.0], [], ["agrees", "undecided"], "undecided"),
        ([1.0, 0.6], [0.6], ["undecided", "agrees"], "undecided"),
        ([0.999, 0.998, 0.999], [0.6, 0.61], ["agrees", "agrees"], "agree"),
    ],
)
def test_a_claim_is_judged_by_intervals(
    claim: Path, gru: list[float], transformer: list[float], outcomes: list[str], outcome: str
) -> None:
    found = [run("gru", positions=share, seed=seed) for seed, share in enumerate(gru)]
    found += [run("transformer", positions=share, seed=seed) for seed, share in enumerate(transformer)]
    judged = claims.judge(claims.read("C1"), found)
    assert [finding.outcome for finding in judged.findings] == outcomes
    assert judged.outcome == outcome


def test_a_fail_that_is_undecided_decides_no_claim(claim: Path) -> None:
    rising = run("transformer", curve=curve(0.5, 0.5, 0.5, 0.5, 0.5, 0.6))
    judged = claims.judge(claims.read("C1"), [run(positions=1.0), rising])
    assert judged.outcome == "undecided"
    assert "still rising" in judged.findings[1].reason


def test_a_longer_split_is_judged_whatever_the_curve_of_the_training_lengths_does(claim: Path) -> None:
    claim.write_text(claim.read_text().replace('protocol = "dense"', 'protocol = "dense"\nsplit = "length-256"'))
    longer = {"length-256": {"accuracy": 0.0, "n": 1024, "positions": 0.5, "last": 0.5, "length": 256}}
    rising = run("transformer", curve=curve(0.5, 0.5, 0.5, 0.5, 0.5, 0.6), tests=longer)
    assert claims.judge(claims.read("C1"), [rising]).findings[1].outcome == "agrees"


def test_only_runs_with_the_settings_of_a_cell_count(claim: Path) -> None:
    claim.write_text(
        claim.read_text().replace('expect = "solves"', 'expect = "solves"\nsettings = { "model.n_layers" = 1 }')
    )
    cell = claims.read("C1").cells[0]
    assert cell.command(3) == "lra run parity gru --recipe diagnostic --protocol dense --set model.n_layers=1 --seed 3"
    plain, changed = run(), run(changed={"model.n_layers": 2})
    assert not cell.matches(plain)
    assert not cell.matches(changed)
    recipe = changed.recipe.model | {"n_layers": 1}
    assert cell.matches(
        records.from_json(records.to_json(changed) | {"recipe": records.to_json(changed)["recipe"] | {"model": recipe}})
    )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("solves = 0.95", "solvs = 0.95", "unknown key 'solvs' in C1.toml; did you mean 'solves'"),
        ("fails = 0.85", "fails = 0.99", "fails is 0.99, solves 0.95"),
        ('expect = "fails"', 'expect = "maybe"', "cells.expect is 'maybe'; 'solves' or 'fails'"),
        ("source = ", "x = ", "unknown key 'x'"),
        ("solves = 0.95", "solves = ", "not valid TOML"),
    ],
)
def test_mistakes_in_a_claim(claim: Path, before: str, after: str, message: str) -> None:
    claim.write_text(claim.read_text().replace(before, after))
    with pytest.raises(UserError, match=message):
        claims.read("C1")


def test_the_command_shows_claims_and_what_is_missing(claim: Path) -> None:
    shown = CliRunner().invoke(app, ["claims"])
    assert "C1 undecided (0 of 2 measured)" in shown.output
    one = CliRunner().invoke(app, ["claims", "C1"])
    assert "lra run parity gru --recipe diagnostic" in one.output
    assert CliRunner().invoke(app, ["claims", "C9"]).exit_code == 2


def test_the_command_runs_what_a_claim_lacks_the_first_seed_of_every_cell_first(
    claim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def begin(cell: Cell, *_: object) -> tuple[int, str]:
        begun.append(cell.name)
        return 0, ""

    monkeypatch.setattr(local, "run_cell", begin)
    missing = [f"parity:dense {name} s{seed}" for seed in (0, 1) for name in ("gru", "transformer")]
    planned = CliRunner().invoke(app, ["claims", "C1", "--dry-run", "--seeds", "2"])
    assert planned.output.splitlines() == [f"{n} {name}: open" for n, name in enumerate(missing)]
    assert not begun
    done = CliRunner().invoke(app, ["claims", "--run", "--seeds", "2"])
    assert begun == missing
    assert "0 of 4 cells have results" in done.output
    assert CliRunner().invoke(app, ["claims", "--time-limit", "1m"]).exit_code == 2


def test_every_shipped_claim_names_tasks_protocols_settings_and_architectures_that_exist() -> None:
    assert claims.names()
    for name in claims.names():
        claim = claims.read(name)
        assert {cell.expect for cell in claim.cells} == {"solves", "fails"}
        for cell in claim.cells:
            protocols = tasks.get(cell.task).cls.protocols
            assert claim.split in ("test", *protocols[cell.protocol].tests)
            declared = architectures.declaration(cell.architecture).options
            settings = {key: str(value) for key, value in cell.settings.items()}
            recipes.resolve("diagnostic", cell.task, cell.architecture, settings)
            own = [key.partition(".")[2] for key in settings if key.startswith("encoder.")]
            assert set(own) <= set(declared)


def test_the_table_of_diagnostics_names_the_best_rule_without_a_model() -> None:
    """Whoever reads 36 % beside a chance of 17 % must see that a rule reaches as much."""
    runs = [record("gru", accuracy=0.36), msgspec.structs.replace(record("s4d", accuracy=0.17), collapsed="at chance")]
    shown = diagnostics.table(runs)
    assert [row[shown.columns.index("floor %")].text for row in shown.rows] == ["36.0", "36.0"]
    assert [shown.rows[number][1].text for number in shown.grey] == ["s4d"]
