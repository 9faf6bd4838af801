"""Execution of an encoder with the same outputs: recomputed activations, compilation, chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from lra.encoder import Encoder
from lra.errors import UserError


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The layers of the encoder's first non-empty ModuleList: the units of recomputation and sharding."""
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return list(module)
    return []


def recompute(encoder: Encoder) -> None:
    """Gradient checkpointing: keep the input of each block only and compute the rest again in the backward pass.
    Raises UserError for an encoder without a list of blocks."""
    layers = blocks(encoder)
    if not layers:
        raise UserError(f"train.checkpointing: {type(encoder).__name__} has no list of blocks")
    for block in layers:
        for name in ("forward", "chunk"):
            if hasattr(block, name):
                setattr(block, name, partial(_recomputed, block, getattr(block, name)))


def _recomputed(block: nn.Module, plain: Callable[..., Any], *arguments: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return plain(*arguments)
    return checkpoint(plain, *arguments, use_reentrant=False)


def divide_experts(encoder: Encoder, processes: int) -> None:
    """Divide the work of the experts of mixtures among the processes of a run. Raises UserError for an encoder without
    such experts, and where their number is not divisible."""
    mixtures: list[Any] = [module for module in encoder.modules() if hasattr(module, "divided")]
    if not mixtures:
        raise UserError(f"--strategy expert_parallel: {type(encoder).__name__} has no experts; use ddp")
    for mixture in mixtures:
        if not mixture.divides:
            raise UserError(f"--strategy expert_parallel: {type(mixture).__name__} mixes all experts; use ddp")
        if mixture.n_experts % processes:
            raise UserError(
                f"--strategy expert_parallel: {mixture.n_experts} experts are not divisible among {processes} processes"
            )
        mixture.divided = True


def truncate(encoder: Encoder, tokens: int) -> None:
    """Run the encoder in chunks of `tokens` tokens and cut the gradient of its recurrent state between them. Raises
    UserError without a recurrent mode."""
    try:
        encoder.init_state(1)
    except NotImplementedError as error:
        raise UserError(f"train.tbptt: {error}; it needs a recurrent encoder and model.direction=causal") from None
    encoder.forward = partial(in_chunks, encoder, tokens)  # type: ignore[method-assign]


def in_chunks(encoder: Encoder, tokens: int, x: Tensor, mask: Tensor) -> Tensor:
    """As `forward`, in chunks of `tokens` tokens: x: (B, L, D) -> (B, L, D). No gradient crosses their borders."""
    start = encoder.init_state(len(x))
    return in_chunks_from(encoder, tokens, x, start, start)[0]


def in_chunks_from(encoder: Encoder, tokens: int, x: Tensor, state: Any, start: Any) -> tuple[Tensor, Any]:
    """As `chunk`, in chunks of `tokens` tokens. start: what `init_state` returned, of which `state` may hold parts."""
    outputs = []
    for chunk in x.split(tokens, dim=1):
        y, state = encoder.chunk(chunk, tree_map(_cut, state, start))
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def _cut(value: Tensor, at_start: Tensor) -> Tensor:
    # what no chunk has replaced is made of parameters, such as a discrete matrix, and keeps their gradient
    return value if value is at_start else value.detach()


def compiled(encoder: Encoder, trial: Callable[[], Tensor]) -> dict[str, Any]:
    """Compile in place and run `trial` once, forward and backward; an encoder that fails to compile runs uncompiled.

    Returns status ("ok", "graph breaks" or "refused"), graph_breaks and reason, for the record.
    """
    from torch import _dynamo

    _dynamo.utils.counters.clear()
    encoder.compile(dynamic=True)
    try:
        trial().sum().backward()
        status, reason = "ok", ""
    except Exception as error:  # noqa: BLE001  (the compiler raises whatever its backends raise)
        encoder._compiled_call_impl = None
        status, reason = "refused", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    encoder.zero_grad(set_to_none=True)
    breaks = dict(_dynamo.utils.counters["graph_break"])
    if status == "ok" and breaks:
        status, reason = "graph breaks", min(breaks)[:200]
    return {"status": status, "graph_breaks": int(sum(breaks.values())), "reason": reason}
