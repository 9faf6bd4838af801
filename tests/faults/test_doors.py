"""Whatever comes through a door is taken or refused in one clear line: recipes, settings, names, results, commands."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from fault_drills import FULL
from fault_fuzz import AWKWARD, CASES, SLOW, altered, anything, damaged, scalars, texts
from hypothesis import given
from hypothesis import strategies as st
from records import content as record_content
from records import record, write
from typer.testing import CliRunner

from lra import files
from lra.cli import template
from lra.cli.app import app
from lra.config import recipe
from lra.config.sections import SECTIONS
from lra.data import prepared_sets
from lra.errors import UserError
from lra.registry import architectures, tasks
from lra.reports import charts, comparison, efficiency, leaderboard, report
from lra.reports import table as tables
from lra.reports.ranking import Leaderboard
from lra.results import profile, result
from lra.results import record as records
from lra.results.collection import Collection
from lra.sweeps import plans, search
from lra.task import DataError
from lra.training import run

KEYS = [f"{section}.{key}" for section, kind in SECTIONS.items() for key in get_type_hints(kind)]
WORDS = [
    "default",
    "task",
    "architecture",
    "cell",
    "listops",
    "s4d",
    "data",
    "model",
    "encoder",
    "optim",
    "train",
    "note",
]


def toml(value: Any) -> str:
    """A value in TOML, or something near it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)


keys = st.one_of(st.sampled_from([k.partition(".")[2] for k in KEYS] + WORDS), texts)
headers = st.lists(st.sampled_from(WORDS) | texts, min_size=1, max_size=4).map(
    lambda parts: "[" + ".".join(p if p.isidentifier() else json.dumps(p) for p in parts) + "]"
)
lines = st.one_of(
    headers, st.tuples(keys, anything).map(lambda kv: f"{json.dumps(kv[0])} = {toml(kv[1])}"), texts,
    st.sampled_from(["a = 1979-05-27", "[[task]]", "task = 3", "x = " + "[" * 3000, "a" + ".a" * 3000 + " = 1"]),
)  # fmt: skip


def resolves(name: str, settings: dict[str, str] | None = None) -> None:
    try:
        found, origin = recipe.resolve(name, "listops", "s4d", settings)
    except UserError as error:
        assert str(error)  # noqa: PT017  (a refusal is as good as a recipe)
        return
    assert len(found.hash) >= 16
    assert recipe.from_dict(json.loads(json.dumps(found.as_dict(), allow_nan=False))) == found
    assert origin


@given(st.lists(lines, max_size=8).map("\n".join))
@CASES
def test_recipes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    resolves(str(path))


@given(damaged((recipe.FOLDER / "quick.toml").read_bytes()))
@CASES
def test_damaged_recipes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(content)
    resolves(str(path))


@given(st.dictionaries(st.sampled_from(KEYS) | keys | texts.map(lambda t: f"encoder.{t}"), scalars.map(toml) | texts))
@CASES
def test_settings(settings: dict[str, str]) -> None:
    resolves("quick", settings)


@given(altered(recipe.resolve("quick", "listops", "s4d")[0].as_dict()))
@CASES
def test_recipes_in_a_folder_of_a_run(content: Any) -> None:
    try:
        recipe.from_dict(json.loads(json.dumps(content)))
    except (UserError, ValueError) as error:
        assert str(error)  # noqa: PT017


SWEEP = {
    "tasks": ["listops"], "architectures": ["gru", "s4d"], "seeds": [0, 1], "recipe": "quick", "protocol": "strict",
    "retries": 1, "set": {"train.steps": 5, "optim.betas": [0.9, 0.99]}, "grid": {"optim.lr": [0.1, 0.2]},
    "run": {"time-limit": "8m"}, "device": "cpu", "part": [{"seeds": [2]}, {"seeds": [3], "grid": {}}],
    "search": {
        "trials": 4, "seed": 0, "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "model.d_model": {"low": 4, "high": 8}, "encoder.horizon": {"choose": [4, 16]},
    },
}  # fmt: skip


