"""Everything one machine can say of this code, in order and in limited time: `python -m benchmarks gpu`.

The parts are those of PARTS: tests of the operators on a GPU, the operators' bench, the doctor, the efficiency profile
of all architectures. Each part is a process of its own whose output goes to `measure/<part>.log` in the results folder
(`LRA_RESULTS`), and which writes its own files as it finishes; a part that fails or runs out of time is named and does
not keep the others from running. Works from a checkout with the machine's own packages: PYTHONPATH=. is set for the
parts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from lra.results import result

ROOT = Path(__file__).resolve().parents[1]
LRA = ("-m", "lra.cli")
PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "tests": (("-m", "pytest", "-q", "-m", "gpu", "tests"), 0.30),
    "bench": (("-m", "benchmarks", "operators", "--budget", "0.5"), 0.25),
    "doctor": ((*LRA, "doctor", "--fresh"), 0.10),
    "profile": ((*LRA, "profile", "--budget", "0.5"), 0.35),
}
"""Part -> arguments for Python, share of the time. What a part leaves unused goes to those after it."""


def run_part(arguments: Sequence[str], log: Path, seconds: float) -> str:
    """Run Python with `arguments` for at most `seconds`. Returns "ok", "failed (exit code)" or "out of time"."""
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
        except BaseException as error:
            # its children (profile's cells, pytest's workers) belong to its session
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "out of time"
    return "ok" if code == 0 else f"failed ({code})"


def gpu(
    seconds: float = typer.Option(520.0, min=1, help="For all parts together."),
    only: list[str] = typer.Option([], help="Parts to run; all by default."),  # noqa: B008
) -> None:
    """Run the parts, each within its share of the time."""
    console = Console()
    strange = [name for name in only if name not in PARTS]
    if strange:
        console.print(f"[red]error:[/] unknown part {strange[0]!r}; one of {', '.join(PARTS)}")
        raise typer.Exit(2)
    folder, end = result.folder() / "measure", time.monotonic() + seconds
    chosen, fine = [name for name in PARTS if not only or name in only], True
    for place, name in enumerate(chosen):
        arguments, share = PARTS[name]
        left = sum(PARTS[other][1] for other in chosen[place:])
        begin = time.monotonic()
        outcome = run_part(arguments, folder / f"{name}.log", max(1.0, (end - begin) * share / left))
        fine = fine and outcome == "ok"
        console.print(f"{name}: {outcome} after {time.monotonic() - begin:.0f} s, {folder / name}.log", soft_wrap=True)
    raise typer.Exit(0 if fine else 1)
