"""Shared by recurrent mixers: one computation for whole sequences and single tokens, and a loop over time."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lra.architectures._precision import wide
from lra.encoder import Mixer


class Recurrence(Mixer):
    """A mixer whose forward and step are both `chunk`. Padding comes after all real tokens: no mask needed."""

    @abstractmethod
    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Any number of tokens: x (B, C, D), state before them -> y (B, C, D), state after them."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.chunk(x, self.init_state(x.shape[0]))[0]

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.chunk(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def zeros(self, batch: int, width: int) -> Tensor:
        """A state of zeros (B, width), on the device of the parameters and in float32 at least."""
        return wide(next(self.parameters()).new_zeros(batch, width))


class Loop(Recurrence):
    """A recurrence that no operator computes, as a Python loop over time, in float32 at least and without autocast.

    A subclass says what a token adds before the loop (`enter`, all tokens in one product), what the tokens share
    (`weights`, made once a chunk) and what one token does to the state (`advance`).
    """

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """x: (B, C, D) -> (B, C, G), what each token brings into the recurrence."""

    def weights(self) -> tuple[Tensor, ...]:
        """The arguments of `advance` after the state."""
        return ()

    @abstractmethod
    def advance(self, entering: Tensor, state: Any, *weights: Tensor) -> tuple[Tensor, Any]:
        """entering: (B, G), state before the token -> y (B, H), state after it."""

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        # a state rounded to bfloat16 at every token would lose what it holds
        entering = wide(self.enter(x))
        with torch.autocast(x.device.type, enabled=False):
            weights = tree_map_only(Tensor, wide, self.weights())
            outputs = []
            for token in entering.unbind(1):
                y, state = self.advance(token, state, *weights)
                outputs.append(y)
            return torch.stack(outputs, dim=1).to(x.dtype), state


class Timed(Loop):
    """A loop whose tokens come some time after one another; `advance` finds the time in the last column it is given."""

    def elapsed(self, x: Tensor) -> Tensor:
        """Time from the token before to each token, (B, C, 1): 1, sequences being evenly spaced."""
        return x.new_ones(*x.shape[:2], 1)

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """x: (B, C, D) -> (B, C, G), what each token brings beside its time."""

    def enter(self, x: Tensor) -> Tensor:
        return torch.cat([wide(self.project(x)), wide(self.elapsed(x))], dim=-1)
