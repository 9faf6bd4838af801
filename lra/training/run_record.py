"""Builds the record of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import torch

from lra import files
from lra.config.recipe import Recipe
from lra.data.floors import floor_bits, floors
from lra.data.prepared_sets import Prepared
from lra.kernels import _dispatch
from lra.model import Batch, Classifier
from lra.profiling import flops
from lra.registry import Constructor
from lra.results import record as records
from lra.results import statistics
from lra.results.official import changed_settings
from lra.results.record import RunRecord
from lra.source import digest
from lra.target import target_of
from lra.task import Protocol


def record(
    architecture: str, seed: int, recipe: Recipe, prepared: Prepared, constructor: Constructor, model: Classifier,
    measured: Mapping[str, Any], more: Mapping[str, Any], started: datetime, seconds: float,
) -> RunRecord:  # fmt: skip
    """The record of a finished run.

    measured: scores by split, and best_step. more: speed, memory, environment and other fields of RunRecord that the
    caller knows. seconds: wall time of the whole run.
    """
    protocol, baseline, test = prepared.protocol, floors(prepared), records.Score(**measured["test"])
    task, prior = prepared.task, target_of(prepared.task, protocol).prior
    other = {key: value for key, value in more.items() if key not in ("speed", "memory", "environment")}
    speed = records.Speed(**more["speed"])
    work = model_work(model, protocol, recipe.data.batch_size / recipe.train.accumulate)
    if "pretraining" in other:
        other["pretraining"] = records.PretrainingSpeed(**other["pretraining"])
        other["compute"] = _compute(other["pretraining"], speed, work.forward_backward or 0.0)
    if "refused_implementations" in other:
        other["refused_implementations"] = tuple(other["refused_implementations"])
    if "curve" in other:
        other["curve"] = tuple(records.CurvePoint(**point) for point in other["curve"])
    if "rate_search" in other:
        trials = tuple(records.Trial(**trial) for trial in other["rate_search"]["trials"])
        other["rate_search"] = records.RateSearch(**other["rate_search"] | {"trials": trials})
    if "compile" in other:
        other["compile"] = records.Compilation(**other["compile"])
    where = dict(more["environment"])
    return RunRecord(
        schema=records.SCHEMA,
        id=f"{files.safe_name(recipe.name.replace('/', '-'))}-{recipe.hash[:8]}-s{seed}-{started:%Y%m%dT%H%M%S}",
        task=prepared.task.name,
        architecture=architecture,
        protocol=records.ProtocolName(name=protocol.name, length=protocol.length, encoding=protocol.encoding),
        recipe=records.ResolvedRecipe(**recipe.as_dict()),
        recipe_hash=recipe.hash,
        changed=changed_settings(recipe),
        seed=seed,
        regime=recipe.regime,
        direction=model.encoder.direction if constructor.declared else "not declared",
        test=test,
        validation=records.Selection(
            **measured[protocol.selection], split=protocol.selection, best_step=measured["best_step"]
        ),
        collapsed=records.AT_CHANCE if statistics.at_chance(test.share, test.n, baseline[prior]) else "",
        floors=baseline,
        floor_bits=floor_bits(prepared),
        tests={name: records.Score(**measured[name]) for name in protocol.tests if name in measured},
        longer=measured["longer"],
        chance=task.chance(protocol) if task.generated else None,
        plateaus=task.plateaus(protocol),
        parameters=sum(p.numel() for p in model.parameters()),
        flops=work,
        speed=speed,
        memory=records.Memory(**more["memory"]),
        wall_seconds=round(seconds, 2),
        implementations=_dispatch.used(),
        data=records.Data(checksum=prepared.checksum, counts=prepared.manifest["counts"]),
        environment=records.Environment(**where | {"commit": records.Commit(**where["commit"])}),
        started=started.isoformat(timespec="seconds"),
        predictions=records.PredictionsFile(file="", sha256=""),
        receptive_field=_receptive_field(model, protocol),
        source=None
        if constructor.source is None
        else records.Source(sha256=digest(constructor.source), files=dict(constructor.source)),
        **other,
    )


def _receptive_field(model: Classifier, protocol: Protocol) -> int | None:
    """Number of tokens that an output depends on, if it is fewer than a sequence holds: such a model is a control."""
    field = getattr(model.encoder, "receptive_field", None)
    return None if field is None or field >= protocol.length else int(field)


def _compute(
    pretraining: records.Speed, fine_tuning: records.Speed, per_example: float
) -> dict[str, records.StageCompute]:
    """Cost of the stages of a self-pretrained run and of both. per_example: FLOPs of one full-length example."""
    stages = {
        name: records.StageCompute(
            seconds=speed.training_seconds or 0.0, examples=speed.examples, flops=per_example * speed.examples
        )
        for name, speed in (("pretraining", pretraining), ("fine-tuning", fine_tuning))
    }
    total = {key: sum(getattr(stage, key) for stage in stages.values()) for key in ("seconds", "examples", "flops")}
    return stages | {"total": records.StageCompute(**total)}


def model_work(model: Classifier, protocol: Protocol, size: float) -> records.ModelWork:
    """Work for one example of a batch of `size`, whose towers are as long as the protocol allows, counted and by
    formula. It includes the example's share of what is done once for a batch."""
    one, two = (flops.model_flops(model, _full_batch(model, protocol, count)) for count in (1, 2))

    def share(alone: float, pair: float) -> float:
        return pair - alone + (2 * alone - pair) / size

    try:
        analytic: float | None = model.cost(protocol.length).of_batch(size).matmul / size
    except NotImplementedError:
        analytic = None
    return records.ModelWork(
        length=protocol.length,
        forward=share(one.forward, two.forward),
        forward_backward=share(one.forward_backward, two.forward_backward),
        matmul=share(one.products, two.products),
        matmul_by_formula=analytic,
        uncounted=tuple(sorted(one.uncounted)),
        convention=f"multiply-add = 2; one example of a batch of {size:g}",
    )


def _full_batch(model: Classifier, protocol: Protocol, examples: int) -> Batch:
    shape = (examples, model.towers, protocol.length)
    values = torch.zeros(shape if protocol.vocabulary else (*shape, protocol.channels), dtype=torch.uint8)
    numbers = torch.zeros(examples, dtype=torch.int64)
    device = next(model.parameters()).device
    return Batch(*(t.to(device) for t in (values, torch.ones(shape, dtype=torch.bool), numbers, numbers)))
