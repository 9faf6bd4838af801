"""How long a run will take and how much memory, from a few of its own steps in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lra.progress import duration

if TYPE_CHECKING:
    from lra.sweep import Cell

STEPS = 4
LIMIT = 300


def table(cells: list[Cell], console: Console) -> Table:
    """One probe for each set of cells that differ in nothing but their seed."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(asdict(cell) | {"seed": 0}, sort_keys=True), []).append(cell)
    shown = Table(title="forecast", title_justify="left", pad_edge=False)
    for column in ("cells", "runs", "each", "together", "memory"):
        shown.add_column(column, overflow="fold")
    whole = 0.0
    with console.status("probing") as status:
        for group in groups.values():
            status.update(f"probing {group[0].name}")
            found = probed(group[0])
            name = group[0].name.replace(f" s{group[0].seed}", "", 1)
            if "failed" in found:
                shown.add_row(name, str(len(group)), found["failed"])
                continue
            whole += found["seconds"] * len(group)
            shown.add_row(
                name, str(len(group)), duration(found["seconds"]), duration(found["seconds"] * len(group)),
                f"{found['bytes'] / 2**20:,.0f} MiB",
            )  # fmt: skip
    shown.caption = f"one after the other about {duration(whole)}"
    return shown


def probed(cell: Cell) -> dict[str, Any]:
    """{"seconds", "bytes"} of one run, or {"failed": why}."""
    command = [sys.executable, "-m", "lra.forecast", json.dumps(asdict(cell))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"failed": f"{STEPS} steps take more than {LIMIT} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines()
        return {"failed": errors[-1][:120] if errors else f"exit code {done.returncode}"}
    return json.loads(lines[-1])


def measured(cell: Cell) -> dict[str, float]:
    """Train a few steps and evaluate one batch, here and now. Preparing data is not counted."""
    start = time.perf_counter()
    import numpy as np
    import torch
    from torch.nn import functional as F

    from lra import memory, optim, store
    from lra.data import DeviceSet, Sampler, Sweep, choose
    from lra.run import build, device, resolved

    found, _, constructor = resolved(cell.request())
    here, loaded = device(), time.perf_counter() - start
    prepared = store.prepared(cell.task, found.data.protocol)
    start = time.perf_counter()
    peak = memory.Peak(here)
    split, test = prepared.split("train"), prepared.split("test")
    data = DeviceSet.of(split, prepared.protocol, here, choose(len(split), found.data.train_examples))
    held = DeviceSet.of(test, prepared.protocol, here, choose(len(test), found.data.test_examples))
    model = build(found, constructor, prepared.task, prepared.protocol, cell.seed).to(here)
    optimiser = optim.build(model, model.encoder, found.optim)
    sampler = Sampler(data.lengths, found.data.batch_size, cell.seed)
    # batches are alike in length inside and differ between them: their mean length stands for the run's
    spread = np.linspace(0, sampler.per_epoch - 1, STEPS).astype(int)
    loaded += time.perf_counter() - start
    seconds = []
    for step in (int(spread[len(spread) // 2]), *spread):
        start = time.perf_counter()
        for part in np.array_split(sampler.batch(int(step)), found.train.accumulate):
            batch = data.batch(part)
            (F.cross_entropy(model(batch).float(), batch.labels) / found.train.accumulate).backward()
        optimiser.step()
        optimiser.zero_grad()
        _wait(here)
        seconds.append(time.perf_counter() - start)
    sweep = Sweep(held, found.data.evaluation_batch_size)
    middle = sweep.plan[len(sweep.plan) // 2]
    model.eval()
    start = time.perf_counter()
    with torch.no_grad():
        model(held.batch(middle))
    _wait(here)
    scoring = (time.perf_counter() - start) / len(middle)
    selection = found.data.validation_examples or len(prepared.split(prepared.protocol.selection))
    validations = found.train.steps // found.train.evaluate_every + 1
    # the first step also compiles and allocates, once
    total = loaded + seconds[0] + found.train.steps * sum(seconds[1:]) / STEPS
    if found.pretrain.objective != "none":
        total += found.pretrain.steps * sum(seconds[1:]) / STEPS
    total += scoring * (validations * selection + len(held))
    return {"seconds": total, "bytes": float(peak.read()["peak_bytes"])}


def _wait(here: Any) -> None:
    if here.type == "cuda":
        import torch

        torch.cuda.synchronize(here)


if __name__ == "__main__":
    from lra.errors import UserError
    from lra.sweep import Cell as Given

    try:
        print(json.dumps(measured(Given(**json.loads(sys.argv[1])))))
    except UserError as error:
        sys.exit(str(error))
