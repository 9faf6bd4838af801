"""Invented run records, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lra.config import recipe as recipes
from lra.results import record as records
from lra.results import result
from lra.results.collection import Collection
from lra.results.official import shipped_recipe
from lra.results.record import AT_CHANCE, RunRecord

ACCURACIES = {"s4d": 0.62, "gru": 0.40, "transformer": 0.402}


def content(
    architecture: str = "gru", seed: int = 0, accuracy: float = 0.5, n: int = 2000, **changes: Any
) -> dict[str, Any]:
    """JSON content of a record of the shipped recipe `quick`. changes: other values of its fields."""
    task, started = changes.get("task", "listops"), changes.get("started", "2026-01-01T00:00:00+00:00")
    recipe = shipped_recipe("quick", task, architecture)
    assert recipe is not None
    return {
        "schema": records.SCHEMA, "task": task, "architecture": architecture,
        "id": f"quick-{task}-{result.slug(architecture)}-s{seed}-{started[:10]}",
        "protocol": {"name": "strict", "length": 2000, "encoding": "tokens"},
        "recipe": recipe.as_dict(), "recipe_hash": recipe.hash, "seed": seed, "regime": "scratch",
        "direction": "bidirectional", "test": {"accuracy": accuracy, "n": n, "correct": round(n * accuracy)},
        "validation": {"accuracy": 0.4, "n": 500, "best_step": 300, "split": "validation"}, "collapsed": "",
        "floors": {"majority class": 0.17, "root operator": 0.36}, "parameters": 12345,
        "flops": {"forward": 2e9, "forward_backward": 6e9, "uncounted": []},
        "speed": {"examples": 6400, "examples_per_second": 10.0, "tokens_per_second": 20000.0},
        "memory": {"peak_bytes": 2**28}, "implementations": {"linear_scan": ["cpu"]},
        "data": {"checksum": "5f28b695" + "0" * 56}, "wall_seconds": 60.0,
        "environment": {
            "cpu": "a cpu x2", "device": "cpu", "precision": "32-true", "python": "3.11.7",
            "versions": {"torch": "2.13.0"}, "commit": {"hash": "0" * 40, "dirty": False},
        },
        "command": f"lra run {task} {architecture} --seed {seed}", "started": started,
        "predictions": {"file": "", "sha256": ""},
    } | changes  # fmt: skip


def record(architecture: str = "gru", seed: int = 0, accuracy: float = 0.5, n: int = 2000, **changes: Any) -> RunRecord:
    return records.from_json(content(architecture, seed, accuracy, n, **changes))


def diagnostic(
    architecture: str = "gru",
    whole: float = 0.0,
    positions: float = 0.6,
    seed: int = 0,
    task: str = "parity",
    **more: Any,
) -> RunRecord:
    """A record of the recipe `diagnostic`."""
    recipe, _ = recipes.resolve("diagnostic", task, architecture)
    made = content(architecture, seed) | {
        "task": task, "recipe": recipe.as_dict(), "recipe_hash": recipe.hash, "changed": {},
        "id": f"diagnostic-{task}-{result.slug(architecture)}-s{seed}",
        "protocol": {"name": "dense", "length": 256}, "chance": 0.5,
        "test": {"accuracy": whole, "n": 1024, "positions": positions, "last": positions, "length": 40},
    }  # fmt: skip
    return records.from_json(made | more)


def modified(name: str, architecture: str = "gru", seed: int = 0, accuracy: float = 0.5, **settings: Any) -> RunRecord:
    """A record whose recipe has a name and settings of section `optim` of the caller's choice."""
    recipe = content(architecture)["recipe"]
    recipe |= {"name": name, "optim": recipe["optim"] | settings}
    return record(architecture, seed, accuracy, recipe=recipe, recipe_hash=(name + str(settings)).ljust(64, "0"))


def answered(accuracy: float, n: int, seed: int) -> dict[str, np.ndarray]:
    """Stored predictions of which exactly round(accuracy * n) are right; the same examples are easy for everyone."""
    random = np.random.default_rng(seed)
    hard = np.random.default_rng(0).random(n) + random.normal(0, 0.1, n)
    right = np.argsort(np.argsort(hard)) < round(accuracy * n)
    label = np.arange(n) % 10
    return {
        "prediction": np.where(right, label, (label + 1) % 10).astype(np.uint8), "label": label.astype(np.uint8),
        "example": np.arange(n, dtype=np.int32),
    }  # fmt: skip


def write(root: Path, made: RunRecord, place: str = "runs") -> Path:
    """With predictions that say what the record says."""
    return result.write(made, answered(made.test.accuracy, made.test.n, made.seed), root, place)


def filled(root: Path, seeds: int = 3) -> Collection:
    """Three architectures on two tasks, one of which collapses on one seed of the second."""
    for task, shift in (("listops", 0.0), ("pathfinder", 0.3)):
        for name, accuracy in ACCURACIES.items():
            for seed in range(seeds):
                collapses = (task, name, seed) == ("pathfinder", "gru", 0)
                value = 0.5 if collapses else accuracy + shift + 0.002 * seed
                accuracy_of_run = round(value * 2000) / 2000
                write(root, record(name, seed, accuracy_of_run, task=task, collapsed=AT_CHANCE if collapses else ""))
    return Collection.read(root)


def profile_content(name: str, length: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """JSON content of a profile in float32 on the machine of the records."""
    timing = {"median": seconds, "low": 0.99 * seconds, "high": 1.02 * seconds, "repeats": 30}
    made = {
        "cell": {"architecture": name, "length": length, "batch": 1, "d_model": 64, "n_layers": 2,
                 "direction": "bidirectional", "budget": 1.0, "task": ""},
        "environment": {"cpu": "a cpu x2", "versions": {"torch": "2.13.0"}, "commit": {"hash": "0" * 40}},
        "parameters": 100_000,
        "flops": {"forward": 1e5 * length, "algorithmic": 1e5 * length, "forward_backward": 3e5 * length,
                  "matmul_counted": 1e5 * length, "matmul_by_formula": 1e5 * length, "uncounted": ()},
        "seconds": {"forward": timing, "train": timing},
        "memory": {"peak_bytes": 2**20 * length // 64, "parameters": 400_000, "gradients": 400_000,
                   "optimiser": 800_000, "activations": 2**19 * length // 64},
        "tokens_per_second": length / seconds, "mfu": 0.2,
        "rounds": [{"forward": seconds, "train": seconds}] * 2, "machine": {"rate": 1e12},
    }  # fmt: skip
    return made | changes
