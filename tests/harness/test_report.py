"""The report: self-contained, escaped, complete; and, where Chromium is installed, used as a reader would use it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from records import filled, record, write
from typer.testing import CliRunner

from lra.cli.app import app
from lra.reports import report
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
    (tmp_path / "reported.csv").write_text(LITERATURE)
    filled(tmp_path)
    curve = [{"step": s, "validation_accuracy": s / 400, "loss": 1.0} for s in (50, 100, 200)]
    write(tmp_path, record(HOSTILE, 0, 0.4, command=f"lra run {HOSTILE}", curve=curve, regime=HOSTILE))
    cells = [("transformer", n, 1e-6 * n**2) for n in (256, 1024, 4096)] + [
        ("s4d", n, 4e-4 * n) for n in (256, 1024, 4096)
    ]
    for name, length, seconds in cells:
        made = profiled(name, length, seconds)
        place = tmp_path / "profile" / "cpu" / f"{name}-{length}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(made))
    return tmp_path


def profiled(name: str, length: int, seconds: float, **changes: Any) -> dict[str, Any]:
    timing = {"median": seconds, "low": 0.99 * seconds, "high": 1.02 * seconds, "repeats": 30}
    made = {
        "cell": {"architecture": name, "length": length, "batch": 1, "d_model": 64, "n_layers": 2,
                 "direction": "bidirectional", "budget": 1.0, "task": ""},
        "environment": {"cpu": "a cpu x2", "versions": {"torch": "2.13.0"}, "commit": {"hash": "0" * 40}},
        "parameters": 100_000,
        "flops": {"forward": 1e5 * length, "algorithmic": 1e5 * length, "forward_backward": 3e5 * length,
                  "matmul_counted": 1e5 * length, "matmul_by_formula": 1e5 * length, "uncounted": []},
        "seconds": {"forward": timing, "train": timing},
        "memory": {"peak_bytes": 2**20 * length // 64, "parameters": 400_000, "gradients": 400_000,
                   "optimiser": 800_000, "activations": 2**19 * length // 64},
        "tokens_per_second": length / seconds, "mfu": 0.2,
        "rounds": [{"forward": seconds, "train": seconds}] * 2, "machine": {"rate": 1e12},
    }  # fmt: skip
    return made | changes


@pytest.fixture
def page(folder: Path) -> str:
    return report.build(Collection.read(folder), folder)


def test_it_is_one_file_that_fetches_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!#)[^\"'>\s]", page)
    assert "url(" not in page
    assert "@import" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


class Tags(HTMLParser):
    """Every element closed in its order, and the scripts there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag not in TAKES and tag not in ("line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in TAKES and tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag


def test_it_is_well_formed_and_nothing_in_a_record_becomes_markup(page: str) -> None:
    found = Tags()
    found.feed(page)
    assert found.open == []
    assert found.scripts == 2
    assert "alert(1)" in page
    assert "<script>alert" not in page


def evidence(page: str) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def test_every_row_and_every_cell_of_the_overview_has_its_evidence(page: str) -> None:
    known = evidence(page)
    names = set(re.findall(r'data-row="(r\d+)"', page))
    assert names == set(known)
    row = next(e for e in known.values() if e["title"].startswith("s4d on listops"))
    parts = {name: dict(pairs) for name, pairs in row["parts"]}
    assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
    assert row["runs"][1]["command"] == "lra run listops s4d --seed 1"
    assert all(len(run["checksum"]) == 16 for run in row["runs"])
    assert parts["Recipe"]["optim.lr"] == "0.01"
    assert parts["Hardware and versions"]["versions.torch"] == "2.13.0"
    assert parts["Data"]["checksum"].startswith("5f28b695")
    assert parts["Floors"]["root operator"] == "36.0 %"
    assert parts["Reported (not ranked)"] == {"S4D-X: A paper Table 1": "60.50 %; differs in: other recipe"}
    assert "over the seeds" in parts["Summary"]["accuracy"]
    collapsed = next(e for e in known.values() if e["title"].startswith("gru on pathfinder"))
    assert dict(dict(collapsed["parts"])["Summary"])["runs that left chance"].startswith("2 of 3")


def test_figures_are_there(page: str) -> None:
    for words in ("Accuracy against speed", "Learning curves", "Training step", "Peak memory of a training step"):
        assert f'aria-label="{words}"' in page
    assert "best measured: s4d" in page
    growth = re.sub(r"<[^>]+>", " ", page[page.index("Growth with length") :])
    # n^2 is below the line 400 n up to n = 400
    assert "from 400" in re.sub(r"\s+", " ", growth)


def test_an_empty_folder_makes_a_page_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    done = CliRunner().invoke(app, ["report"])
    assert done.exit_code == 0, done.output
    assert "There are no results yet" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_left_out_files_are_told(folder: Path) -> None:
    (folder / "runs" / "bad.json").write_text("{")
    assert "not a result file" in html.unescape(report.build(Collection.read(folder), folder))


def test_charts_put_points_where_they_belong() -> None:
    svg = chart("t<", "x", "y", [Series("a&b", [(1, 10), (10, 20), (100, 40)])], log_x=True, lines=[("floor", 15)])
    tree = ElementTree.fromstring(svg)
    circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in tree.iter("circle")]
    (a, b, c) = circles
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.2)
    assert b[1] - a[1] == pytest.approx((c[1] - b[1]) / 2, abs=0.2)
    (floor,) = [float(line.get("y1", "")) for line in tree.iter("line") if line.get("class") == "floor"]
    assert floor == pytest.approx((a[1] + b[1]) / 2, abs=0.2)
    assert chart("t", "x", "y", []) == ""