def planned(path: Path) -> None:
    """The cells of a sweep and its search are right, or one clear line says what is wrong."""
    try:
        plan = plans.read(path)
        assert len({json.dumps([*cell.arguments()]) for cell in plan.cells}) == len(plan.cells) <= plans.MAX_CELLS
        space = {key: value for key, value in plan.search.items() if key not in ("trials", "seed")}
        if space:
            points = search.sample_points(space, 4, 0)
            assert [list(point) for point in points] == [list(space)] * 4
            json.dumps(points, allow_nan=False)
    except UserError as error:
        assert len(str(error)) < 5000  # noqa: PT017  (a refusal is as good as a plan)


@given(altered(SWEEP))
@CASES
def test_sweeps(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "own.toml"
    content = content if isinstance(content, dict) else {"tasks": content}
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in content.items())
    path.write_bytes(text.encode(errors="surrogatepass"))
    planned(path)


@given(damaged("\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in SWEEP.items()).encode()))
@CASES
def test_damaged_sweeps(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(content)
    planned(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("x = " + "[" * 3000, "not valid TOML"),
        ("seeds = [-1]", "numbers from 0 to 4294967295"),
        (f"seeds = {list(range(10_001))}", "has 10,001 runs; a sweep has at most 10,000"),
        ("part = " + toml([{"seeds": list(range(n, n + 2001))} for n in range(5)]), "has 2,001 runs"),
        ("grid = " + toml({f"encoder.k{i}": list(range(10)) for i in range(12)}), "has 1,000,000,000,000 runs"),
    ],
    ids=["deep", "seed", "many", "many parts", "huge grid"],
)
def test_absurd_sweeps_are_refused(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'tasks = ["listops"]\narchitectures = ["gru"]\n{line}\n')
    with pytest.raises(UserError, match=says):
        plans.read(path)


@given(st.one_of(texts, st.tuples(st.sampled_from([*architectures.names(), "net.py"]), texts).map("/".join)))
@CASES
def test_names(name: str) -> None:
    for registry in (architectures, tasks):
        if ":" in name and not name.startswith(("/", ".", ":")):
            # that would import what it names, which is the user's own wish
            continue
        try:
            registry.get(name)
        except UserError as error:
            assert "\n" not in str(error).replace(name, "")  # noqa: PT017
    if not (name.isascii() and name.isidentifier()):
        with pytest.raises(UserError, match="cannot be an architecture's name"):
            template.architecture(name, "recurrent")
    for made in (files.safe_name(name), result.slug(name)):
        assert Path(made).name == made
        assert 0 < len(made.encode()) <= 120
        assert made not in (".", "..")
        assert not made.startswith(".")
    assert files.safe_name(files.safe_name(name)) == files.safe_name(name)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good result; beside it there is room for one that is not."""
    root = tmp_path_factory.mktemp("shelf")
    write(root, record("s4d", n=20))
    return root


def everything(root: Path) -> Collection:
    """What the tables, the comparison and the commands make of a folder."""
    collection = Collection.read(root)
    board = Leaderboard.of(collection)
    for form in leaderboard.FORMATS:
        text = leaderboard.build(board, form)
        text.encode()
        assert "<script>" not in text or form in ("csv", "tex")
        assert "\x1b" not in text
    leaderboard.readme(board)
    collection.frame()
    for other in collection.records:
        str(comparison.compare(collection.records[0], other, collection))
    return collection


@given(altered({**record_content("gru", n=20), "id": "b"}), st.booleans())
@SLOW
def test_results(shelf: Path, content: Any, named: bool) -> None:
    good = next(p for p in shelf.rglob("*.json") if p.name != "b.json")
    path, data = good.with_name("b.json"), good.with_suffix(".npz")
    if isinstance(content, dict) and named:
        content["predictions"] = json.loads(good.read_text())["predictions"]
    assert data.is_file()
    path.write_bytes(json.dumps(content).encode(errors="surrogatepass"))
    found = everything(shelf)
    assert len(found.records) + len(found.problems) >= 1
    assert good.stem in [r.id for r in found.records] or any("and differs" in p for p in found.problems)


def test_markup_in_a_result_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=y>{{7*7}}[red]\\input{x}|"
    plain = record_content("gru", n=20)
    made = plain | dict.fromkeys(("architecture", "command", "direction", "regime", "started", "task"), hostile)
    made |= {
        "recipe": plain["recipe"] | {"name": hostile}, "protocol": plain["protocol"] | {"name": hostile},
        "environment": {"cpu": hostile, "device": "cpu", "commit": {"hash": hostile}}, "floors": {hostile: 0.1},
        "flops": {"forward": 1.0, "uncounted": [hostile]}, "collapsed": hostile,
    }  # fmt: skip
    for place in ("runs", "diagnostics"):
        write(tmp_path, records.from_json(made), place)
    found = everything(tmp_path)
    assert len(found.records) == 1
    board, page = Leaderboard.of(found), report.build(found, tmp_path)
    # the page's own: its data, Vega and its code
    assert page.count("<script") == 3
    assert "<img src=x" not in page
    assert "{{7*7}}" in page
    assert "<img" not in leaderboard.html(board) + leaderboard.markdown(board)


@given(altered({**record_content("gru", n=20), "predictions": {"file": "a.npz", "sha256": "0" * 64}}))
@CASES
def test_records(content: Any) -> None:
    try:
        parsed = records.from_json(content)
    except ValueError as error:
        assert str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        json.dumps(content, allow_nan=False).encode()
        assert records.from_json(records.to_json(parsed)) == parsed


TIMES = {"median": 0.01, "low": 0.009, "high": 0.012, "repeats": 30}
PROFILE = {
    "cell": {
        "architecture": "s4d/inv", "length": 1024, "batch": 1, "d_model": 64, "n_layers": 2, "direction": "causal",
        "task": "", "budget": 0.5,
    },
    "environment": {
        "cpu": "a cpu x2", "threads": 2, "versions": {"torch": "2.13.0"}, "commit": {"hash": "0" * 40, "dirty": False},
    },
    "seconds": {"forward": TIMES, "train": TIMES, "step": TIMES}, "parameters": 66688, "tokens_per_second": 1e5,
    "mfu": 0.1, "machine": {"bandwidth": 4e10, "rate": 1e11},
    "rounds": [{"forward": 0.01, "train": 0.01, "step": 0.01}, {}, {"forward": 0.011, "train": 0.011, "step": 0.011}],
    "flops": {
        "forward": 1e8, "algorithmic": 1e8, "forward_backward": 3e8, "matmul_counted": 1e8, "matmul_by_formula": 1e8,
        "uncounted": ["aten::x"],
    },
    "memory": {"peak_bytes": 2**24, "parameters": 1, "gradients": 1, "optimiser": 1, "activations": 1},
}  # fmt: skip


@given(altered(PROFILE), st.sampled_from(["", "out of memory"]), st.integers(0, 9))
@CASES
def test_profiles(tmp_path: Path, content: Any, failed: str, turn: int) -> None:
    folder = tmp_path / "profile"
    folder.mkdir(exist_ok=True)
    if isinstance(content, dict) and failed:
        content["failed"] = failed
    second = PROFILE | {"cell": PROFILE["cell"] | {"length": 2048}}  # type: ignore[operator]
    for name, made in (("a", content), ("b", second)):
        (folder / f"{name}.json").write_bytes(json.dumps(made).encode(errors="surrogatepass"))
    found, wrong = profile.load(tmp_path)
    assert len(found) + len(wrong) == 2
    assert profile.from_json(second) in found
    found = efficiency.load(tmp_path)
    assert all("\n" not in line for line in wrong)
    for table in efficiency.tables(found):
        assert "<script>" not in tables.markdown(table)
        tables.latex(table).encode()
    efficiency.table_csv(found).encode()
    if turn == 0:  # drawing takes longer than all the rest
        for cells in efficiency.curves(found).values():
            for chart in charts.growth(cells, "train_ms", "ms"):
                assert json.dumps(charts.specification(chart))


COMMANDS = [
    ["list"], ["show"], ["run"], ["check"], ["sweep"], ["leaderboard"], ["compare"], ["audit"], ["profile"], ["bench"],
    ["doctor"], ["new", "architecture"], ["data", "list"], ["data", "prepare"], ["data", "verify"], ["data", "pack"],
    ["data", "unpack"], ["data", "show"],
]  # fmt: skip
OPTIONS = [
    "new", "data", "report", "--help", "--json", "--recipe", "--seed", "--protocol", "--set", "--from", "--resume",
    "--time-limit", "--format", "--task", "--device", "--out", "--split", "--count", "--workers", "--lengths", "--fit",
    "--tree", "--models", "--reach", "--png", "--to", "--emit", "--dry-run", "--cell", "--pretrain", "--match",
    "--reported", "listops", "tiny", "s4d", "gru/x", "quick", "paper", "md,csv", "train.steps=5", "grid.toml",
    "encoder.x=1", "8m", "2GiB", "params=0.5", "-1", "0", "3", "64,128",
]  # fmt: skip


@pytest.fixture
def idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shelf: Path) -> Path:
    """Commands that stop where the work would begin."""

    def stopped(*_: Any, **__: Any) -> Any:
        raise DataError("stopped here")

    for name in (
        "data.prepared_sets.load_prepared", "data.prepared_sets.verify", "training.run.run", "conformance.suite.check",
        "cli.template.architecture", "sweeps.local.execute_plan", "profiling.profiler.profile",
        "profiling.profiler.Workload", "profiling.fit.fit", "operators.bench.bench",
        "operators.doctor.examine", "conformance.reach.reach", "conformance.recall.recall",
    ):  # fmt: skip
        monkeypatch.setattr(f"lra.{name}", stopped)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "results"
    shutil.copytree(shelf, root)
    (tmp_path / "grid.toml").write_text('tasks = ["listops"]\narchitectures = ["gru"]\n')
    for name in ("LRA_CACHE", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("LRA_RESULTS", str(root))
    return tmp_path


# no system passes a NUL on a command line
safe_words = texts.filter(lambda t: ":" not in t and "\0" not in t)


@given(st.sampled_from([[], *COMMANDS]), st.lists(st.sampled_from(OPTIONS) | safe_words, max_size=5))
@CASES
def test_command_lines(idle: Path, command: list[str], more: list[str]) -> None:
    outside, words = set(idle.parent.iterdir()), command + more
    done = CliRunner().invoke(app, words)
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exc_info)
    assert done.exit_code in (0, 1, 2)
    assert set(idle.parent.iterdir()) == outside


LINES = (
    ["{}"], ["show", "{}", "s4d"], ["show", "listops", "s4d/{}"], ["show", "listops", "s4d", "--recipe", "{}"],
    ["show", "listops", "s4d", "--set", "{}"], ["show", "listops", "s4d", "--protocol", "{}"],
    ["data", "prepare", "{}"],
    ["data", "prepare", "listops", "--from", "{}"], ["compare", "{}", "{}"], ["leaderboard", "--task", "{}"],
    ["leaderboard", "--format", "{}"], ["leaderboard", "--format", "md", "--out", "out/{}"],
    ["sweep", "{}"], ["sweep", "grid.toml", "--emit", "{}"], ["sweep", "grid.toml", "--time-limit", "{}"],
    ["data", "unpack", "{}"], ["data", "pack", "listops", "--to", "out/{}"], ["report", "--out", "out/{}"],
    ["profile", "--lengths", "{}"], ["profile", "--fit", "{}"], ["bench", "{}"], ["doctor", "{}"],
    ["check", "gru", "--reach", "--png", "out/{}"],
    ["run", "listops", "s4d", "--time-limit", "{}"], ["run", "listops", "s4d", "--seed", "{}"],
)  # fmt: skip


@pytest.mark.parametrize("line", LINES if FULL else LINES[3::4], ids=" ".join)
def test_awkward_words_in_every_place(idle: Path, line: list[str]) -> None:
    for word in (w for w in (AWKWARD if FULL else AWKWARD[::4]) if "\0" not in w):
        done = CliRunner().invoke(app, [part.replace("{}", word) for part in line])
        assert done.exception is None or isinstance(done.exception, SystemExit), (line, word, done.exc_info)


def test_nothing_above_is_run_for_real() -> None:
    assert prepared_sets.load_prepared.__module__ == "lra.data.prepared_sets"
    assert run.run.__module__ == "lra.training.run"
