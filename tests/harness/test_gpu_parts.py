"""The parts measured on one machine: each is run, named when it fails or lasts too long, and none stops the others."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.gpu import PARTS, run_part


def test_a_part_writes_its_log_and_says_how_it_ended(tmp_path: Path) -> None:
    log = tmp_path / "new" / "part.log"
    assert run_part(["-c", "import lra; print('here')"], log, 60) == "ok"
    assert log.read_text() == "here\n"
    assert run_part(["-c", "raise SystemExit(3)"], log, 60) == "failed (3)"


def test_a_part_out_of_time_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_part(["-c", code], tmp_path / "part.log", 1.5) == "out of time"
    assert (tmp_path / "part.log").read_text() == "begun\n"
    time.sleep(3)
    assert not mark.exists()


def run_main(*words: str) -> tuple[int, str]:
    import typer

    app = typer.Typer()
    app.command()(gpu.gpu)
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


def test_a_failing_part_does_not_keep_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    parts = {"a": (("-c", "raise SystemExit(1)"), 0.5), "b": (("-c", "print(1)"), 0.5)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    code, said = run_main()
    assert code == 1
    assert [line.split(" after")[0] for line in said.splitlines()] == ["a: failed (1)", "b: ok"]
    assert (tmp_path / "measure" / "b.log").read_text() == "1\n"
    assert run_main("--only", "b")[0] == 0
    code, said = run_main("--only", "c")
    assert code == 2
    assert "unknown part 'c'; one of a, b" in said


def test_what_a_part_leaves_unused_goes_to_those_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    monkeypatch.setattr(gpu, "PARTS", {"a": (("a",), 0.5), "b": (("b",), 0.3), "c": (("c",), 0.2)})
    clock, given = [1000.0], []

    def part(arguments: tuple[str, ...], log: Path, seconds: float) -> str:
        given.append((*arguments, round(seconds, 6)))
        clock[0] += 10 if arguments == ("a",) else seconds
        return "ok"

    monkeypatch.setattr(gpu, "run_part", part)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    code, said = run_main("--seconds", "100")
    assert code == 0
    # a takes 10 of its 50 seconds, which leaves 90 for shares of 3 to 2
    assert given == [("a", 50.0), ("b", 54.0), ("c", 36.0)]
    assert [line.split()[3] for line in said.splitlines()] == ["10", "54", "36"]


def test_the_parts_are_commands_of_this_project() -> None:
    assert sum(share for _, share in PARTS.values()) == pytest.approx(1)
    for arguments, _ in PARTS.values():
        words = [*arguments[:2], "--version"] if "pytest" in arguments else [*arguments[:3], "--help"]
        assert subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode == 0
