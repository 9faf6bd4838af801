"""The report: self-contained, escaped, complete."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from documents import parse
from records import diagnostic, record, write
from report_page import built, diagnose, fill
from typer.testing import CliRunner

from lra.cli.app import app
from lra.errors import UserError
from lra.registry import architectures
from lra.reports import charts, diagnostics, efficiency, report
from lra.reports import evidence as evidence_of
from lra.results.collection import Collection

TAKES = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return built(tmp_path_factory.mktemp("results"))


def test_it_is_one_file_that_fetches_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.findall(r"<[^>]*\s(?:src|href)\s*=\s*[\"']?(?!#)[^\"'>\s]", page)
    assert "url(" not in page
    assert "@import" not in page
    assert not re.findall(r"https?://", page)


class Tags(HTMLParser):
    """Every element closed in its order, and the scripts there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag not in TAKES:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in TAKES:
            assert self.open.pop() == tag


def test_it_is_well_formed_and_nothing_in_a_record_becomes_markup(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.scripts == 3  # data, Vega as data, and the page's own
    assert "alert(1)" in page
    assert "<script>alert" not in page


def contents(page: str) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def evidence(page: str) -> dict[str, Any]:
    """Each row's evidence, with its parts by name."""
    data = contents(page)
    for entry in data["evidence"].values():
        parts = (data["parts"][n] for n in entry["parts"])
        entry["parts"] = {name: dict(data["pairs"][n] for n in numbers) for name, numbers in parts}
        entry["runs"] = [dict(zip(data["runColumns"], run, strict=True)) for run in entry["runs"]]
    return data["evidence"]


def test_every_row_and_every_cell_of_the_overview_has_its_evidence(page: str) -> None:
    known = evidence(page)
    # those of the modified runs and of the profiles' charts are among them
    assert set(re.findall(r'data-row="([^"]+)"', page)) == set(known)
    row = next(e for e in known.values() if e["title"].startswith("s4d on listops"))
    parts = row["parts"]
    assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
    assert row["commands"][1] == "lra run listops s4d --seed 1"
    assert all(len(run["checksum"]) == 16 for run in row["runs"])
    assert parts["Recipe"]["optim.lr"] == "0.003"
    assert parts["Hardware and versions"]["versions.torch"] == "2.13.0"
    assert parts["Data"]["checksum"].startswith("5f28b695")
    assert parts["Baselines"]["root operator"] == "36.0 %"
    assert parts["Reported (not ranked)"] == {"S4D-X: A paper Table 1": "60.50 %; differs in: other recipe"}
    assert "over the seeds" in parts["Summary"]["accuracy"]
    collapsed = next(e for e in known.values() if e["title"].startswith("gru on pathfinder"))
    assert collapsed["parts"]["Summary"]["runs above chance"].startswith("2 of 3")


def test_baselines_and_profiles_have_their_evidence(page: str) -> None:
    known = evidence(page)
    rule = next(e for e in known.values() if e["title"].startswith("root operator on listops"))
    assert rule["parts"]["Baseline"]["accuracy"] == "36.00 %"
    assert '"root operator" predicts the most frequent training label' in rule["parts"]["Baseline"]["computed by"]
    assert rule["parts"]["Data"]["checksum"].startswith("5f28b695")
    (key, profile) = next((key, e) for key, e in known.items() if e["title"].startswith("s4d: encoder, batch 1"))
    assert [name for name in profile["parts"] if name.endswith("tokens")] == [
        "256 tokens",
        "1,024 tokens",
        "4,096 tokens",
    ]
    assert profile["parts"]["1,024 tokens"]["seconds.train.median"] == "0.4096"
    assert profile["parts"]["1,024 tokens"]["rounds, train, s"] == "0.4096, 0.4096"
    parse(profile["commands"][0])
    assert "--lengths 256,1024,4096 --batch 1 --d-model 64 --layers 2" in profile["commands"][0]
    charted = [row for rows in contents(page)["datasets"].values() for row in rows if "train_ms" in row]
    assert {row["row"] for row in charted if row["architecture"] == "s4d"} == {key}


def test_the_rules_of_an_unregistered_task_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record may name any file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    write(tmp_path, record("gru", 0, 0.5, task="evil.py:Evil", floors={"rule": 0.2}))
    entries = evidence(report.build(Collection.read(tmp_path), tmp_path)).values()
    assert [e["parts"]["Baseline"]["computed by"] for e in entries if e["title"].startswith("rule on")] == [
        "the task that the record names"
    ]


def test_a_cell_of_the_heat_map_has_its_curve_by_length(page: str) -> None:
    data = contents(page)
    (task,) = data["lengths"]
    assert task == "parity"
    spec = data["specs"][data["lengths"][task]]
    assert {layer["data"]["name"] for layer in spec["layer"] if "data" in layer} | {
        inner["data"]["name"] for layer in spec["layer"] for inner in layer.get("layer", ()) if "data" in inner
    } >= {"lengths"}  # fmt: skip
    assert report.PANEL in json.dumps(spec)


def test_figures_are_there(page: str) -> None:
    data = contents(page)
    labels = re.findall(r'class="chart" data-chart="\d+" role="img" aria-label="([^"]*)"', page)
    for words in ("Accuracy against training time on listops", "Learning curves, outside: training loss",
                  "Training step against length", "Peak memory of a step against length"):  # fmt: skip
        assert any(label.startswith(words) for label in labels), words
    assert len(labels) == len(data["charts"])
    growth = re.sub(r"<[^>]+>", " ", page[page.index("Growth with length") :])
    # n^2 is below the line 400 n up to n = 400
    assert "from 400" in re.sub(r"\s+", " ", growth)


def test_a_row_whose_every_run_is_at_chance_is_grey(tmp_path: Path) -> None:
    write(tmp_path, record("gru", 0, 0.17, collapsed="at chance"))
    write(tmp_path, record("s4d", 0, 0.6))
    page = report.build(Collection.read(tmp_path), tmp_path)
    assert re.findall(r'<tr data-row="(r\d)"[^>]*class="chance"', page) == ["r1"]


def test_baselines_are_rows_by_accuracy(page: str, tmp_path: Path) -> None:
    write(tmp_path, record("gru", 0, 0.3))
    write(tmp_path, record("s4d", 0, 0.6))
    small = report.build(Collection.read(tmp_path), tmp_path)
    table = small[small.index('<table id="rows"') :].partition("</table>")[0]
    rows = re.findall(r"<tr ([^>]*)>.*?<th[^>]*>(.*?)</th><td data-sort=\"([0-9.]+)\"><b>", table)
    names = [re.sub("<[^>]+>", "", name) for _, name, _ in rows]
    mark = "(no sequence model)"
    assert names == ["s4d", f"root operator {mark}", "gru", f"majority class {mark}"]
    assert [float(value) for *_, value in rows] == [60.0, 36.0, 30.0, 17.0]
    assert ["baseline" in attributes for attributes, *_ in rows] == [False, True, False, True]
    overview = page[page.index('<table class="matrix') : page.index('id="results"')]
    assert "majority class <small>(no sequence model)</small>" in overview


def test_diagnostics_and_claims_are_shown_where_there_are_such_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = contents(page)["datasets"].values()
    cells = {(row["label"], row["task"]): row for rows in datasets for row in rows if "verdict" in row}
    assert set(cells) == {("gru", "parity"), ("transformer", "parity"), ("transformer", "mqar")}
    gru = cells["gru", "parity"]
    assert (gru["accuracy"], gru["whole"], gru["verdict"]) == (99.9, "98.4", "solved")
    assert (gru["reach"], gru["seeds"], gru["guess"]) == ("64", 2, "50.0")
    assert cells["transformer", "parity"]["chance"]
    lengths = [row for rows in datasets for row in rows if "length" in row and row.get("label") == "gru"]
    assert [(row["length"], row["accuracy"]) for row in lengths] == [(40, 99.9), (64, 95.0), (256, 55.0)]
    behind = evidence(page)[gru["row"]]
    assert behind["parts"]["Verdict"]["seed 1"].startswith("solved: 98.4 % of the examples right")
    assert behind["parts"]["Chance and plateaus"] == {"chance": "50.0 %"}
    assert len(behind["runs"]) == 2

    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    text = 'statement = "Gated networks <learn> parity."\nsource = "a paper"\npublished = "100"\ntask = "parity"\n'
    text += 'protocol = "dense"\nsolves = 0.95\nfails = 0.85\n'
    cell = '[[cells]]\narchitecture = "{}"\nexpect = "{}"\n'
    (tmp_path / "claims").mkdir()
    for name, expected in (("C1", "fails"), ("C2", "solves")):
        cells_of = cell.format("gru", "solves") + cell.format("transformer", expected)
        (tmp_path / "claims" / f"{name}.toml").write_text(text + cells_of)
    (tmp_path / "claims" / "C3.toml").write_text(text + cell.format("lstm", "solves"))
    (tmp_path / "claims" / "C4.toml").write_text("x = 1")
    empty = report.build(Collection.read(tmp_path), tmp_path)
    assert 'id="diagnostics"' not in empty
    assert 'id="claims"' not in empty
    diagnose(tmp_path)
    shown = report.build(Collection.read(tmp_path), tmp_path)
    outcome = r'<summary><span class="outcome \w+">(\w+)</span> (\w+): ([^<]*)</summary>'
    told = "Gated networks &lt;learn&gt; parity."
    assert re.findall(outcome, shown) == [("agree", "C1", told), ("disagree", "C2", told)]
    assert "left out the claim C4: unknown key" in shown
    assert "<summary>1 file left out or counted once</summary>" in shown
    row = next(key for key, entry in contents(shown)["evidence"].items() if entry["title"].startswith("gru on parity"))
    assert f'<button type="button" data-row="{row}">gru</button>' in shown


def test_runs_with_other_settings_and_protocols_have_cells_of_their_own() -> None:
    changed = diagnostic("gru", changed={"train.steps": 100}, recipe_hash="1" * 64)
    earlier = diagnostic("gru", recipe_hash="2" * 64)
    other = diagnostic("gru", protocol={"name": "final", "length": 256})
    found = {(cell.label, cell.column) for cell in diagnostics.cells([diagnostic("gru"), changed, earlier, other])}
    steps = changed.recipe.train["steps"]
    hashes = [made.recipe_hash[:6] for made in (earlier, diagnostic("gru"))]
    assert found == {(f"gru #{digits}", "parity (dense)") for digits in hashes} | {
        (f"gru, train.steps {steps}", "parity (dense)"), ("gru", "parity (final)"),
    }  # fmt: skip


def test_every_chart_finds_its_data(page: str) -> None:
    data = contents(page)

    def names(spec: dict[str, Any]) -> set[str]:
        inner = [names(layer) for layer in spec.get("layer", ())]
        return {spec["data"]["name"]} if "data" in spec else set().union(*inner)

    for chart in data["charts"]:
        needed = names(data["specs"][chart["spec"]])
        if chart["rows"]:
            assert set(chart["rows"]) <= {run["row"] for run in data["runs"]}
            assert needed == {"runs"}
        else:
            assert needed
            assert needed <= set(data["datasets"])
    assert names(data["specs"][data["seeds"]]) == {"runs"}


def test_an_average_is_a_column_only_where_it_exists(tmp_path: Path) -> None:
    """Of single runs it has no interval."""
    tasks = ("listops", "text", "retrieval", "image", "pathfinder")
    for task in tasks[:4]:
        write(tmp_path, record("gru", 0, 0.5, task=task))
    headings = r'<button type="button" data-kind="number">([a-z0-9 ]+)</button>'
    page = report.build(Collection.read(tmp_path), tmp_path)
    assert re.findall(headings, page) == list(tasks[:4])
    write(tmp_path, record("gru", 0, 0.6, task=tasks[4]))
    page = report.build(Collection.read(tmp_path), tmp_path)
    assert re.findall(headings, page) == [*tasks, "avg 5"]
    button = '<button type="button" data-row="a0 avg 5 gru">52.00</button>'
    assert f'data-sort="52.000" class="place0">{button} <small></small></td>' in page
    average = evidence(page)["a0 avg 5 gru"]
    assert average["parts"]["Tasks"] == {task: f"{60 if task == 'pathfinder' else 50}.00 %, seeds 1" for task in tasks}
    assert len(average["commands"]) == 5


def test_memory_comes_from_the_profile_of_the_device(page: str, tmp_path: Path) -> None:
    def memory(text: str) -> dict[str, str]:
        datasets = contents(text)["datasets"].values()
        return {row["label"]: row["memory"] for rows in datasets for row in rows if row.get("status")}

    assert memory(page)["s4d"] == "16 MiB, a step of 1,024 tokens"
    assert memory(page)["gru"] == "not profiled"
    fill(tmp_path)
    for path in (tmp_path / "profile").rglob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"environment": content["environment"] | {"threads": 2}}))
    assert memory(report.build(Collection.read(tmp_path), tmp_path))["s4d"] == "not profiled"


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    curve = [{"step": s, "validation_accuracy": 0.5} for s in range(1, 1001)]
    write(tmp_path, record("gru", 0, 0.5, curve=curve))
    (run,) = contents(report.build(Collection.read(tmp_path), tmp_path))["runs"]
    assert (len(run["step"]), run["step"][0], run["step"][-1]) == (evidence_of.CURVE_POINTS, 1, 1000)


