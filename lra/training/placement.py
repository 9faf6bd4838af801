"""Where a run is placed: devices, nodes, and the strategy that uses them together."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lra.config.recipe import Recipe
from lra.errors import UserError

# how launchers tell a process its rank: torchrun and Lightning's own, then Slurm
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp", "expert_parallel")


@dataclass(frozen=True)
class Placement:
    """Where a run is placed: devices per node, number of nodes, and the strategy.

    strategy: "ddp" replicates the model on every device, "fsdp" shards it, "expert_parallel" is "ddp" whose processes
    divide the work of the experts of mixtures, "auto" is "ddp" on several devices.
    """

    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    @property
    def resolved_strategy(self) -> str:
        if self.world_size == 1:
            return "auto"
        return "ddp" if self.strategy in ("auto", "expert_parallel") else self.strategy

    @property
    def divides_experts(self) -> bool:
        return self.strategy == "expert_parallel" and self.world_size > 1

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp" and self.world_size > 1

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
        if self.sharded and (setting := unsupported_by_fsdp(recipe)):
            raise UserError(f"--strategy fsdp shards the model, but {setting} needs all of it on one device; use ddp")
        batch_size, parts = recipe.data.batch_size, recipe.train.accumulate
        if batch_size % (self.world_size * parts):
            raise UserError(
                f"data.batch_size is {batch_size}, not divisible by {self.world_size} devices x {parts} accumulated "
                "parts"
            )


def launcher_rank() -> int:
    """Global rank of this process as the launcher's environment has it; 0 without one."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


def unsupported_by_fsdp(recipe: Recipe) -> str:
    """Name of the first recipe setting that FSDP does not support; empty if there is none."""
    used = {
        "optim.ema": recipe.optim.ema,
        f"optim.name={recipe.optim.name}": recipe.optim.name in ("adafactor", "muon", "sophia"),
        f"pretrain.objective={recipe.pretrain.objective}": recipe.pretrain.objective != "none",
        "search.rates": recipe.search.rates,
        "train.tbptt": recipe.train.tbptt,
        "train.compile": recipe.train.compile,
    }
    return next((name for name, value in used.items() if value), "")
