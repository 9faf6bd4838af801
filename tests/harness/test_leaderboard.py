"""The leaderboard: which rows are compared, what is left out, and its five forms against golden files."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import answered, filled, record, write
from rich.console import Console
from typer.testing import CliRunner

from lra import files
from lra.cli.app import app
from lra.errors import UserError
from lra.reports import leaderboard, sheets, tables
from lra.results import literature, result
from lra.results.collection import Collection

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden"
LITERATURE = (
    "architecture,name,protocol,listops,text,retrieval,image,pathfinder,pathx,printed_average,not_comparable,source,note\n"
    "S4D-X,s4d,strict,60.5,,,,86,FAIL,,pathfinder,A paper Table 1,\n"
)


@pytest.fixture
def collection(tmp_path: Path) -> Collection:
    (tmp_path / "reported.csv").write_text(LITERATURE)
    return filled(tmp_path)


def test_rows_average_seeds_and_keep_groups_apart() -> None:
    runs = [
        record("gru", 0, 0.40), record("gru", 1, 0.50), record("s4d", 0, 0.60),
        record("gru", 0, 0.90, protocol={"name": "lra2020", "length": 2000}),
        record("gru", 0, 0.90, environment={"cpu": "another x8"}), record("gru", 0, 0.90, data={"checksum": "other"}),
        record("gru", 0, 0.90, regime="self-pretrained"), record("gru", 0, 0.90, n=1000),
        record("gru", 0, 0.90, environment={"cpu": "a cpu x2", "gpu": "H200", "device": "cuda"}),
    ]  # fmt: skip
    found = leaderboard.rows(runs)
    assert len(found) == 7
    main = found[leaderboard.group_of(runs[0])]
    assert [row.architecture for row in main] == ["s4d", "gru"]
    assert main[1].accuracy.mean == pytest.approx(0.45)
    assert [row.accuracy.source for row in main] == ["test set", "seeds"]
    idle = record("gru", environment={"cpu": "a cpu x2", "gpu": "H200", "device": "cpu"})
    assert leaderboard.group_of(idle) == leaderboard.group_of(runs[0])


def test_a_rerun_of_one_seed_does_not_count_twice_and_two_recipes_are_two_rows() -> None:
    old, new = record(accuracy=0.4), record(accuracy=0.6, started="2026-02-01T00:00:00+00:00")
    (rows,) = leaderboard.rows([new, old]).values()
    assert (rows[0].seeds, rows[0].accuracy.mean) == (1, 0.6)
    (rows,) = leaderboard.rows([old, record(accuracy=0.5, recipe_hash="b" * 64)]).values()
    assert [row.label for row in rows] == ["gru #bbbbbb", "gru #aaaaaa"]


def test_ranks_use_seeds_and_stored_predictions(collection: Collection) -> None:
    found = leaderboard.rows(collection.records, collection.answers)
    listops = next(rows for group, rows in found.items() if group.task == "listops")
    assert {row.architecture: row.rank for row in listops} == {"s4d": 1, "transformer": 2, "gru": 2}
    one_seed = [r for r in collection.records if r["seed"] == 0]
    (without, *_), (with_answers, *_) = (leaderboard.rows(one_seed, a).values() for a in ({}, collection.answers))
    assert [row.rank for row in without] == [1, 1, 1]
    assert [row.rank for row in with_answers] == [1, 2, 2]


def test_predictions_are_matched_by_example_and_only_on_the_same_ones(tmp_path: Path) -> None:
    for name, accuracy, shift in (("s4d", 0.62, 0), ("gru", 0.5, 0), ("lru", 0.5, 7)):
        stored = answered(accuracy, 2000, 0)
        turned = np.random.default_rng(1).permutation(2000) if name == "gru" else np.arange(2000)
        stored = {key: value[turned] for key, value in stored.items()}
        stored["example"] = stored["example"] + shift
        result.write(record(name, 0, accuracy), stored, tmp_path)
    found = Collection.read(tmp_path)
    right = {r["architecture"]: found.answers[r["id"]].right for r in found.records}
    assert np.array_equal(right["gru"], answered(0.5, 2000, 0)["prediction"] == answered(0.5, 2000, 0)["label"])
    (rows,) = leaderboard.rows(found.records, found.answers).values()
    assert {row.architecture: row.rank for row in rows} == {"s4d": 1, "gru": 2, "lru": 2}
    (rows,) = leaderboard.rows([r for r in found.records if r["architecture"] != "gru"], found.answers).values()
    assert [row.rank for row in rows] == [1, 1]


def test_an_average_is_never_over_missing_tasks() -> None:
    runs = [record("gru", task=task, accuracy=0.5 + i / 10) for i, task in enumerate(leaderboard.LRA[:5])]
    runs += [record("s4d", task=task, accuracy=0.6) for task in leaderboard.LRA if task != "text"]
    (((_, by_architecture)),) = leaderboard.averages(leaderboard.rows(runs)).items()
    mean = leaderboard.average(by_architecture["gru"], leaderboard.LRA[:5])
    assert mean
    assert mean.mean == pytest.approx(0.7)
    assert leaderboard.average(by_architecture["gru"], leaderboard.LRA) is None
    assert leaderboard.average(by_architecture["s4d"], leaderboard.LRA[:5]) is None
    shown = leaderboard.overall_sheet(("strict", "quick", "scratch", "a cpu"), by_architecture)
    texts = {row[0].text: [cell.text for cell in row[-2:]] for row in shown.rows}
    assert texts == {"gru": ["70.00", "-"], "s4d": ["-", "-"]}


def test_runs_at_chance_are_counted_and_told(collection: Collection) -> None:
    shown = next(s for s in leaderboard.sheets(collection) if s.title.startswith("pathfinder"))
    row = next(row for row in shown.rows if row[1].text == "gru")
    assert [cell.text for cell in row[2:5:2]] == [f"{100 * np.mean([0.5, 0.702, 0.704]):.2f}", "2/3"]
    assert "at chance: 1 of 3 runs of gru (the others' mean is 70.30)" in shown.notes


def test_a_table_says_who_was_trained_on_more() -> None:
    speed = {"examples": 9600, "examples_per_second": 10.0}
    made = [record("gru"), record("gru", 1), record("lstm"), record("s4d", speed=speed)]
    (found,) = leaderboard.sheets(Collection(made))
    assert "training examples differ: 9.6k for s4d; 6.4k for the others" in found.notes
    seen = {row[1].text: row[found.columns.index("seen")].text for row in found.rows}
    assert seen == {"gru": "6.4k", "lstm": "6.4k", "s4d": "9.6k"}
    (same,) = leaderboard.sheets(Collection(made[:3]))
    assert not [note for note in same.notes if "training examples" in note]


def test_no_row_at_chance_is_the_best_of_anything() -> None:
    made = [record("gru", accuracy=0.498, collapsed="not above"), record("s4d", accuracy=0.49)]
    made += [record(name, task="image", accuracy=0.498, collapsed="not above") for name in ("gru", "s4d")]
    overall, image, listops = leaderboard.sheets(Collection(made))
    assert [[cell.place for cell in row[1:3]] for row in overall.rows] == [[0, 0], [1, 0]]
    assert [row[2].place for row in image.rows] == [0, 0]
    assert [row[2].place for row in listops.rows] == [0, 1]
    assert "| gru | 49.80 ± 2.19, at chance | 49.80 ± 2.19, at chance |" in tables.readme(Collection(made))


def test_many_rows_at_chance_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a table where 36 rows are, and in one where all are: one note in every form, not one a row."""
    names, chance = sorted(f"net{i}" for i in range(36)), "not above the best blind guess"
    lost = [record(name, accuracy=0.17, collapsed=chance) for name in names]
    mixed = [record("gru", i, a, collapsed=chance if a < 0.2 else "") for i, a in enumerate((0.17, 0.6, 0.64))]
    told = f"at chance: every run of {', '.join(names)}; 1 of 3 runs of gru (the others' mean is 62.00)"
    for records, notes in (
        (lost + mixed, [f"one seed, ± of the test set: {', '.join(names)}", told]),
        (lost, ["one seed, ± of the test set: all rows", "at chance: every run of all rows"]),
    ):
        (found,) = leaderboard.sheets(Collection(records))
        assert [note for note in found.notes if "floors" not in note] == notes
    for made in lost + mixed:
        write(tmp_path, made)
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    written = invoke("--out", str(tmp_path)).stdout, *(p.read_text() for p in tmp_path.glob("[Ll]*.[mht]*"))
    assert len(written) == 4
    assert [text.count("at chance: ") for text in written] == [1] * 4
    assert [text.count("net7, net8") for text in written] == [2] * 4