@pytest.mark.slow
def test_a_thousand_results_stay_below_3_megabytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for task in ("listops", "text", "image", "pathfinder", "retrieval"):
        for name in architectures.names()[:67]:
            for seed in range(3):
                values = dict(zip(("validation_accuracy", "validation_loss", "loss"), random.random(3), strict=True))
                curve = [{"step": step, **values} for step in range(100, 4100, 100)]
                write(tmp_path, record(name, seed, random.integers(400, 1800) / 2000, task=task, curve=curve))
    page = report.build(Collection.read(tmp_path), tmp_path)
    assert "1,005 runs" in page
    assert len(page.encode()) < 3e6


def test_an_empty_folder_makes_a_page_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    done = CliRunner().invoke(app, ["report"])
    assert done.exit_code == 0, done.output
    assert "There are no results yet" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_left_out_files_are_told(folder: Path) -> None:
    (folder / "runs" / "bad.json").write_text("{")
    assert "not a result file" in html.unescape(report.build(Collection.read(folder), folder))


def frame(count: int = 10, **changes: Any) -> pd.DataFrame:
    """Rows as the charts take them: the slower the better, except for the last."""
    families = ("attention", "recurrent")
    rows = [
        {"row": f"r{i}", "label": f"net{i}", "family": families[i % 2], "accuracy": 40.0 + i, "low": 39.0 + i,
         "high": 41.0 + i, "chance": False, "minutes": 1.0 + i, "memory_bytes": math.nan, "shown": "", "memory": "",
         "status": "", "seeds": 1, "speed": 1.0, "seen": 10, "parameters": 10, "gflop": 1.0, "hardware": "a cpu x2"}
        for i in range(count)
    ]  # fmt: skip
    rows[-1]["accuracy"] = 39.5
    return pd.DataFrame(rows).assign(**changes)


