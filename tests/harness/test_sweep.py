"""Sweeps: grids, skipping, failures, forecasts, search and job scripts, on cells of a second each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lra.cli.app import app
from lra.config.match import flops_of_example
from lra.data import prepared_sets
from lra.errors import UserError
from lra.registry import architectures, tasks
from lra.results import result
from lra.sweeps import forecast, local, plans, search
from lra.sweeps.plans import Cell
from lra.sweeps.progress import Board, duration
from lra.training.construction import build
from lra.training.request import resolve

HERE = Path(__file__).parents[1]
TINY = f"{HERE / 'tiny_task.py'}:Tiny"
SMALL = (
    '"train.steps" = 4\n"train.evaluate_every" = 4\n"model.d_model" = 8\n"model.n_layers" = 1\n"data.batch_size" = 16'
)
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text)
    return file


def grid(folder: Path, more: str = "", architectures: str = '["gru"]') -> plans.Plan:
    head = f'tasks = ["{TINY}"]\narchitectures = {architectures}\nrecipe = "quick"\n'
    return plans.read(written(folder, f"{head}{more}\n[set]\n{SMALL}\n"))


def test_a_grid_is_every_combination_once(tmp_path: Path) -> None:
    plan = grid(
        tmp_path, 'seeds = [0, 1]\ngrid = {"optim.lr" = [1e-3, 3e-3], "optim.clip" = [0.0, 1.0]}', '["gru", "s4d"]'
    )
    assert len(plan.cells) == 2 * 2 * 2 * 2
    assert len({json.dumps([c.architecture, c.seed, dict(c.settings)]) for c in plan.cells}) == 16
    assert plan.cells[0].arguments()[:7] == ["run", TINY, "gru", "--recipe", "quick", "--seed", "0"]


def test_parts_follow_one_another_and_those_of_another_device_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f'''tasks = ["{TINY}"]
recipe = "quick"
[[part]]
architectures = ["s4d"]
[[part]]
architectures = ["gru"]
seeds = [0, 1]
[[part]]
device = "gpu"
architectures = ["lru"]
'''
    monkeypatch.setattr("lra.training.device.device_type", lambda: "cpu")
    cells = plans.read(written(tmp_path, text)).cells
    assert [(cell.architecture, cell.seed) for cell in cells] == [("s4d", 0), ("gru", 0), ("gru", 1)]
    monkeypatch.setattr("lra.training.device.device_type", lambda: "cuda")
    assert [cell.architecture for cell in plans.read(written(tmp_path, text)).cells][3:] == ["lru"]
    with pytest.raises(UserError, match="did you mean 'gpu'"):
        plans.read(written(tmp_path, text.replace('"gpu"', '"gpus"')))
    with pytest.raises(UserError, match="part is not a list of tables"):
        plans.read(written(tmp_path, "part = 3"))


def test_the_campaign_resolves_on_either_device(monkeypatch: pytest.MonkeyPatch) -> None:
    file = HERE.parent / "results" / "campaign.toml"
    for kind, most in (("cpu", 300), ("cuda", 600)):
        monkeypatch.setattr("lra.training.device.device_type", lambda kind=kind: kind)
        assert 100 < len(plans.read(file).cells) < most


def test_a_sweep_stops_in_time_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = grid(tmp_path, "seeds = [0, 1, 2]")
    limits = []

    def short(cell: Cell, log: Path, retries: int) -> tuple[int, str]:
        limits.append(cell.options["time-limit"])
        time.sleep(2.2)
        return (0, "") if len(limits) == 1 else (130, "stopped at step 3 of 4 by the time limit")

    monkeypatch.setattr(local, "run_cell", short)
    assert local.execute_plan(plan, Console(), forecast=False, seconds=4.0) == []
    assert limits == ["4s", "2s"]
    said = capsys.readouterr().out
    assert "failed" not in said
    assert "0 of 3 cells have results" in said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tasks = [", "not valid TOML"),
        ('task = ["listops"]', "did you mean 'tasks'"),
        ('tasks = []\narchitectures = ["gru"]', "at least one str"),
        ('tasks = ["listops"]\narchitectures = ["grru"]', "did you mean 'gru'"),
        ('tasks = ["listops"]\narchitectures = ["gru"]\nseeds = ["a"]', "at least one int"),
        ('tasks = ["listops"]\narchitectures = ["gru"]\ngrid = {"optim.lr" = 1}', "at least one value"),
        ('tasks = ["listops"]\narchitectures = ["gru"]\n[set]\n"optim.lrr" = 1', "did you mean 'optim.lr'"),
        ('tasks = ["listops"]\narchitectures = ["gru"]\n[run]\nresume = true', "unknown option"),
        ('tasks = ["listops"]\narchitectures = ["gru", "gru"]', "two cells are the same run"),
        ('tasks = ["listops"]\narchitectures = ["gru*x"]', "no architecture matches 'gru\\*x'"),
    ],
)
def test_a_wrong_file_is_one_clear_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as error:
        plans.read(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_pattern_stands_for_registered_names_and_a_later_part_adds_what_is_new(tmp_path: Path) -> None:
    parts = '[[part]]\narchitectures = ["s5", "gru"]\n[[part]]\narchitectures = ["s*d", "*5"]'
    plan = plans.read(written(tmp_path, f'tasks = ["listops"]\nrecipe = "quick"\n{parts}'))
    assert [cell.architecture for cell in plan.cells] == ["s5", "gru", "s4d"]


def test_cells_run_once_failures_are_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from torch import nn\n"
        "class Broken(nn.Module):\n"
        "    def __init__(self, d_model: int) -> None:\n"
        "        super().__init__()\n"
        "    def forward(self, x):\n"
        "        raise ValueError('it cannot be run')\n"
    )
    plan = grid(tmp_path, "", f'["{broken}:Broken", "gru"]')
    console = Console(width=200)
    failed = local.execute_plan(plan, console, forecast=False)
    assert [cell.architecture for cell in failed] == [f"{broken}:Broken"]
    said = capsys.readouterr().out
    assert "it cannot be run" in said
    assert "1 of 2 cells have results" in said
    (path,) = (tmp_path / "lra_results").rglob("*.json")
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(local, "command", lambda *_: pytest.fail("a finished cell was run again"))
    assert local.execute_plan(plans.Plan(plan.file, plan.cells[1:]), console, forecast=False) == []
    assert path.stat().st_mtime_ns == before


def test_a_failed_run_is_tried_again_from_its_checkpoint(tmp_path: Path) -> None:
    (cell,) = grid(tmp_path).cells
    seen: list[list[str]] = []

    def start(arguments: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        seen.append(arguments)
        from lra.training.request import folder_of, resolve

        checkpoint = folder_of(cell.request(), resolve(cell.request())[0]) / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_bytes(b"")
        return subprocess.CompletedProcess(arguments, 0 if len(seen) == 3 else 7)

    assert local.run_cell(cell, tmp_path / "log", 5, start=start) == (0, "")
    assert ["--resume" in arguments for arguments in seen] == [False, True, True]


def test_a_worker_with_nothing_on_its_disk_starts_a_cell_without_loading_torch(tmp_path: Path) -> None:
    program = (
        "import sys, subprocess, pathlib; from lra.sweeps.plans import Cell; from lra.sweeps.local import run_cell\n"
        "start = lambda *_, **__: subprocess.CompletedProcess([], 0)\n"
        "said = run_cell(Cell('listops', 'gru', 0, 'quick'), pathlib.Path('log'), 0, start=start)\n"
        "print(said, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "(0, '') False", done.stderr


def test_one_cell_of_a_job_array_and_its_script(tmp_path: Path) -> None:
    plan = grid(tmp_path, "seeds = [0, 1, 2]")
    script = plans.job_script(plan, "slurm")
    assert "#SBATCH --array=0-2" in script
    assert f"sweep {plan.file} --cell $SLURM_ARRAY_TASK_ID" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    with pytest.raises(UserError, match="cells 0 to 2"):
        local.execute_plan(plan, QUIET, only=3)
    with pytest.raises(UserError, match="did you mean 'slurm'"):
        plans.job_script(plan, "slrum")


def test_a_dry_run_lists_the_cells_and_runs_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.execute_plan(grid(tmp_path, "seeds = [0, 1]"), Console(width=300), forecast=False, dry_run=True) == []
    assert capsys.readouterr().out.count(": open") == 2
    assert not list((tmp_path / "lra_results").rglob("*.json"))


def test_a_forecast_is_made_by_running_a_few_steps(tmp_path: Path) -> None:
    (cell,) = grid(tmp_path).cells
    found = forecast.measure(cell)
    assert found["seconds"] > 0
    assert found["bytes"] >= 0
    longer = Cell(**{**vars(cell), "settings": {**cell.settings, "train.steps": 100_000}})
    assert forecast.measure(longer)["seconds"] > 20 * found["seconds"]
    assert (
        "model.d_model is 0" in forecast.run_probe(Cell(**{**vars(cell), "settings": {"model.d_model": 0}}))["failed"]
    )


def test_the_board_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=80)
    board = Board(["x=[/a]"], console)
    board.set(0, "failed", "cannot read [/data]")
    console.print(board)
    said = capsys.readouterr().out
    assert said.count("x=[/a]") == 2
    assert said.count("cannot read [/data]") == 2


def test_the_board_knows_the_time_left() -> None:
    board = Board(["a", "b", "c", "d"], QUIET)
    assert board.remaining() is None
    board.set(0, "finished")
    board.set(1, "running")
    board.started[1] -= 10
    board.set(1, "done")
    left = board.remaining()
    assert left is not None
    assert 20 <= left < 21
    assert (duration(20), duration(600), duration(7200)) == ("20 s", "10 min", "2.0 h")


def test_drawn_points_fill_the_space_and_are_the_same_again() -> None:
    space = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "model.n_layers": {"low": 1, "high": 4},
             "model.pooling": {"choose": ["mean", "max"]}}  # fmt: skip
    points = search.sample_points(space, 16, 3)
    assert points == search.sample_points(space, 16, 3) != search.sample_points(space, 16, 4)
    assert len(points) == 16
    # half of a balanced sequence lies below the geometric mean
    assert sum(p["optim.lr"] < 1e-3 for p in points) == 8
    assert {p["model.n_layers"] for p in points} == {1, 2, 3, 4}
    assert sum(p["model.pooling"] == "max" for p in points) == 8
    for wrong in ({"low": 1}, {"low": 2, "high": 1}, {"low": 0.0, "high": 1.0, "log": True}, 3, {"lwo": 1, "high": 2}):
        with pytest.raises(UserError, match=r"search\.optim\.lr"):
            search.sample_points({"optim.lr": wrong}, 2, 0)


def test_a_search_counts_its_trials_in_the_result_and_opens_the_test_set_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(cell: Cell, *_: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, cell.arguments())
        return done.exit_code, done.output[-200:]

    monkeypatch.setattr(local, "run_cell", here)
    more = 'search = {trials = 2, "optim.lr" = {low = 1e-4, high = 1e-2, log = true}}'
    assert local.execute_plan(grid(tmp_path, more), QUIET, forecast=False) == []
    (path,) = (tmp_path / "lra_results").rglob("*.json")
    said = result.read(path).search
    assert said
    assert (said["trials"], said["finished"]) == (2, 2)
    outcomes = [json.loads(p.read_text()) for p in tmp_path.rglob("selection.json")]
    assert len(outcomes) == 2
    assert said["validation"] == max(o["accuracy"] for o in outcomes)
    assert said["chosen"]["optim.lr"] == result.read(path).recipe.optim["lr"]


def test_a_search_on_the_next_token_chooses_the_fewest_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = set()

    def scores(cell: Cell) -> dict[str, float]:
        rates.add(cell.settings["optim.lr"])
        return {"accuracy": cell.settings["optim.lr"], "bits": cell.settings["optim.lr"]}

    monkeypatch.setattr(search, "trial_scores", scores)
    plan = grid(tmp_path, 'search = {trials = 3, "optim.lr" = {low = 1e-4, high = 1e-2}}')
    (cell,) = search.choose_settings(plan, QUIET, lambda _: []).cells
    assert len(rates) == 3
    assert json.loads(cell.options["search"])["validation"] == cell.settings["optim.lr"] == min(rates)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_a_cluster_without_ray_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cluster"):
        local.execute_plan(grid(tmp_path), QUIET, ray="local", forecast=False)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_twelve_cells_survive_the_death_of_a_node(tmp_path: Path) -> None:
    # twelve cells load torch one after the other, 15 s each on a processor of their own and 45 s on a third of one
    done = subprocess.run(
        [sys.executable, "-m", "tests.dying_node", TINY, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=1800, cwd=HERE.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["killed"] == 1
    # the node died with a cell in it
    assert "--seed" in said["cut_short"][0]
    assert said["failed"] == []
    assert said["results"] == 12
    assert len(set(said["cells"])) == 12


def test_a_budget_of_flops_sets_the_steps(tmp_path: Path) -> None:
    head = f'tasks = ["{TINY}"]\narchitectures = ["gru", "s4d"]\nseeds = [0, 1]\nrecipe = "quick"\n'
    grid_of = '[grid]\n"model.d_model" = [8, 16]\n[set]\n"model.n_layers" = 1\n"data.batch_size" = 16\n'
    cells = plans.read(written(tmp_path, f"{head}flops = [4e9, 1.6e10]\n{grid_of}")).cells
    assert len(cells) == 2 * 2 * 2 * 2
    plain, _ = resolve(Cell(TINY, "gru", 0, "quick").request())
    task, protocol = prepared_sets.resolve(tasks.get(TINY)(), None)
    validations = round(plain.train.steps / plain.train.evaluate_every)
    for cell in cells:
        recipe, _ = resolve(cell.request())
        assert recipe.train.steps == validations * recipe.train.evaluate_every
        assert recipe.optim.warmup == -(-plain.optim.warmup * recipe.train.steps // plain.train.steps)
        model = build(recipe, architectures.get(recipe.architecture), task, protocol, 0)
        of_step = 16 * flops_of_example(model, recipe, protocol)
        nearest = min((4e9, 1.6e10), key=lambda budget: abs(recipe.train.steps * of_step - budget))
        assert abs(recipe.train.steps * of_step - nearest) <= validations * of_step / 2 + 1
    steps = [cell.settings["train.steps"] for cell in cells[::2]]
    # the wider model gets fewer steps of the same budget, and four times the budget pays for about four times as many
    assert steps[0] > steps[2]
    assert steps[1] / steps[0] == pytest.approx(4, rel=0.05)
    for more, says in (
        ("flops = [0]", "flops is"),
        ('flops = "1e9"', "a list of numbers above 0"),
        ("flops = [1.0]", "allows"),
        ('flops = [1e9]\n[set]\n"train.steps" = 5', "leave out train.steps"),
    ):
        with pytest.raises(UserError, match=says):
            plans.read(written(tmp_path, f'tasks = ["{TINY}"]\narchitectures = ["gru"]\nrecipe = "quick"\n{more}\n'))


def test_a_pattern_with_a_slash_names_variants(tmp_path: Path) -> None:
    cells = grid(tmp_path, architectures='["delta_elman/step*"]').cells
    assert [cell.architecture for cell in cells] == [f"delta_elman/step{number}" for number in range(5)]
