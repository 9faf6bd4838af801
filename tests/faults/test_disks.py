"""Disks that are full, read-only or written by two at once, and clocks that jump."""

from __future__ import annotations

import ctypes
import fcntl
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_drills import FULL, done, drill, start

pytestmark = pytest.mark.xdist_group("disks")


def mounted(place: Path, options: str, *more: str) -> bool:
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", *more, "-o", options, "none", str(place)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder; whatever a test mounts at lra_cache, lra_runs or lra_results below it is unmounted again."""
    if os.name != "posix" or os.geteuid() != 0 or not mounted(tmp_path / "probe", "size=4k"):
        pytest.skip("a small disk needs the right to mount one")
    yield tmp_path
    for place in ("probe", "lra_cache", "lra_runs", "lra_results"):
        # children may still hold it for a moment: detach
        ctypes.CDLL(None).umount2(str(tmp_path / place).encode(), 2)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.parametrize("size", [8, 16, 24, 32] if FULL else [16])
def test_a_preparation_on_a_full_disk_says_so_and_leaves_nothing(disk: Path, size: int) -> None:
    mounted(disk / "lra_cache", f"size={size}k")
    ended = drill(disk, "prepare")
    assert ended.code == 2, ended.said
    assert "free some space or point LRA_CACHE at another disk" in ended.value
    assert [p.name for p in (disk / "lra_cache").rglob("*") if p.is_file()] == [".strict.lock"]
    remount(disk / "lra_cache", "size=8m")
    done(disk, "prepare")
    assert done(disk, "look")["prepared"] == []


@pytest.mark.parametrize(
    ("place", "sizes", "advice"),
    [
        ("lra_runs", (4, 8, 16, 20, 24, 28, 32, 40, 48, 64) if FULL else (24,), "LRA_RUNS"),
        ("lra_results", (4, 8) if FULL else (4,), "LRA_RESULTS"),
    ],
)
def test_a_run_on_a_full_disk_says_so_and_goes_on_once_there_is_room(
    disk: Path, tmp_path_factory: pytest.TempPathFactory, place: str, sizes: tuple[int, ...], advice: str
) -> None:
    refused = 0
    for size in sizes:
        mounted(disk / place, f"size={size}k")
        ended = drill(disk, "run", resume=False)
        if ended.code != 0:
            refused += 1
            assert ended.code == 2, f"{size}: {ended.value}\n{ended.said}"
            assert advice in ended.value
            assert done(disk, "look")["problems"] == []
            remount(disk / place, "size=8m")
            done(disk, "run")
        assert len(done(disk, "look")["ids"]) >= 1
        subprocess.run(["umount", str(disk / place)], check=True)
    assert refused


@pytest.mark.parametrize(
    ("place", "job", "advice"),
    [("lra_cache", "prepare", "LRA_CACHE"), ("lra_runs", "run", "LRA_RUNS"), ("lra_results", "run", "LRA_RESULTS")],
)
def test_a_read_only_folder_is_one_clear_line(disk: Path, place: str, job: str, advice: str) -> None:
    mounted(disk / place, "size=8m,ro")
    ended = drill(disk, job)
    assert ended.code == 2, f"{ended.value}\n{ended.said}"
    assert advice in ended.value


def test_a_run_reads_a_prepared_set_it_cannot_write_to(disk: Path) -> None:
    mounted(disk / "lra_cache", "size=8m")
    done(disk, "prepare")
    remount(disk / "lra_cache", "ro")
    done(disk, "run")
    assert len(done(disk, "look")["ids"]) == 1


def test_two_writers_of_one_folder_lose_nothing(tmp_path: Path) -> None:
    count = 100 if FULL else 15
    # the same id in every record
    both = [start(tmp_path, "result", count=count) for _ in range(2)]
    while any(process.is_alive() for process in both):
        assert drill(tmp_path, "leaderboard").code == 0 or not list((tmp_path / "lra_results").rglob("*.json"))
    for process in both:
        process.join()
    found = done(tmp_path, "look")
    assert found["problems"] == []
    assert len(set(found["ids"])) == 2 * count


def test_two_preparations_at_once_make_one_set(tmp_path: Path) -> None:
    both = [start(tmp_path, "prepare") for _ in range(2)]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert done(tmp_path, "look")["prepared"] == []


def test_one_run_is_done_by_one_process(tmp_path: Path) -> None:
    done(tmp_path, "run")
    [lock] = (tmp_path / "lra_runs").rglob("lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = drill(tmp_path, "run", resume=False)
    assert second.code == 2, second.said
    assert "another process is doing this run" in second.value
    assert len(done(tmp_path, "look")["ids"]) == 1
    done(tmp_path, "run")


@pytest.mark.parametrize("before", ["clock_stands", "clock_leaps"])
def test_a_clock_that_jumps_costs_no_result(tmp_path: Path, before: str) -> None:
    for _ in range(2):
        done(tmp_path, "run", resume=False, before=before)
    found = done(tmp_path, "look")
    assert found["problems"] == []
    assert len(found["ids"]) == 2
    assert found["sane"]