@pytest.mark.parametrize("form", ["md", "csv", "tex", "html"])
def test_tables_match_their_golden_files(form: str, collection: Collection) -> None:
    """Written by `tables.build` from the records of tests/records.py, and read over."""
    assert tables.build(collection, form) == (GOLDEN / f"leaderboard.{form}").read_text(encoding="utf-8")
    turned = Collection(list(reversed(collection.records)), (), collection.answers, collection.reported)
    assert tables.build(turned, form) == tables.build(collection, form)


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
    for form, (name, _) in tables.FORMATS.items():
        assert tables.build(collection, form) == (tracked / "results" / name).read_text(encoding="utf-8"), (
            f"results/{name} is not what results/runs says: run `lra leaderboard`"
        )
    start, end = tables.MARKERS
    shown = (tracked / "README.md").read_text(encoding="utf-8").split(start)[1].split(end)[0].strip()
    assert shown == tables.readme(collection), "README.md is not what results/runs says: run `lra leaderboard`"


def test_the_short_form_has_a_row_for_each_architecture(collection: Collection) -> None:
    """The records of tests/records.py are of one recipe, regime and device."""
    title, _, head, _, *rows, _, floors = tables.readme(collection).splitlines()
    assert title == "Recipe quick, scratch, a cpu x2:"
    assert head == "| architecture | listops (strict) | pathfinder (strict) |"
    assert rows == [
        "| s4d | **62.20 ± 0.50, 3 seeds** | **92.20 ± 0.50, 3 seeds** |",
        "| transformer | <u>40.40 ± 0.50, 3 seeds</u> | <u>70.40 ± 0.50, 3 seeds</u> |",
        "| gru | 40.20 ± 0.50, 3 seeds | 63.53 ± 29.12, 3 seeds, 1 at chance |",
    ]
    rules = "majority class 17.0, root operator 36.0"
    assert floors == f"Floors: listops (strict) {rules}; pathfinder (strict) {rules}."


