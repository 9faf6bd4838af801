"""Two hundred hostile or clumsy command lines: one clear line each, exit code 2, before anything heavy is loaded."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import hostile_lines
import pytest
from typer.testing import CliRunner

# what the slower commands import, so that a line's own time is measured
import lra.conformance.suite
import lra.reports.leaderboard
import lra.sweeps.local
import lra.training.run  # noqa: F401
from lra.cli.app import app

SECONDS = 2.0
ANNOUNCED = ("loading PyTorch", "looking for their results")
"""Ends of the line that announces what takes long."""
LINES = hostile_lines.lines()
KINDS = sorted({kind for kind, _, _ in LINES})
# of every kind one that has to be noticed before anything heavy is imported
ALONE = [
    "rnu listops gru", "run listop gru", "run listops gru --set model.d_model=1000000", "run listops gru --devices 999",
    "run listops none.py:Net", "sweep torn.toml", "doctor fft_con", "profile gru --fit 3", "leaderboard --format mdd",
    "report --out words.txt/x",
]  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("LRA_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    hostile_lines.lay_out(tmp_path)
    return tmp_path


def test_there_are_two_hundred_of_them() -> None:
    assert len(LINES) >= 200
    assert len({tuple(words) for _, words, _ in LINES}) == len(LINES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_line_gets_one_clear_line(kind: str, places: Path) -> None:
    wrong = []
    for words, says in [(words, says) for k, words, says in LINES if k == kind]:
        start = time.process_time()
        done = CliRunner().invoke(app, words)
        seconds = time.process_time() - start
        faults = [f"exit code {done.exit_code}"] if done.exit_code != 2 else []
        if not isinstance(done.exception, SystemExit):
            faults.append(repr(done.exception))
        answer = done.stderr.strip().splitlines()
        if len(answer) != 1 or not answer[0].startswith("error: ") or says not in answer[0]:
            faults.append(f"answer {done.stderr!r}, expected {says!r}")
        if done.stdout.rstrip() and not done.stdout.rstrip().endswith(ANNOUNCED):
            faults.append(f"printed {done.stdout[:80]!r} before the error")
        if seconds > SECONDS:
            faults.append(f"{seconds:.1f} s")
        if faults:
            wrong.append((" ".join(words)[:80], *faults))
    assert wrong == []


@pytest.mark.parametrize("line", ALONE)
def test_a_process_of_its_own_answers_before_it_imports_what_is_heavy(line: str, places: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "lra.cli", *line.split()], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < SECONDS


def test_a_results_folder_that_is_a_file_is_refused(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(places / "words.txt"))
    for line in ("leaderboard", "report", "compare a b", "run listops gru"):
        done = CliRunner().invoke(app, line.split())
        assert done.exit_code == 2, (line, done.output)
        assert "LRA_RESULTS" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
