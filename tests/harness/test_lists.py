"""`lra list` and `lra data list`: 80 columns, whole names, what a user chooses by, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lra import registry
from lra.cli.app import app
from lra.cli.lists import size_text
from lra.errors import UserError
from lra.registry import PLUGIN, Registry, architectures, tasks

TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"


def printed(*words: str) -> list[str]:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_lists_fit_80_columns_without_breaking_a_name() -> None:
    for lines, names in ((printed("list"), [*architectures.names(), *tasks.names()]),
                         (printed("data", "list"), tasks.names())):  # fmt: skip
        assert max(map(len, lines)) <= 80
        first = {line.split()[0] for line in lines if line.strip()}
        assert set(names) <= first
        assert not any(character in line for line in lines for character in "│┃…\x1b")


def test_the_list_has_what_a_user_chooses_by() -> None:
    (row,) = (line for line in printed("list", "s4d") if line.startswith("s4d "))
    assert row.split() == ["s4d", f"+{len(architectures.facts('s4d')['variants'])}", "state_space", "L", "log", "L",
                           "either", "yes", "2022"]  # fmt: skip
    data = json.loads("\n".join(printed("data", "list", "retrieval", "--json")))
    assert {row["protocol"] for row in data} == set(tasks.facts("retrieval")["protocols"])
    assert all((row["classes"], row["length"] > 999, row["chance"]) == (2, True, 0.5) for row in data)


def test_patterns_and_families_filter_the_list() -> None:
    lines = printed("list", "*former*", "--family", "linear-attention")
    names = [line.split()[0] for line in lines[1:] if not line.startswith(("+n", "papers"))]
    matching = [name for name in architectures.names() if "former" in name]
    assert names == [name for name in matching if architectures.family(name) == "linear_attention"]
    variants = [line.split()[0] for line in printed("list", "s4d/*")[1:] if line.startswith("s4d/")]
    assert variants == [f"s4d/{variant}" for variant in architectures.facts("s4d")["variants"]]
    assert {line.split()[0] for line in printed("data", "list", "path*")[1:]} >= {"pathx", "path256"}
    assert not any("pathx" in line for line in printed("data", "list", "image"))


def test_direction_and_recurrent_mode_are_those_of_the_encoders() -> None:
    wrong = []
    for name in architectures.names():
        constructor, options = architectures.get(name), {"d_model": 16, "n_layers": 1, "length": 16}
        direction, encoder = "causal" if constructor.cls.card.causal else "two-way", None
        if "direction" in constructor.options():
            try:
                encoder, direction = constructor(**options, direction="causal"), "either"
            except UserError:
                direction = "two-way"
        try:
            (encoder or constructor(**options)).init_state(1)
            recurrent = True
        except NotImplementedError:
            recurrent = False
        facts = architectures.facts(name)
        if (facts["direction"], facts["recurrent"]) != (direction, recurrent):
            wrong.append((name, facts["direction"], direction, facts["recurrent"], recurrent))
    assert wrong == []


class Point:
    """A stand-in for an entry point."""

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def load(self) -> Any:
        module, _, attribute = self.value.partition(":")
        return getattr(__import__(module, fromlist=[attribute]), attribute)


def test_plug_ins_have_full_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "lra.architectures": [Point("theirs", "lra.architectures.recurrent.gru:GRU"), Point("broken", "no_such:Net")],
        "lra.tasks": [Point("their_task", "lra.tasks.lra.listops:ListOps")],
    }
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])
    Registry._plugins.cache_clear()
    try:
        rows = {line.split()[0]: line.split() for line in printed("list") if line.strip()}
        gru = architectures.facts("gru")
        assert rows["theirs"][-4:] == [gru["scaling"], gru["direction"], "yes", str(gru["year"])]
        assert rows["theirs"][2] == PLUGIN
        assert rows["broken"][1] == PLUGIN
        assert any("broken: " in line and "no_such" in line for line in printed("list"))
        assert rows["their_task"][-1] == "10"
        assert {line.split()[0] for line in printed("list", "--family", PLUGIN)} >= {"theirs", "broken"}
    finally:
        monkeypatch.undo()
        Registry._plugins.cache_clear()


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; from lra.cli.app import app\n"
        "for words in (['list'], ['data', 'list']): app(words, standalone_mode=False)\n"
        "assert not {'torch', 'pandas', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)


def test_sizes_are_short() -> None:
    assert [size_text(size) for size in (None, 0, 999, 1000, 12_345_678, 999_600_000, 3_210_000_000_000)] == [
        "-", "0 B", "999 B", "1 kB", "12.3 MB", "1 GB", "3,210 GB",
    ]  # fmt: skip
