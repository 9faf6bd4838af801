"""Published settings: every file loads, fits its architecture and says what to expect."""

from __future__ import annotations

import re
import tomllib
from functools import partial
from typing import Any

import pytest
from typer.testing import CliRunner

from lra import match, recipe, store
from lra.cli import app
from lra.registry import architectures
from lra.run import Request, build, resolved

FILES = sorted(path.stem for path in (recipe.FOLDER / "paper").glob("*.toml"))
TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")


def architecture_of(file: str) -> str:
    """`transformer-rope` is a variant's own file; file names otherwise are architectures."""
    return file.replace("-", "/")


def content(file: str) -> dict[str, Any]:
    return tomllib.loads((recipe.FOLDER / "paper" / f"{file}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES)
def test_every_file_resolves_and_fits_its_architecture(file: str) -> None:
    name = architecture_of(file)
    if name.partition("/")[0] not in architectures.names():
        pytest.skip(f"no architecture {name} is registered")
    told = list(content(file)["task"])
    assert set(told) <= set(TASKS)
    for task in told:
        found, origin, constructor = resolved(Request(task, name, "paper"))
        assert origin["data.protocol"].startswith(f"{file}.toml")
        assert found.train.steps >= found.train.evaluate_every
        own, protocol = store.resolve(task, found.data.protocol)
        assert protocol.name in ("lra2020", "s4")
        model = match.shaped(partial(build, found, constructor, own, protocol, 0))
        assert sum(p.numel() for p in model.parameters()) > 1000


@pytest.mark.parametrize("file", FILES)
def test_every_file_names_its_source_and_every_table_its_place(file: str) -> None:
    text = (recipe.FOLDER / "paper" / f"{file}.toml").read_text(encoding="utf-8")
    head = text.partition("\n\n")[0]
    assert re.search(r"arXiv:\d{4}\.\d{5}", head)
    assert "Values: " in head
    for task, table in content(file)["task"].items():
        expected = table.get("expected", {})
        assert not expected.get("accuracy") or "arXiv:" in str(expected["source"]), task
        # what is not the source's own says so where it stands
        assert re.search(r"^evaluate_every = \d+   # ours", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("task", "architecture", "says"),
    [
        ("listops", "s4", ["59.60 %", "58.35 to 59.60 %", "50 % on validation after epoch 10", "0.01"]),
        ("image", "transformer", ["42.44 %", "lra2020"]),
        ("text", "transformer/rope", ["79.08 %", "transformer-rope.toml"]),
    ],
)
def test_show_prints_what_to_expect(task: str, architecture: str, says: list[str]) -> None:
    done = CliRunner().invoke(app, ["show", task, architecture, "--recipe", "paper"])
    assert done.exit_code == 0, done.output
    for text in says:
        assert text in done.output


def test_an_architecture_without_published_settings_is_told_which_there_are() -> None:
    done = CliRunner().invoke(app, ["show", "listops", "gru", "--recipe", "paper"])
    assert done.exit_code == 2
    assert "s4d" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
