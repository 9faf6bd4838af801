"""Forecast the time and memory of a run from a few of its training steps, measured in a separate process.

Memory is a lower bound: on a CPU the heap keeps growing over hundreds of steps with varying lengths.
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
    from lra.data.batches import DeviceSet, Plan
    from lra.model import Classifier
    from lra.sweeps.plans import Cell
    from lra.training.module import Trainable
    from lra.training.stages import TrainingSet

STEPS = 8
"""Measured training steps."""
BATCHES = 6
"""Measured evaluation batches."""
CANDIDATES = 1000
"""Steps from which the measured ones are chosen by length."""
TIMEOUT = 300
"""Seconds a probe may take."""


def forecast_table(cells: list[Cell], console: Console) -> Table:
    """Forecast cells as a table. Cells that differ only in their seed are measured once."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(asdict(cell) | {"seed": 0}, sort_keys=True), []).append(cell)
    table = Table(title="forecast", title_justify="left", pad_edge=False)
    for column in ("cells", "runs", "each", "total", "memory, at least"):
        table.add_column(column, overflow="fold")
    total = 0.0
    with console.status("probing") as status:
        for group in groups.values():
            status.update(f"probing {group[0].name}")
            probe = run_probe(group[0])
            name = group[0].name.replace(f" s{group[0].seed}", "", 1)
            if "failed" in probe:
                table.add_row(name, str(len(group)), probe["failed"])
                continue
            total += probe["seconds"] * len(group)
            table.add_row(
                name, str(len(group)), duration(probe["seconds"]), duration(probe["seconds"] * len(group)),
                f"{probe['bytes'] / 2**20:,.0f} MiB",
            )  # fmt: skip
    table.caption = f"about {duration(total)} in total, one run at a time"
    return table


