"""Several devices: which process this is, how many there are, and what they tell each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from lra.data import Share
from lra.errors import UserError

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")
# how launchers tell a process its place: torchrun and Lightning's own, then SLURM
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


@dataclass(frozen=True)
class Placement:
    """devices of each node, nodes, strategy: "ddp" copies the model, "fsdp" shards it, "auto" is ddp for several."""

    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    def checked(self, here: torch.device, batch_size: int, parts: int, ema: bool) -> Placement:
        """This placement if it is possible on machines like this one. Raises UserError."""
        if self.strategy not in STRATEGIES:
            raise UserError(f"--strategy is {self.strategy!r}; one of {', '.join(STRATEGIES)}")
        if self.devices < 1 or self.nodes < 1:
            raise UserError("--devices and --nodes are at least 1")
        found = torch.cuda.device_count() if here.type == "cuda" else os.cpu_count() or 1
        if self.devices > found:
            kind = "GPUs" if here.type == "cuda" else "processors"
            raise UserError(f"--devices is {self.devices}, but this machine has {found} {kind}")
        if self.strategy == "fsdp" and here.type != "cuda":
            raise UserError("--strategy fsdp needs GPUs; on processors use ddp")
        if self.strategy == "fsdp" and ema:
            raise UserError("--strategy fsdp does not average weights; set optim.ema=0 or use ddp")
        if batch_size % (self.world * parts):
            raise UserError(
                f"data.batch_size is {batch_size}, which {self.world} devices x {parts} accumulated parts do not divide"
            )
        return self

    def for_trainer(self, block: type | None) -> dict[str, Any]:
        """What Lightning's Trainer is told. block: class of the encoder's blocks, which fsdp shards one by one."""
        strategy: Any = self.strategy
        if strategy == "auto" and self.world > 1:
            strategy = "ddp"
        if strategy == "fsdp":
            from lightning.pytorch.strategies import FSDPStrategy

            wrapped = {block} if block is not None else None
            strategy = FSDPStrategy(state_dict_type="full", auto_wrap_policy=wrapped)
        return {
            "devices": self.devices, "num_nodes": self.nodes, "strategy": strategy, "use_distributed_sampler": False,
        }  # fmt: skip


def rank() -> int:
    """Of this process among all, known before they are joined."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name, "").isdigit()), 0)


def world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def share(placement: Placement) -> Share:
    return Share(rank() if placement.world > 1 else 0, placement.world)


def mean(value: Tensor) -> Tensor:
    """Over all processes."""
    if world() == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / world()


def gathered(thing: Any) -> list[Any]:
    """What each process has, in order of rank, on every process."""
    if world() == 1:
        return [thing]
    every: list[Any] = [None] * world()
    distributed.all_gather_object(every, thing)
    return every
