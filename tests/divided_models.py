"""One process of several that divide models: `python divided_models.py RANK PROCESSES FOLDER [CASE...]` writes its
results. A case is one of CASES, or strategy:architecture."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import lra
import lra.registry
from lra.model import Batch, Classifier
from lra.target import Target
from lra.task import UNSCORED, Protocol
from lra.training.parallel import sequence, sharding, tensor
from lra.training.parallel.pipeline import Pipeline

LENGTH, CLASSES, ROWS = 13, 3, 4
LIMIT = 0.01
"""Of the norm of the gradients, which are clipped to it."""
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "zero1": ("zero1", "s4d", {}),
    "zero2": ("zero2", "transformer/t5", {}),
    "zero3": ("zero3", "gru", {}),
    "zero3-reversible": ("zero3", "reformer", {}),
    "tensor": ("tensor", "transformer/llama", {}),
    "tensor-alibi": ("tensor", "transformer/alibi", {"direction": "causal"}),
    "sequence-complex": ("sequence", "s4d", {}),
    "sequence-keys": ("sequence", "transformer/rope", {"direction": "causal"}),
    "sequence-time": ("sequence", "gru", {"block": {"positions": "learned"}}),
    "pipeline": ("pipeline", "transformer", {}),
    "pipeline-positions": ("pipeline", "gru", {}),
}
"""Name -> strategy, architecture and its options."""


class DoubleTarget(Target):
    """Without the cast of outputs to float32."""

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, -2), labels.flatten(), ignore_index=UNSCORED)


class DoublePositionTarget(DoubleTarget):
    per_position = True


def settings(name: str) -> tuple[str, str, dict[str, Any]]:
    if name in CASES:
        return CASES[name]
    strategy, architecture = name.split(":")
    causal = strategy == "sequence" and "direction" in lra.registry.architectures.get(architecture).options()
    return strategy, architecture, {"direction": "causal"} if causal else {}


def case(name: str) -> tuple[Classifier, Target, Batch]:
    """A classifier in float64, its target and a batch of four sequences, two of them padded."""
    _, architecture, options = settings(name)
    torch.manual_seed(0)
    encoder = lra.create_encoder(architecture, d_model=8, n_layers=3, length=LENGTH + 1, **options)
    per_position = name.endswith("positions")
    pooling = "cls" if name == "pipeline" else "mean"
    target = (DoublePositionTarget if per_position else DoubleTarget)(CLASSES)
    protocol = Protocol("test", length=LENGTH, vocabulary=5)
    model = Classifier(encoder, protocol, CLASSES, 1, pooling, per_position=per_position).double().train()
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 5, LENGTH, 9])[:, None]
    labels = torch.randint(0, CLASSES, (ROWS, LENGTH) if per_position else (ROWS,))
    if per_position:
        # unequal numbers of scored positions
        labels = labels.masked_fill(~mask, UNSCORED)
    values = torch.randint(0, 5, (ROWS, 1, LENGTH))
    return model, target, Batch(values, mask.unsqueeze(1), labels, torch.arange(ROWS))


def whole(name: str) -> dict[str, Tensor]:
    """Loss and clipped gradients of one process."""
    model, target, batch = case(name)
    loss = target.loss(model(batch), batch.labels)
    loss.backward()
    return _results(model, loss)


def divided(name: str, rank: int, processes: int) -> dict[str, Tensor]:
    """The same, of several."""
    strategy, (model, target, batch) = settings(name)[0], case(name)
    mesh = init_device_mesh("cpu", (processes,))
    if strategy.startswith("zero"):
        zero = int(strategy[-1])
        sharding.shard(model, mesh, zero)
        mine, parts = Batch(*(column[rank::processes] for column in batch)), []
        for row in range(2):
            if zero == 1:
                sharding.accumulate(model, last=row == 1)
            part = Batch(*(column[row : row + 1] for column in mine))
            loss = target.loss(model(part), part.labels) / 2
            loss.backward()
            parts.append(loss.detach())
        loss = torch.stack(parts).sum()
        distributed.all_reduce(loss)
        loss /= processes
    elif strategy == "pipeline":
        loss, output = Pipeline(model, target, rank, processes)(batch)
        torch.testing.assert_close(target.loss(output, batch.labels), loss)
        loss.backward()
    else:
        if strategy == "tensor":
            tensor.divide(model.encoder, mesh)
        else:
            sequence.divide(model.encoder, rank, processes)
        loss = target.loss(model(batch), batch.labels)
        loss.backward()
    if strategy in ("sequence", "pipeline"):
        # as DDP does
        for parameter in model.parameters():
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad)
            parameter.grad /= processes
    return _results(model, loss)


def _results(model: Classifier, loss: Tensor) -> dict[str, Tensor]:
    sharding.clip(list(model.parameters()), LIMIT)
    results = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            results[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return results


if __name__ == "__main__":
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = f"file://{folder / 'store'}"
    distributed.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=processes, timeout=timedelta(minutes=2)
    )
    names = sys.argv[4:] or CASES
    torch.save({name: divided(name, rank, processes) for name in names}, folder / f"{rank}.pt")
    distributed.destroy_process_group()
