"""Sequence parallelism: divides the tokens of a causal recurrent encoder among processes.

Process r of P encodes the r-th part of every sequence with `Encoder.chunk`. It starts from the state that it receives
from process r - 1 and sends its last state to process r + 1; gradients of the states are sent back. The rows of a batch
form P groups, so that processes work at the same time: a pass takes 2 - 1/P times a process's share of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_flatten, tree_unflatten

from lra.encoder import Encoder, clean_padding
from lra.errors import UserError

USE = "--strategy sequence needs a causal encoder that passes a state along (`chunk`)"


def check(encoder: Encoder) -> None:
    """Raise UserError for an encoder whose tokens cannot be divided: if it has no recurrent mode, is not causal, or its
    chunks give other outputs or gradients than its forward pass."""
    name = type(encoder).__name__
    if not encoder.causal:
        raise UserError(f"{USE}, but {name} is {encoder.direction}; set model.direction=causal, or use ddp or fsdp")
    try:
        encoder.init_state(1)
    except NotImplementedError as error:
        raise UserError(f"{USE}: {error}; use ddp or fsdp") from None
    if any("BatchNorm" in type(module).__name__ for module in encoder.modules()):
        raise UserError(f"{USE}, but the batch normalisation of {name} uses all tokens of a batch; use another norm")
    problem = _difference(encoder)
    if problem:
        raise UserError(f"{USE}, but with {name} {problem}; use ddp or fsdp")


def _difference(encoder: Encoder) -> str:
    """The first difference between a forward pass over a few tokens and two chunks; empty if they agree."""
    like, training = next(encoder.parameters()), encoder.training
    tokens = min(4, encoder.length)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        x = torch.randn(1, tokens, encoder.d_model).to(like).requires_grad_()
        encoder.eval()
        try:
            whole = encoder(x, torch.ones(1, tokens, dtype=torch.bool, device=like.device))
            if encoder.aux_loss() is not None:
                return "the auxiliary loss depends on all tokens"
            head, state = encoder.chunk(x[:, : tokens // 2], encoder.init_state(1))
            tail, _ = encoder.chunk(x[:, tokens // 2 :], state)
            parts = torch.cat([head, tail], dim=1)
            weights = torch.randn_like(whole)
            of_whole, of_parts = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (whole, parts))
        finally:
            encoder.train(training)
    if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-4):
        return "chunks give other outputs than the forward pass"
    if not torch.allclose(of_whole, of_parts, rtol=1e-3, atol=1e-4):
        return "chunks give other gradients than the forward pass"
    return ""


def divide(encoder: Encoder, rank: int, processes: int) -> None:
    """Divide the tokens of an encoder among the processes of the default group, in place, for training. Every process
    passes the same input. In evaluation mode each process encodes all tokens by itself.

    The gradients of the encoder's weights are those of this process's tokens times the number of processes; all other
    gradients are those of one process. The mean over processes, as in DDP, is then the gradient of one process.
    """
    encoder.forward = partial(_forward, encoder, encoder.forward, Ring(rank, processes))  # type: ignore[method-assign]


def join(encoder: Encoder) -> None:
    """Undo `divide`: each process encodes all tokens by itself."""
    del encoder.forward


@dataclass
class Ring:
    """The processes in the order of the tokens.

    layouts: the leaves of a state, by (rows, tokens before): None for a leaf of the initial state that has not changed,
    the shape and dtype of a tensor, or a value that is not a tensor.
    """

    rank: int
    processes: int
    layouts: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    group: Any = None

    @property
    def last(self) -> bool:
        return self.rank == self.processes - 1

    def open(self) -> None:
        """Create the process group of the states, separate from DDP's. Every process calls it at the same time."""
        if self.group is None:
            self.group = distributed.new_group()

    def send(self, value: Tensor, to: int) -> None:
        distributed.send(value, to, group=self.group)

    def receive(self, like: Tensor, source: int) -> Tensor:
        distributed.recv(like, source, group=self.group)
        return like


