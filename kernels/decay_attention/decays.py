"""Decayed attention inside chunks of C steps, one decay per head or one per channel, with its derivative.

`since` is the decay from the start of the chunk through each step, `until` the decay after each step to its end. Only
sums of log decays are exponentiated, and these are never positive. The gradient of a log decay is gathered from what
passes its step: differences of running sums would lose digits.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

NO_MEMORY = -1000.0  # exp of it is 0 even in float64, and unlike infinity it leaves a running sum its digits

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


class PerHead:
    """log decays (..., C, 1). The decay between any two steps is a matrix, from differences of a float64 sum."""

    def __init__(self, log_decay: Tensor) -> None:
        self.total = log_decay.double().clamp_min(NO_MEMORY).cumsum(-2)
        self.since = self.total.exp().to(log_decay.dtype)
        self.until = (self.total[..., -1:, :] - self.total).exp().to(log_decay.dtype)

    @cached_property
    def steps(self) -> Tensor:
        """(..., C, C): the decay from step j, column, to step i >= j, row; 0 above the diagonal."""
        steps = self.since.new_empty(*self.since.shape[:-1], self.since.shape[-2])
        torch.sub(self.total, self.total.mT, out=steps)
        return steps.exp_().tril_()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the steps of a chunk give each other: q, k (..., C, K), v (..., C, V) -> (..., C, V)."""
        return (q @ k.mT).mul_(self.steps) @ v

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Gradients:
        """Gradients of q, k, v and the log decays for the gradient (..., C, V) of `attend`; rows and columns,
        (..., C, K): the gradients that `log since` and `log until` have from elsewhere."""
        scores = q @ k.mT
        weights = (grad @ v.mT).mul_(self.steps)
        rows, columns = rows.sum(-1, keepdim=True), columns.sum(-1, keepdim=True)
        ones = torch.ones_like(weights[(0,) * (weights.dim() - 2)])
        log_decay = self.crossing(weights * scores) + ones.triu() @ rows + ones.tril(-1) @ columns
        return weights @ k, weights.mT @ q, scores.mul_(self.steps).mT @ grad, log_decay

    @staticmethod
    def crossing(pairs: Tensor) -> Tensor:
        """For each step t the sum of `pairs`, (..., C, C), over columns j < t and rows i >= t: (..., C, 1)."""
        ones = torch.ones_like(pairs[(0,) * (pairs.dim() - 2)])
        return (ones.triu() @ pairs).tril_(-1).sum(-1, keepdim=True)


def first(x: Tensor, size: int) -> Tensor:
    """The first halves of blocks of 2 * size steps: (..., C, X) -> a view (..., C / (2 size), size, X)."""
    return x.unflatten(-2, (-1, 2, size))[..., 0, :, :]


def second(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, size))[..., 1, :, :]


class PerChannel:
    """log decays (..., C, K), C a power of two. A chunk is halved again and again, and the second half of each block
    meets its first half through the boundary between them: a decay on either side, and a matrix product."""

    def __init__(self, log_decay: Tensor) -> None:
        since, until = log_decay, torch.zeros_like(log_decay)
        self.levels = []
        """Blocks of 1, 2, 4, ... steps: log decays from the block's start through, and after each step to its end."""
        for level in range(log_decay.shape[-2].bit_length() - 1):
            self.levels.append((2**level, since, until))
            size, through = 2**level, since
            since, until = since.clone(), until.clone()
            second(since, size).add_(first(through, size)[..., -1:, :])
            first(until, size).add_(second(through, size)[..., -1:, :])
        self.since, self.until = since.exp(), until.exp()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `PerHead.attend`."""
        o = (q * k).sum(-1, keepdim=True) * v
        for size, since, until in self.levels:
            late, early = second(q, size) * second(since, size).exp(), first(k, size) * first(until, size).exp()
            second(o, size).add_(late @ early.mT @ first(v, size))
        return o

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Gradients:
        """As `PerHead.backward`; overwrites rows and columns."""
        diagonal = (grad * v).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = diagonal * k, diagonal * q, (q * k).sum(-1, keepdim=True) * grad
        for size, since, until in reversed(self.levels):
            # in a doubling the last sum of each half went to every step of the other
            to_first, to_second = second(rows, size).sum(-2), first(columns, size).sum(-2)
            first(rows, size)[..., -1, :].add_(to_first)
            second(rows, size)[..., -1, :].add_(to_second)
            since, until = second(since, size).exp(), first(until, size).exp()
            late, early = second(q, size) * since, first(k, size) * until
            late_o, early_v = second(grad, size), first(v, size)
            first(grad_v, size).add_(early @ late.mT @ late_o)
            weights = late_o @ early_v.mT
            grad_late, grad_early = weights @ early, weights.mT @ late
            second(rows, size).addcmul_(grad_late, late)
            first(columns, size).addcmul_(grad_early, early)
            second(grad_q, size).addcmul_(grad_late, since)
            first(grad_k, size).addcmul_(grad_early, until)
        return grad_q, grad_k, grad_v, rows


def decays(log_decay: Tensor) -> PerHead | PerChannel:
    """log_decay: (..., C, 1) or (..., C, K)."""
    return PerHead(log_decay) if log_decay.shape[-1] == 1 else PerChannel(log_decay)
