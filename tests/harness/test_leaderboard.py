"""The leaderboard: which rows are compared, what is left out, and its forms against golden files."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from records import answered, filled, modified, record, write
from rich.console import Console
from typer.testing import CliRunner

from lra import files
from lra.cli.app import app
from lra.config import recipe
from lra.errors import UserError
from lra.reports import leaderboard, ranking, readme, report
from lra.reports import table as tables
from lra.reports.ranking import LRA, Leaderboard, Row
from lra.results import literature, official, result
from lra.results.collection import COLUMNS, Collection
from lra.results.record import AT_CHANCE, RunRecord

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"
LITERATURE = (
    "architecture,name,protocol,listops,text,retrieval,image,pathfinder,pathx,printed_average,not_comparable,source,note\n"
    "S4D-X,s4d,strict,60.5,,,,86,FAIL,,pathfinder,A paper Table 1,\n"
)


def ranked(*runs: RunRecord) -> Leaderboard:
    return Leaderboard.of(Collection(runs))


def rows_of(board: Leaderboard) -> list[Row]:
    """The rows of the only group."""
    (rows,) = board.groups.values()
    return list(rows)


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    (tmp_path / "reported.csv").write_text(LITERATURE)
    return filled(tmp_path)


def test_rows_average_seeds_and_keep_groups_apart() -> None:
    runs = [
        record("gru", 0, 0.40), record("gru", 1, 0.50), record("s4d", 0, 0.60),
        record("gru", 0, 0.90, id="a", protocol={"name": "lra2020", "length": 2000}),
        record("gru", 0, 0.90, id="c", data={"checksum": "other"}),
        record("gru", 0, 0.90, id="d", regime="self-pretrained"), record("gru", 0, 0.90, id="e", n=1000),
        record("gru", 0, 0.90, id="f", environment={"cpu": "a cpu x2", "gpu": "H200", "device": "cuda"}),
    ]  # fmt: skip
    board = ranked(*runs)
    assert len(board.groups) == 6
    main = board.groups[ranking.group_of(runs[0])]
    assert [row.architecture for row in main] == ["s4d", "gru"]
    assert main[1].accuracy.mean == pytest.approx(0.45)
    assert [row.accuracy.source for row in main] == ["test set", "seeds"]
    idle = record("gru", environment={"cpu": "a cpu x2", "gpu": "H200", "device": "cpu", "precision": "32-true"})
    assert ranking.group_of(idle) == ranking.group_of(runs[0])


def test_runs_of_two_machines_share_a_row() -> None:
    (row,) = rows_of(ranked(record("gru", 0), record("gru", 1, environment={"cpu": "another x8", "precision": "32"})))
    assert (row.seeds, row.hardware) == (2, "a cpu x2, another x8")


def test_a_rerun_of_one_seed_counts_once() -> None:
    old, new = record(accuracy=0.4), record(accuracy=0.6, started="2026-02-01T00:00:00+00:00")
    (row,) = rows_of(ranked(new, old))
    assert (row.seeds, row.accuracy.mean) == (1, 0.6)


def test_an_official_run_has_exactly_the_settings_of_the_shipped_recipe() -> None:
    assert official.settings_of(record("s4d")).status == "official"
    named = record("s4d")
    named.recipe.data["protocol"] = "strict"
    # the protocol is written out: another hash, the same settings
    whole = official.shipped_recipe("quick", "listops", "s4d", "strict")
    assert whole is not None
    assert whole.hash != named.recipe_hash
    assert official.settings_of(msgspec.structs.replace(named, recipe_hash=whole.hash)).status == "official"
    variant = official.shipped_recipe("quick", "listops", "s4d/inv")
    assert official.settings_of(record("s4d/inv")).status == "official"
    assert variant is not None


@pytest.mark.parametrize(
    ("changes", "status", "describes"),
    [
        ({"command": "lra run listops gru --set optim.lr=0.5"}, "modified", ""),
        ({"command": "lra run listops gru --set=optim.lr=0.5"}, "modified", ""),
        ({"command": "lra run listops gru --match params=1k"}, "modified", ""),
        ({"command": "lra run listops gru"}, "earlier recipe", ""),
        ({"changed": {}, "command": "lra run listops gru"}, "earlier recipe", ""),
        ({"changed": {"optim.lr": 0.25, "train.x": None}}, "modified",
         "optim.lr 0.5 (recipe: 0.25), train.x - (recipe: -)"),
        ({"command": "no 'shell"}, "earlier recipe", ""),
    ],
)  # fmt: skip
def test_other_settings_are_named(changes: dict[str, Any], status: str, describes: str) -> None:
    """A record holds what was changed; for older ones, which do not, the command tells whether something was."""
    settings = official.settings_of(msgspec.structs.replace(modified("quick", lr=0.5), **changes))
    shipped = recipe.resolve("quick", "listops", "gru")[0]
    assert settings.status == status
    assert settings.describe() == (describes or f"optim.lr 0.5 (recipe: {shipped.optim.lr})")
    assert not settings.ranked


def test_what_a_run_changes_is_known_before_it_starts() -> None:
    shipped = recipe.resolve("quick", "listops", "gru")[0]
    assert official.changed_settings(shipped) == {}
    longer = recipe.resolve("quick", "listops", "gru", {"train.steps": "7", "encoder.depth": "2"})[0]
    assert official.changed_settings(longer) == {"train.steps": shipped.train.steps, "encoder.depth": None}
    assert official.changed_settings(shipped.with_pretraining("mlm"))["pretrain.objective"] is None  # type: ignore[index]
    assert official.changed_settings(replace(shipped, name="my own")) is None


def test_modified_runs_are_listed_apart_and_count_nowhere(tmp_path: Path) -> None:
    """Four steps of a run with another rate must not stand beside the official row, nor split it."""
    runs = [record(name, task=task) for name in ("gru", "s4d") for task in LRA[:2]]
    plain = ranked(*runs)
    changed = modified("quick", accuracy=0.9, lr=0.5)
    changed = msgspec.structs.replace(changed, id="other", command="lra run listops gru --set optim.lr=0.5")
    board = ranked(*runs, changed)
    assert board.groups == plain.groups
    assert leaderboard.readme(board) == leaderboard.readme(plain)
    assert leaderboard.build(board, "csv") == leaderboard.build(plain, "csv")
    assert board.averages == plain.averages
    for form in ("md", "tex", "html"):
        text = leaderboard.build(board, form)
        assert text.count("Modified runs, not ranked") == 1
        assert "modified: optim.lr 0.5 (recipe: " in text
        assert text.index("90.00") > text.index("Modified runs")
    page = report.build(Collection([*runs, changed]), tmp_path)
    assert page.count("modified: optim.lr 0.5 (recipe: ") == 1
    assert "Modified runs" not in report.build(Collection(runs), tmp_path)
    shown = leaderboard.table_with(board, changed)
    assert [[c.text for c in row[:4]] for row in shown.rows] == [["listops (strict)", "quick", "gru", "90.00"]]
    assert leaderboard.table_with(board, runs[0]).title.startswith("listops (strict")


def test_recipes_of_the_user_have_tables_of_their_own_and_none_in_the_readme() -> None:
    runs = [modified("mine", accuracy=a, lr=lr) for a, lr in ((0.4, 0.1), (0.5, 0.2))]
    runs = [msgspec.structs.replace(run, id=str(n)) for n, run in enumerate(runs)]
    board = ranked(record(accuracy=0.3), *runs)
    own, shipped = sorted(board.groups, key=lambda group: group.shipped)
    assert [row.label for row in board.groups[own]] == ["gru #mine{'", "gru #mine{'"]
    assert [row.label for row in board.groups[shipped]] == ["gru"]
    assert "recipe mine (not shipped)" in leaderboard.build(board, "md")
    assert "mine" not in leaderboard.readme(board)


def test_ranks_use_seeds_and_stored_predictions(collection: Collection) -> None:
    board = Leaderboard.of(collection)
    listops = next(rows for group, rows in board.groups.items() if group.task == "listops")
    assert {row.architecture: row.rank for row in listops} == {"s4d": 1, "transformer": 2, "gru": 2}
    one_seed = [r for r in collection.records if r.seed == 0]
    (without, *_), (with_predictions, *_) = (
        Leaderboard.of(Collection(one_seed, predictions=p)).groups.values() for p in ({}, collection.predictions)
    )
    assert [row.rank for row in without] == [1, 1, 1]
    assert [row.rank for row in with_predictions] == [1, 2, 2]


def test_frames_have_a_row_for_each_run_and_for_each_ranked_row(collection: Collection) -> None:
    runs = collection.frame()
    assert tuple(runs.columns) == COLUMNS
    assert len(runs) == 18
    assert runs["id"].is_unique
    first = runs.iloc[0]
    record = collection.records[0]
    assert (first["accuracy"], first["status"], first["seed"]) == (record.test.accuracy, "official", record.seed)
    assert str(first["started"]) == "2026-01-01 00:00:00+00:00"
    board = leaderboard.frame(collection, "listops")
    assert tuple(board.columns) == ranking.FIELDS
    assert list(board["architecture"]) == ["s4d", "transformer", "gru"]
    assert list(board["rank"]) == [1, 2, 2]
    assert board["accuracy"].tolist() == pytest.approx([0.622, 0.404, 0.402])
    assert len(leaderboard.frame(collection)) == 6
    with pytest.raises(UserError, match="did you mean 'listops'"):
        leaderboard.frame(collection, "listop")
    empty = Collection(())
    assert (len(empty.frame()), len(leaderboard.frame(empty))) == (0, 0)


def test_predictions_are_matched_by_example_and_only_on_the_same_ones(tmp_path: Path) -> None:
    for name, accuracy, shift in (("s4d", 0.62, 0), ("gru", 0.5, 0), ("lru", 0.5, 7)):
        stored = answered(accuracy, 2000, 0)
        turned = np.random.default_rng(1).permutation(2000) if name == "gru" else np.arange(2000)
        stored = {key: value[turned] for key, value in stored.items()}
        stored["example"] = stored["example"] + shift
        result.write(record(name, 0, accuracy), stored, tmp_path)
    collection = Collection.read(tmp_path)
    correct = {r.architecture: collection.predictions[r.id].correct for r in collection.records}
    assert np.array_equal(correct["gru"], answered(0.5, 2000, 0)["prediction"] == answered(0.5, 2000, 0)["label"])
    assert {row.architecture: row.rank for row in rows_of(Leaderboard.of(collection))} == {"s4d": 1, "gru": 2, "lru": 2}
    others = replace(collection, records=[r for r in collection.records if r.architecture != "gru"])
    assert [row.rank for row in rows_of(Leaderboard.of(others))] == [1, 1]


def test_an_average_is_never_over_missing_tasks() -> None:
    runs = [record("gru", task=task, accuracy=0.5 + i / 10) for i, task in enumerate(LRA[:5])]
    runs += [record("s4d", task=task, accuracy=0.6) for task in LRA if task != "text"]
    board = ranked(*runs)
    ((key, averages),) = board.averages.items()
    mean = averages["gru"]["avg 5"]
    assert mean
    assert mean.mean == pytest.approx(0.7)
    assert averages["gru"]["avg 6"] is averages["s4d"]["avg 5"] is None
    shown = leaderboard.overall_table(board, key)
    texts = {row[0].text: [cell.text for cell in row[-2:]] for row in shown.rows}
    assert texts == {"gru": ["70.00", "-"], "s4d": ["-", "-"]}


def test_runs_at_chance_are_counted_and_told(collection: Collection) -> None:
    shown = next(t for t in leaderboard.all_tables(Leaderboard.of(collection)) if t.title.startswith("pathfinder"))
    row = next(row for row in shown.rows if row[1].text == "gru")
    assert [cell.text for cell in row[2:5:2]] == [f"{100 * np.mean([0.5, 0.702, 0.704]):.2f}", "2/3"]
    assert shown.notes == ["at chance: 1 of 3 runs of gru (the others' mean is 70.30)"]
    assert not shown.grey


def test_a_table_says_who_was_trained_on_more() -> None:
    speed = {"examples": 9600, "examples_per_second": 10.0}
    made = [record("gru"), record("gru", 1), record("lstm"), record("s4d", speed=speed)]
    (shown,) = leaderboard.all_tables(ranked(*made))
    assert shown.notes == ["training examples differ: 9.6k for s4d; 6.4k for the others"]
    seen = {row[1].text: row[shown.columns.index("seen")].text for row in shown.rows if row[0].text != "-"}
    assert seen == {"gru": "6.4k", "lstm": "6.4k", "s4d": "9.6k"}
    (same,) = leaderboard.all_tables(ranked(*made[:3]))
    assert not same.notes


TRIALS = [{"lr": lr, "steps": 20, "accuracy": 0.2, "loss": 2.0, "examples": 640, "seconds": 1.0} for lr in (1e-3, 3e-3)]
SPEED = {"examples": 6400, "examples_per_second": 10.0, "steps": 200}


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"speed": SPEED | {"steps": 400}}, "steps differ: 400 for s4d; 200 for the others"),
        (
            {"rate_search": {"lr": 1e-3, "trials": TRIALS, "examples": 1280, "seconds": 2.0}},
            "learning rates tried differ: 0.001 (20 steps), 0.003 (20 steps) for s4d; one for the others",
        ),
        ({"budget": 1.1}, "parameter budget differ: 1.1 for s4d; 0.0 for the others"),
    ],
)
def test_a_table_says_who_was_given_more(changes: dict[str, Any], note: str) -> None:
    other = record("s4d", **{"speed": SPEED} | {k: v for k, v in changes.items() if k != "budget"})
    if "budget" in changes:
        other.recipe.model["budget"] = changes["budget"]
    ((_, rows),) = ranked(record("gru", speed=SPEED), record("lstm", speed=SPEED), other).groups.items()
    assert leaderboard.unequal(rows) == note
    assert not leaderboard.unequal([row for row in rows if row.architecture != "s4d"])


def test_the_rows_of_every_committed_table_were_given_the_same(tracked: Path) -> None:
    """Training examples, steps, search and parameter budget; and no row exceeds the budget."""
    board = Leaderboard.of(Collection.read(tracked / "results"))
    if not board.groups:
        pytest.skip("no run of a shipped recipe is committed")
    for group, rows in board.groups.items():
        assert not leaderboard.unequal(rows), group
        sizes = {row.architecture: row.parameters for row in rows}
        for row in rows:
            budget = row.runs[0].recipe.model.get("budget") or math.inf
            assert row.parameters <= budget * sizes.get("transformer", math.inf), row.label


def test_no_runs_are_a_sentence() -> None:
    assert leaderboard.readme(ranked()) == "There are no results of a shipped recipe yet."


def test_no_row_at_chance_is_the_best_of_anything() -> None:
    made = [record("gru", accuracy=0.498, collapsed=AT_CHANCE), record("s4d", accuracy=0.49)]
    made += [record(name, task="image", accuracy=0.498, collapsed=AT_CHANCE) for name in ("gru", "s4d")]
    overall, image, listops = leaderboard.all_tables(ranked(*made))
    assert [[cell.place for cell in row[1:3]] for row in overall.rows] == [[0, 0], [1, 0]]
    assert [(row[1].text, row[2].place) for row in image.rows[:2]] == [("gru", 0), ("s4d", 0)]
    assert [(row[1].text, row[2].place) for row in listops.rows[:2]] == [("gru", 0), ("s4d", 1)]
    assert image.grey == {0, 1}
    assert listops.grey == {0}
    page = leaderboard.build(ranked(*made), "html")
    assert len(re.findall(r'<tr class="grey">(?:<td[^>]*>[^<]*</td>){2}<td>49.80', page)) == 3
    assert "| gru | 49.80 ± 2.19, at chance | 49.80 ± 2.19, at chance |" in leaderboard.readme(ranked(*made))


def test_many_rows_at_chance_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a table where 36 rows are, and in one where all are: one note in every form, not one a row."""
    names = sorted(f"net{i}" for i in range(36))
    lost = [record(name, accuracy=0.17, collapsed=AT_CHANCE) for name in names]
    mixed = [record("gru", i, a, collapsed=AT_CHANCE if a < 0.2 else "") for i, a in enumerate((0.17, 0.6, 0.64))]
    told = f"at chance: every run of {', '.join(names)}; 1 of 3 runs of gru (the others' mean is 62.00)"
    for records, note in ((lost + mixed, told), (lost, "at chance: every run of all rows")):
        (shown,) = leaderboard.all_tables(ranked(*records))
        assert shown.notes == [note]
    for made in lost + mixed:
        write(tmp_path, made)
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    written = invoke("--out", str(tmp_path)).stdout, *(p.read_text() for p in tmp_path.glob("[Ll]*.[mht]*"))
    assert len(written) == 4
    assert [text.count("at chance: ") for text in written] == [1] * 4
    assert [text.count("net7, net8") for text in written] == [1] * 4


