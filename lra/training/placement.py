"""Placement of a run: devices, nodes, and the strategy that uses them together."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lra.config.recipe import Recipe
from lra.errors import UserError

# how launchers tell a process its rank: torchrun and Lightning's own, then Slurm
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
ZERO = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}
"""Strategies that shard the weights -> stage of ZeRO (lra.training.parallel.sharding)."""
STRATEGIES = (
    "auto", "ddp", "ddp_find_unused_parameters_true", *ZERO, "tensor", "sequence", "pipeline", "expert_parallel",
)  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Placement of a run: devices per node, number of nodes, and the strategy.

    strategy: "ddp" replicates the model on every device; "zero1", "zero2" and "zero3" (or "fsdp") shard it, "tensor",
    "sequence" and "pipeline" divide its width, its tokens and its blocks among the devices, which then all work on the
    whole batch; "expert_parallel" is "ddp" whose processes divide the work of the experts of mixtures; "auto" is "ddp"
    on several devices. On one device all are the same.
    """

    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    @property
    def resolved(self) -> str:
        """The strategy that is used: "auto" on one device, else the strategy that "auto" selects."""
        if self.world_size == 1:
            return "auto"
        return "ddp" if self.strategy == "auto" else self.strategy

    @property
    def resolved_strategy(self) -> str:
        """Lightning's name of the strategy, where it has one."""
        return "ddp" if self.resolved in ("expert_parallel", "sequence", "pipeline") else self.resolved

    @property
    def divides_experts(self) -> bool:
        return self.resolved == "expert_parallel"

    @property
    def zero(self) -> int:
        """Stage of ZeRO; 0 where weights are not sharded."""
        return ZERO.get(self.resolved, 0)

    @property
    def divides_weights(self) -> bool:
        """Whether each process holds a part of the weights."""
        return self.zero > 0 or self.resolved == "tensor"

    @property
    def divides_batches(self) -> bool:
        """Whether each process works on a part of every batch."""
        return self.resolved not in ("auto", "tensor", "sequence", "pipeline")

    def validate(self, device: str, recipe: Recipe) -> None:
        """Raise UserError unless a recipe can be trained with this placement on this machine.

        device: "cuda" or "cpu"; torch is imported for the first only.
        """
        if self.strategy not in STRATEGIES:
            raise UserError(f"--strategy is {self.strategy!r}; one of {', '.join(STRATEGIES)}")
        if self.devices < 1 or self.nodes < 1:
            raise UserError("--devices and --nodes are at least 1")
        available = os.cpu_count() or 1
        if device == "cuda":
            import torch

            available = torch.cuda.device_count()
        if self.devices > available:
            kind = "GPUs" if device == "cuda" else "processors"
            raise UserError(f"--devices is {self.devices}, but this machine has {available} {kind}")
        if setting := _unsupported(self, recipe):
            raise UserError(f"--strategy {self.strategy} does not work with {setting}; use ddp")
        batch_size, parts = recipe.data.batch_size, recipe.train.accumulate
        # a pipeline divides the batch into at least as many microbatches as there are stages
        shares = self.world_size if self.divides_batches or self.resolved == "pipeline" else 1
        if batch_size % (shares * parts):
            raise UserError(
                f"data.batch_size is {batch_size}, not divisible by {shares} devices x {parts} accumulated parts"
            )


def launcher_rank() -> int:
    """Global rank of this process as the launcher's environment has it; 0 without one."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


def _unsupported(placement: Placement, recipe: Recipe) -> str:
    """Name of the first recipe setting that a strategy does not support; empty if there is none."""
    divided = placement.divides_weights
    pipeline = placement.resolved == "pipeline"
    rewritten = divided or pipeline or placement.resolved == "sequence"
    pretraining = recipe.pretrain.objective != "none"
    used = {
        "optim.ema": divided and recipe.optim.ema,
        f"optim.name={recipe.optim.name}": (
            (divided and recipe.optim.name in ("adafactor", "muon")) or (rewritten and recipe.optim.name == "sophia")
        ),
        f"pretrain.objective={recipe.pretrain.objective}": (divided or pipeline) and pretraining,
        "search.rates": divided and recipe.search.rates,
        "train.tbptt": rewritten and recipe.train.tbptt,
        "train.stream": (rewritten or placement.resolved == "tensor") and recipe.train.stream,
        "train.compile": rewritten and recipe.train.compile,
        "train.precision=fp16": (divided or pipeline) and recipe.train.precision == "fp16",
    }
    return next((name for name, value in used.items() if value), "")
