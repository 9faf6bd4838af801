"""The documentation site: its snippets and commands run, its links lead somewhere, and its reference is complete."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import docstrings
import pages
import pytest
import samples
from documents import ROOT, blocks, files, links, mentions, of, parse, shell_lines, small
from typer.testing import CliRunner

from lra.cli.app import app
from lra.conformance import suite
from lra.registry import architectures, tasks
from lra.reports import efficiency
from lra.sweeps import plans

WRITTEN = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
ELSEWHERE = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# these take a second and write nothing; the others are parsed and not run
QUICK = {"list", "show"}
OTHERS = {"pip", "sbatch", "source"}
"""Programs that are not of this project: their commands are not run."""
ALL = "\n".join(WRITTEN.values())


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory from which Python imports, with results, runs and prepared data below it."""
    for name in ("LRA_RESULTS", "LRA_RUNS", "LRA_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def write_files(text: str, folder: Path) -> None:
    for name, content in files(text).items():
        (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("page", [name for name, text in WRITTEN.items() if blocks("python", text)])
def test_python_snippets(page: str, workplace: Path) -> None:
    """In order, in one namespace, as a reader types them."""
    write_files(WRITTEN[page], workplace)
    namespace: dict[str, Any] = {}
    for snippet in blocks("python", WRITTEN[page]):
        if snippet not in files(WRITTEN[page]).values():
            exec(compile(small(snippet), page, "exec"), namespace)


def test_the_layer_keeps_what_it_declares(workplace: Path) -> None:
    write_files(WRITTEN["layer.md"], workplace)
    findings = suite.check("ema_layer.py:EMA", only=["shape", "padding", "causal", "step", "gradients"])
    assert [finding.status for finding in findings] == ["pass"] * 5, findings


@pytest.mark.parametrize("page", [name for name, text in WRITTEN.items() if of("lra", shell_lines(text))])
def test_lra_commands(page: str, workplace: Path) -> None:
    write_files(WRITTEN[page], workplace)
    for command in of("lra", shell_lines(WRITTEN[page])):
        words = shlex.split(command)[1:]
        if words[0] in QUICK and command not in ELSEWHERE:
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, (command, done.output)
        else:
            parse(command)


def test_sweep_files(workplace: Path) -> None:
    """With the recipe `quick`, which has no parameter budget to solve for."""
    write_files(WRITTEN["scaling.md"].replace('"standard"', '"quick"'), workplace)
    for name in ("sweep.toml", "search.toml"):
        done = CliRunner().invoke(app, ["sweep", name, "--dry-run", "--no-forecast"])
        assert done.exit_code == 0, done.output
        assert done.output.count(": open") == {"sweep.toml": 12, "search.toml": 16}[name]
    assert not (workplace / "lra_runs").exists()


@pytest.mark.parametrize(
    ("name", "count"), [("ladder.toml", 5 * 3), pytest.param("laws.toml", 2 * 4 * 3, marks=pytest.mark.slow)]
)
def test_sweep_files_with_budgets(name: str, count: int, workplace: Path) -> None:
    write_files(WRITTEN["laws.md"], workplace)
    cells = plans.read(workplace / name).cells
    assert len(cells) == count
    assert all(50 <= cell.settings["train.steps"] <= 20_000 for cell in cells)


@pytest.mark.parametrize("command", of("lra", mentions("lra", ALL)))
def test_mentioned_commands_parse(command: str) -> None:
    parse(command)


@pytest.mark.parametrize("command", sorted({*of("make", shell_lines(ALL)), *of("make", mentions("make", ALL))}))
def test_make_commands(command: str) -> None:
    words = ["make", "-n", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_shell_line_is_checked() -> None:
    assert [line for line in shell_lines(ALL) if line.split()[0] not in OTHERS | {"make", "lra"}] == []


def test_every_toml_block_is_a_file_that_parses() -> None:
    named = {content for text in WRITTEN.values() for content in files(text).values()}
    assert set(blocks("toml", ALL)) <= named
    for block in blocks("toml", ALL):
        tomllib.loads(block)


@pytest.fixture(scope="module")
def site() -> dict[str, str]:
    return pages.pages()


def test_links_lead_to_pages(site: dict[str, str]) -> None:
    broken = [
        f"{page}: {target}"
        for page, text in site.items()
        for target in links(text)
        if os.path.normpath(PurePosixPath(page).parent / target) not in {*site, *samples.pictures()}
    ]
    assert broken == []


def test_everything_registered_has_a_page_in_its_index(site: dict[str, str]) -> None:
    operators = [path.parent.name for path in (ROOT / "kernels").glob("[!_]*/__init__.py")]
    for kind, names in (("architectures", architectures.names()), ("tasks", tasks.names()), ("operators", operators)):
        for name in names:
            assert f"reference/{kind}/{name}.md" in site
            assert f"[{name}]({name}.md)" in site[f"reference/{kind}/index.md"]


def test_the_page_of_an_architecture_holds_its_card_docstring_and_options(site: dict[str, str]) -> None:
    page = site["reference/architectures/s4d.md"]
    assert "https://arxiv.org/abs/2206.11893" in page
    assert "K_l = 2 Re sum_m C_m Bbar_m Abar_m^l" in blocks("text", page)[0]
    assert "| `state_size` | `64` |" in page
    assert "| `s4d/inv` | `init='inv'` |" in page
    assert "| recurrent mode | yes |" in page
    assert "| recurrent mode | no |" in site["reference/architectures/fnet.md"]


def test_the_page_of_an_architecture_holds_what_was_measured_and_checked(site: dict[str, str]) -> None:
    page = site["reference/architectures/s4d.md"]
    cells = [p for p in efficiency.load(ROOT / "results") if p.cell.architecture == "s4d"]
    measured = page.partition("## Measured")[2].partition("## ")[0]
    assert measured.count("| s4d |") == len(cells) > 0
    assert (
        "| conformance | passes every [check](../checks.md) but `optim_norms`, for [reasons](#exempted-checks) |"
        in page
    )
    assert "| conformance | passes every [check](../checks.md) |" in site["reference/architectures/mgu.md"]
    assert "| compared in | `tests/architectures/test_parity_s4d.py` |" in page


def test_the_page_of_a_task_shows_examples(site: dict[str, str]) -> None:
    assert re.search(r"## Examples\n\n```text\n\[M", site["reference/tasks/listops.md"])
    assert "![Examples of pathfinder](pathfinder.png)" in site["reference/tasks/pathfinder.md"]
    assert "on one contour" in site["reference/tasks/pathfinder.md"]
    assert "lra data show image --png image.png" in site["reference/tasks/image.md"]
    assert samples.pictures()["reference/tasks/pathfinder.png"].startswith(b"\x89PNG")


def test_the_other_references_are_complete(site: dict[str, str]) -> None:
    task, commands = site["reference/tasks/listops.md"], site["reference/commands.md"]
    assert {"### strict", "### lra2020", "### s4"} <= set(task.splitlines())
    assert {"## lra run", "## lra data prepare", "## lra new architecture"} <= set(commands.splitlines())
    assert "`--init-from`" in commands
    assert "select-only" not in commands, "hidden options stay hidden"
    assert "### lra.train" in site["reference/api.md"]
    assert "def reference(" in blocks("python", site["reference/operators/linear_scan.md"])[1]
    assert "## RunRecord" in site["reference/record.md"]


def test_every_variable_is_on_its_page_and_no_other() -> None:
    folders = ("lra", "architectures", "kernels", "tasks", "benchmarks")
    code = "".join(p.read_text(encoding="utf-8") for f in folders for p in sorted((ROOT / f).rglob("*.py")))
    code += (ROOT / "Makefile").read_text(encoding="utf-8")
    used = set(re.findall(r"\bLRA_[A-Z]+\b", code))
    described = set(re.findall(r"^\| `(LRA_[A-Z]+)`", WRITTEN["environment.md"], flags=re.MULTILINE))
    assert described == used


def test_docstrings_become_markdown() -> None:
    text = "One *line*.\n\n    y_t = a * x_t\n        over time\n\nOf `a_b` and c_d, arXiv:2206.11893."
    assert docstrings.markdown(text) == (
        "One \\*line\\*.\n\n```text\ny_t = a * x_t\n    over time\n```\n\n"
        "Of `a_b` and c\\_d, [arXiv:2206.11893](https://arxiv.org/abs/2206.11893)."
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("furo") is None, reason="the extra `docs` is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pages.write(tmp_path / "source")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs")]
    done = subprocess.run(
        [*sphinx, str(tmp_path / "source"), str(tmp_path / "html")],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "reference" / "architectures" / "s4d.html").is_file()
