"""Children to be killed: jobs that run in a process of their own and die at a chosen moment, and what to look at after.

The children are forked from one server that has imported everything, so that a drill takes a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FULL = os.environ.get("LRA_FAULTS") == "full"
"""Set by `make test-faults`; without it every drill runs in a short form."""
TINY = f"{HERE.parent / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "12", "train.evaluate_every": "4", "model.d_model": "8", "data.batch_size": "16",
    "model.n_layers": "1", "model.dropout": "0.1",
}  # fmt: skip
WRITES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")


def job_prepare(**_: Any) -> Any:
    from lra.data import prepared_sets
    from lra.registry import tasks

    return prepared_sets.load_prepared(tasks.get(TINY)()).checksum


def job_run(seed: int = 0, resume: bool = True, settings: Mapping[str, str] | None = None, **_: Any) -> str:
    from rich.console import Console

    from lra.errors import UserError
    from lra.training.request import Request
    from lra.training.run import run

    request = {"task": TINY, "architecture": "gru", "recipe": "quick", "seed": seed, "settings": settings or SMALL}
    try:
        path = run(Request(**request, resume=resume), Console(quiet=True))  # type: ignore[arg-type]
    except UserError as error:
        if not str(error).startswith("nothing to resume"):
            raise
        path = run(Request(**request), Console(quiet=True))  # type: ignore[arg-type]
    return str(path)


def job_result(count: int = 1, seed: int = 0, **_: Any) -> list[str]:
    from records import record, write

    from lra.results import result

    return [str(write(result.folder(), record(seed=seed, accuracy=0.5, n=20))) for _ in range(count)]


def job_leaderboard(**_: Any) -> list[str]:
    from lra.reports import leaderboard, readme
    from lra.reports.ranking import Leaderboard
    from lra.results import result
    from lra.results.collection import Collection

    root = result.folder()
    board = Leaderboard.of(Collection.read(root))
    written = [str(p) for p in leaderboard.write(root, board, list(leaderboard.FORMATS))]
    readme.update(root.parent / "README.md", board)
    return written


def job_sweep(**_: Any) -> int:
    """A sweep whose runs are forked from this process instead of started anew: the rest is as `lra sweep` does it."""
    from rich.console import Console

    from lra.sweeps import local, plans

    assert (local.run_cell.__kwdefaults__ or {})["start"] is local.run_child
    local.run_cell.__kwdefaults__ = {"start": forked}
    return len(local.execute_plan(plans.read(Path("grid.toml")), Console(quiet=True), forecast=False))


def forked(words: list[str], *, stdout: Any, check: bool = False, **_: Any) -> Any:
    """What `subprocess.run` of `python -m lra.cli ...` does, without the seconds of starting Python."""
    from typer.testing import CliRunner

    from lra.cli.app import app
    from lra.sweeps import local

    pid = os.fork()
    if pid == 0:
        local._end_with_parent()
        done = CliRunner().invoke(app, words[words.index("lra.cli") + 1 :])
        stdout.write(done.output + (repr(done.exception) if done.exception else ""))
        stdout.flush()
        os._exit(done.exit_code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return subprocess.CompletedProcess(words, status)


def job_look(**_: Any) -> dict[str, Any]:
    """Everything a reader would open, read as a reader would."""
    import numpy as np

    from lra.data import prepared_sets
    from lra.registry import tasks
    from lra.results import result
    from lra.results.collection import Collection
    from lra.training import checkpoint

    collections = [Collection.read(result.folder(), place) for place in ("runs", "smoke")]
    records = [record for collection in collections for record in collection.records]
    task = tasks.get(TINY)()
    ready = prepared_sets.find_prepared(task) is not None
    kept = sorted(Path(os.environ["LRA_RUNS"]).rglob("*.ckpt"))
    steps = {path.name: checkpoint.read(path).get("global_step") for path in kept}
    predictions = {}
    for record in records:
        [place] = result.folder().rglob(record.predictions.file)
        predictions[record.id] = np.load(place, allow_pickle=False)["prediction"].tolist()
    return {
        "problems": [line for collection in collections for line in collection.problems],
        "ids": [r.id for r in records], "predictions": predictions,
        "cells": [[r.architecture, r.seed, r.recipe_hash] for r in records], "steps": steps,
        "sane": all(0 < r.wall_seconds < 600 and r.speed.examples_per_second > 0 for r in records),
        "prepared": prepared_sets.verify(task) if ready else None,
    }  # fmt: skip


def clock_stands() -> None:
    """Every run starts at the same second."""
    from datetime import datetime

    from lra.training import run

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 1, 1, tzinfo=tz)

    run.datetime = Stopped  # type: ignore[misc]


def clock_leaps() -> None:
    """The wall clock jumps by up to ten days, back or ahead, whenever it is looked at."""
    from datetime import datetime, timedelta

    from lra.training import run

    draw, now = random.Random(os.getpid()), time.time

    class Leaping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=draw.uniform(-10, 10))

    run.datetime = Leaping  # type: ignore[misc]
    time.time = lambda: now() + draw.uniform(-864_000, 864_000)


JOBS: dict[str, Callable[..., Any]] = {
    name.removeprefix("job_"): value for name, value in list(globals().items()) if name.startswith("job_")
}


@dataclass
class Ended:
    """How a child ended. code: exit status, negative for a signal; events: writes below its folder it came to."""

    code: int
    value: Any
    said: str
    events: int
    seconds: float


def child(job: str, folder: str, kill_at: int, options: dict[str, Any]) -> None:
    """Do a job in `folder`; kill_at: die by SIGKILL at the start of that write (0: never)."""
    import torch

    sys.stderr = open(f"{folder}/said", "w")  # noqa: SIM115  (open until the process dies)
    torch.set_num_threads(1)
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        os.environ[name] = f"{folder}/{name.lower()}"
    os.environ.pop("LRA_DATA", None)
    os.chdir(folder)
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event in WRITES
        if event == "open" and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and str(arguments[0] if arguments else "").startswith(f"{folder}/lra_"):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    before_job = options.pop("before", None)
    if before_job:
        globals()[before_job]()
    try:
        value, code = JOBS[job](**options), 0
    except BaseException as error:  # noqa: BLE001  (a child reports whatever ended it)
        plain = type(error).__name__ in ("UserError", "DataError")
        value, code = str(error), 2 if plain else 1
        if not plain:
            traceback.print_exc()
    sys.stderr.flush()
    Path(folder, "value").write_text(json.dumps([value, seen]))
    os._exit(code)


_server: Any = None


def _context() -> Any:
    global _server
    if _server is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, HERE.parent, HERE)))
        _server = multiprocessing.get_context("forkserver")
        _server.set_forkserver_preload(["fault_preload"])
        from multiprocessing import forkserver

        forkserver.ensure_running()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return _server


def start(folder: Path, job: str, kill_at: int = 0, **options: Any) -> Any:
    (folder / "value").unlink(missing_ok=True)
    process = _context().Process(target=child, args=(job, str(folder), kill_at, options))
    process.start()
    return process


def drill(folder: Path, job: str, kill_at: int = 0, kill_after: float | None = None, **options: Any) -> Ended:
    """Run a job, kill it at its write number `kill_at` or after so many seconds, and say how it ended."""
    process, clock = start(folder, job, kill_at, **options), time.monotonic()
    process.join(kill_after if kill_after is not None else 240)
    if process.is_alive():
        process.kill()
        process.join()
        assert kill_after is not None, f"{job} hangs"
    seconds = time.monotonic() - clock
    place = folder / "value"
    value, events = json.loads(place.read_text()) if place.is_file() else (None, 0)
    said = folder / "said"
    return Ended(process.exitcode, value, said.read_text() if said.is_file() else "", events, seconds)


def done(folder: Path, job: str, **options: Any) -> Any:
    """Run a job that has to succeed; what it returned."""
    ended = drill(folder, job, **options)
    assert ended.code == 0, f"{job}: {ended.value}\n{ended.said}"
    return ended.value


def moments(events: int, short: int, long: int) -> list[int]:
    """Writes to die at: all of them where there is time, else a spread of them; always the last."""
    wanted = long if FULL else short
    if events <= wanted:
        return list(range(1, events + 1))
    step = events / wanted
    return sorted({max(1, round(step * (i + 1))) for i in range(wanted)})


def seconds(limit: float, short: int, long: int) -> list[float]:
    """Moments at random, the same in every session."""
    draw = random.Random(20)
    return [draw.uniform(0.0, limit) for _ in range(long if FULL else short)]
