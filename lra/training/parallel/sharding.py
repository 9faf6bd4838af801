"""Sharding by FSDP2 (torch.distributed.fsdp.fully_shard): weights, gradients and optimiser states in shards.

The stages are those of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054).

1  optimiser states, and the weights between steps, are sharded. Every process has whole gradients and gathered weights
   until the last part of an accumulated step.
2  gradients are sharded, too: they are reduced to shards after every backward pass. Weights stay gathered from the
   forward to the backward pass.
3  the weights of a block are freed after its forward pass and gathered again for its backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor

from lra.encoder import Encoder
from lra.model import Classifier
from lra.training.execution import blocks


def shard(model: Classifier, mesh: DeviceMesh, stage: int) -> None:
    """Shard a classifier in place over a mesh of one dimension.

    The weights of a block of the encoder are gathered together, and so are all other weights.
    """
    if mesh.device_type == "cpu":
        _fsdp_param.free_storage = _free_storage
    for block in _units(model.encoder):
        fully_shard(block, mesh=mesh, reshard_after_forward=stage == 3)
        for name in ("step", "chunk"):
            if hasattr(block, name):
                register_fsdp_forward_method(block, name)
    # the backward pass starts with these weights
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "outputs")


def clip(parameters: list[Tensor], limit: float) -> None:
    """Scale gradients so that their norm over all parameters and shards is at most `limit`."""
    norms = []
    # PyTorch does not mix tensors with DTensors
    for divided in (True, False):
        grads = [p.grad for p in parameters if p.grad is not None and isinstance(p, DTensor) is divided]
        if grads:
            norm = torch.nn.utils.get_total_norm(grads)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for divided in (True, False):
        chosen = [p for p in parameters if isinstance(p, DTensor) is divided]
        torch.nn.utils.clip_grads_with_norm_(chosen, limit, total)


_plain_free = _fsdp_param.free_storage


def _free_storage(tensor: Tensor) -> None:
    # CPU kernels view weights as NumPy arrays, and PyTorch refuses to free memory that NumPy may refer to
    if tensor.untyped_storage().resizable():
        _plain_free(tensor)


def accumulate(model: nn.Module, last: bool) -> None:
    """Stage 1: keep whole gradients and weights unless the next backward pass is the last of a step."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)


def _units(encoder: Encoder) -> list[nn.Module]:
    """The blocks that share no parameter with each other and that the encoder calls. FSDP2 gathers weights when a
    module is called; a reversible encoder calls the parts of its blocks instead of the blocks."""
    layers, called = blocks(encoder), set()
    hooks = [layer.register_forward_pre_hook(lambda layer, _: called.add(id(layer))) for layer in layers]
    like, training = next(encoder.parameters()), encoder.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        x = like.new_zeros(1, min(16, encoder.length), encoder.d_model)
        encoder.eval()(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
    encoder.train(training)
    for hook in hooks:
        hook.remove()
    owners: dict[int, set[int]] = {}
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            owners.setdefault(id(parameter), set()).add(number)
    own = [layer for layer in layers if all(len(owners[id(p)]) == 1 for p in layer.parameters())]
    return [layer for layer in own if id(layer) in called]
