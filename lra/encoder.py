"""The encoder contract: the interface of every sequence architecture.

An encoder maps a batch of embedded sequences to a batch of the same shape:

    forward(x: (B, L, D) float, mask: (B, L) bool, True = real token) -> (B, L, D)

Sequences are right-padded: in each row of `mask` the real tokens come first. Outputs and gradients at real positions do
not depend on the content or the amount of padding, or on rows of padding alone; outputs at padding are unspecified. An
encoder with `gaps = True` also accepts masks that hide tokens between real ones, under the same rule.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lra.errors import UserError

FAMILIES = ("recurrent", "state_space", "linear_attention", "attention", "mixture", "convolution", "memory")
"""The folders of `architectures/`."""
SCALINGS = ("L", "L log L", "L sqrt L", "L^2")
DIRECTIONS = ("causal", "bidirectional", "concat", "add", "shared")
PADDING_ORDER = (
    "mask has real tokens (True) after padding (False); pad on the right, and invert a mask in which True is padding"
)


@dataclass(frozen=True)
class Cost:
    """Forward work in floating-point operations; one multiply-add counts as 2.

    `matmul` is the work that torch's FLOP counter counts (matrix products, convolutions); `other` is the rest (FFTs,
    scans, softmax, norms, element-wise operations). Both are per sequence. `batch_matmul` and `batch_other` are work
    done once per batch of any size, for example to compute the kernel of a state space model.
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
        """The same work, done once per batch instead of once per sequence."""
        return Cost(batch_matmul=self.matmul + self.batch_matmul, batch_other=self.other + self.batch_other)

    def of_sequences(self, count: float) -> Cost:
        """Work of `count` sequences in one batch."""
        return Cost(self.matmul * count, self.other * count, self.batch_matmul, self.batch_other)

    def of_batch(self, size: float) -> Cost:
        """Total work of a batch of `size` sequences, in `matmul` and `other`."""
        return Cost(self.matmul * size + self.batch_matmul, self.other * size + self.batch_other)

    def __add__(self, addend: Cost) -> Cost:
        return Cost(
            self.matmul + addend.matmul, self.other + addend.other,
            self.batch_matmul + addend.batch_matmul, self.batch_other + addend.batch_other,
        )  # fmt: skip

    def __mul__(self, times: float) -> Cost:
        """The work repeated `times` times, including the work done once per batch."""
        return Cost(self.matmul * times, self.other * times, self.batch_matmul * times, self.batch_other * times)

    __rmul__ = __mul__

    @staticmethod
    def linear(rows: float, d_in: int, d_out: int, bias: bool = True) -> Cost:
        """Work of a d_in x d_out linear map applied to `rows` vectors."""
        return Cost(2.0 * rows * d_in * d_out, rows * d_out if bias else 0.0)


@dataclass(frozen=True)
class Card:
    """Description of an architecture, written as literals in the class body so that it is read without importing.

    title, url: of the paper; year: of its first version.
    scaling: how the work grows with the sequence length L, one of SCALINGS, for encoders built for that length.
    causal: whether outputs depend on earlier positions only (a wrapper runs such a mixer bidirectionally).
    variants: name -> constructor arguments; `s4d/inv` is the constructor of s4d with these arguments preset.
    exempt: conformance check -> reason, or `variant/check` -> reason for one variant. An exempted check must fail; it
    is an error if it passes.
    recall: constructor arguments of `lra check --recall`, if the paper chooses them by the range of dependencies.
    no_recall: why it does not recall the first of 256 tokens; empty if it does. Both hold for the default options only.
    """

    title: str
    year: int
    url: str
    scaling: str
    causal: bool
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)
    recall: Mapping[str, Any] = field(default_factory=dict)
    no_recall: str = ""


@dataclass(frozen=True)
class Published:
    """The map from a published state dict to an encoder, as returned by `Encoder.published`.

    options: constructor arguments that follow from the tensors, such as widths and the number of layers.
    names: own parameter -> the published tensors that it is made of; () for a parameter that has none.
    convert: pattern of own parameters (fnmatch) -> function of those tensors. By default, tensors are concatenated
    along their first dimension, dimensions of size 1 are ignored, and a parameter without tensors is 0.
    ignored: patterns of published tensors that the encoder does not use, such as embeddings and output layers.
    undetermined: constructor arguments that do not follow from the tensors and must be given.
    """

    options: Mapping[str, Any]
    names: Mapping[str, Sequence[str]]
    convert: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    undetermined: Sequence[str] = ()


