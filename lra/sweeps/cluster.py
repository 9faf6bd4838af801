"""Run a sweep on a Ray cluster: one Ray task per run.

Ray restarts a task whose node dies. Workers send their results back, and the driver writes them. The nodes need this
package and the data (LRA_DATA, or a shared LRA_CACHE), but no shared results folder. Needs the extra `cluster`.
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
from lra.sweeps.local import is_finished, run_cell
from lra.sweeps.plans import Cell, Plan
from lra.sweeps.progress import Board, live_display

MAX_RESTARTS = 3
"""Restarts of a task whose node died; not counted as retries of a failed run."""
VARIABLES = ("LRA_CACHE", "LRA_DATA", "OMP_NUM_THREADS", "PYTHONPATH")


def run(plan: Plan, unfinished: list[int], address: str, console: Console) -> list[int]:
    """Run the unfinished cells of a plan. Returns the numbers of those that failed.

    address: of the cluster, or "local". Raises UserError if Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs the package ray: `pip install 'lra-suite[cluster]'`") from None
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]))
    try:
        ray.init(
            address=None if address == "local" else address, log_to_driver=False, include_dashboard=False,
            runtime_env={"env_vars": environment | {"PYTHONPATH": path}},
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray {address}: cannot connect to a cluster ({str(error).splitlines()[0]})") from None
    try:
        return _drive(ray, plan, unfinished, console)
    finally:
        ray.shutdown()


def _drive(ray: Any, plan: Plan, unfinished: list[int], console: Console) -> list[int]:
    """Submit the cells, collect their results and write them."""
    board = Board(
        [cell.name for cell in plan.cells], console, workers=max(int(ray.cluster_resources().get("CPU", 1)), 1)
    )
    devices = {n: int(plan.cells[n].options.get("devices", 1)) for n in unfinished}
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    execute = ray.remote(execute_cell)
    for number in range(len(plan.cells)):
        board.set(number, "waiting" if number in unfinished else "finished")
    failed = []
    with live_display(board):
        pending = {}
        for number in unfinished:
            resources = {"num_gpus": devices[number]} if gpus else {"num_cpus": devices[number]}
            reference = execute.options(max_retries=MAX_RESTARTS, **resources).remote(plan.cells[number], plan.retries)
            pending[reference] = number
            board.set(number, "running")
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=1)
            for reference in ready:
                number = pending.pop(reference)
                try:
                    code, message, contents = ray.get(reference)
                except ray.exceptions.RayError as error:
                    code, message, contents = 1, str(error).strip().splitlines()[0][:160], {}
                if not code:
                    _save_result(plan.cells[number], contents)
                else:
                    failed.append(number)
                    with files.atomic(plan.logs / f"{number}.log") as temporary:
                        temporary.write_bytes(contents.get("log", message.encode()))
                board.set(number, "failed" if code else "done", message)
    return failed


def execute_cell(cell: Cell, retries: int) -> tuple[int, str, dict[str, bytes]]:
    """Run a cell on a worker. Returns the exit code, a message, and the content of the result's files or of the log."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        variables = {"LRA_RESULTS": str(folder / "results"), "LRA_RUNS": str(folder / "runs")}
        os.environ.update(variables)
        code, message = run_cell(cell, folder / "log", retries, variables)
        if code:
            return code, message, {"log": (folder / "log").read_bytes()}
        (record,) = (folder / "results" / "runs").rglob("*.json")
        paths = (record, record.with_suffix(".npz"))
        return 0, "", {str(path.relative_to(folder / "results")): path.read_bytes() for path in paths}


def _save_result(cell: Cell, contents: dict[str, bytes]) -> None:
    """Write the files of a result, the record last, unless the cell has a result already."""
    root = result.folder()
    if is_finished(cell, root):
        return
    for name in sorted(contents, reverse=True):
        with files.atomic(root / name) as temporary:
            temporary.write_bytes(contents[name])