def test_the_terminal_form_fits_100_columns(tmp_path: Path) -> None:
    names = ("linear_transformer/random_features", "s4d", "nystromformer")
    speed = {"examples": 123_456_789, "examples_per_second": 12345.6}
    long = [record(name, task=task, accuracy=0.8, parameters=123_456_789, speed=speed)
            for name in names for task in leaderboard.LRA]  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    for sheet in leaderboard.sheets(Collection(long)):
        console.print(sheets.terminal(sheet))
    shown = console.export_text()
    assert "80.00" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_hostile_names_are_escaped_in_every_form(tmp_path: Path) -> None:
    name = "x.py:<script>|[red]_{\\&%$#~^"
    found = Collection([record(name), record("gru")])
    assert "<script>" not in tables.build(found, "html")
    assert "<script>" not in tables.build(found, "md")
    assert r"\|[red]" in tables.build(found, "md")
    assert r"\_\{\textbackslash{}\&\%\$\#\textasciitilde{}\textasciicircum{}" in tables.build(found, "tex")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sheets.terminal(leaderboard.sheets(found)[0]))
    assert "[red]" in console.export_text()


def test_latex_is_balanced(collection: Collection) -> None:
    text = tables.build(collection, "tex")
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


def test_measured_stands_beside_reported_with_what_differs(collection: Collection) -> None:
    sheet = leaderboard.beside(leaderboard.rows(collection.records), collection)
    assert sheet
    lines = {row[0].text: [cell.text for cell in row[1:6]] for row in sheet.rows}
    assert lines["listops (strict, quick)"] == ["s4d", "62.20", "60.50", "+1.70", "other recipe"]
    assert lines["pathfinder (strict, quick)"][-1] == "other data or task, see note, other recipe"
    paper = [record("s4d", recipe={"name": "paper/s4d"}), record("s4d", task="pathx", protocol={"name": "s4"})]
    beside = leaderboard.beside(leaderboard.rows(paper), Collection(paper, reported=collection.reported))
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
    found = Collection.read(tmp_path)
    assert len(found.records) == 1
    assert "is a copy of" in found.problems[0]
    content = json.loads(path.read_text()) | {"regime": "pretrained"}
    (other / path.name).write_text(json.dumps(content | {"seal": files.seal(content)}))
    found = Collection.read(tmp_path)
    assert found.records == []
    assert len(found.problems) == 2
    assert all(str(p) in " ".join(found.problems) for p in (path, other / path.name))


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (answered(0.6, 2000, 0), "its predictions are 0.6000 right, its accuracy is 0.5000"),
        (answered(0.5, 100, 0), "stores (100,) predictions"),
    ],
)
def test_predictions_that_contradict_the_accuracy_are_refused(
    stored: dict[str, np.ndarray], says: str, tmp_path: Path
) -> None:
    path = result.write(record(), stored, tmp_path)
    found = Collection.read(tmp_path)
    assert found.records == []
    assert str(path) in found.problems[0]
    assert says in found.problems[0]


def test_filters(collection: Collection) -> None:
    assert {r["task"] for r in collection.only(task="listops").records} == {"listops"}
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


def test_a_model_with_a_stated_receptive_field_is_a_floor() -> None:
    records = [record("bounded_cnn", seed, accuracy, receptive_field=9) for seed, accuracy in ((0, 0.2), (1, 0.3))]
    group = leaderboard.group_of(records[0])
    names = dict(leaderboard.floor_cells([*records, record("gru")], group))
    assert names["bounded_cnn, which sees 9 tokens"] == "25.0"
    assert len(names) == 3
