"""The report in headless Chromium, where it is installed, used as a reader would use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report_page import HOSTILE, built


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page, opened by a link that shares a view."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (on Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("browser")
    place = folder / "report.html"
    place.write_text(built(folder), encoding="utf-8")
    opened = Browser(f"file://{place}#task=pathfinder&sort=rows.3.ascending&hide=parameters", folder / "profile")
    opened.run(HELPERS)
    yield opened
    opened.close()


HELPERS = """
  window.shown = () => [...document.querySelectorAll("#rows tbody tr:not(.baseline)")].filter((row) => !row.hidden);
  window.column = (n) => shown().map((row) => row.cells[n].textContent.trim());
  window.form = document.getElementById("filters");
  window.dialog = document.getElementById("evidence");
  window.set = (fields) => {
    for (const name of ["text", "task", "family"]) form[name].value = fields[name] ?? "";
    form.dispatchEvent(new Event("input"));
  };
  window.until = async (fits) => { while (!fits()) await new Promise((go) => setTimeout(go, 20)); };
"""


def test_a_link_shares_the_view(browser: Browser) -> None:
    restored = "return [column(0), getComputedStyle(document.querySelector('#rows th:nth-child(7)')).display]"
    assert browser.run(restored) == [["pathfinder"] * 3, "none"]
    rising = browser.run("return column(3).map(parseFloat)")
    assert rising == sorted(rising)
    browser.run("location.hash = '#text=s4d'; await until(() => form.text.value)")
    assert browser.run(restored.replace("column(0)", "column(2)")) == [["s4d", "s4d"], "table-cell"]


def test_it_sorts(browser: Browser) -> None:
    browser.run("set({})")
    click = "document.querySelector('#rows [data-key=accuracy]').click(); return column(3).map(parseFloat)"
    falling, rising = browser.run(click), browser.run(click)
    if falling[0] < falling[-1]:
        falling, rising = rising, falling
    assert len(falling) == 7
    assert falling == sorted(falling, reverse=True)
    assert rising == sorted(rising)
    assert browser.run("return location.hash").startswith("#sort=rows.3.")


def test_a_table_sorts_thousands_below_millions(browser: Browser) -> None:
    sorts = """
      const table = document.getElementById("diagnoses"), [head] = table.tHead.rows, rows = [...table.tBodies[0].rows];
      const column = [...head.cells].findIndex((cell) => cell.textContent === "steps");
      const texts = ["1.20M", "900.0k", "7,000", "-"], before = rows.map((row) => row.cells[column].textContent);
      rows.forEach((row, i) => { row.cells[column].textContent = texts[i]; });
      head.cells[column].firstChild.click();
      const sorted = [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
      rows.forEach((row, i) => { row.cells[column].textContent = before[i]; });
      return sorted;
    """
    falling = browser.run(sorts)
    assert falling == ["1.20M", "900.0k", "7,000", "-"][: len(falling)]
    assert len(falling) > 1


def test_it_filters_rows_and_figures_and_keeps_the_baselines(browser: Browser) -> None:
    browser.run("set({text: 'S4D pathf'})")
    assert browser.run("return shown().map((row) => row.cells[2].textContent + row.cells[0].textContent)") == [
        "s4dpathfinder"
    ]
    assert browser.run("return document.getElementById('count').textContent") == "1 of 7 rows"
    browser.run("set({task: 'listops', family: 'recurrent'})")
    assert browser.run("return [column(0), column(2)]") == [["listops"], ["gru"]]
    assert browser.run("return location.hash").startswith("#family=recurrent&task=listops")
    baselines = "return [...document.querySelectorAll('#rows .baseline')].filter((row) => !row.hidden).map("
    assert browser.run(f"{baselines} (row) => row.cells[0].textContent)") == ["listops"] * 4
    figures = "return [...document.querySelectorAll('#figures > details')].filter((part) => !part.hidden).map("
    assert set(browser.run(f"{figures} (part) => part.dataset.task)")) == {"listops"}
    heat = "return [...document.querySelectorAll('#diagnostics > .wide')].filter((part) => !part.hidden).map("
    assert browser.run(f"{heat} (part) => part.dataset.family)") == ["recurrent"]


def test_a_row_opens_its_evidence_and_a_hostile_name_stays_text(browser: Browser) -> None:
    browser.run(
        "set({}); shown().find((row) => /s4d/.test(row.textContent) && /listops/.test(row.textContent)).click()"
    )
    assert browser.run("return [dialog.open, document.getElementById('evidence-title').textContent.slice(0, 14)]") == [
        True, "s4d on listops",
    ]  # fmt: skip
    commands = "return [...dialog.querySelectorAll('code')].map((code) => code.textContent)"
    assert browser.run(commands) == [f"lra run listops s4d --seed {seed}" for seed in range(3)]
    browser.run("dialog.close(); shown().find((row) => row.textContent.includes('alert(1)')).click()")
    browser.run("await until(() => dialog.querySelector('svg'))")
    assert browser.run("return dialog.querySelector('.role-legend-label text').textContent") == "seed 0"
    assert browser.run("return dialog.querySelectorAll('script').length") == 0
    assert browser.run(commands) == [f"lra run {HOSTILE}"]
    browser.run("dialog.close()")


def test_a_cell_of_the_heat_map_opens_its_evidence(browser: Browser) -> None:
    click = """
      set({});
      const place = document.querySelector("#diagnostics [data-family=recurrent] [data-chart]");
      place.scrollIntoView();
      await until(() => place.querySelector("svg"));
      const cell = place.querySelector(".mark-rect path");
      const { x, y, width, height } = cell.getBoundingClientRect();
      const where = { bubbles: true, clientX: x + width / 2, clientY: y + height / 2 };
      for (const kind of ["pointerdown", "mousedown", "click"]) cell.dispatchEvent(new MouseEvent(kind, where));
      await until(() => dialog.querySelector("svg"));
      const said = [dialog.open, dialog.textContent.includes("solved: 98.4 % of the examples right")];
      const points = [...dialog.querySelectorAll(".mark-symbol [aria-label]")];
      said.push(points.map((point) => point.getAttribute("aria-label")));
      dialog.close();
      return said;
    """
    opened, told, points = browser.run(click)
    assert (opened, told) == (True, True)
    assert [point for point in points if "length: 256" in point and "55" in point]


def test_a_baseline_and_a_profile_open_their_evidence(browser: Browser) -> None:
    title = "const said = document.getElementById('evidence-title').textContent; dialog.close(); return said"
    baseline = "[...document.querySelectorAll('#rows .baseline')].find((row) => /root operator/.test(row.textContent))"
    assert browser.run(f"set({{}}); {baseline}.click(); {title}").startswith("root operator on listops")
    profiled = "[...document.querySelectorAll('#efficiency td button')].find((b) => b.textContent === 's4d')"
    assert browser.run(f"{profiled}.click(); {title}").startswith("s4d: encoder, batch 1")


def test_the_page_is_there_after_less_than_a_second_of_work(browser: Browser, tmp_path: Path) -> None:
    """Time of the main thread until the page is loaded: waiting for a CPU that others use does not count."""
    address = browser.run("return location.href.split('#')[0]")
    fresh = Browser("about:blank", tmp_path)
    fresh.call("Performance.enable", timeDomain="threadTicks")
    fresh.go(address)
    metrics = {m["name"]: m["value"] for m in fresh.call("Performance.getMetrics")["metrics"]}
    fresh.close()
    assert 0 < metrics["TaskDuration"] < 1


def test_it_fits_a_phone_and_nothing_was_fetched_or_logged(browser: Browser) -> None:
    """Every chart is drawn first: a fault of one would be logged."""
    browser.resize(390, 844)
    draw = """
      set({});
      for (const part of document.querySelectorAll("details")) part.open = true;
      for (const place of document.querySelectorAll("[data-chart]")) {
        place.scrollIntoView();
        await until(() => place.querySelector("svg"));
      }
      return [document.querySelectorAll("[data-chart] svg").length, document.documentElement.scrollWidth];
    """
    charted, wide = browser.run(draw)
    assert charted == browser.run("return document.querySelectorAll('[data-chart]').length")
    assert wide <= 390
    assert [address for address in browser.requests if not address.startswith(("file:", "blob:"))] == []
    assert len(browser.requests) == 1
    assert browser.faults == []


def test_the_page_follows_the_dark_scheme(browser: Browser) -> None:
    """Light text on a dark page, on a system that asks for it."""
    shade = """
      const light = (name) => {
        const numbers = getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).map(Number);
        return numbers.reduce((a, b) => a + b) / 765;
      };
      return [light("backgroundColor"), light("color")];
    """
    page, ink = browser.run(shade)
    assert page > 0.9
    assert ink < 0.3
    browser.prefer("dark")
    page, ink = browser.run(shade)
    browser.prefer("light")
    assert page < 0.2
    assert ink > 0.8
