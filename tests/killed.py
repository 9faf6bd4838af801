"""A program for test_resume: each run is a forked child, one of which kills itself with SIGKILL at a given step.

python -m tests.killed TASK FOLDER ARCHITECTURE[+key=value]...@STEP ...: prints, for each, how the killed child died,
the step it was resumed from, and whether the resumed run ended with the very weights and predictions of one never
stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from lra.results import result
from lra.results.record import RunRecord
from lra.training import stages
from lra.training.callbacks import Stop
from lra.training.request import Request
from lra.training.run import run

SETTINGS = {
    "train.steps": "24", "train.evaluate_every": "8", "model.d_model": "16", "data.batch_size": "16",
    "model.n_layers": "1", "model.dropout": "0.1",
}  # fmt: skip


def child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process; returns what waitpid says of its end."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (the parent only sees the exit code)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def one(task: str, architecture: str, folder: Path, settings: dict[str, str], resume: bool, kill_at: int = 0) -> None:
    os.environ.update(LRA_RESULTS=str(folder / "results"), LRA_RUNS=str(folder / "runs"))
    stopping, scoring = Stop.on_train_batch_end, stages.score

    def die(self: Stop, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        stopping(self, trainer, *rest)

    def keep(found: Any, prepared: Any, trained: Any, *rest: Any, **more: Any) -> dict[str, Any]:
        torch.save(trained.module.model.state_dict(), folder / "final.pt")
        return scoring(found, prepared, trained, *rest, **more)

    if kill_at:
        Stop.on_train_batch_end = die  # type: ignore[assignment,method-assign]
    stages.score = keep  # type: ignore[assignment]
    run(Request(task, architecture, "quick", settings=settings, resume=resume), Console(quiet=True))


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], np.ndarray, RunRecord]:
    (path,) = (folder / "results").rglob("*.json")
    return torch.load(folder / "final.pt"), np.load(path.with_suffix(".npz"))["prediction"], result.read(path)


def main(task: str, place: Path, cases: list[str]) -> None:
    # each child would load them anew
    for op in ("linear_scan", "recurrent_cell"):
        import_module(f"lra.kernels.{op}.cpu")
    for number, case in enumerate(cases):
        architecture, _, step = case.partition("@")
        name, *changes = architecture.split("+")
        kill_at = int(step)
        settings = SETTINGS | dict(change.split("=", 1) for change in changes)
        whole, broken = place / f"whole-{number}", place / f"broken-{number}"
        for folder in (whole, broken):
            folder.mkdir()
        first = child(partial(one, task, name, whole, settings, resume=False))
        died = child(partial(one, task, name, broken, settings, resume=False, kill_at=kill_at))
        kept = [torch.load(p, weights_only=True)["global_step"] for p in broken.rglob("last.ckpt")]
        again = child(partial(one, task, name, broken, settings, resume=True))
        said: dict[str, Any] = {"signal": os.WTERMSIG(died), "kept": kept, "ends": [first, again]}
        if not first and not again:
            (a, p, x), (b, q, y) = outcome(whole), outcome(broken)
            said["weights"] = all(torch.equal(a[key], b[key]) for key in a)
            said["predictions"] = bool((p == q).all())
            said["steps"] = [x.speed.steps, y.speed.steps]
            said["validation"] = [x.validation.accuracy, y.validation.accuracy]
        print(json.dumps({"architecture": architecture, **said}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
