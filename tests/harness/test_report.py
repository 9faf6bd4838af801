"""The report: self-contained, escaped, complete; and, where Chromium is installed, used as a reader would use it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from records import filled, profile_content, record, write
from typer.testing import CliRunner

from lra.cli.app import app
from lra.errors import UserError
from lra.reports import charts, efficiency, report
from lra.results.collection import Collection

HOSTILE = "</script><script>alert(1)</script>&\"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LITERATURE = (
    "architecture,name,protocol,listops,text,retrieval,image,pathfinder,pathx,printed_average,not_comparable,source,note\n"
    "S4D-X,s4d,strict,60.5,,,,86,FAIL,,,A paper Table 1,\n"
)
TAKES = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path)


def fill(tmp_path: Path) -> Path:
    """Results, literature and profile of a small report; one record has a hostile name."""
    (tmp_path / "reported.csv").write_text(LITERATURE)
    filled(tmp_path)
    curve = [{"step": s, "validation_accuracy": s / 400, "loss": 1 / s} for s in (50, 100, 200)]
    write(tmp_path, record(HOSTILE, 0, 0.4, command=f"lra run {HOSTILE}", curve=curve, regime=HOSTILE))
    cells = [("transformer", n, 1e-6 * n**2) for n in (256, 1024, 4096)] + [
        ("s4d", n, 4e-4 * n) for n in (256, 1024, 4096)
    ]
    for name, length, seconds in cells:
        made = profile_content(name, length, seconds)
        place = tmp_path / "profile" / "cpu" / f"{name}-{length}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(made))
    return tmp_path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = fill(tmp_path_factory.mktemp("results"))
    return report.build(Collection.read(folder), folder)


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
        entry["parts"] = {name: dict(pairs) for name, pairs in (data["parts"][n] for n in entry["parts"])}
        entry["runs"] = [dict(zip(data["runColumns"], run, strict=True)) for run in entry["runs"]]
    return data["evidence"]


def test_every_row_and_every_cell_of_the_overview_has_its_evidence(page: str) -> None:
    known = evidence(page)
    names = set(re.findall(r'data-row="(r\d+)"', page))
    assert names == set(known)
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
    assert collapsed["parts"]["Summary"]["runs that left chance"].startswith("2 of 3")


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
    assert re.findall(r'data-sort="52\.000" class="place0">52\.00 <small></small></td>', page)


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
    assert (len(run["step"]), run["step"][0], run["step"][-1]) == (report.CURVE_POINTS, 1, 1000)


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
         "status": "", "seeds": 1, "speed": 1.0, "seen": 10, "parameters": 10, "gflop": 1.0}
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
    heat = charts.heatmap(frame(4).assign(task="parity"))
    starts = {".png": b"\x89PNG", ".svg": b"<svg", ".pdf": b"%PDF"}
    for suffix, start in starts.items():
        assert charts.save(heat, tmp_path / f"chart{suffix}").read_bytes().startswith(start)
    with pytest.raises(UserError, match=r"a chart ends in \.png, \.svg, \.pdf"):
        charts.save(heat, tmp_path / "chart.jpg")


SESSION = """
<script>
const faults = [];
window.addEventListener("error", (event) => faults.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
window.addEventListener("securitypolicyviolation", (event) => faults.push(`blocked ${event.blockedURI}`));
console.error = console.warn = (...words) => faults.push(words.join(" "));
const until = async (fits) => { while (!fits()) await new Promise((go) => setTimeout(go, 20)); };
const use = async () => {
  const said = {};
  const all = [...document.querySelectorAll("#rows tbody tr")];
  const rows = () => [...document.querySelectorAll("#rows tbody tr")].filter((row) => !row.hidden);
  const column = (n) => rows().map((row) => row.cells[n].textContent.trim());
  const dialog = document.getElementById("evidence");
  const form = document.getElementById("filters");
  said.restored = [column(0), getComputedStyle(document.querySelector("#rows th:nth-child(7)")).display];
  form.reset();
  await new Promise((go) => setTimeout(go, 50));
  const button = document.querySelector("#rows [data-key=accuracy]");
  button.click();
  said.falling = column(3).map(parseFloat);
  button.click();
  said.rising = column(3).map(parseFloat);
  said.address = location.hash;
  form.text.value = "S4D pathf"; form.dispatchEvent(new Event("input"));
  said.filtered = rows().map((row) => row.cells[2].textContent + " " + row.cells[0].textContent);
  said.count = document.getElementById("count").textContent;
  form.text.value = ""; form.task.value = "listops"; form.dispatchEvent(new Event("input"));
  said.tasks = [...new Set(column(0))];
  const figures = [...document.querySelectorAll("#figures details[data-task]")].filter((part) => !part.hidden);
  said.figures = figures.map((part) => part.dataset.task);
  said.filteredAddress = location.hash;
  form.task.value = ""; form.family.value = "recurrent"; form.dispatchEvent(new Event("input"));
  said.family = [...new Set(column(2))];
  form.reset();
  await new Promise((go) => setTimeout(go, 50));
  const wanted = rows().find((row) => row.textContent.includes("s4d") && row.textContent.includes("listops"));
  wanted.querySelector("button").click();
  said.opened = dialog.open; said.title = document.getElementById("evidence-title").textContent;
  said.commands = [...dialog.querySelectorAll("code")].map((code) => code.textContent);
  dialog.close();
  all.find((row) => row.textContent.includes("alert(1)")).click();
  await until(() => dialog.querySelector("svg"));
  said.legend = [...dialog.querySelectorAll("svg .role-legend-label text")].map((text) => text.textContent);
  said.injected = dialog.querySelectorAll("script").length;
  dialog.close();
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (const place of document.querySelectorAll("[data-chart]")) {
    place.scrollIntoView();
    await until(() => place.querySelector("svg"));
  }
  said.charts = document.querySelectorAll("[data-chart] svg").length;
  const dot = document.querySelector("#figures svg .mark-symbol path[aria-roledescription=point]");
  const { x, y, width, height } = (dot.scrollIntoView(), dot.getBoundingClientRect());
  const where = { bubbles: true, clientX: x + width / 2, clientY: y + height / 2 };
  for (const kind of ["pointerdown", "mousedown", "click"]) dot.dispatchEvent(new MouseEvent(kind, where));
  said.byDot = dialog.open;
  dialog.close();
  said.wide = document.documentElement.scrollWidth > window.innerWidth;
  said.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  return said;
};
window.addEventListener("load", async () => {
  const out = document.createElement("pre");
  try { out.textContent = JSON.stringify({ ...await use(), faults }); }
  catch (error) { out.textContent = JSON.stringify({ faults: [...faults, String(error.stack)] }); }
  out.id = "session";
  document.body.append(out);
});
</script>
"""


@pytest.mark.slow  # a busy machine draws too slowly for the browser's clock
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (on Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser_it_sorts_filters_draws_and_opens_its_evidence(width: int, page: str, tmp_path: Path) -> None:
    """500 is the narrowest window of a headless Chromium."""
    place = tmp_path / "session.html"
    place.write_text(page.replace("<title>", SESSION + "<title>", 1), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom",
               "--virtual-time-budget=60000", f"--user-data-dir={tmp_path / 'chromium'}"]  # fmt: skip
    address = f"file://{place}#task=pathfinder&sort=rows.3.ascending&hide=parameters"
    done = subprocess.run([str(CHROMIUM), *options, address], capture_output=True, text=True, timeout=120, check=True)
    (text,) = re.findall(r'<pre id="session">(.*?)</pre>', done.stdout, re.DOTALL)
    said = json.loads(html.unescape(text))
    assert said["faults"] == []
    assert said["restored"] == [["pathfinder"] * 3, "none"]
    assert said["falling"] == sorted(said["falling"], reverse=True)
    assert said["rising"] == sorted(said["rising"])
    assert len(said["rising"]) == 7
    assert said["address"] == "#sort=rows.3.ascending&hide=parameters"
    assert said["filtered"] == ["s4d pathfinder"]
    assert said["count"] == "1 of 7 rows"
    assert said["tasks"] == ["listops"]
    assert set(said["figures"]) == {"listops"}
    assert said["filteredAddress"] == "#task=listops&sort=rows.3.ascending&hide=parameters"
    assert said["family"] == ["gru"]
    assert said["opened"]
    assert said["title"].startswith("s4d on listops")
    assert said["commands"] == [f"lra run listops s4d --seed {seed}" for seed in range(3)]
    assert said["legend"] == ["seed 0"]
    assert said["injected"] == 0
    assert said["charts"] == len(contents(page)["charts"])
    assert said["byDot"]
    assert not said["wide"]
    assert said["fetched"] == []
