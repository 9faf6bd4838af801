"""The Makefile, with a stand-in for the environment: what each target runs, and when it sets itself up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from typer.main import get_command

from benchmarks.__main__ import app as benchmarks
from lra.cli.app import app

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "pathfinder64", "path256")
# a command that prints its own name and its arguments, one a line
ECHO = '#!/bin/sh\nbasename "$0"\nprintf "<%s>\\n" "$@"\n'
PIP = '#!/bin/sh\ntest "$1" = -c && exit 0\necho "$@" >> "$(dirname "$0")/../../calls"\n'


def make(folder: Path, *words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    # what an outer `make test` exports would change what is tested
    own = {
        k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "ARCH", "RECIPE", "SEED", "TIME"))
    }
    return subprocess.run(
        ["make", "UV=", *words],  # a uv of this machine would be called instead of the stand-in for pip
        cwd=folder,
        env=own | ({"PATH": path} if path else {}),
        capture_output=True,
        text=True,
        check=False,
    )


def command(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an up-to-date stand-in for .venv: `lra` prints its arguments, pip writes its own to `calls`."""
    folder = tmp_path / "a check out"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    command(folder / ".venv/bin/lra", ECHO)
    command(folder / ".venv/bin/lint-imports", "#!/bin/sh\n")
    command(folder / ".venv/bin/python", PIP)
    (folder / ".venv/.stamp").write_text(f"{folder.resolve()}\n", encoding="utf-8")
    return folder


def targets() -> list[str]:
    [declared] = re.findall(r"^\.PHONY: (help.*)$", MAKEFILE, flags=re.MULTILINE)
    return " ".join(declared.split()).replace("$(TASKS)", " ".join(TASKS)).split()