@pytest.mark.parametrize("form", ["md", "csv", "tex", "html"])
def test_tables_match_their_golden_files(form: str, collection: Collection) -> None:
    """Written by `leaderboard.build` from the records of tests/records.py, and read over."""
    text = leaderboard.build(Leaderboard.of(collection), form)
    for run in collection.records:
        # it changes with the recipe
        text = text.replace(run.recipe_hash, "a" * 64)
    assert text == (GOLDEN / f"leaderboard.{form}").read_text(encoding="utf-8")
    turned = replace(collection, records=list(reversed(collection.records)))
    assert leaderboard.build(Leaderboard.of(turned), form) == leaderboard.build(Leaderboard.of(collection), form)


@pytest.fixture
def tracked(tmp_path: Path) -> Path:
    """README and results as git tracks them: what a user's own runs add to the folder is not part of them."""
    git = ["git", "-C", str(ROOT)]
    names = subprocess.run([*git, "ls-files", "-z", "README.md", "results"], capture_output=True, check=False).stdout
    if not names:
        pytest.skip("not a git checkout")
    prefix = f"--prefix={tmp_path}/"
    subprocess.run([*git, "checkout-index", "-q", "-f", "-z", "--stdin", prefix], input=names, check=True)
    return tmp_path


def test_the_committed_tables_are_those_of_the_committed_runs(tracked: Path) -> None:
    collection = Collection.read(tracked / "results")
    assert not collection.problems
    board = Leaderboard.of(collection)
    for form, (name, _) in leaderboard.FORMATS.items():
        assert leaderboard.build(board, form) == (tracked / "results" / name).read_text(encoding="utf-8"), (
            f"results/{name} does not match results/runs: run `lra leaderboard`"
        )
    path = tracked / "README.md"
    before = path.read_text(encoding="utf-8")
    assert readme.update(path, board) == ["results", "architectures"]
    assert path.read_text(encoding="utf-8") == before, "README.md is out of date: run `lra leaderboard`"


