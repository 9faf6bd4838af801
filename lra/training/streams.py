"""Persistent streams: each row of the training batches follows one part of the packed documents, and the state of the
encoder is carried from step to step. No gradient crosses the border of a step (truncated backpropagation through time).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lra.encoder import Encoder
from lra.errors import UserError
from lra.training.execution import in_chunks_from


class Streams:
    """Makes `encoder.forward` carry its state in training, between `attach` and `detach`. Call `begin` before a
    batch and `end` after its loss.

    length: tokens of an example, of which the last stands again at the start of the next one; tokens: of a chunk, 0
    for the whole example; parts: micro-batches of a step, each with a state of its own; per_epoch: steps until every
    row is at the end of its part and starts anew. Raises UserError for an encoder whose state grows or that has none.
    """

    def __init__(self, encoder: Encoder, length: int, tokens: int, parts: int, per_epoch: int) -> None:
        self.encoder, self.tokens, self.parts, self.per_epoch = encoder, tokens or length, parts, per_epoch
        self.plain = type(encoder).forward
        self.part = 0
        self.states: list[list[Tensor | None] | None] = [None] * parts
        self._next: list[Tensor | None] | None = None
        self._before: Any = None
        _check(encoder, length)

    def attach(self) -> None:
        self._before = vars(self.encoder).get("forward")
        self.encoder.forward = self.forward  # type: ignore[method-assign]

    def detach(self) -> None:
        del self.encoder.forward
        if self._before is not None:
            self.encoder.forward = self._before  # type: ignore[method-assign]

    def begin(self, example: Tensor, number: int) -> None:
        """Before batch `number`: its examples (B,) are the next ones of their rows."""
        self.part, self._next = number % self.parts, None
        if int(example[0]) % self.per_epoch == 0:
            self.states[self.part] = None

    def end(self) -> None:
        if self._next is not None:
            self.states[self.part] = self._next

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.encoder.training:
            return self.plain(self.encoder, x, mask)
        start = self.encoder.init_state(len(x))
        leaves, spec = tree_flatten(start)
        known = self.states[self.part] or [None] * len(leaves)
        carried = [own if old is None else old.to(x.device) for old, own in zip(known, leaves, strict=True)]
        state = tree_unflatten(carried, spec)
        # the last token is not scored, and the next example begins with it
        y, state = in_chunks_from(self.encoder, self.tokens, x[:, :-1], state, start)
        # what no token has replaced is made of parameters, which the step changes
        self._next = [
            None if leaf is own else leaf.detach() for leaf, own in zip(tree_leaves(state), leaves, strict=True)
        ]
        return F.pad(y, (0, 0, 0, 1))


def _check(encoder: Encoder, length: int) -> None:
    name, sizes = type(encoder).__name__, []
    x = torch.zeros(1, length, encoder.d_model, device=next(encoder.parameters()).device)
    training = encoder.training
    try:
        with torch.no_grad():
            state: Any = encoder.eval().init_state(1)
            for _ in range(3):
                _, state = encoder.chunk(x, state)
                sizes.append(sum(leaf.numel() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)))
    except NotImplementedError as error:
        raise UserError(f"train.stream: {error}; it needs a recurrent encoder and model.direction=causal") from None
    except (ValueError, IndexError) as error:
        raise UserError(f"train.stream: {error}; a stream has no end") from None
    finally:
        encoder.train(training)
    if sizes[1] != sizes[2]:
        raise UserError(f"train.stream: the state of {name} grows with every token; a stream has no end")