class Encoder(nn.Module, ABC):
    """Base class of every architecture: one public subclass per file in `architectures/`, named after the file.

    Constructors take the keyword-only arguments `d_model, n_layers, length, dropout=0.0` and options of their own. A
    `**` passes on the options of the base class; the signature of the class lists all of them. length: the longest
    sequence that the encoder will process.
    """

    card: ClassVar[Card]
    refuses_causal: ClassVar[bool] = False
    """Whether a constructor with an argument `direction` raises ValueError for "causal"."""
    recurrent: ClassVar[bool | None] = None
    """False if the default options rule out a recurrent mode that the mixers have."""
    d_model: int
    n_layers: int
    length: int
    direction: str = "causal"
    """One of DIRECTIONS. Outputs depend on later positions unless it is "causal"."""
    gaps: ClassVar[bool] = False
    """Whether masks may hide tokens between real ones; never when causal."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]

    @property
    def causal(self) -> bool:
        return self.direction == "causal"

    @property
    def active_parameters(self) -> int:
        """Number of parameters that one token uses: all of them, unless a router picks experts for it."""
        return sum(p.numel() for p in self.parameters())

    @property
    def scaling(self) -> str:
        """Growth of the work of this instance with length: that of the card, unless an option changes it."""
        return self.card.scaling

    @property
    def optim(self) -> Mapping[str, Mapping[str, float]]:
        """Optimiser settings by pattern of parameter names (fnmatch).

        Settings: `lr` (upper bound of the learning rate), `lr_scale` (factor on the recipe's rate), `weight_decay`. The
        first pattern that matches a parameter applies; a pattern that matches none is an error.
        """
        return {}

    @classmethod
    def published(cls, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Published:
        """The map from a published state dict to an encoder of this class, for `lra import` and `lra.import_weights`.

        tensors: the state dict; a missing tensor is reported to the user. given: constructor arguments from the user.
        Raises NotImplementedError if the class has no such map, and ValueError for tensors that it cannot represent.
        """
        raise NotImplementedError(f"{cls.__name__} has no map for published weights")

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: (B, L, D); mask: (B, L) bool, True = real -> (B, L, D)."""

    @abstractmethod
    def cost(self, length: int) -> Cost:
        """Analytic forward work for sequences of `length` tokens, computed from shapes."""

    def init_state(self, batch: int) -> Any:
        """Recurrent state before the first token: tensors, or nested tuples of tensors. Raises NotImplementedError if
        the encoder has no recurrent mode."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent mode")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process one token: x: (B, D), state -> y: (B, D), next state. Gives the same outputs as `forward`."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent mode")

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process C >= 1 tokens: x: (B, C, D), state -> y: (B, C, D), state after the last token.

        By default this calls `step` C times. Encoders whose operators take a state override it with a faster version.
        Prefill, streaming and truncated backpropagation use it. Raises NotImplementedError if the encoder has no
        recurrent mode.
        """
        return stepwise(self.step, x, state)

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of recurrent state per sequence after `tokens` tokens.

        Tensors that the sequences of a batch share, such as discretised matrices, do not count. Raises
        NotImplementedError if the encoder has no recurrent mode.
        """
        sizes = []
        for batch in (1, 2):
            state = self.init_state(batch)
            with torch.no_grad():
                for _ in range(tokens):
                    _, state = self.step(next(self.parameters()).new_zeros(batch, self.d_model), state)
            sizes.append(sum(t.nbytes for t in tree_leaves(state) if isinstance(t, Tensor)))
        return sizes[1] - sizes[0]

    def aux_loss(self) -> Tensor | None:
        """Auxiliary loss of the last forward pass, such as router balance or ponder cost; None if there is none."""
        return None

    def after_step(self) -> None:
        """Update parameters that have no gradient, such as the biases that balance experts. A training loop calls it
        after each step of the optimiser."""

    def diagnostics(self) -> dict[str, float]:
        """Values to log, such as the share of dropped tokens or the load of each expert; {} if there are none.

        They cover the forward passes since the previous call. To measure an evaluation, call it before and after.
        """
        return {}


class Mixer(nn.Module, ABC):
    """A sequence mixer: the part of a residual block that moves information between positions.

    The block sets x to zero at the padding and ignores the outputs there.
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


@runtime_checkable
class Prunable(Protocol):
    """A module made of units that can be removed, such as attention heads or the channels of a feed-forward part.

    unit: "heads" or "channels". units: their number; 0 if none can be removed. reader: the linear map that reads the
    units; each unit has an equal share of its columns.
    """

    unit: str

    @property
    def units(self) -> int: ...

    @property
    def reader(self) -> nn.Linear: ...

    def keep(self, units: Tensor) -> None:
        """Remove all units but these: (n,) int64, in rising order."""
        ...


def keep_linear(linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Remove all rows or columns of a linear map but those at the given indices, in place."""
    with torch.no_grad():
        if rows is not None:
            linear.weight = nn.Parameter(linear.weight[rows])
            linear.bias = None if linear.bias is None else nn.Parameter(linear.bias[rows])
        if columns is not None:
            linear.weight = nn.Parameter(linear.weight[:, columns])
    linear.out_features, linear.in_features = linear.weight.shape


def signature_of(cls: type[Encoder]) -> inspect.Signature:
    """Arguments of a constructor. A `**` in it is replaced by the keyword-only arguments of the base class's
    constructor that it does not name itself; these come first."""
    owner, *bases = (c for c in cls.__mro__ if "__init__" in vars(c))
    own = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
    if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD and issubclass(bases[0], Encoder):
        named = {p.name: p for p in (*inspect.signature(bases[0]).parameters.values(), *own[:-1])}
        positional = [p for p in own[:-1] if p.kind is not p.KEYWORD_ONLY]
        own = [*positional, *(p for p in named.values() if p.kind is p.KEYWORD_ONLY)]
    return inspect.Signature(own)


def clean_padding(x: Tensor, mask: Tensor, *, gaps: bool = False) -> tuple[Tensor, Tensor]:
    """Check the mask and clear the padding, at the start of `forward`: x: (B, L, D), mask: (B, L) bool -> the same.

    x becomes zero at the padding, so that NaN there does not reach gradients. In a row of padding alone the first
    position counts as a real token, so that norms and softmax are defined. gaps: whether real tokens may come after
    padding.

    Raises UserError for a mask that is not (B, L) bool, and for one with real tokens after padding. On an accelerator,
    where reading the mask would wait for the device, the latter is a device-side assertion. It is not checked in traced
    code and in the transforms of torch.func.
    """
    if mask.dtype is not torch.bool or mask.dim() != 2:
        raise UserError(
            f"mask is {tuple(mask.shape)} {mask.dtype}; expected (batch, length) torch.bool, True = real token"
        )
    if not (gaps or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        ordered = (mask[:, :-1] | ~mask[:, 1:]).all()
        if mask.device.type != "cpu":
            torch._assert_async(ordered, PADDING_ORDER)
        elif not ordered:
            raise UserError(PADDING_ORDER)
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return fill_padding(x, mask), mask | (first & ~mask.any(1, keepdim=True))


def lengths_of(mask: Tensor) -> Tensor:
    """Number of real tokens in each row of a right-padded mask: (B, L) bool -> (B,) int64."""
    return mask.sum(dim=1, dtype=torch.int64)


def fill_padding(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """x with `value` at padding: (B, L, D), (B, L) bool -> (B, L, D). On a CPU, x itself if there is no padding."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if x.device.type != "cpu" or traced:
        return x.masked_fill(~mask.unsqueeze(-1), value)
    # faster than masked_fill, forward and backward
    rows = (~mask).flatten().nonzero().squeeze(1)
    return x.flatten(0, 1).index_fill(0, rows, value).view(x.shape) if len(rows) else x


def stepwise(step: Callable[[Tensor, Any], tuple[Tensor, Any]], x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Call `step` on each token of x: (B, C, D), state -> (B, C, D), state after the last token."""
    outputs = []
    for token in x.unbind(1):
        y, state = step(token, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state
