"""Several processes: their rank and number, collective operations, and the strategy that Lightning uses."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lra.data.batches import Shard
from lra.training.placement import Placement, launcher_rank


class CPUCapableFSDP(FSDPStrategy):
    """FSDPStrategy that also works on CPU: Lightning passes no device id there, and torch needs one."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self.root_device.type != "cpu":
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, mixed_precision=self.mixed_precision_config,
            device_id=self.root_device, **self.kwargs,
        )  # fmt: skip


def trainer_options(placement: Placement, block: type | None) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for a placement. block: class of the encoder's blocks, the units of sharding."""
    strategy: Any = placement.resolved_strategy
    if placement.sharded:
        wrapped = {block} if block is not None else None
        strategy = CPUCapableFSDP(state_dict_type="full", auto_wrap_policy=wrapped)
    return {
        "devices": placement.devices, "num_nodes": placement.nodes, "strategy": strategy,
        "use_distributed_sampler": False,
    }  # fmt: skip


def rank() -> int:
    """Global rank of this process; read from the launcher's environment before the process group exists."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return launcher_rank()


def world_size() -> int:
    """Number of processes; 1 before the process group exists."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def shard(placement: Placement) -> Shard:
    """The part of every batch that this process works on."""
    return Shard(rank() if placement.world_size > 1 else 0, placement.world_size)


def mean(value: Tensor) -> Tensor:
    """Average a tensor over all processes."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / world_size()


def gather(value: Any) -> list[Any]:
    """All-gather: every process's object, ordered by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values
