"""The difficulty of each training example for a finished run, and the curricula that use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lra.config.recipe import Recipe
from lra.data.batches import DeviceSet, EvaluationLoader, Sampler
from lra.data.curriculum import Curve, Dynamic, Staged, cut
from lra.errors import UserError
from lra.model import Classifier
from lra.target import Target
from lra.training import checkpoint, distributed

FILE = "difficulty.ckpt"


@dataclass(frozen=True)
class Scorer:
    """The model that measures the difficulty of examples, on the device and in evaluation mode. about: description of
    its run, for the record."""

    model: Classifier
    about: Mapping[str, Any]


class Ordered:
    """The plan of a recipe's curriculum. known: difficulty of each example, (n,). alone: whether this is the only
    process. Of several processes only the first has the difficulties; it sends them to the others at the first batch,
    when the process group exists."""

    def __init__(
        self, recipe: Recipe, plain: Sampler, known: np.ndarray | None, curve: Curve, alone: bool = True
    ) -> None:
        self.recipe, self.plain, self.known, self.curve = recipe, plain, known, curve
        self._plan = self._made() if alone else None

    @property
    def per_epoch(self) -> int:
        return self.plain.per_epoch

    def batch(self, step: int) -> np.ndarray:
        if self._plan is None:
            self.known = distributed.gather(self.known)[0]
            self._plan = self._made()
        return self._plan.batch(step)

    def _made(self) -> Staged | Dynamic:
        """Raises UserError for bins too small."""
        train, size = self.recipe.train, self.recipe.data.batch_size
        assert self.known is not None
        if train.curriculum == "difficulty":
            return Staged(self.plain, cut(self.known, train.curriculum_bins, size), train.curriculum_steps)
        return Dynamic(self.plain, cut(self.known, 2, size), self.curve)

    def described(self, scorer: Scorer) -> dict[str, Any]:
        """The field of the record, after training: the scorer, the number of examples and the mean difficulty of each
        bin and, if the curriculum is dynamic, the share of hard examples from each step on."""
        if (known := self.known) is None:
            return {}
        # a run that is resumed after its last step has planned no batch
        plan = self._plan or self._made()
        bins = [{"examples": len(part), "difficulty": round(float(known[part].mean()), 6)} for part in plan.bins]
        facts = dict(scorer.about) | {"bins": bins}
        if isinstance(plan, Dynamic):
            steps = [0, *(int(point["step"]) + 1 for point in self.curve())]
            trained = [step for step in steps if step < self.recipe.train.steps]
            facts["hard"] = [{"step": step, "share": plan.share(step)} for step in trained]
        return facts


def difficulty(
    scorer: Scorer, data: DeviceSet, target: Target, batch_size: int, folder: Path, resume: bool
) -> np.ndarray | None:
    """-log p of the labels of each example under the scorer (`Target.difficulty`), (n,) float32; None on every process
    but the first. It is computed in float32 and stored in `folder`, where a resumed run reads it. Raises UserError if
    it is not finite."""
    if distributed.rank():
        return None
    path = folder / FILE
    if not (resume and path.is_file()):
        found = torch.zeros(len(data))
        cuda = [data.device] if data.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices=cuda):
            for batch in EvaluationLoader(data, batch_size):
                found[batch.example.cpu()] = target.difficulty(scorer.model(batch), batch.labels).float().cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write({"difficulty": found}, path)
    known = checkpoint.read(path)["difficulty"].numpy()
    if len(known) != len(data):
        raise UserError(f"{path} has {len(known):,} training examples, not {len(data):,}; run without --resume")
    if wrong := int((~np.isfinite(known)).sum()):
        raise UserError(
            f"--scorer {scorer.about['scorer']}: the difficulty of {wrong:,} training examples is not finite"
        )
    return known
