"""How long a run will take and how much memory at least, from a few of its own steps in a process of its own.

Memory is a lower bound: over hundreds of steps of changing lengths the heap of a CPU grows beyond what a few show.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lra.sweeps.progress import duration

if TYPE_CHECKING:
    from lra.config.recipe import Recipe
    from lra.data.batches import DeviceSet, Sampler
    from lra.model import Classifier
    from lra.sweeps.plans import Cell
    from lra.training.module import Trainable

STEPS = 8
BATCHES = 6
LOOKED_AT = 1000
"""Training steps and evaluated batches that are tried, and steps whose lengths are looked at to choose the former."""
LIMIT = 300


def table(cells: list[Cell], console: Console) -> Table:
    """One probe for each set of cells that differ in nothing but their seed."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(asdict(cell) | {"seed": 0}, sort_keys=True), []).append(cell)
    shown = Table(title="forecast", title_justify="left", pad_edge=False)
    for column in ("cells", "runs", "each", "together", "memory, at least"):
        shown.add_column(column, overflow="fold")
    whole = 0.0
    with console.status("probing") as status:
        for group in groups.values():
            status.update(f"probing {group[0].name}")
            probe = probed(group[0])
            name = group[0].name.replace(f" s{group[0].seed}", "", 1)
            if "failed" in probe:
                shown.add_row(name, str(len(group)), probe["failed"])
                continue
            whole += probe["seconds"] * len(group)
            shown.add_row(
                name, str(len(group)), duration(probe["seconds"]), duration(probe["seconds"] * len(group)),
                f"{probe['bytes'] / 2**20:,.0f} MiB",
            )  # fmt: skip
    shown.caption = f"one after the other about {duration(whole)}"
    return shown


def probed(cell: Cell) -> dict[str, Any]:
    """{"seconds", "bytes"} of one run, or {"failed": why}."""
    command = [sys.executable, "-m", "lra.sweeps.forecast", json.dumps(asdict(cell))]
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
    """Train and evaluate a few batches as a run would, here and now. Preparing data is not counted."""
    start = time.perf_counter()
    from lra.data import prepared_sets
    from lra.data.batches import DeviceSet, Sampler, choose
    from lra.profiling import memory
    from lra.registry import architectures
    from lra.training import stages
    from lra.training.construction import build
    from lra.training.device import device
    from lra.training.module import Training
    from lra.training.pretraining import Pretraining
    from lra.training.request import resolve
    from lra.training.run import check_operators

    recipe, _ = resolve(cell.request())
    constructor = architectures.get(cell.architecture)
    here, total = device(), time.perf_counter() - start
    prepared = prepared_sets.load_prepared(cell.task, recipe.data.protocol)
    start = time.perf_counter()
    model = build(recipe, constructor, prepared.task, prepared.protocol, cell.seed)
    check_operators(model, prepared, constructor)
    # from here on in the order of a run, for the memory is that of its largest moment
    peak = memory.Peak(here)
    memory.keep_freed()
    split, selection = prepared.split("train"), prepared.split(prepared.protocol.selection)
    data = DeviceSet.of(split, prepared.protocol, here, choose(len(split), recipe.data.train_examples))
    stages.apply_execution(recipe, model)
    if recipe.train.compile:
        stages.compile_encoder(data, model.to(here))
    model.to(here)
    total += time.perf_counter() - start
    if recipe.pretrain.objective != "none":
        before = Pretraining(model, recipe, prepared.protocol).to(here)
        total += _training(before, recipe, data, Sampler(data.lengths, before.batch_size, cell.seed))
    held = DeviceSet.of(selection, prepared.protocol, here, choose(len(selection), recipe.data.validation_examples))
    total += _training(
        Training(model, recipe, prepared.task.classes), recipe, data, stages.training_sampler(recipe, data, cell.seed)
    )
    # the split that selects is scored once more at the end, and the test set once
    times = recipe.train.steps // min(recipe.train.evaluate_every, recipe.train.steps) + 1
    scored = times * len(held) + (recipe.data.test_examples or len(prepared.split("test")))
    total += scored * _scoring(model, recipe, held)
    return {"seconds": total, "bytes": float(peak.read()["peak_bytes"])}


def _training(module: Trainable, recipe: Recipe, data: DeviceSet, sampler: Sampler) -> float:
    """Seconds that all steps of a stage take. The longest batch is among those tried: it decides on the memory."""
    import numpy as np
    import torch

    from lra.training import precision

    module.setup("fit")
    optimiser = module.configure_optimizers()["optimizer"]
    if hasattr(optimiser, "train"):
        optimiser.train()
    module.train()
    steps = np.unique(np.linspace(0, module.steps - 1, min(module.steps, LOOKED_AT)).astype(int))
    by_length = steps[np.argsort([data.lengths[sampler.batch(int(s))].max() for s in steps], kind="stable")]
    middles = by_length[(2 * np.arange(STEPS) + 1) * len(steps) // (2 * STEPS)]
    # mixed as in a run: memory freed by one length does not always serve the next
    np.random.default_rng(0).shuffle(middles)
    seconds, parts = [], recipe.train.accumulate
    for step in (middles[0], *middles, by_length[-1]):
        start = time.perf_counter()
        for part in range(parts):
            with precision.autocast(recipe, data.device):
                loss: Any = module.training_step(data.batch(sampler.batch(int(step))[part::parts]), 0)
            (loss / parts).backward()
        if recipe.optim.clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.optim.clip)
        optimiser.step()
        optimiser.zero_grad()
        _wait(data.device)
        seconds.append(time.perf_counter() - start)
    # the first step also allocates, once
    return seconds[0] - seconds[1] + module.steps * sum(seconds[1 : STEPS + 1]) / STEPS


def _scoring(model: Classifier, recipe: Recipe, held: DeviceSet) -> float:
    """Seconds an example takes in evaluation, from batches of all lengths, the longest among them."""
    import numpy as np
    import torch

    from lra.data.batches import EvaluationLoader
    from lra.training import precision

    plan = EvaluationLoader(held, recipe.data.evaluation_batch_size).plan
    chosen = [plan[i] for i in np.unique(np.linspace(0, len(plan) - 1, BATCHES).astype(int))]
    seconds = []
    model.eval()
    for examples in (chosen[0], *chosen):
        start = time.perf_counter()
        with torch.no_grad(), precision.autocast(recipe, held.device):
            model(held.batch(examples))
        _wait(held.device)
        seconds.append((time.perf_counter() - start) / len(examples))
    return sum(seconds[1:]) / len(chosen)


def _wait(here: Any) -> None:
    if here.type == "cuda":
        import torch

        torch.cuda.synchronize(here)


if __name__ == "__main__":
    from lra.errors import UserError
    from lra.sweeps.plans import Cell as Given

    try:
        print(json.dumps(measured(Given(**json.loads(sys.argv[1])))))
    except UserError as error:
        sys.exit(str(error))
