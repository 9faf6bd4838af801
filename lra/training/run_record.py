"""What a finished run says of itself: floors, work, and the whole record."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import torch

from lra import files
from lra.config.recipe import Recipe
from lra.data.floors import floors
from lra.data.prepared_sets import Prepared
from lra.kernels import _dispatch
from lra.model import Batch, Classifier
from lra.profiling import flops
from lra.registry import Constructor
from lra.results import environment, result, statistics
from lra.task import Protocol

COLLAPSED = "not above the best blind guess"


def record(
    architecture: str, seed: int, found: Recipe, prepared: Prepared, constructor: Constructor, model: Classifier,
    measured: Mapping[str, Any], more: Mapping[str, Any], started: datetime, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """measured: scores by split and best_step. more: fields only the caller knows. seconds: of wall time."""
    protocol, baseline, test = prepared.protocol, floors(prepared), measured["test"]
    blind = max(v for k, v in baseline.items() if k == "majority class")
    identity = f"{files.safe(found.name.replace('/', '-'))}-{found.hash[:8]}-s{seed}-{started:%Y%m%dT%H%M%S}"
    work = model_work(model, protocol, found.data.batch_size / found.train.accumulate)
    return (
        {
            "schema": result.SCHEMA,
            "id": identity,
            "task": prepared.task.name,
            "architecture": architecture,
            "protocol": {"name": protocol.name, "length": protocol.length, "encoding": protocol.encoding},
            "recipe": found.as_dict(),
            "recipe_hash": found.hash,
            "seed": seed,
            "regime": found.regime,
            "direction": model.encoder.direction if constructor.declared else "not declared",
            "test": test,
            "validation": measured[protocol.selection]
            | {"split": protocol.selection, "best_step": measured["best_step"]},
            "collapsed": COLLAPSED if statistics.at_chance(test["accuracy"], test["n"], blind) else "",
            "floors": baseline,
            "parameters": sum(p.numel() for p in model.parameters()),
            "flops": work,
            "wall_seconds": round(seconds, 2),
            "implementations": _dispatch.used(),
            "data": {"checksum": prepared.checksum, "counts": prepared.manifest["counts"]},
            "command": environment.command_line(repeatable=True),
            "started": started.isoformat(timespec="seconds"),
            "predictions": {},
            **more,
        }
        | _charged(more, work["forward_backward"])
        | _reach(model, protocol)
    )


def _reach(model: Classifier, protocol: Protocol) -> dict[str, int]:
    """Tokens an output can depend on, where they are fewer than a sequence holds: such a model is a control."""
    field = getattr(model.encoder, "receptive_field", None)
    return {} if field is None or field >= protocol.length else {"receptive_field": int(field)}


def _charged(more: Mapping[str, Any], per_example: float) -> dict[str, Any]:
    """The compute of both stages of a self-pretrained run, at the work of one full-length example."""
    if "pretraining" not in more:
        return {}
    stages = {"pretraining": more["pretraining"], "fine-tuning": more["speed"]}
    charged = {
        name: {"seconds": s["training_seconds"], "examples": s["examples"], "flops": per_example * s["examples"]}
        for name, s in stages.items()
    }
    whole = {key: sum(stage[key] for stage in charged.values()) for key in ("seconds", "examples", "flops")}
    return {"compute": charged | {"total": whole}}


def model_work(model: Classifier, protocol: Protocol, size: float) -> dict[str, Any]:
    """Work for one example of a batch of `size`, whose towers are as long as the protocol allows, counted and by
    formula. It includes the example's share of what is done once for a batch."""
    one, two = (flops.model_flops(model, _full_batch(model, protocol, count)) for count in (1, 2))

    def share(alone: float, pair: float) -> float:
        return pair - alone + (2 * alone - pair) / size

    try:
        analytic: float | None = model.cost(protocol.length).of_batch(size).matmul / size
    except NotImplementedError:
        analytic = None
    return {
        "length": protocol.length,
        "forward": share(one.forward, two.forward),
        "forward_backward": share(one.forward_backward, two.forward_backward),
        "matmul": share(one.matmul, two.matmul),
        "matmul_by_formula": analytic,
        "uncounted": sorted(one.uncounted),
        "convention": f"multiply-add = 2; one example of a batch of {size:g}",
    }


def _full_batch(model: Classifier, protocol: Protocol, examples: int) -> Batch:
    shape = (examples, model.towers, protocol.length)
    values = torch.zeros(shape if protocol.vocabulary else (*shape, protocol.channels), dtype=torch.uint8)
    numbers = torch.zeros(examples, dtype=torch.int64)
    device = next(model.parameters()).device
    return Batch(*(t.to(device) for t in (values, torch.ones(shape, dtype=torch.bool), numbers, numbers)))
