"""All measurements that need a GPU, in eight minutes: `python -m benchmarks gpu`.

The parts (PARTS) are parity on the GPU, times beside the floor and other packages, time by kernel, and widths and
launch settings. Each part is a separate process; its output goes to `measure/<part>.log` in the results folder
(`LRA_RESULTS`), and its results, after every step, to `measure/gpu.json`. If a part fails or runs out of time, the next
one starts all the same, and the next call goes on where the part stopped. Works from a checkout with the packages of
the machine: the parts run with PYTHONPATH=. set.
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
SHARES = {"parity": 150, "times": 180, "kernels": 90, "widths": 60}
PARTS = {part: (("-m", "benchmarks", "steps", part), share / 480) for part, share in SHARES.items()}
"""Part -> arguments of Python, share of the time. Unused time is available to later parts."""


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
            # its child processes belong to the same session
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "out of time"
    return "ok" if code == 0 else f"failed ({code})"


def gpu(
    seconds: float = typer.Option(480.0, min=1, help="Time limit for all parts."),
    only: list[str] = typer.Option([], help="Part to run; may be repeated; default: all."),  # noqa: B008
) -> None:
    """Run the measurements of a machine with a GPU, each part within its share of the time."""
    console = Console()
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        console.print(f"[red]error:[/] unknown part {unknown[0]!r}; one of {', '.join(PARTS)}")
        raise typer.Exit(2)
    folder, end = result.folder() / "measure", time.monotonic() + seconds
    parts, succeeded = [name for name in PARTS if not only or name in only], True
    for position, name in enumerate(parts):
        arguments, share = PARTS[name]
        remaining = sum(PARTS[other][1] for other in parts[position:])
        begin = time.monotonic()
        outcome = run_part(arguments, folder / f"{name}.log", max(1.0, (end - begin) * share / remaining))
        succeeded = succeeded and outcome == "ok"
        console.print(f"{name}: {outcome} after {time.monotonic() - begin:.0f} s, {folder / name}.log", soft_wrap=True)
    raise typer.Exit(0 if succeeded else 1)
