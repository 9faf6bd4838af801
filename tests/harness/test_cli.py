"""The command line: what it lists, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lra import registry
from lra.cli import common
from lra.cli.app import app
from lra.cli.common import process_start
from lra.cli.template import architecture as start_architecture
from lra.errors import UserError

TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"
runner = CliRunner()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("LRA_DATA", raising=False)
    return tmp_path


def refused(*arguments: str) -> str:
    """The one line a wrong command answers with."""
    done = runner.invoke(app, list(arguments))
    assert done.exit_code == 2, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_list_names_everything_and_imports_no_torch() -> None:
    code = (
        "import sys; from lra.cli.app import app; app(['list', '--json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)
    assert [a["name"] for a in found["architectures"]] == registry.architectures.names()
    assert [t["name"] for t in found["tasks"]] == registry.tasks.names()
    s4d = next(a for a in found["architectures"] if a["name"] == "s4d")
    assert {"lin", "inv", "legs"} <= set(s4d["variants"])


def test_show_names_the_paper() -> None:
    url = registry.architectures.facts("lstm")["url"]
    assert url in runner.invoke(app, ["show", "listops", "lstm", "--recipe", "quick"]).output


def test_show_says_where_each_value_comes_from() -> None:
    done = runner.invoke(app, ["show", "listops", "s4d", "--recipe", "quick", "--set", "optim.lr=0.5"])
    assert done.exit_code == 0, done.output
    row = next(line for line in done.output.splitlines() if "optim.lr" in line)
    assert "0.5" in row
    assert "--set" in row
    assert "quick.toml" in done.output
    assert "built-in default" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "listop", "gru"), "did you mean 'listops'"),
        (("run", "listops", "grru"), "did you mean 'gru'"),
        (("run", "listops", "s4d/imv"), "did you mean 'inv'"),
        (("run", "listops", "gru", "--recipe", "quikc"), "did you mean 'quick'"),
        (("run", "listops", "gru", "--recipe", "none.toml"), "recipe file none.toml does not exist"),
        (("run", "listops", "gru", "--set", "train.step=3"), "did you mean 'train.steps'"),
        (("run", "listops", "gru", "--set", "train.steps"), "expected key=value"),
        (("run", "listops", "gru", "--set", "optim.lr=-1"), "more than 0"),
        (("run", "listops", "gru", "--set", "encoder.hidden=3"), "encoder.hidden"),
        (("run", "listops", "gru", "--time-limit", "8"), "for example 90s"),
        (("run", "listops", "gru", "--protocol", "strickt"), "did you mean 'strict'"),
        (("run", "listops", "missing.py:Net"), "no file missing.py"),
        (("run", "listops", "no.such.module:Net"), "importing no.such.module failed"),
        (("run", "listops", "json:JSONDecoder"), "not a class derived from torch.nn.Module"),
        (("run", "listops", "gru", "--from", "/nonexistent"), "--from"),
        (("show", "listops", "grru"), "did you mean 'gru'"),
        (("check", "grru"), "did you mean 'gru'"),
        (("data", "prepare", "listop"), "did you mean 'listops'"),
        (("data", "verify", "listops"), "not prepared"),
        (("data", "show", "listops", "--split", "tset"), "did you mean 'test'"),
        (("new", "architecture", "gru", "--family", "recurrent"), "an architecture named gru exists"),
        (("new", "architecture", "my_net", "--family", "recurent"), "did you mean 'recurrent'"),
        (("new", "architecture", "My-Net", "--family", "recurrent"), "cannot be an architecture's name"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, ...], says: str) -> None:
    assert says in refused(*arguments)


def test_a_name_that_is_near_to_none_is_not_answered_with_all_of_them() -> None:
    line = refused("show", "listops", "zzz")
    assert line.endswith(f", ... ({len(registry.architectures.names())} in all)")
    assert len(line) < 400


def test_an_unwritable_results_folder_is_refused_before_training(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = places / "file"
    file.write_text("")
    monkeypatch.setenv("LRA_RESULTS", str(file))
    assert "LRA_RESULTS" in refused("run", TINY, "gru", "--recipe", "quick")


@pytest.mark.parametrize(
    ("typed", "offered"), [("run listop", "listops"), ("check s4d/in", "s4d/inv"), ("swee", "sweep")]
)
def test_the_shell_completes_commands_and_names(typed: str, offered: str) -> None:
    words = f"lra {typed}"
    environment = os.environ | {
        "_LRA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1),
    }  # fmt: skip
    code = "from lra.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert offered in done.stdout.split(), done.stderr


def test_a_time_limit_counts_from_the_start_of_the_process() -> None:
    code = "import time; time.sleep(1.5); from lra.cli.common import process_start as p; print(time.monotonic() - p())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert 1.5 < float(done.stdout) < 60
    created = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lra.cli.train._run", lambda request, dry_run: created.append(request.created))
        assert runner.invoke(app, ["run", "listops", "gru", "--time-limit", "8m"]).exit_code == 0
    assert abs(created[0] - process_start()) < 0.1


@pytest.mark.parametrize("words", [["check", "gru"], ["profile", "gru"], ["doctor"], ["bench"], ["evaluate", "."]])
def test_a_terminal_is_told_what_takes_long(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise UserError("stopped here")

    for name in ("conformance.suite.check", "profiling.profiler.profile", "operators.doctor.examine",
                 "operators.bench.bench", "training.trained_run.load"):  # fmt: skip
        monkeypatch.setattr(f"lra.{name}", stop)
    shown = io.StringIO()
    monkeypatch.setattr(common, "errors", Console(file=shown, force_terminal=True, width=200))
    assert runner.invoke(app, words).exit_code == 2
    text = shown.getvalue()
    assert text.index("loading PyTorch") < text.index("stopped here")


def test_run_says_that_it_loads_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise UserError("stopped here")

    monkeypatch.setattr("lra.training.run.run", stop)
    done = runner.invoke(app, ["run", TINY, "gru", "--recipe", "quick"])
    assert done.exit_code == 2
    assert "gru, recipe quick, seed 0: loading PyTorch" in done.stdout
    assert "stopped here" in done.stderr


def test_a_sweep_runs_as_many_cells_at_a_time_as_asked(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("lra.sweeps.local.execute_plan", lambda *_, **options: given.update(options) or [])
    grid = places / "grid.toml"
    grid.write_text('tasks = ["listops"]\narchitectures = ["gru"]\n')
    assert runner.invoke(app, ["sweep", str(grid), "--jobs", "3", "--time-limit", "9h"]).exit_code == 0
    assert given["jobs"] == 3
    assert given["seconds"] < 9 * 3600


def test_a_dry_run_says_in_full_why_the_run_could_not_start(places: Path) -> None:
    words = ["run", "parity", "reformer", "--recipe", "quick", "--dry-run"]
    assert runner.invoke(app, ["data", "prepare", "parity"]).exit_code == 0
    done = runner.invoke(app, words)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: parity needs a causal encoder")
    assert "model.direction=causal" in done.stderr


def test_an_empty_leaderboard_says_where_diagnostic_results_are(places: Path) -> None:
    assert "`lra run listops gru --recipe standard` makes one" in runner.invoke(app, ["leaderboard"]).output
    folder = places / "lra_results/diagnostics/parity/gru"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    assert "`lra diagnose` shows those of diagnostic tasks" in runner.invoke(app, ["leaderboard"]).output


def test_the_plan_names_the_rates_that_are_tried(places: Path) -> None:
    done = runner.invoke(app, ["diagnose", "gru", "--tasks", "parity", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "before that, 450 steps at each learning rate of 0.001, 0.003, 0.006" in done.output


def test_a_dry_run_shows_the_plan_its_data_and_the_forecast(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run", TINY, "gru", "--recipe", "quick", "--set", "train.steps=77", "--dry-run"]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert re.search(
        r"forecast: none before the data are prepared: lra data prepare \S*tiny_task.py:Tiny\n", done.output
    )
    assert runner.invoke(app, ["data", "prepare", TINY]).exit_code == 0
    cells: list[Any] = []

    def probe(cell: Any) -> dict[str, float]:
        cells.append(cell)
        return {"seconds": 61.0, "bytes": 2.0**30}

    monkeypatch.setattr("lra.sweeps.forecast.run_probe", probe)
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "77 steps" in done.output
    assert "tiny (strict), up to 24 tokens; 512 train, 100 validation, 150 test" in done.output
    assert "at least 1,024 MiB" in done.output
    assert cells[0].request().settings == {"train.steps": "77"}
    assert not (places / "lra_runs").exists()
    assert not (places / "lra_results").exists()


def test_corrupt_data_are_named_with_what_to_do(places: Path) -> None:
    assert runner.invoke(app, ["data", "prepare", TINY]).exit_code == 0
    assert runner.invoke(app, ["data", "verify", TINY]).exit_code == 0
    values = next((places / "lra_cache").rglob("train.values.npy"))
    whole = values.read_bytes()
    values.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "SHA-256" in refused("data", "verify", TINY)
    values.write_bytes(whole[:-7])
    assert "remove" in refused("run", TINY, "gru", "--recipe", "quick")
    values.unlink()
    assert "is missing" in refused("run", TINY, "gru", "--recipe", "quick")


def test_data_show_prints_examples() -> None:
    done = runner.invoke(app, ["data", "show", TINY, "--count", "3"])
    assert done.exit_code == 0, done.output
    digits = [line for line in done.stdout.splitlines() if set(line) <= set("0123 ") and line]
    assert len(digits) == 3


def test_the_template_of_an_architecture_passes_its_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lra.conformance import suite

    (tmp_path / "architectures" / "recurrent").mkdir(parents=True)
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    registry.Registry._files.cache_clear()
    try:
        path = start_architecture("my_net", "recurrent")
    finally:
        monkeypatch.undo()
        registry.Registry._files.cache_clear()
    findings = suite.check(f"{path}:MyNet")
    assert findings
    assert not [f for f in findings if f.status not in ("pass", "exempt")]