def _forward(encoder: Encoder, plain: Callable[..., Tensor], ring: Ring, x: Tensor, mask: Tensor) -> Tensor:
    if not (encoder.training and torch.is_grad_enabled()) or x.shape[1] < ring.processes:
        return plain(x, mask)
    ring.open()
    x, _ = clean_padding(x, mask)
    bounds = [x.shape[1] * part // ring.processes for part in range(ring.processes + 1)]
    mine = _Take.apply(x, bounds, ring)
    outputs = []
    for rows in mine.tensor_split(min(len(x), ring.processes)):
        start = encoder.init_state(len(rows))
        key = len(rows), bounds[ring.rank]
        state = start if ring.rank == 0 else _received(start, rows, key, ring)
        y, state = encoder.chunk(rows, state)
        outputs.append(y if ring.last else _sent(y, state, start, (len(rows), bounds[ring.rank + 1]), ring))
    return _Join.apply(torch.cat(outputs), bounds, ring)


def _sent(y: Tensor, state: Any, start: Any, key: tuple[int, int], ring: Ring) -> Tensor:
    """y, after the state was sent to the next process."""
    (leaves, shape), (first, before) = tree_flatten(state), tree_flatten(start)
    if shape != before:
        raise UserError(f"{USE}, but the structure of the state of this one changes between tokens")
    tensors: list[Tensor] = []
    layout: list[Any] = []
    for leaf, at_start in zip(leaves, first, strict=True):
        if leaf is at_start:
            layout.append(None)
        elif isinstance(leaf, Tensor):
            tensors.append(leaf)
            layout.append((tuple(leaf.shape), leaf.dtype))
        else:
            layout.append(leaf)
    if key not in ring.layouts:
        ring.layouts[key] = layout
        distributed.send_object_list([layout], ring.rank + 1, group=ring.group, device=y.device)
    return _Send.apply(ring, y, *tensors)


def _received(start: Any, rows: Tensor, key: tuple[int, int], ring: Ring) -> Any:
    """The state that the previous process has sent."""
    if key not in ring.layouts:
        content: list[Any] = [None]
        distributed.recv_object_list(content, ring.rank - 1, group=ring.group, device=rows.device)
        ring.layouts[key] = content[0]
    layout = ring.layouts[key]
    leaves, shape = tree_flatten(start)
    like = [rows.new_empty(leaf[0], dtype=leaf[1]) for leaf in layout if isinstance(leaf, tuple)]
    # an input that needs a gradient makes the node part of the backward pass of every process
    tensors = iter(_Receive.apply(ring, rows.new_zeros(()).requires_grad_(), *like))
    filled = []
    for leaf, at_start in zip(layout, leaves, strict=True):
        filled.append(at_start if leaf is None else next(tensors) if isinstance(leaf, tuple) else leaf)
    return tree_unflatten(filled, shape)


def _packed(tensors: list[Tensor]) -> Tensor:
    """The bytes of several tensors, one after the other: (n,) uint8."""
    return torch.cat([_real(t.detach()).contiguous().flatten().view(torch.uint8) for t in tensors])


def _unpacked(content: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = content.split([t.nbytes for t in like])
    values = [part.clone().view(_real(t).dtype).view(_real(t).shape) for part, t in zip(parts, like, strict=True)]
    return [torch.view_as_complex(v) if t.is_complex() else v for v, t in zip(values, like, strict=True)]


def _real(value: Tensor) -> Tensor:
    value = value.resolve_conj().resolve_neg()
    return torch.view_as_real(value) if value.is_complex() else value


def _differentiable(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_floating_point() or t.is_complex()]


def _bytes_of(like: list[Tensor], device: torch.device) -> Tensor:
    return torch.empty(sum(t.nbytes for t in like), dtype=torch.uint8, device=device)


class _Send(torch.autograd.Function):
    """The identity on y. The tensors are sent to the next process, and their gradients are received from it."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, y: Tensor, *tensors: Tensor) -> Tensor:
        ring.send(_packed(list(tensors)), ring.rank + 1)
        ctx.ring = ring
        ctx.like = [torch.empty_like(t, device="meta") for t in tensors]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        like = _differentiable(ctx.like)
        grads: list[Tensor] = []
        if like:
            grads = _unpacked(ctx.ring.receive(_bytes_of(like, grad.device), ctx.ring.rank + 1), like)
        found = iter(grads)
        return None, grad, *(next(found) if _differentiable([t]) else None for t in ctx.like)


class _Receive(torch.autograd.Function):
    """The tensors that the previous process sends, shaped as `like`; their gradients are sent back to it."""

    @staticmethod
    def forward(ctx: Any, ring: Ring, _: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        content = _bytes_of(list(like), like[0].device)
        tensors = _unpacked(ring.receive(content, ring.rank - 1), list(like))
        ctx.ring = ring
        kept = {id(t) for t in _differentiable(tensors)}
        ctx.differentiable = [id(t) in kept for t in tensors]
        ctx.mark_non_differentiable(*(t for t in tensors if id(t) not in kept))
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sent = [grad for grad, differentiable in zip(grads, ctx.differentiable, strict=True) if differentiable]
        if sent:
            ctx.ring.send(_packed(sent), ctx.ring.rank - 1)
        return (None, None, *(None for _ in grads))


class _Take(torch.autograd.Function):
    """This process's tokens, (B, L, D) -> (B, L / P, D); the backward pass gathers the gradients of all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: list[int], ring: Ring) -> Tensor:
        ctx.bounds, ctx.ring = bounds, ring
        return x[:, bounds[ring.rank] : bounds[ring.rank + 1]].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad, ctx.bounds, ctx.ring) / ctx.ring.processes, None, None


class _Join(torch.autograd.Function):
    """The outputs of all processes, (B, L / P, D) -> (B, L, D); the gradient is P times that of the own tokens."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bounds: list[int], ring: Ring) -> Tensor:
        ctx.bounds, ctx.ring = bounds, ring
        return _gathered(y, bounds, ring)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rank, bounds = ctx.ring.rank, ctx.bounds
        return grad[:, bounds[rank] : bounds[rank + 1]] * ctx.ring.processes, None, None


def _gathered(part: Tensor, bounds: list[int], ring: Ring) -> Tensor:
    sizes = [stop - start for start, stop in pairwise(bounds)]
    # padded to the longest part, because all parts of an all-gather have one shape
    padded = part.new_zeros(len(part), max(sizes), part.shape[2])
    padded[:, : part.shape[1]] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded, group=ring.group)
    return torch.cat([p[:, :size] for p, size in zip(parts, sizes, strict=True)], dim=1)