def test_areas_are_proportional_and_names_do_not_overlap() -> None:
    dots = [Series(f"name{i}", [(i % 3, i // 3 + 1)], [4.0**i], line=False) for i in range(3)]
    radii = [float(c.get("r", "")) for c in ElementTree.fromstring(chart("t", "x", "y", dots)).iter("circle")]
    assert radii[2] / radii[1] == pytest.approx(2, abs=0.05)
    crowd = [Series("a long name", [(1 + i / 1000, 1)], [1.0], line=False) for i in range(30)]
    shown = [t for t in ElementTree.fromstring(chart("t", "x", "y", crowd)).iter("text") if t.text == "a long name"]
    assert 0 < len(shown) < 30


@pytest.mark.parametrize(
    ("value", "text"), [(1024, "1K"), (65536, "64K"), (0.25, "0.25"), (3e6, "3M"), (300, "300"), (20_000, "20k")]
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert plots.number(value) == text


SESSION = """
<script>
const faults = [];
window.addEventListener("error", (event) => faults.push(String(event.message)));
console.error = (...words) => faults.push(words.join(" "));
window.addEventListener("load", () => {
  const shown = () => [...document.querySelectorAll("#rows tbody tr")].filter((r) => r.style.display !== "none");
  const values = (key) => shown().map((r) => JSON.parse(r.dataset.values)[key]);
  const dialog = document.getElementById("evidence");
  const found = {};
  document.querySelector("[data-key=accuracy]").click();
  found.falling = values("accuracy");
  document.querySelector("[data-key=accuracy]").click();
  found.rising = values("accuracy");
  const form = document.getElementById("filters");
  form.text.value = "S4D pathf"; form.dispatchEvent(new Event("input"));
  found.filtered = values("label").map((label, i) => `${label} ${values("task")[i]}`);
  found.count = document.getElementById("count").textContent;
  form.text.value = ""; form.task.value = "listops"; form.dispatchEvent(new Event("input"));
  found.tasks = [...new Set(values("task"))];
  shown().find((r) => r.textContent.includes("s4d")).querySelector("button").click();
  found.opened = dialog.open; found.title = document.getElementById("evidence-title").textContent;
  found.commands = [...dialog.querySelectorAll("code")].map((c) => c.textContent);
  dialog.close();
  const dot = document.querySelector("svg [data-row]");
  dot.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
  found.by_key = dialog.open;
  dialog.close();
  const hostile = [...document.querySelectorAll("#rows tbody tr")].find((r) => r.textContent.includes("alert(1)"));
  hostile.click();
  found.curves = dialog.querySelectorAll("svg polyline").length > 0;
  found.headings = [...dialog.querySelectorAll("h3")].filter((h) => h.textContent === "Runs").length;
  found.injected = dialog.querySelectorAll("script").length;
  found.wide = document.documentElement.scrollWidth > window.innerWidth;
  found.faults = faults;
  const out = document.createElement("pre");
  out.id = "session"; out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser_it_sorts_filters_and_opens_its_evidence(width: int, page: str, tmp_path: Path) -> None:
    """500 is the narrowest window of a headless Chromium."""
    place = tmp_path / "session.html"
    place.write_text(page.replace("<title>", SESSION + "<title>", 1), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'chromium'}"
    done = subprocess.run(
        [str(CHROMIUM), *options, profile, f"file://{place}"], capture_output=True, text=True, timeout=120, check=True
    )
    (told,) = re.findall(r'<pre id="session">(.*?)</pre>', done.stdout, re.DOTALL)
    found = json.loads(html.unescape(told))
    assert found["faults"] == []
    assert found["falling"] == sorted(found["falling"], reverse=True)
    assert found["rising"] == sorted(found["rising"])
    assert len(found["rising"]) == 7
    assert found["filtered"] == ["s4d pathfinder"]
    assert found["count"] == "1 of 7 rows"
    assert found["tasks"] == ["listops"]
    assert found["opened"]
    assert found["by_key"]
    assert found["title"].startswith("s4d on listops")
    assert found["commands"] == [f"lra run listops s4d --seed {seed}" for seed in range(3)]
    assert found["curves"]
    assert found["headings"] == 1
    assert found["injected"] == 0
    assert not found["wide"]
