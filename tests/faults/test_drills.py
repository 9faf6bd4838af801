"""Killed at any moment: nothing good is lost, nothing half-written is read, and the same command finishes the job."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fault_drills import FULL, TINY, done, drill, moments, seconds

# one server for all of them
pytestmark = pytest.mark.xdist_group("drills")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one run went through undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done(folder, "run")
    return folder


def fresh(tmp_path: Path, number: float, like: Path | None = None) -> Path:
    folder = tmp_path / f"drill-{number}"
    if like is not None:
        shutil.copytree(like, folder)
    else:
        folder.mkdir()
    return folder


def sound(folder: Path) -> dict[str, list[str]]:
    found = done(folder, "look")
    assert found["problems"] == []
    assert found["prepared"] in (None, [])
    return found


def test_a_killed_preparation_is_done_again(tmp_path: Path) -> None:
    first = drill(fresh(tmp_path, 0), "prepare")
    assert first.code == 0
    for at in moments(first.events, 2, 60):
        folder = fresh(tmp_path, at)
        assert drill(folder, "prepare", kill_at=at).code == -9
        assert sound(folder)["prepared"] is None or at == first.events
        assert done(folder, "prepare") == first.value
        assert [p.name for p in (folder / "lra_cache/tiny").iterdir() if p.name[-7:] in ("partial", ".old")] == []


def test_a_killed_run_goes_on_to_the_same_result(whole: Path, tmp_path: Path) -> None:
    expected = sound(whole)
    [answers] = expected["predictions"].values()  # type: ignore[attr-defined]
    cached = fresh(tmp_path, 0)
    shutil.copytree(whole / "lra_cache", cached / "lra_cache")
    total = drill(cached, "run").events
    # moments within writes and between them
    ways: list[dict[str, float]] = [{"kill_at": at} for at in moments(total, 3, 60)]
    ways += [{"kill_after": after} for after in seconds(1.5, 1, 30)]
    for number, way in enumerate(ways, 1):
        folder = fresh(tmp_path, number)
        shutil.copytree(whole / "lra_cache", folder / "lra_cache")
        ended = drill(folder, "run", **way)  # type: ignore[arg-type]
        assert ended.code == -9 or "kill_after" in way
        before = sound(folder)
        assert len(before["ids"]) <= 1
        if not before["ids"]:
            done(folder, "run")
        after = sound(folder)
        assert list(after["predictions"].values()) == [answers], way  # type: ignore[attr-defined]
        shutil.rmtree(folder)


def test_a_killed_writer_of_results_leaves_those_there_were(tmp_path: Path) -> None:
    like = fresh(tmp_path, 0)
    kept = done(like, "result", count=3, seed=1)
    content = [Path(path).read_bytes() for path in kept]
    for at in moments(drill(fresh(tmp_path, 0.5, like), "result", seed=2).events, 3, 40):
        folder = fresh(tmp_path, at, like)
        assert drill(folder, "result", kill_at=at, seed=2).code == -9
        assert 3 <= len(sound(folder)["ids"]) <= 4
        assert [folder.joinpath(Path(p).relative_to(like)).read_bytes() for p in kept] == content
        done(folder, "result", seed=3)
        assert 4 <= len(sound(folder)["ids"]) <= 5


def test_a_killed_leaderboard_leaves_the_old_tables_or_the_new_ones(whole: Path, tmp_path: Path) -> None:
    like = fresh(tmp_path, 0, whole)
    (like / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    done(like, "leaderboard")
    old = {p.name: p.read_text() for p in tables(like)}
    done(like, "result", count=2)
    last = drill(fresh(tmp_path, 0.5, like), "leaderboard")
    new = {p.name: p.read_text() for p in tables(tmp_path / "drill-0.5")}
    assert old.keys() == new.keys()
    assert all(old[name] != new[name] for name in old)
    for at in moments(last.events, 2, 40):
        folder = fresh(tmp_path, at, like)
        assert drill(folder, "leaderboard", kill_at=at).code == -9
        for path in tables(folder):
            assert path.read_text() in (old[path.name], new[path.name])
        done(folder, "leaderboard")
        assert {p.name: p.read_text() for p in tables(folder)} == new


GRID = """
tasks = ["{tiny}"]
architectures = ["gru", "elman"]
seeds = [0, 1]
recipe = "quick"
[set]
"train.steps" = 8
"train.evaluate_every" = 4
"model.d_model" = 8
"data.batch_size" = 16
"model.n_layers" = 1
[grid]
"optim.lr" = [1e-2, 3e-2]
"""


def test_a_sweep_killed_again_and_again_ends_every_cell_once(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID.replace("{tiny}", TINY))
    shutil.copytree(whole / "lra_cache", tmp_path / "lra_cache")
    kills, rounds = 0, 0
    # a sweep that was left alone long enough is begun anew, until there were as many kills as wanted
    while kills < (100 if FULL else 2):
        rounds += 1
        for after in seconds(3.0, 3, 25):
            ended = drill(tmp_path, "sweep", kill_after=after)
            kills += ended.code == -9
            assert ended.code in (0, -9), f"{ended.value}\n{ended.said}"
            assert sound(tmp_path)["problems"] == []
        assert done(tmp_path, "sweep") == 0
        found = sound(tmp_path)
        assert len(found["ids"]) == len({tuple(cell) for cell in found["cells"]}) == 8
        if rounds == 1:
            first = found["predictions"]
        # the same cells, and the same answers
        answers = sorted(map(tuple, found["predictions"].values()))  # type: ignore[attr-defined]
        assert answers == sorted(map(tuple, first.values()))  # type: ignore[attr-defined]
        shutil.rmtree(tmp_path / "lra_results")
        shutil.rmtree(tmp_path / "lra_runs")


def tables(folder: Path) -> list[Path]:
    return [*(p for p in (folder / "lra_results").iterdir() if p.is_file() and p.name[0] != "."), folder / "README.md"]


def test_the_long_form_is_the_one_that_make_test_faults_runs() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert "LRA_FAULTS=full" in makefile
    assert len(moments(50, 3, 100)) == (50 if FULL else 3)
