"""A program for test_sweep: twelve cells on a Ray cluster of two local nodes, one of which is killed in the middle.

python -m tests.dying_node TASK FOLDER: prints what is there at the end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console

from lra.operators import doctor
from lra.results import result
from lra.sweeps import local, plans

SETTINGS = (
    '"train.steps" = 40\n"train.evaluate_every" = 20\n"model.d_model" = 8\n"model.n_layers" = 1\n"data.batch_size" = 16'
)


def running(raylet: int) -> str:
    """The command of the cell that a node has in progress; empty where it has none."""
    for place in Path("/proc").glob("[0-9]*"):
        # processes end while they are looked at
        with suppress(OSError, ValueError):
            words, above = (place / "cmdline").read_text().split("\0"), int(place.name)
            while "lra.cli" in words and above > 1:
                above = int(Path(f"/proc/{above}/stat").read_text().rpartition(")")[2].split()[1])
                if above == raylet:
                    return " ".join(words)
    return ""


def main(task: str, folder: Path) -> None:
    from ray.cluster_utils import Cluster

    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        os.environ.setdefault(name, str(folder / name.lower()))
    os.environ["OMP_NUM_THREADS"] = "1"
    file = folder / "twelve.toml"
    file.write_text(
        f'tasks = ["{task}"]\narchitectures = ["gru"]\nrecipe = "quick"\nseeds = [0, 1, 2, 3, 4, 5]\n'
        f'grid = {{"optim.lr" = [1e-3, 3e-3]}}\n[set]\n{SETTINGS}\n'
    )
    plan = plans.read(file)
    # its half minute once, and not on every node at the same time
    doctor.require_parity(["recurrent_cell"], torch.device("cpu"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    raylet = second.all_processes["raylet"][0].process.pid
    killed: list[int] = []
    cut: list[str] = []

    def kill() -> None:
        while len(list(result.folder().rglob("*.json"))) < 3 or not (cell := running(raylet)):
            time.sleep(0.2)
        cut.append(cell)
        cluster.remove_node(second, allow_graceful=False)
        killed.append(len(list(result.folder().rglob("*.json"))))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    start = time.monotonic()
    failed = local.execute_plan(plan, Console(stderr=True), ray=cluster.address, forecast=False)
    seconds = time.monotonic() - start
    killer.join(1)
    cluster.shutdown()
    files = sorted(result.folder().rglob("*.json"))
    records = [result.read(path) for path in files]
    print(json.dumps({
        "killed": len(killed), "killed_after_results": killed, "cut_short": cut,
        "failed": [cell.name for cell in failed], "results": len(files),
        "cells": [f"{r.seed} {r.recipe_hash}" for r in records],
        "seconds": round(seconds, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