def test_the_short_form_has_a_row_for_each_architecture(collection: Collection) -> None:
    """The records of tests/records.py are of one recipe, regime and device."""
    title, _, head, _, *rows = leaderboard.readme(Leaderboard.of(collection)).splitlines()
    assert title == "Recipe quick, scratch, CPU, float32:"
    assert head == "| architecture | listops (strict) | pathfinder (strict) |"
    assert rows == [
        "| s4d | **62.20 ± 0.50, 3 seeds** | **92.20 ± 0.50, 3 seeds** |",
        "| transformer | <u>40.40 ± 0.50, 3 seeds</u> | <u>70.40 ± 0.50, 3 seeds</u> |",
        "| gru | 40.20 ± 0.50, 3 seeds | 63.53 ± 29.12, 3 seeds, 1 at chance |",
        "| majority class (no sequence model) | 17.00 | 17.00 |",
        "| root operator (no sequence model) | 36.00 | 36.00 |",
    ]


def test_the_terminal_form_fits_100_columns(tmp_path: Path) -> None:
    names = ("linear_transformer/random_features", "s4d", "nystromformer")
    speed = {"examples": 123_456_789, "examples_per_second": 12345.6}
    long = [record(name, task=task, accuracy=0.8, parameters=123_456_789, speed=speed)
            for name in names for task in LRA]  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    for shown in leaderboard.all_tables(ranked(*long)):
        console.print(tables.terminal(shown))
    text = console.export_text()
    assert "80.00" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_hostile_names_are_escaped_in_every_form(tmp_path: Path) -> None:
    name = "x.py:<script>|[red]_{\\&%$#~^"
    board = ranked(record(name), record("gru"))
    assert "<script>" not in leaderboard.build(board, "html")
    assert "<script>" not in leaderboard.build(board, "md")
    assert r"\|[red]" in leaderboard.build(board, "md")
    assert r"\_\{\textbackslash{}\&\%\$\#\textasciitilde{}\textasciicircum{}" in leaderboard.build(board, "tex")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables.terminal(leaderboard.all_tables(board)[0]))
    assert "[red]" in console.export_text()