def run_probe(cell: Cell) -> dict[str, Any]:
    """Measure a cell in a separate process. Returns {"seconds", "bytes"} of the run, or {"failed": reason}.

    refused: whether the run itself would end with that reason."""
    command = [sys.executable, "-m", "lra.sweeps.forecast", json.dumps(asdict(cell))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"failed": f"{STEPS} steps take more than {TIMEOUT} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        errors = done.stderr.strip().splitlines()
        return {"failed": errors[-1][:120] if errors else f"exit code {done.returncode}"}
    return json.loads(lines[-1])


def measure(cell: Cell) -> dict[str, float]:
    """Train and evaluate a few batches as a run does. Returns {"seconds", "bytes"}; preparing data is not counted."""
    start = time.perf_counter()
    from lra.data import prepared_sets
    from lra.data.batches import DeviceSet, choose
    from lra.data.drawn import training_set
    from lra.profiling import memory
    from lra.registry import architectures
    from lra.target import target_of
    from lra.training import stages
    from lra.training.construction import build
    from lra.training.device import device
    from lra.training.module import Training
    from lra.training.pretraining import Pretraining
    from lra.training.request import resolve
    from lra.training.run import check_operators, load_scorer, load_teacher

    recipe, _ = resolve(cell.request())
    constructor = architectures.get(cell.architecture)
    target, total = device(), time.perf_counter() - start
    prepared = prepared_sets.load_prepared(cell.task, recipe.data.protocol)
    start = time.perf_counter()
    model = build(recipe, constructor, prepared.task, prepared.protocol, cell.seed)
    check_operators(model, prepared, constructor)
    # the rest follows the order of a run, because the peak memory depends on it
    peak = memory.Peak(target)
    memory.keep_freed()
    selection = prepared.split(prepared.protocol.selection)
    data = training_set(prepared, target, recipe.data.batch_size, cell.seed, recipe.data.train_examples)
    stages.apply_execution(recipe, model)
    if recipe.train.compile:
        stages.compile_encoder(data, model.to(target))
    model.to(target)
    total += time.perf_counter() - start
    if recipe.pretrain.objective != "none":
        before = Pretraining(model, recipe, prepared.protocol).to(target)
        total += _time_training(before, recipe, data, data.sampler(before.batch_size, cell.seed))
    validation = DeviceSet.of(
        selection, prepared.protocol, target, choose(len(selection), recipe.data.validation_examples)
    )
    teacher, _ = load_teacher(cell.request(), recipe, prepared)
    module = Training(model, recipe, target_of(prepared.task, prepared.protocol), teacher)
    training = _time_training(module, recipe, data, stages.training_sampler(recipe, data, cell.seed))
    evaluation = _time_evaluation(model, recipe, validation)
    total += training
    if rates := recipe.search.rates:
        share = recipe.trial(rates[0]).train.steps / recipe.train.steps
        total += len(rates) * (share * training + len(validation) * evaluation)
    # the selection split is evaluated once more at the end, and each test split once
    evaluations = recipe.train.steps // min(recipe.train.evaluate_every, recipe.train.steps) + 1
    protocol, limit = prepared.protocol, recipe.data.test_examples
    scored = evaluations * len(validation) + sum(
        (limit or len(prepared.split(name))) * protocol.of_split(name).length / protocol.length
        for name in ("test", *protocol.tests)
    )
    total += scored * evaluation
    if (scorer := load_scorer(cell.request(), recipe, prepared)) is not None and isinstance(data, DeviceSet):
        total += len(data) * _time_evaluation(scorer.model, recipe, data)
    return {"seconds": total, "bytes": float(peak.read()["peak_bytes"])}


def _time_training(module: Trainable, recipe: Recipe, data: TrainingSet, sampler: Plan) -> float:
    """Estimate the seconds of all steps of a stage. Also runs the longest batch, which determines the peak memory."""
    import numpy as np
    import torch

    from lra.training import precision

    module.setup("fit")
    optimiser = module.configure_optimizers()["optimizer"]
    if hasattr(optimiser, "train"):
        optimiser.train()
    module.train()
    steps = np.unique(np.linspace(0, module.steps - 1, min(module.steps, CANDIDATES)).astype(int))
    by_length = steps[np.argsort([data.longest(sampler.batch(int(s))) for s in steps], kind="stable")]
    chosen = by_length[(2 * np.arange(STEPS) + 1) * len(steps) // (2 * STEPS)]
    # lengths vary from step to step as in a run, because this affects the memory
    np.random.default_rng(0).shuffle(chosen)
    seconds, parts = [], recipe.train.accumulate
    for step in (chosen[0], *chosen, by_length[-1]):
        start = time.perf_counter()
        for part in range(parts):
            with precision.autocast(precision.of_run(recipe, data.device), data.device):
                loss: Any = module.training_step(data.batch(sampler.batch(int(step))[part::parts]), 0)
            (loss / parts).backward()
        if recipe.optim.clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.optim.clip)
        optimiser.step()
        optimiser.zero_grad()
        _synchronize(data.device)
        seconds.append(time.perf_counter() - start)
    # the first step includes the first allocations
    return seconds[0] - seconds[1] + module.steps * sum(seconds[1 : STEPS + 1]) / STEPS


def _time_evaluation(model: Classifier, recipe: Recipe, data: DeviceSet) -> float:
    """Seconds per example in evaluation, averaged over batches of all lengths, including the longest."""
    import numpy as np
    import torch

    from lra.data.batches import EvaluationLoader
    from lra.training import precision

    plan = EvaluationLoader(data, recipe.data.evaluation_batch_size).plan
    chosen = [plan[i] for i in np.unique(np.linspace(0, len(plan) - 1, BATCHES).astype(int))]
    seconds = []
    model.eval()
    for examples in (chosen[0], *chosen):
        start = time.perf_counter()
        with torch.no_grad(), precision.autocast(precision.of_run(recipe, data.device), data.device):
            model(data.batch(examples))
        _synchronize(data.device)
        seconds.append((time.perf_counter() - start) / len(examples))
    return sum(seconds[1:]) / len(chosen)


def _synchronize(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


if __name__ == "__main__":
    from lra.errors import UserError
    from lra.sweeps import plans

    try:
        print(json.dumps(measure(plans.Cell(**json.loads(sys.argv[1])))))
    except UserError as error:
        print(json.dumps({"failed": str(error), "refused": True}))