def test_help_has_one_line_for_every_target(checkout: Path) -> None:
    done = make(checkout, "help")
    listed = re.findall(r"^  ([a-z0-9-]+)  +\S", done.stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(targets())
    assert make(checkout).stdout == done.stdout


@pytest.mark.parametrize("target", ["setup", *TASKS, "leaderboard", "profile", "doctor"])
def test_up_to_date_environment_is_left_alone(checkout: Path, target: str) -> None:
    done = make(checkout, target)
    assert done.returncode == 0, done.stderr
    assert not (checkout / "calls").exists()


@pytest.mark.parametrize("task", TASKS)
def test_task_targets(checkout: Path, task: str) -> None:
    done = make(checkout, task)
    assert done.stdout.splitlines() == ["lra", *(f"<{w}>" for w in f"run {task} s4d --recipe auto --seed 0".split())]


@pytest.mark.parametrize("arch", ["my_layer.py:MyLayer", "some where/it's.py:A", "$(HOME)", "a;echo b", '"x" `y` #z'])
def test_values_arrive_as_they_are(checkout: Path, arch: str) -> None:
    given = arch.replace("$", "$$")
    done = make(checkout, "listops", f"ARCH={given}", "SEED=3", "RECIPE=quick", "TIME=8m")
    assert done.stdout.splitlines()[1:] == [
        *("<run>", "<listops>", f"<{arch}>", "<--recipe>", "<quick>", "<--seed>", "<3>", "<--time-limit>", "<8m>")
    ]


def test_environment_does_not_choose(checkout: Path) -> None:
    # machines that set ARCH=x86_64 for their own purposes exist
    script = f'ARCH=x86_64 make -C "{checkout}" -s listops'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert "<s4d>" in done.stdout


def test_profile_takes_all_unless_told(checkout: Path) -> None:
    assert make(checkout, "profile").stdout.splitlines() == ["lra", "<profile>"]
    assert make(checkout, "profile", "ARCH=gru").stdout.splitlines() == ["lra", "<profile>", "<gru>"]


def test_test_and_check(checkout: Path) -> None:
    assert make(checkout, "test", "K=some name", "JOBS=2").returncode == 0
    done = make(checkout, "check", "ARCH=gru")
    assert done.stdout.splitlines() == ["lra", "<check>", "<gru>"]
    assert (checkout / "calls").read_text(encoding="utf-8").splitlines() == [
        "-m pytest -q -n 2 --dist worksteal -k some name", "-m ruff check --quiet .",
        "-m ruff format --check --quiet .", "-m mypy", "-m mypy --python-version 3.14",
    ]  # fmt: skip


def test_bench_is_a_command_of_the_benchmarks(checkout: Path) -> None:
    assert make(checkout, "bench", "OP=linear_scan").returncode == 0
    assert (checkout / "calls").read_text(encoding="utf-8").splitlines() == ["-m benchmarks operators linear_scan"]
    assert "operators" in get_command(benchmarks).commands  # type: ignore[attr-defined]


def test_check_fails_where_an_import_contract_is_broken(checkout: Path) -> None:
    command(checkout / ".venv/bin/lint-imports", "#!/bin/sh\necho a contract is BROKEN\nexit 1\n")
    done = make(checkout, "check")
    assert done.returncode != 0
    assert "a contract is BROKEN" in done.stdout


@pytest.mark.parametrize("broken", ["ruff check", "ruff format", "mypy"])
def test_check_fails_with_what_it_runs(checkout: Path, broken: str) -> None:
    command(checkout / ".venv/bin/python", f'#!/bin/sh\ncase "$*" in *"{broken}"*) exit 1;; esac\n')
    assert make(checkout, "check").returncode != 0


@pytest.mark.parametrize("target", [*TASKS, "leaderboard", "report", "profile", "diagnose", "doctor"])
def test_targets_call_commands_that_exist(checkout: Path, target: str) -> None:
    called = make(checkout, target).stdout.splitlines()[1].strip("<>")
    assert called in get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_inputs_update_the_environment(checkout: Path, changed: str) -> None:
    later = time.time() + 60
    os.utime(checkout / changed, (later, later))
    done = make(checkout, "listops")
    assert "setup: installing" in done.stdout
    assert "setup: making" not in done.stdout
    assert "install" in (checkout / "calls").read_text(encoding="utf-8")
    assert "-c constraints.txt -e .[dev]" in (checkout / "calls").read_text(encoding="utf-8")


@pytest.mark.parametrize("works", [True, False])
def test_uv_installs_the_same_packages_where_it_is_installed(checkout: Path, works: bool) -> None:
    log, end = 'echo "$@" >> "$(dirname "$0")/../uv-calls"', "" if works else 'echo "error: no index" >&2; exit 2\n'
    command(checkout / "path/uv", f"#!/bin/sh\n{log}\n{end}")
    (checkout / ".venv/.stamp").unlink()
    done = make(checkout, "setup", f"UV={checkout}/path/uv")
    assert done.returncode == 0, done.stderr
    wanted = "-c constraints.txt -e .[dev]"
    assert (checkout / "uv-calls").read_text().strip() == f"pip install --python .venv/bin/python {wanted}"
    calls = (checkout / "calls").read_text(encoding="utf-8")
    assert ("pip" in calls) != works
    assert "-m compileall" in calls, "uv leaves no bytecode, and without it each command compiles PyTorch anew"
    assert works or "uv failed (error: no index); trying pip" in done.stderr
    assert (checkout / ".venv/.stamp").read_text().strip() == str(checkout.resolve())


def test_pip_installs_where_there_is_no_uv(checkout: Path) -> None:
    (checkout / ".venv/.stamp").unlink()
    assert make(checkout, "setup", "UV=no-such-uv").returncode == 0
    assert "install" in (checkout / "calls").read_text()


def test_moved_checkout_gets_a_new_environment(checkout: Path) -> None:
    moved = checkout.rename(checkout.parent / "elsewhere")
    command(moved / "a path/python3", '#!/bin/sh\necho "$@" >> made\n')
    done = make(moved, "setup", f"PYTHON={moved}/a path/python3")
    assert "setup: making .venv" in done.stdout
    assert "-m venv --clear .venv" in (moved / "made").read_text(encoding="utf-8")
    assert (moved / ".venv/.stamp").read_text(encoding="utf-8").strip() == str(moved.resolve())
    assert "installing" not in make(moved, "setup").stdout


def test_failed_installation_is_said_and_tried_again(checkout: Path) -> None:
    command(checkout / ".venv/bin/python", '#!/bin/sh\ntest "$1" = -c && exit 0\necho "ERROR: no such pin"\nexit 1\n')
    (checkout / ".venv/.stamp").unlink()
    for _ in range(2):
        done = make(checkout, "listops")
        assert done.returncode != 0
        assert "ERROR: no such pin" in done.stderr
        assert "setup: pip failed" in done.stderr
        assert "<listops>" not in done.stdout


def test_no_usable_python_is_one_clear_line(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    command(checkout / "path/python3", '#!/bin/sh\ntest "$1" = --version && echo Python 3.9.2 && exit\nexit 1\n')
    for tool in ("bash", "sh", "test", "cat", "head", "rm", "awk", "make"):
        found = shutil.which(tool)
        assert found
        (checkout / "path" / tool).symlink_to(found)
    done = make(checkout, "listops", path=str(checkout / "path"))
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("setup:")]
    assert "3.11, 3.12, 3.13 or 3.14" in line
    assert "Python 3.9.2" in line
    assert not (checkout / ".venv").exists()
