"""Two processes of one run, forked from the server of the drills, that go slowly through a chosen phase."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fault_drills import TINY

from lra.training import checkpoint_io, stages
from lra.training.callbacks import Stop

SETTINGS = (
    "train.evaluate_every=40", "model.d_model=8", "data.batch_size=16", "model.n_layers=1",
    'train.precision="32"',
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def ranks(folder: str, phase: str, port: int) -> None:
    """Run both processes in a process group of their own and write their exit codes to `codes`."""
    os.setpgrp()
    children = [_fork(Path(folder), phase, port, rank) for rank in (0, 1)]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Path(folder, "group").write_text(str(os.getpid()))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    Path(folder, "codes").write_text(json.dumps(codes))


def _fork(folder: Path, phase: str, port: int, rank: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        _run(folder, phase, port, rank)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException as error:  # noqa: BLE001  (a child reports whatever ended it)
        print(repr(error), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(folder: Path, phase: str, port: int, rank: int) -> None:
    import torch

    said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ |= {
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "LRA_CACHE": str(folder.parent / "cache"),
        **{name: str(folder / name.lower()) for name in ("LRA_RESULTS", "LRA_RUNS")},
    }  # fmt: skip
    torch.set_num_threads(1)
    _slow(phase, folder / f"reached-{rank}", rank)
    from lra.cli.app import main

    steps = "train.steps=40" if phase == "score" else "train.steps=2000"
    words = ["lra", "run", TINY, "transformer", "--recipe", "quick", "--devices", "2"]
    sys.argv = [*words, *(word for setting in (*SETTINGS, steps) for word in ("--set", setting))]
    main()


def _slow(phase: str, marker: Path, rank: int) -> None:
    """Make a phase write its marker and take long."""
    from lra.data import prepared_sets

    def before(place: Any, name: str, seconds: float, when: Callable[..., bool] = lambda *_: True) -> None:
        plain = getattr(place, name)

        @functools.wraps(plain)
        def slow(*arguments: Any, **options: Any) -> Any:
            if when(*arguments):
                marker.touch()
                time.sleep(seconds)
            return plain(*arguments, **options)

        setattr(place, name, slow)

    if phase == "start":
        before(prepared_sets, "load_prepared", 60)
    elif phase == "join":  # the second process lets the first one wait
        import torch

        before(torch.distributed, "init_process_group", 60 * rank)
    elif phase == "train":
        before(Stop, "on_train_batch_end", 0.01, lambda _, trainer, *__: trainer.global_step > 2)
    elif phase == "wait":  # in a collective operation that the second process never joins
        before(Stop, "on_train_batch_end", 60 * rank, lambda _, trainer, *__: trainer.global_step > 2)
    elif phase == "validate":
        before(Stop, "on_validation_batch_end", 0.1)
    elif phase == "checkpoint":
        before(checkpoint_io, "write", 0.5)
        if rank:  # only the first one writes
            before(Stop, "on_validation_end", 0)
    elif phase == "score":
        # longer than the drill waits before its signal: a process that has ended its work is no longer in the phase
        before(stages, "score", 1.0)