BASELINES = {"majority class": 10.0, "root operator": 42.0, "depth 4": 86.0}


def test_the_axis_follows_the_rows_and_baselines_beyond_it_are_told() -> None:
    spec = charts.dots(frame(), BASELINES).to_dict()
    axis = spec["layer"][2]["encoding"]["x"]["scale"]["domain"]
    assert 38 < axis[0] < 39
    assert 49 < axis[1] < 52
    told = [line.replace("\u00a0", " ") for line in spec["title"]["subtitle"]]
    assert told == ["dashed: root operator 42.0", "below the axis: majority class 10.0", "above the axis: depth 4 86.0"]
    drawn = [row for rows in spec["datasets"].values() for row in rows if "baseline" in row]
    assert drawn == [{"baseline": "root operator", "accuracy": 42.0}]


def test_the_front_holds_what_no_row_beats() -> None:
    table = frame()
    assert list(charts.pareto(table, "minutes", "accuracy")["label"]) == [f"net{i}" for i in range(9)]
    slower = table.assign(minutes=table["minutes"].to_numpy()[::-1])
    assert list(charts.pareto(slower, "minutes", "accuracy")["label"]) == ["net9", "net8"]


def test_what_is_at_chance_is_not_on_the_front_and_memory_is_an_area() -> None:
    table = frame(chance=[False] * 8 + [True] * 2)
    spec = charts.tradeoff(table, BASELINES, ["attention", "recurrent"]).to_dict()
    steps, dots = (layer for layer in spec["layer"] if layer["mark"]["type"] in ("line", "point"))
    assert {row["label"] for row in spec["datasets"][steps["data"]["name"]]} == {f"net{i}" for i in range(8)}
    assert dots["encoding"]["size"] == {"value": 50}
    known = charts.tradeoff(table.assign(memory_bytes=1.0), BASELINES, ["attention", "recurrent"]).to_dict()
    dots = next(layer for layer in known["layer"] if layer["mark"]["type"] == "point")
    assert dots["encoding"]["size"]["condition"]["field"] == "memory_bytes"
    assert dots["mark"]["invalid"] == "show"


