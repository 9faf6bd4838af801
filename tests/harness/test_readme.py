"""The README and CONTRIBUTING are run: snippets, commands, targets, links and the tree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, USAGE_ERROR, blocks, links, mentions, of, parse, shell_lines, small
from typer.testing import CliRunner

from lra.cli.app import app

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# these finish in seconds and write nothing; the others are parsed and not run
QUICK = {"list", "show", "check"}


@pytest.fixture
def with_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory that holds my_layer.py as the README prints it."""
    [layer] = [block for block in blocks("python", README) if "class MyLayer" in block]
    assert len(layer.splitlines()) <= 15
    (tmp_path / "my_layer.py").write_text(layer, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def test_length() -> None:
    assert len(README.splitlines()) <= 200


def test_every_shell_line_is_checked() -> None:
    lines = shell_lines(README + GUIDE)
    assert [line for line in lines if not line.startswith(("make ", "lra "))] == []


def test_python_snippet() -> None:
    [snippet] = [block for block in blocks("python", README) if "torch.randn" in block]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [shape] = re.findall(r"# (torch\.Size.*)", snippet)
    assert shape in done.stdout


def test_training_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, but on the tests' own small task."""
    [snippet] = [block for block in blocks("python", README) if "lra.train(" in block]
    for name in ("LRA_RESULTS", "LRA_RUNS", "LRA_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    done = subprocess.run([sys.executable, "-c", small(snippet)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "difference +0.00 points" in done.stdout


@pytest.mark.parametrize("command", of("make", shell_lines(README + GUIDE) + mentions("make", README + GUIDE)))
def test_make_command(command: str) -> None:
    words = shlex.split(command)[1:]
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", of("lra", shell_lines(README)))
@pytest.mark.usefixtures("with_layer")
def test_lra_command(command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] in QUICK:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    else:
        parse(command)


@pytest.mark.parametrize("command", of("lra", shell_lines(GUIDE) + mentions("lra", README + GUIDE)))
def test_lra_command_parses(command: str) -> None:
    parse(command)


@pytest.mark.parametrize("command", ["lra runn listops s4d", "lra run listops", "lra run listops s4d --sed 1"])
def test_wrong_commands_do_not_parse(command: str) -> None:
    with pytest.raises((KeyError, USAGE_ERROR)):
        parse(command)


def test_links_lead_somewhere() -> None:
    targets = links(README + GUIDE)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_tree_is_the_tree() -> None:
    [tree] = blocks("", README)
    listed = {line.split("/")[0] for line in tree.splitlines()}
    linked = {p.name for p in (ROOT / "lra").iterdir() if p.is_symlink()}
    assert listed == {"lra", "benchmarks", "docs", "examples", "results", "tests"} | linked
