"""A sweep on a Ray cluster: one task for each run, tried again where a node dies, every result written by the driver.

Needs the extra `cluster`. The nodes need this package, the data (LRA_DATA) or a shared LRA_CACHE, and nothing else: a
worker sends the parts of its result back and keeps none.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from lra import files
from lra.errors import UserError
from lra.results import result
from lra.sweeps.local import attempt, finished
from lra.sweeps.plans import Cell, Plan
from lra.sweeps.progress import Board, watched

# a task whose node died is not at fault, so it may move more often than a failing run is repeated
MOVES = 3
PASSED = ("LRA_CACHE", "LRA_DATA", "OMP_NUM_THREADS", "PYTHONPATH")


def run(plan: Plan, open_: list[int], address: str, console: Console) -> list[int]:
    """Returns the numbers of the cells that failed. Raises UserError without Ray or cluster."""
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs the package ray: `pip install 'lra-suite[cluster]'`") from None
    environment = {name: os.environ[name] for name in PASSED if name in os.environ}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]))
    try:
        ray.init(
            address=None if address == "local" else address, log_to_driver=False, include_dashboard=False,
            runtime_env={"env_vars": environment | {"PYTHONPATH": path}},
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: no cluster answers there ({str(error).splitlines()[0]})") from None
    try:
        return _driven(ray, plan, open_, console)
    finally:
        ray.shutdown()


def _driven(ray: Any, plan: Plan, open_: list[int], console: Console) -> list[int]:
    board = Board(
        [cell.name for cell in plan.cells], console, workers=max(int(ray.cluster_resources().get("CPU", 1)), 1)
    )
    devices = {n: int(plan.cells[n].options.get("devices", 1)) for n in open_}
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    execute = ray.remote(executed)
    for number in range(len(plan.cells)):
        board.set(number, "waiting" if number in open_ else "finished")
    failed = []
    with watched(board):
        pending = {}
        for number in open_:
            wants = {"num_gpus": devices[number]} if gpus else {"num_cpus": devices[number]}
            told = execute.options(max_retries=MOVES, **wants).remote(plan.cells[number], plan.retries)
            pending[told] = number
            board.set(number, "running")
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=1)
            for told in ready:
                number = pending.pop(told)
                try:
                    code, said, parts = ray.get(told)
                except ray.exceptions.RayError as error:
                    code, said, parts = 1, str(error).strip().splitlines()[0][:160], {}
                if not code:
                    _kept(plan.cells[number], parts)
                else:
                    failed.append(number)
                    with files.atomic(plan.logs / f"{number}.log") as temporary:
                        temporary.write_bytes(parts.get("log", said.encode()))
                board.set(number, "failed" if code else "done", said)
    return failed


def executed(cell: Cell, retries: int) -> tuple[int, str, dict[str, bytes]]:
    """On a worker: run a cell, and send back its two parts, or its log where it failed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        own = {"LRA_RESULTS": str(folder / "results"), "LRA_RUNS": str(folder / "runs")}
        os.environ.update(own)
        code, said = attempt(cell, folder / "log", retries, own)
        if code:
            return code, said, {"log": (folder / "log").read_bytes()}
        (record,) = (folder / "results" / "runs").rglob("*.json")
        parts = (record, record.with_suffix(".npz"))
        return 0, "", {str(p.relative_to(folder / "results")): p.read_bytes() for p in parts}


def _kept(cell: Cell, parts: dict[str, bytes]) -> None:
    """Write a result once, the record last, unless another attempt's is there already."""
    root = result.folder()
    if finished(cell, root):
        return
    for name in sorted(parts, reverse=True):
        with files.atomic(root / name) as temporary:
            temporary.write_bytes(parts[name])
