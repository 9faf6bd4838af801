"""Compression of a trained run: int8 weights, or heads and channels removed; what comes out is an exported folder.

A compressed model is described by the list of what was done to it, its `structure`, which `rebuild` repeats on a newly
built model before the weights are loaded.
"""

from __future__ import annotations

import copy
import statistics as numbers
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lra.data import prepared_sets
from lra.data.batches import DeviceSet, EvaluationLoader, choose
from lra.encoder import Prunable
from lra.errors import UserError
from lra.model import Batch, Classifier
from lra.results import record as records
from lra.results import statistics
from lra.target import target_of
from lra.training import export, trained_run
from lra.training.run_record import model_work
from lra.training.trained_run import TrainedRun

Structure = list[dict[str, Any]]
QUANTISED = (nn.Linear, nn.Conv1d, nn.Embedding)
REPEATS = 5
"""Forward passes of each model in the comparison of their speed."""


class Int8(nn.Module):
    """Symmetric int8 weights with one scale for each row, as a parametrization: weight = integers * scale.

    The integers of a row are round(127 w / max |w|).
    """

    def forward(self, integers: Tensor, scale: Tensor) -> Tensor:
        return integers.to(scale.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / 127
        return (weight / scale.masked_fill(scale == 0, 1)).round().to(torch.int8), scale


def quantize(run: TrainedRun, folder: Path, progress: Callable[[str, int, int], None]) -> TrainedRun:
    """Store the weights of all linear maps, convolutions and embeddings as int8. Raises UserError."""
    export.check(run, folder)
    if any(step["method"] == "int8" for step in run.structure):
        raise UserError(f"{run.folder} has int8 weights already")
    step = {"method": "int8", "modules": [name for name, _ in _weighted(run.model)]}
    if not step["modules"]:
        raise UserError(f"{run.recipe.architecture} has no linear map, convolution or embedding to quantise")
    return _finish(run, folder, step, progress)


def prune(
    run: TrainedRun, folder: Path, progress: Callable[[str, int, int], None], *, heads: float = 0.0,
    channels: float = 0.0, examples: int = 256,
) -> TrainedRun:  # fmt: skip
    """Remove a share of the attention heads and of the feed-forward channels of every layer. Raises UserError.

    Those with the lowest importance go, |sum w dL/dw| over the weights that read them (Michel, Levy and Neubig 2019,
    arXiv:1905.10650), added up over `examples` training examples; one of each layer stays.
    """
    export.check(run, folder)
    shares = {"heads": heads, "channels": channels}
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise UserError(f"{name} is {share}; a share from 0 up to, not including, 1")
    if not any(shares.values()):
        raise UserError("nothing to remove: give a share of heads or of channels, such as channels=0.5")
    if examples < 1:
        raise UserError(f"examples is {examples}; at least 1")
    if any(step["method"] == "int8" for step in run.structure):
        raise UserError(f"{run.folder} has int8 weights; prune the run first, then quantise the result")
    parts = {name: m for name, m in run.model.named_modules() if isinstance(m, Prunable) and m.units}
    for unit, share in shares.items():
        if share and all(part.unit != unit for part in parts.values()):
            raise UserError(f"{run.recipe.architecture} has no {unit} that can be removed")
    parts = {name: part for name, part in parts.items() if shares[part.unit]}
    kept = {}
    for name, importance in _importance(run, parts, examples, progress).items():
        count = max(1, len(importance) - int(len(importance) * shares[parts[name].unit]))
        kept[name] = importance.topk(count).indices.sort().values.tolist()
    return _finish(run, folder, {"method": "pruning", "kept": kept, **shares, "examples": examples}, progress)


def rebuild(model: Classifier, structure: Sequence[Mapping[str, Any]]) -> None:
    """Repeat the changes of `structure` on a model.

    Raises ValueError for a method that this version does not know or a module that has no units, AttributeError for a
    module that the model does not have.
    """
    for step in structure:
        if step["method"] == "int8":
            _to_int8([model.get_submodule(name) for name in step["modules"]])
        elif step["method"] == "pruning":
            for name, kept in step["kept"].items():
                part = model.get_submodule(name)
                if not isinstance(part, Prunable):
                    raise ValueError(f"{name} has no units that can be removed")
                part.keep(torch.tensor(kept, device=part.reader.weight.device))
        else:
            raise ValueError(f"unknown compression {step['method']!r}")


def _weighted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with a plain weight that can be stored as int8."""
    modules = ((name, m) for name, m in model.named_modules() if isinstance(m, QUANTISED))
    return [(name, m) for name, m in modules if not parametrize.is_parametrized(m) and "weight" in m._parameters]


def _to_int8(modules: Sequence[nn.Module]) -> None:
    done: dict[Any, Any] = {}
    for module in modules:
        weight: Any = module.weight
        weight.requires_grad_(False)
        parametrize.register_parametrization(module, "weight", Int8())
        stored: Any = module.parametrizations["weight"]  # type: ignore[index]
        # a weight that two modules share is stored once
        stored.original0, stored.original1 = done.setdefault(weight, (stored.original0, stored.original1))


def _importance(
    run: TrainedRun, parts: Mapping[str, Prunable], examples: int, progress: Callable[[str, int, int], None]
) -> dict[str, Tensor]:
    """Importance of the units of each part, (units,), over `examples` training examples."""
    split = prepared_sets.load_prepared(run.task, run.protocol).split("train")
    device, target = next(run.model.parameters()).device, target_of(run.task, run.protocol)
    data = DeviceSet.of(split, run.protocol, device, choose(len(split), min(examples, len(split))))
    totals = {name: torch.zeros(part.units, device=device) for name, part in parts.items()}
    weights = [part.reader.weight for part in parts.values()]
    before = [weight.requires_grad for weight in weights]
    run.model.eval()
    for weight in weights:
        weight.requires_grad_(True)
    loader = EvaluationLoader(data, min(run.recipe.data.batch_size, len(data)))
    for number, batch in enumerate(loader):
        progress("importance", number, len(loader))
        loss = target.loss(run.model(batch), batch.labels)
        for (name, part), grad in zip(parts.items(), torch.autograd.grad(loss, weights), strict=True):
            taylor = (part.reader.weight.detach() * grad).sum(0)
            totals[name] += taylor.view(part.units, -1).sum(1).abs()
    for weight, required in zip(weights, before, strict=True):
        weight.requires_grad_(required)
    return totals


def _finish(
    run: TrainedRun, folder: Path, step: dict[str, Any], progress: Callable[[str, int, int], None]
) -> TrainedRun:
    """Compress a copy of the run, score it, write it to `folder`, and load it from there."""
    small = copy.copy(run)
    small.model = copy.deepcopy(run.model)
    rebuild(small.model, [step])
    small.structure = [*run.structure, step]
    progress("scoring", 0, 2)
    selection, test = (small.evaluate(split) for split in (run.protocol.selection, "test"))
    progress("timing", 1, 2)
    record, seconds = run.record, _seconds(run, small)
    before = {"accuracy": record.test.accuracy, "parameters": record.parameters}
    # with int8 weights there is one scale more for each row, which is no parameter
    parameters = sum(p.numel() for name, p in small.model.named_parameters() if not name.endswith(".original1"))
    after = {"accuracy": test.accuracy, "parameters": parameters}
    for row, model, spent in ((before, run.model, seconds[0]), (after, small.model, seconds[1])):
        row |= {"bytes": sum(t.nbytes for t in export.distinct(model)[0].values()), "seconds_per_example": spent}
    scores = {"accuracy": test.accuracy, "n": test.n, "correct": test.correct, **test.more}
    score = records.Score(**scores)
    small._record = msgspec.structs.replace(
        record,
        id=f"{record.id}-{step['method']}",
        test=score,
        validation=records.Selection(
            accuracy=selection.accuracy,
            n=selection.n,
            correct=selection.correct,
            split=selection.split,
            best_step=record.validation.best_step,
            **selection.more,
        ),
        tests={},
        parameters=parameters,
        flops=model_work(small.model, run.protocol, run.recipe.data.batch_size / run.recipe.train.accumulate),
        collapsed=records.AT_CHANCE
        if statistics.at_chance(score.share, score.n, record.floors[target_of(run.task, run.protocol).prior])
        else "",
        compression={"of": record.id, **step, "original": before, "compressed": after},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        predictions=records.PredictionsFile(file="", sha256=""),
        seal="",
    )
    return trained_run.load(export.write(small, folder))


def _seconds(*runs: TrainedRun) -> list[float]:
    """Median seconds of a forward pass for one example, of each run, in turns on the same batch."""
    data = runs[0]._data("test")
    batch: Batch = data.batch(np.arange(min(runs[0].recipe.data.evaluation_batch_size, len(data), 32)))
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS + 1):
        for times, run in zip(spent, runs, strict=True):
            with run._evaluating(data):
                clock = time.perf_counter()
                run.model(batch).sum().item()
                times.append((time.perf_counter() - clock) / len(batch.labels))
    return [numbers.median(times[1:]) for times in spent]