def test_latex_is_balanced(collection: Collection) -> None:
    text = leaderboard.build(Leaderboard.of(collection), "tex")
    open_ones: list[str] = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        open_ones.append(name) if what == "begin" else open_ones.remove(open_ones[-1] if open_ones[-1] == name else "")
    assert not open_ones
    bare = re.sub(r"\\.", "", text)
    assert bare.count("{") == bare.count("}")
    for body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in body[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(body[0])}
    assert r"\textbf{62.20}" in text
    assert r"\underline{40.40}" in text


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="LaTeX is not installed (on Debian: texlive-latex-recommended)"
)
def test_latex_compiles(tmp_path: Path) -> None:
    """With a hostile name. A box wider than the page is no error."""
    made = [*filled(tmp_path / "results").records, record("x.py:<script>|[red]_{\\&%$#~^")]
    document = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n%s\n\\end{document}\n"
    (tmp_path / "tables.tex").write_text(document % leaderboard.build(ranked(*made), "tex"), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000


def test_measured_stands_beside_reported_with_what_differs(collection: Collection) -> None:
    shown = leaderboard.beside(Leaderboard.of(collection))
    assert shown
    lines = {row[0].text: [cell.text for cell in row[1:6]] for row in shown.rows}
    assert lines["listops (strict, quick)"] == ["s4d", "62.20", "60.50", "+1.70", "other recipe"]
    assert lines["pathfinder (strict, quick)"][-1] == "other data or task, see note, other recipe"
    paper = official.shipped_recipe("paper/s4d", "listops", "s4d")
    assert paper is not None
    runs = [
        record("s4d", recipe=paper.as_dict(), recipe_hash=paper.hash),
        record("s4d", id="b", task="pathx", protocol={"name": "s4"}),
    ]
    beside = leaderboard.beside(Leaderboard.of(Collection(runs, reported=collection.reported)))
    assert beside
    assert [[c.text for c in row[3:6]] for row in beside.rows] == [
        ["60.50", "-10.50", "nothing known"], ["FAIL", "-", "protocol strict, other recipe"],
    ]  # fmt: skip


def test_the_literature_is_read_from_sources_only() -> None:
    rows = literature.load(ROOT / "results")
    assert len(rows) >= 40
    lra = {r.architecture: r for r in rows if r.protocol == "lra2020"}
    # Tay et al. 2020 (arXiv:2011.04006), Table 1
    assert lra["Transformer"].values["listops"] == 36.37
    assert math.isnan(lra["Transformer"].values["pathx"])
    assert all(r.source for r in rows)
    assert not any("memory" in r.note for r in rows)
    speed = literature.efficiency(ROOT / "results")
    # Table 2 there
    assert [e.value for e in speed if (e.name, e.length, e.metric) == ("transformer", 4096, "train steps/s")] == [1.4]


@pytest.mark.parametrize(("old", "new"), [("60.5", "605"), ("60.5", "many"), ("A paper Table 1", " "), (",FAIL", "")])
def test_a_wrong_row_of_the_literature_is_named(old: str, new: str, tmp_path: Path) -> None:
    (tmp_path / "reported.csv").write_text(LITERATURE.replace(old, new))
    with pytest.raises(UserError, match="line 2"):
        literature.load(tmp_path)
    assert "line 2" in Collection.read(tmp_path).problems[0]


def test_copied_results_count_once_and_clashing_ones_not_at_all(tmp_path: Path) -> None:
    path = write(tmp_path, record())
    other = tmp_path / "runs" / "from a friend"
    other.mkdir()
    for file in path.parent.iterdir():
        shutil.copy(file, other / file.name)
    collection = Collection.read(tmp_path)
    assert len(collection.records) == 1
    assert "is a copy of" in collection.problems[0]
    content = json.loads(path.read_text()) | {"regime": "pretrained"}
    (other / path.name).write_text(json.dumps(content | {"seal": files.seal(content)}))
    collection = Collection.read(tmp_path)
    assert collection.records == []
    assert len(collection.problems) == 2
    assert all(str(p) in " ".join(collection.problems) for p in (path, other / path.name))


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (answered(0.6, 2000, 0), "0.6000 of its predictions are right, but its accuracy is 0.5000"),
        (answered(0.5, 100, 0), "stores (100,) predictions"),
    ],
)
def test_predictions_that_contradict_the_accuracy_are_refused(
    stored: dict[str, np.ndarray], says: str, tmp_path: Path
) -> None:
    path = result.write(record(), stored, tmp_path)
    collection = Collection.read(tmp_path)
    assert collection.records == []
    assert str(path) in collection.problems[0]
    assert says in collection.problems[0]


