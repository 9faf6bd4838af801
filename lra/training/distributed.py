"""Several processes: their rank and number, collective operations, and the strategy that Lightning uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lra.data.batches import Shard
from lra.model import Classifier
from lra.training.parallel import sharding, tensor
from lra.training.placement import Placement, launcher_rank


class Divided(ModelParallelStrategy):
    """ModelParallelStrategy whose checkpoints are the files of one process, with whole tensors."""

    def __init__(self, placement: Placement) -> None:
        sharded = placement.zero > 0
        super().__init__(
            data_parallel_size=placement.world_size if sharded else 1,
            tensor_parallel_size=1 if sharded else placement.world_size,
            save_distributed_checkpoint=False,
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return _whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return _whole(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimisers, and return the rest."""
        content = self.checkpoint_io.load_checkpoint(Path(checkpoint_path), weights_only=weights_only)
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {name: _like(value, own[name]) for name, value in content.pop("state_dict").items()}
        self.lightning_module.load_state_dict(state)
        for optimizer, saved in zip(self.optimizers, content.pop("optimizer_states"), strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, values in saved["state"].items():
                at = parameters[number]
                for name, value in values.items():
                    if isinstance(value, Tensor) and value.shape == at.shape:
                        values[name] = _like(value, at)
            optimizer.load_state_dict(saved)
        return content


def _whole(state: dict[str, Any]) -> dict[str, Any]:
    return tree_map_only(DTensor, lambda value: value.full_tensor().cpu(), state)


def _like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, the same on every process, divided as `own` is."""
    if not isinstance(own, DTensor):
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def trainer_options(placement: Placement) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for a placement."""
    strategy: Any = Divided(placement) if placement.divides_weights else placement.resolved_strategy
    return {
        "devices": placement.devices, "num_nodes": placement.nodes, "strategy": strategy,
        "use_distributed_sampler": False,
    }  # fmt: skip


def division(placement: Placement) -> Callable[[Classifier, DeviceMesh], None] | None:
    """The function that divides the weights of a model over Lightning's mesh; None if each process has all of them."""
    if not placement.divides_weights:
        return None

    def divide(model: Classifier, mesh: DeviceMesh) -> None:
        if placement.zero:
            sharding.shard(model, mesh["data_parallel"], placement.zero)
        else:
            tensor.divide(model.encoder, mesh["tensor_parallel"])

    return divide


def rank() -> int:
    """Global rank of this process; read from the launcher's environment before the process group exists."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return launcher_rank()


def world_size() -> int:
    """Number of processes; 1 before the process group exists."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def shard(placement: Placement) -> Shard:
    """The part of a set of examples that this process answers."""
    return Shard(rank() if placement.world_size > 1 else 0, placement.world_size)


def training_shard(placement: Placement) -> Shard:
    """The part of every training batch that this process works on: all of it where the processes divide the model."""
    return shard(placement) if placement.divides_batches else Shard()


def validation_shard(placement: Placement) -> Shard:
    """The part of the validation set that this process works on."""
    return Shard() if placement.resolved == "tensor" else shard(placement)


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