def test_times_of_two_machines_are_told() -> None:
    def subtitle(table: pd.DataFrame) -> list[str]:
        return charts.tradeoff(table, {}, ["attention", "recurrent"]).to_dict()["title"]["subtitle"]

    assert subtitle(frame()) == []
    machines = ["a cpu x2"] * 9 + ["another x8"]
    assert subtitle(frame(hardware=machines)) == ["on more than one machine: a cpu x2; another x8"]


def test_names_beside_dots_do_not_overlap() -> None:
    crowd = frame(30, label="a long name", minutes=[1 + i / 1000 for i in range(30)])
    spec = charts.tradeoff(crowd, {}, ["attention", "recurrent"]).to_dict()
    names = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "text")
    assert 0 < len(spec["datasets"][names["data"]["name"]]) < 30


@pytest.mark.parametrize("count", [1, 8, 9, 20])
def test_a_panel_holds_eight_names_at_most_each_with_its_own_colour_and_marker(count: int) -> None:
    table = frame(count, family="attention")
    parts = charts.panels(table, "label")
    assert sum(len(part) for _, part in parts) == count
    assert len(parts) == -(-count // charts.LINES)
    for theme in charts.INK:
        ranges = charts.theme(theme)["range"]
        assert len(set(ranges["category"])) == len(set(ranges["symbol"])) == charts.LINES
    for _, part in parts:
        cells = part.assign(architecture=part["label"], length=256, train_ms=1.0)
        spec = charts.by_length(cells, "train_ms", "", "ms").to_dict()
        domain = spec["layer"][1]["encoding"]["color"]["scale"]["domain"]
        assert len(set(domain)) == len(part) <= charts.LINES
        assert spec["layer"][1]["encoding"]["shape"]["scale"]["domain"] == domain


def test_more_names_than_colours_are_refused() -> None:
    runs = frame(9).assign(step=[[1]] * 9, loss=[[1.0]] * 9)
    with pytest.raises(ValueError, match="9 names in one panel"):
        charts.curves(runs, "loss", "loss")
    assert charts.curves(runs[:8], "loss", "loss").to_dict()


def test_panels_of_growth_share_their_axis(folder: Path) -> None:
    (cells,) = efficiency.curves(efficiency.load(folder)).values()
    specs = [chart.to_dict() for chart in charts.growth(cells, "train_ms", "ms")]
    domains = [spec["layer"][1]["encoding"]["y"]["scale"]["domain"] for spec in specs]
    assert len(domains) == 2
    assert domains[0] == domains[1]
    assert [spec["title"] for spec in specs] == ["attention", "state space"]


def test_a_chart_is_saved_in_the_format_of_its_name(tmp_path: Path) -> None:
    heat = charts.heatmap(frame(4).assign(task="parity"), ["parity"], "attention")
    starts = {".png": b"\x89PNG", ".svg": b"<svg", ".pdf": b"%PDF"}
    for suffix, start in starts.items():
        assert charts.save(heat, tmp_path / f"chart{suffix}").read_bytes().startswith(start)
    with pytest.raises(UserError, match=r"a chart ends in \.png, \.svg, \.pdf"):
        charts.save(heat, tmp_path / "chart.jpg")


def test_every_figure_is_written_for_a_column_of_a_paper(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.25 inches wide, text has 6 points or more."""
    monkeypatch.setenv("LRA_RESULTS", str(folder))
    done = CliRunner().invoke(
        app, ["report", "--out", str(folder / "out"), "--figures", str(folder / "out"), "--format", "svg"]
    )
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in (folder / "out").glob("*.svg"))
    assert f"wrote {len(names)} files" in done.output
    for ending in ("-time", "-accuracy", "-training-loss", "-validation-accuracy", "-training", "-memory"):
        assert [name for name in names if name.endswith(f"{ending}.svg")], ending
    assert {"diagnostics-recurrent.svg", "diagnostics-parity-length.svg"} <= set(names)
    for name in names:
        svg = (folder / "out" / name).read_text(encoding="utf-8")
        (width,) = re.findall(r'<svg[^>]*? width="([\d.]+)"', svg)
        sizes = [float(size) for size in re.findall(r'font-size="([\d.]+)px"', svg)]
        assert min(sizes) * 3.25 * 72 / float(width) >= 6, name
        assert "<script>alert" not in svg
    refused = CliRunner().invoke(app, ["report", "--figures", str(folder), "--format", "gif"])
    assert (refused.exit_code, "gif" in refused.output) == (2, True)