def test_filters(collection: Collection) -> None:
    assert {r.task for r in collection.only(task="listops").records} == {"listops"}
    assert len(collection.only(device="A CPU", recipe="quick", regime="scratch").records) == len(collection.records)
    for key, value, says in (("task", "listop", "did you mean 'listops'"), ("device", "h100", "known: a cpu x2")):
        with pytest.raises(UserError, match=says):
            collection.only(**{key: value})


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["leaderboard", *arguments])


def test_command(collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    done = invoke("--task", "listops", "--format", "csv")
    assert {row["task"] for row in csv.DictReader(io.StringIO(done.stdout))} == {"listops"}
    assert not list(tmp_path.glob("[Ll]*.*"))
    done = invoke("--task", "listops", "--reported")
    assert "Measured beside reported" in done.stdout
    assert not list(tmp_path.glob("[Ll]*.*"))
    done = invoke("--format", "md,tex")
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.glob("[Ll]*.*")) == ["LEADERBOARD.md", "leaderboard.tex"]
    assert invoke("--format", "pdf").exit_code == 2
    assert invoke("--protocol", "s4").exit_code == 2
    assert invoke("--task", "listops", "--out", str(tmp_path / "some")).exit_code == 0
    assert "pathfinder" not in (tmp_path / "some" / "LEADERBOARD.md").read_text()


