"""The encoder contract: what every sequence architecture is, whoever wrote it.

An encoder maps a batch of embedded sequences to a batch of the same shape:

    forward(x: (B, L, D) float, mask: (B, L) bool, True = real token) -> (B, L, D)

Sequences are right-padded: in each row of `mask` the real tokens form a prefix of at least one token. Outputs at real
positions never depend on what the padding holds or on how much of it there is; outputs at padding are unspecified.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

FAMILIES = ("recurrent", "state_space", "linear_attention", "attention", "mixture", "convolution", "memory")
"""The folders of `architectures/`."""
SCALINGS = ("L", "L log L", "L sqrt L", "L^2")
DIRECTIONS = ("causal", "bidirectional", "concat", "add", "shared")


@dataclass(frozen=True)
class Cost:
    """Forward work in floating-point operations; one multiply-add counts as 2.

    `matmul` is what a dispatcher-level counter sees (matrix products, convolutions); `other` is everything else
    (FFTs, scans, softmax, norms, element-wise work). Both are for one sequence. `batch_matmul` and `batch_other` are
    done once for a batch, however many sequences it has, such as making the kernel of a state space model.
    """

    matmul: float = 0.0
    other: float = 0.0
    batch_matmul: float = 0.0
    batch_other: float = 0.0

    @property
    def total(self) -> float:
        """Work of a batch of one sequence."""
        return self.matmul + self.other + self.batch_matmul + self.batch_other

    @property
    def per_batch(self) -> Cost:
        """This work done once for a batch instead of once for each sequence."""
        return Cost(batch_matmul=self.matmul + self.batch_matmul, batch_other=self.other + self.batch_other)

    def of_sequences(self, count: float) -> Cost:
        """Work of `count` sequences that share a batch."""
        return Cost(self.matmul * count, self.other * count, self.batch_matmul, self.batch_other)

    def of_batch(self, size: float) -> Cost:
        """All work of a batch of `size` sequences, in `matmul` and `other`."""
        return Cost(self.matmul * size + self.batch_matmul, self.other * size + self.batch_other)

    def __add__(self, more: Cost) -> Cost:
        return Cost(
            self.matmul + more.matmul, self.other + more.other,
            self.batch_matmul + more.batch_matmul, self.batch_other + more.batch_other,
        )  # fmt: skip

    def __mul__(self, times: float) -> Cost:
        """This work repeated, with what is done once for a batch."""
        return Cost(self.matmul * times, self.other * times, self.batch_matmul * times, self.batch_other * times)

    __rmul__ = __mul__

    @staticmethod
    def linear(rows: float, d_in: int, d_out: int, bias: bool = True) -> Cost:
        """Work of `rows` vectors through a d_in x d_out linear map."""
        return Cost(2.0 * rows * d_in * d_out, rows * d_out if bias else 0.0)


@dataclass(frozen=True)
class Card:
    """What an architecture says of itself. Written as literals in the class body: listing reads it without importing.

    title: of the paper; year: of its first version; url: of the paper.
    scaling: growth of work with length L, one of SCALINGS, each encoder built for its length.
    causal: whether the mathematics only looks back (such a mixer runs bidirectionally through a wrapper).
    variants: name -> constructor arguments; `s4d/inv` is the constructor of s4d with those arguments preset.
    exempt: conformance check -> reason, or `variant/check` where one variant alone fails it. The check is then expected
    to fail, and failing to fail is an error.
    """

    title: str
    year: int
    url: str
    scaling: str
    causal: bool
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)


class Encoder(nn.Module, ABC):
    """Base of every architecture: one public subclass per file in `architectures/`, named after the file.

    Constructors take keyword-only arguments `d_model, n_layers, length, dropout=0.0` and their own, never `**kwargs`.
    `length` is the longest sequence the encoder will be given.
    """

    card: ClassVar[Card]
    d_model: int
    n_layers: int
    length: int
    direction: str = "causal"
    """How this instance looks at the sequence: one of DIRECTIONS; anything but "causal" sees the future."""

    @property
    def causal(self) -> bool:
        return self.direction == "causal"

    @property
    def scaling(self) -> str:
        """Growth of work with length with these arguments: the card's, unless one of them changes it."""
        return self.card.scaling

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        """Optimiser settings by parameter-name pattern (fnmatch): `lr` (at most this rate), `lr_scale` (times the
        recipe's), `weight_decay`. The first pattern that matches a parameter wins; one matching none is an error."""
        return {}

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, L, D); mask: (B, L) bool, True = real -> (B, L, D)."""

    @abstractmethod
    def cost(self, length: int) -> Cost:
        """Analytic forward work for sequences of `length` tokens, from shapes alone."""

    def init_state(self, batch: int) -> Any:
        """Recurrent state before the first token: tensors, or nested tuples of them. Raises NotImplementedError if
        the encoder has no recurrent mode."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent mode")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token: x: (B, D), state -> y: (B, D), next state. Equal to `forward` position by position."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent mode")

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Any number of tokens: x: (B, C, D) with C >= 1, state -> y: (B, C, D), state after the last token.

        Equal to C calls of `step`, which is the default; an encoder whose operators take a state does it faster.
        Prefill, streaming and truncated backpropagation rest on it. Raises NotImplementedError without a recurrent
        mode.
        """
        return stepwise(self.step, x, state)

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of recurrent state that one more sequence of a batch takes after `tokens` tokens; what sequences share,
        such as discrete matrices, does not count. Raises NotImplementedError without a recurrent mode."""
        sizes = []
        for batch in (1, 2):
            state = self.init_state(batch)
            with torch.no_grad():
                for _ in range(tokens):
                    _, state = self.step(next(self.parameters()).new_zeros(batch, self.d_model), state)
            sizes.append(sum(t.nbytes for t in tree_leaves(state) if isinstance(t, Tensor)))
        return sizes[1] - sizes[0]

    def aux_loss(self) -> Tensor | None:
        """What the last forward adds to the loss (router balance, ponder cost); None when nothing."""
        return None

    def diagnostics(self) -> dict[str, float]:
        """What to log beside the loss (share of dropped tokens, load of each expert), over the forwards since it was
        last asked: asking starts anew, so that one asks before an evaluation and after it. {} when nothing."""
        return {}


class Mixer(nn.Module, ABC):
    """A sequence mixer inside a residual block: the part in which tokens meet.

    The block hands it x with zeros at the padding; its outputs at padding are ignored.
    """

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, L, D); mask: (B, L) bool -> (B, L, D)."""

    @abstractmethod
    def cost(self, length: int) -> Cost:
        """Analytic forward work for sequences of `length` tokens."""

    def init_state(self, batch: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no recurrent mode")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError(f"{type(self).__name__} has no recurrent mode")

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x: (B, C, D), state -> y: (B, C, D), state after the last token; equal to C calls of `step`."""
        return stepwise(self.step, x, state)

    def aux_loss(self) -> Tensor | None:
        return None


def lengths_of(mask: Tensor) -> Tensor:
    """Real tokens per row of a right-padded mask: (B, L) bool -> (B,) int64."""
    return mask.sum(dim=1, dtype=torch.int64)


def stepwise(step: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """`chunk` as a loop: call step on each token of x: (B, C, D) -> (B, C, D), state after the last token."""
    outputs = []
    for token in x.unbind(1):
        y, state = step(token, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
