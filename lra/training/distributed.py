"""Several devices: which process this is, how many there are, and what they tell each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lra.config.recipe import Recipe
from lra.data.batches import Share
from lra.errors import UserError

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")
# how launchers tell a process its place: torchrun and Lightning's own, then SLURM
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


class Sharded(FSDPStrategy):
    """Lightning's, on processors too, which torch shards on when they are named and Lightning does not know."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.root_device.type != "cpu":
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, mixed_precision=self.mixed_precision_config,
            device_id=self.root_device, **self.kwargs,
        )  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """devices of each node, nodes, strategy: "ddp" copies the model, "fsdp" shards it, "auto" is ddp for several."""

    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    @property
    def taken(self) -> str:
        """The strategy that this placement amounts to."""
        if self.world == 1:
            return "auto"
        return "ddp" if self.strategy == "auto" else self.strategy

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp" and self.world > 1

    def checked(self, here: torch.device, found: Recipe) -> Placement:
        """This placement if it is possible for a recipe on machines like this one. Raises UserError."""
        if self.strategy not in STRATEGIES:
            raise UserError(f"--strategy is {self.strategy!r}; one of {', '.join(STRATEGIES)}")
        if self.devices < 1 or self.nodes < 1:
            raise UserError("--devices and --nodes are at least 1")
        there = torch.cuda.device_count() if here.type == "cuda" else os.cpu_count() or 1
        if self.devices > there:
            kind = "GPUs" if here.type == "cuda" else "processors"
            raise UserError(f"--devices is {self.devices}, but this machine has {there} {kind}")
        if self.sharded and (whole := needs_whole(found)):
            raise UserError(f"--strategy fsdp leaves no process a whole model, as {whole} needs; use ddp")
        batch_size, parts = found.data.batch_size, found.train.accumulate
        if batch_size % (self.world * parts):
            raise UserError(
                f"data.batch_size is {batch_size}, which {self.world} devices x {parts} accumulated parts do not divide"
            )
        return self

    def for_trainer(self, block: type | None) -> dict[str, Any]:
        """What Lightning's Trainer is told. block: class of the encoder's blocks, which fsdp shards one by one."""
        strategy: Any = self.taken
        if self.sharded:
            wrapped = {block} if block is not None else None
            strategy = Sharded(state_dict_type="full", auto_wrap_policy=wrapped)
        return {
            "devices": self.devices, "num_nodes": self.nodes, "strategy": strategy, "use_distributed_sampler": False,
        }  # fmt: skip


def needs_whole(found: Recipe) -> str:
    """What of a recipe looks at matrices or calls the model past its shards; empty for one that can be sharded."""
    given = {
        "optim.ema": found.optim.ema,
        f"optim.name={found.optim.name}": found.optim.name in ("adafactor", "muon", "sophia"),
        f"pretrain.objective={found.pretrain.objective}": found.pretrain.objective != "none",
        "search.rates": found.search.rates,
        "train.tbptt": found.train.tbptt,
        "train.compile": found.train.compile,
    }
    return next((name for name, wanted in given.items() if wanted), "")


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
