"""Reversible layers (Gomez et al. 2017, arXiv:1707.04585): the backward pass recovers activations instead of reading
stored ones, so that memory does not grow with depth.

    y1 = x1 + f(x2);  y2 = x2 + g(y1)          and back:  x2 = y2 - g(y1);  x1 = y1 - f(x2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Step:
    """f(x2, kept) -> (f's value, kept): `kept`, given back on the way back, is what f must not decide anew (None at
    first). g(y1) -> g's value. f_parameters, g_parameters: what each of them learns."""

    f: Callable[[Tensor, Any], tuple[Tensor, Any]]
    g: Callable[[Tensor], Tensor]
    f_parameters: Sequence[nn.Parameter]
    g_parameters: Sequence[nn.Parameter]


def reversible(x1: Tensor, x2: Tensor, steps: Sequence[Step], random: bool) -> tuple[Tensor, Tensor]:
    """The streams after all steps. random: f or g draw numbers (dropout), the same ones again on the way back."""
    parameters = [p for step in steps for p in (*step.f_parameters, *step.g_parameters)]
    return _Reversible.apply(x1, x2, steps, random, *parameters)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, steps: Sequence[Step], random: bool, *_: Tensor) -> Any:
        kind = x1.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.steps, ctx.history = steps, []
        for step in steps:
            before = _generators(x1.device) if random else None
            value, kept = step.f(x2, None)
            x1 = x1 + value
            between = _generators(x1.device) if random else None
            x2 = x2 + step.g(x1)
            ctx.history.append((before, kept, between))
        ctx.save_for_backward(x1, x2)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> Any:
        y1, y2 = ctx.saved_tensors
        kind, dtype, enabled = ctx.autocast
        found: list[tuple[Tensor, ...]] = []
        # torch 2.9 would take weights cast in the forward, which have no graph, out of autocast's cache
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
            for step, (before, kept, between) in zip(reversed(ctx.steps), reversed(ctx.history), strict=True):
                leaf = y1.detach().requires_grad_()
                with _replayed(between, y1.device):
                    value = step.g(leaf)
                own, *g_grads = torch.autograd.grad(value, [leaf, *step.g_parameters], d2.to(value.dtype))
                y2, d1 = y2 - value.detach(), d1 + own
                leaf = y2.detach().requires_grad_()
                with _replayed(before, y1.device):
                    value, _ = step.f(leaf, kept)
                own, *f_grads = torch.autograd.grad(value, [leaf, *step.f_parameters], d1.to(value.dtype))
                y1, d2 = y1 - value.detach(), d2 + own
                found.append((*f_grads, *g_grads))
        return d1, d2, None, None, *(grad for grads in reversed(found) for grad in grads)


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _replayed(states: tuple[Tensor, Tensor | None] | None, device: torch.device) -> Any:
    return nullcontext() if states is None else _from(states, device)


@contextmanager
def _from(states: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw as then, and leave the generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
        yield
