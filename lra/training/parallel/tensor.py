"""Tensor parallelism: the heads of attention and the channels of feed-forward parts divided among processes.

Each divided part has a linear map that writes its units (heads or channels) and one that reads them (Shoeybi et al.
2019, arXiv:1909.08053). A process computes its share of the units for all tokens. One sum over the processes follows in
the forward pass and one in the backward pass. Weights, gradients and optimiser states of these maps are DTensors. Every
process computes all other parts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn import functional as F

from lra.encoder import Encoder, Prunable
from lra.errors import UserError


def check(encoder: Encoder, processes: int) -> None:
    """Raise UserError if an encoder has no part that can be divided, or a number of units that is not divisible."""
    parts = _parts(encoder)
    if not parts:
        raise UserError(
            f"--strategy tensor divides attention heads and feed-forward channels, but {type(encoder).__name__} has "
            "none that can be divided; use ddp or fsdp"
        )
    for part in parts:
        if part.units % processes:
            raise UserError(
                f"--strategy tensor: {part.units} {part.unit} of {type(part).__name__} are not divisible among "
                f"{processes} processes"
            )


def divide(encoder: Encoder, mesh: DeviceMesh) -> None:
    """Divide an encoder in place over a mesh of one dimension. Every process passes the same input. Raises UserError
    as `check`."""
    check(encoder, mesh.size())
    for part in _parts(encoder):
        reader = part.reader
        writers = [m for m in _module(part).children() if isinstance(m, nn.Linear) and m is not reader]
        sections = [writer.out_features // reader.in_features for writer in writers]
        each = part.units // mesh.size()
        first = mesh.get_local_rank() * each
        part.keep(torch.arange(first, first + each, device=reader.weight.device))
        for writer, count in zip(writers, sections, strict=True):
            # maps of several quantities, such as queries, keys and values, hold their rows one after the other
            _distribute(writer, "weight", mesh, _StridedShard(0, split_factor=count))
            if writer.bias is not None:
                _distribute(writer, "bias", mesh, _StridedShard(0, split_factor=count))
            writer.forward = partial(_write, writer, mesh)  # type: ignore[method-assign]
        _distribute(reader, "weight", mesh, Shard(1))
        reader.forward = partial(_read, reader, mesh)  # type: ignore[method-assign]


def _parts(encoder: Encoder) -> list[Prunable]:
    return [module for module in encoder.modules() if isinstance(module, Prunable) and module.units]


def _module(part: Prunable) -> nn.Module:
    assert isinstance(part, nn.Module)
    return part


def _distribute(linear: nn.Linear, name: str, mesh: DeviceMesh, placement: Placement) -> None:
    local = getattr(linear, name).detach()
    setattr(linear, name, nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False)))


def _write(linear: nn.Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """(..., D), the same on every process -> this process's units; gradients are summed over the processes."""
    x = DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    return F.linear(x, _local(linear.weight), None if linear.bias is None else _local(linear.bias))


def _read(linear: nn.Linear, mesh: DeviceMesh, x: Tensor) -> Tensor:
    """This process's units -> (..., D), summed over the processes."""
    part = DTensor.from_local(F.linear(x, _local(linear.weight)), mesh, [Partial()], run_check=False)
    y = part.redistribute(placements=[Replicate()]).to_local()
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()