def test_each_group_is_ranked_once_for_all_files(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(runs: Any) -> list[int]:
        sizes.append(len(runs))
        return [1] * len(runs)

    monkeypatch.setattr(ranking, "ranks", counted)
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    done = invoke("--reported")
    assert done.exit_code == 0, done.output
    assert sizes == [3, 3]


def test_a_model_with_a_stated_receptive_field_is_a_floor() -> None:
    runs = [record("bounded_cnn", seed, accuracy, receptive_field=9) for seed, accuracy in ((0, 0.2), (1, 0.3))]
    names = dict(leaderboard.floor_cells([*runs, record("gru")]))
    assert names["bounded_cnn, which sees 9 tokens"] == "25.0"
    assert len(names) == 3
    (shown,) = leaderboard.all_tables(ranked(*runs))
    assert shown.notes == ["bounded_cnn sees 9 tokens"]


def test_baselines_are_rows_of_the_table_between_those_that_beat_them_and_the_others() -> None:
    (shown,) = leaderboard.all_tables(ranked(record("s4d", accuracy=0.6), record("gru", accuracy=0.2)))
    assert [[cell.text for cell in row[:4]] for row in shown.rows] == [
        ["1", "s4d", "60.00", shown.rows[0][3].text], ["-", "root operator (no sequence model)", "36.00", "-"],
        ["1", "gru", "20.00", shown.rows[2][3].text], ["-", "majority class (no sequence model)", "17.00", "-"],
    ]  # fmt: skip


def test_runs_of_two_sources_are_two_rows() -> None:
    """Two versions of a user's class under one name are two models, not two seeds of one."""

    def made(seed: int, source: dict[str, Any] | None, **changes: Any) -> RunRecord:
        return record("net.py:Net", seed, 0.4 + seed / 10, source=source, **changes)

    one, two = ({"sha256": digit * 64, "files": {"net.py": digit * 64}} for digit in "ab")
    rows = rows_of(ranked(made(0, one), made(1, one), made(2, two)))
    assert {row.label: row.seeds for row in rows} == {"net.py:Net source aaaaaa": 2, "net.py:Net source bbbbbb": 1}
    (row,) = rows_of(ranked(made(0, one), made(1, one)))
    assert (row.label, row.seeds) == ("net.py:Net", 2)
    # a source that nobody knows is that of no other run
    assert [row.seeds for row in rows_of(ranked(made(0, {}), made(1, {})))] == [1, 1]
    assert [row.seeds for row in rows_of(ranked(made(0, None), made(1, None)))] == [2]
