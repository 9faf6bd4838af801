"""The shared residual stack: an architecture supplies a mixer, the stack supplies everything around it.

Each of the blocks is
    prenorm (default)   x = x + mixer(norm(x));  x = x + ffn(norm(x));  after the last block, norm(x)
    postnorm            x = norm(x + mixer(x));  x = norm(x + ffn(x))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.architectures._checks import at_least, one_of
from lra.architectures._dropout import Dropout, tie_dropout
from lra.architectures._experts import Experts
from lra.architectures._moe import MIXTURES
from lra.architectures._norm import BatchNorm, LayerNorm, RMSNorm, ScaleNorm, normalised
from lra.architectures._precision import own_precision
from lra.architectures._table import Tables
from lra.encoder import Cost, Encoder, Mixer, clean_padding, fill_padding, keep_linear, lengths_of

NORMS: dict[str, type[nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm, "batch": BatchNorm, "scale": ScaleNorm}
POSITIONS = ("none", "sinusoidal", "learned")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
FFNS = (*ACTIVATIONS, "swiglu", "none", *MIXTURES)
Advance = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""`step` or `chunk` of a mixer."""


@dataclass(frozen=True)
class Block:
    """The parts of a block around a mixer.

    ffn: "gelu", "relu" or "silu" (two linear maps), "swiglu" (gated), "none", or a mixture of experts, of MIXTURES in
    `_moe.py`; expand: its hidden width, or that of each expert, over d_model.
    experts: options of the mixture, the keyword arguments of its class.
    norm: "layer", "rms", "scale" (rms with one gain for all channels), or "batch" (in training over the real tokens of
    the whole batch); prenorm: before each part (else after the sum).
    norm_eps: what the norms add to the variance or the mean square, 1e-6 in "rms" and 1e-5 in the others unless given.
    positions: added to the input: "none", "sinusoidal" (fixed), "learned" (up to `length`).
    embedding_dropout: rate of the dropout on the input once positions are added.
    tie_dropout: every dropout of the encoder but that on attention weights drops a channel at all tokens of a sequence
    or at none.
    """

    ffn: str = "gelu"
    expand: float = 4.0
    norm: str = "layer"
    prenorm: bool = True
    positions: str = "none"
    experts: Mapping[str, Any] = field(default_factory=dict)
    embedding_dropout: float = 0.0
    tie_dropout: bool = False
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key, allowed in (("ffn", FFNS), ("norm", tuple(NORMS)), ("positions", POSITIONS)):
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(f"block.{key} is {value!r}; one of {', '.join(allowed)}")
        if self.expand <= 0:
            raise ValueError(f"block.expand is {self.expand}; more than 0")
        if self.norm_eps is not None and not self.norm_eps > 0:
            raise ValueError(f"block.norm_eps is {self.norm_eps}; more than 0")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"block.embedding_dropout is {self.embedding_dropout}; from 0 up to, not including, 1")
        if not isinstance(self.tie_dropout, bool):
            raise ValueError(f"block.tie_dropout is {self.tie_dropout!r}; true or false")
        options = _options(MIXTURES[self.ffn]) if self.ffn in MIXTURES else []
        for key in self.experts:
            if not options:
                raise ValueError(
                    f"block.experts has {key!r}, but block.ffn is {self.ffn!r}; one of {', '.join(MIXTURES)}"
                )
            if key not in options:
                raise ValueError(f"unknown block.experts.{key}; {_hint(key, options)}")

    def make_norm(self, d_model: int) -> nn.Module:
        """A norm over the channels of (B, L, d_model)."""
        return NORMS[self.norm](d_model) if self.norm_eps is None else NORMS[self.norm](d_model, eps=self.norm_eps)

    def updated(self, changes: Mapping[str, Any] | None) -> Block:
        """This block with some fields changed; an unknown field is a ValueError naming the nearest."""
        known = [f.name for f in fields(self)]
        for key in changes or {}:
            if key not in known:
                raise ValueError(f"unknown block.{key}; {_hint(key, known)}")
        return replace(self, **(changes or {}))


def _options(mixture: type[Experts]) -> list[str]:
    parameters = inspect.signature(mixture).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _hint(key: str, known: list[str]) -> str:
    near = get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else ", ".join(known)


class FeedForward(nn.Module):
    """Position-wise: (..., D) -> (..., D). gelu, relu, silu: W2 act(W1 x); swiglu: W2 (silu(W1 x) * W3 x)."""

    def __init__(self, kind: str, d_model: int, expand: float, dropout: float) -> None:
        super().__init__()
        self.kind, self.hidden = kind, round(d_model * expand)
        self.up = nn.Linear(d_model, self.hidden * (2 if kind == "swiglu" else 1))
        self.down = nn.Linear(self.hidden, d_model)
        self.dropout = Dropout(dropout)

    unit = "channels"

    @property
    def units(self) -> int:
        return self.hidden

    @property
    def reader(self) -> nn.Linear:
        return self.down

    def keep(self, units: Tensor) -> None:
        rows = torch.cat([units, self.hidden + units]) if self.kind == "swiglu" else units
        keep_linear(self.up, rows=rows)
        keep_linear(self.down, columns=units)
        self.hidden = len(units)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.up(x)
        if self.kind == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        else:
            h = ACTIVATIONS[self.kind](h)
        return self.down(self.dropout(h))

    def cost(self, length: int) -> Cost:
        up = Cost.linear(length, self.up.in_features, self.up.out_features)
        return up + Cost.linear(length, self.hidden, self.down.out_features) + Cost(other=8.0 * length * self.hidden)


def feed_forward(block: Block, d_model: int, dropout: float) -> FeedForward | Experts | None:
    """The part after the mixer that `block` names; a mixture of experts has no dropout inside."""
    if block.ffn == "none":
        return None
    if block.ffn in MIXTURES:
        return MIXTURES[block.ffn](d_model, block.expand, **block.experts)
    return FeedForward(block.ffn, d_model, block.expand, dropout)


class Layer(nn.Module):
    """One block: mixer and feed-forward, each with its norm and residual."""

    def __init__(self, mixer: Mixer, d_model: int, block: Block, dropout: float) -> None:
        super().__init__()
        self.prenorm = block.prenorm
        self.mixer = mixer
        self.norm = block.make_norm(d_model)
        self.ffn = feed_forward(block, d_model, dropout)
        self.ffn_norm = None if self.ffn is None else block.make_norm(d_model)
        self.dropout = Dropout(dropout)

    def _around(
        self, x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor], mask: Tensor | None = None
    ) -> Tensor:
        if self.prenorm:
            return own_precision(x, lambda: x + self.dropout(part(normalised(norm, x, mask))))
        return own_precision(x, lambda: normalised(norm, x + self.dropout(part(x)), mask))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self._around(x, self.norm, lambda h: self.mixer(fill_padding(h, mask), mask), mask)
        ffn = self.ffn
        if ffn is not None and self.ffn_norm is not None:
            x = self._around(x, self.ffn_norm, lambda h: ffn(h, mask), mask)
        return x

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._advance(self.mixer.step, x, state)

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._advance(self.mixer.chunk, x, state)

    def _advance(self, mixer: Advance, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """x: (B, D) or (B, C, D), as `mixer` takes it."""
        after: list[Any] = []

        def mix(h: Tensor) -> Tensor:
            y, new = mixer(h, state)
            after.append(new)
            return y

        x = self._around(x, self.norm, mix)
        if self.ffn is not None and self.ffn_norm is not None:
            x = self._around(x, self.ffn_norm, self.ffn)
        return x, after[0]


class Flip(torch.autograd.Function):
    """Rows of x: (R, D) in an order that is its own inverse, so that the gradient is read in the same order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return Flip.apply(grads[0], *ctx.saved_tensors), None


def flip(x: Tensor, mask: Tensor) -> Tensor:
    """Reverse the real tokens of each row, leaving padding in place: (B, L, D), (B, L) -> (B, L, D)."""
    position = torch.arange(x.shape[1], device=x.device)
    length = lengths_of(mask).unsqueeze(1)
    index = torch.where(position < length, length - 1 - position, position)
    rows = index + x.shape[1] * torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return Flip.apply(x.flatten(0, 1), rows.flatten()).view(x.shape)


class Bidirectional(Mixer):
    """A causal mixer run both ways. concat: project [ahead, back]; add: sum of two mixers; shared: sum, one mixer."""

    def __init__(self, make: Callable[[], Mixer], d_model: int, combine: str) -> None:
        super().__init__()
        self.d_model = d_model
        self.ahead = make()
        self.back = None if combine == "shared" else make()
        self.project = nn.Linear(2 * d_model, d_model) if combine == "concat" else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        ahead = self.ahead(x, mask)
        back = flip((self.back or self.ahead)(flip(x, mask), mask), mask)
        return self.project(torch.cat([ahead, back], dim=-1)) if self.project is not None else ahead + back

    def cost(self, length: int) -> Cost:
        both = self.ahead.cost(length) * 2
        if self.project is None:
            return both + Cost(other=float(length * self.d_model))
        return both + Cost.linear(length, self.project.in_features, self.project.out_features)

    def aux_loss(self) -> Tensor | None:
        return _sum_losses([self.ahead, self.back])


class Stack(Tables, Encoder):
    """Encoder built of `n_layers` residual blocks around the mixers that `make(layer)` returns.

    direction: "causal", or "bidirectional"; mixers with a bidirectional form of their own say `native=True` and build
    it themselves; the others are run both ways and combined by "concat" (= "bidirectional"), "add" or "shared".
    block: changes to the class's own `block`, by field name. A subclass whose blocks pass more than x along names its
    own `layer`.
    """

    block: ClassVar[Block] = Block()
    layer: ClassVar[type[Layer]] = Layer

    def __init__(
        self,
        make: Callable[[int], Mixer],
        native: bool = False,
        *,
        d_model: int,
        n_layers: int,
        length: int,
        dropout: float = 0.0,
        direction: str = "causal",
        block: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        at_least(1, d_model=d_model, n_layers=n_layers, length=length)
        allowed = ("causal", "bidirectional") if native else ("causal", "bidirectional", "concat", "add", "shared")
        one_of(allowed, direction=direction)
        self.d_model, self.n_layers, self.length, self.direction = d_model, n_layers, length, direction
        shape = type(self).block.updated(block)
        combine = "concat" if direction == "bidirectional" else direction

        def mixer(layer: int) -> Mixer:
            if native or direction == "causal":
                return make(layer)
            return Bidirectional(lambda: make(layer), d_model, combine)

        self.layers = nn.ModuleList(type(self).layer(mixer(i), d_model, shape, dropout) for i in range(n_layers))
        if direction == "causal" and any(part.looks_ahead for part in self.experts):
            raise ValueError(f"direction is 'causal', but the mixture {shape.ffn!r} looks at all tokens of a sequence")
        self.norm = shape.make_norm(d_model) if shape.prenorm else nn.Identity()
        self.register_buffer("positions", None)
        if shape.positions == "sinusoidal":
            self.register_table("positions", sinusoidal, length, d_model)
        elif shape.positions == "learned":
            self.positions = nn.Parameter(torch.randn(length, d_model) * 0.02)
        self.embedding_dropout = Dropout(shape.embedding_dropout)
        tie_dropout(self, shape.tie_dropout)

    @property
    def blocks(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def experts(self) -> list[Experts]:
        return [layer.ffn for layer in self.blocks if isinstance(layer.ffn, Experts)]

    @property
    def active_parameters(self) -> int:
        return super().active_parameters - sum(m.idle_parameters for m in self.modules() if isinstance(m, Experts))

    def enter(self, x: Tensor, time: Tensor | int = 0) -> Tensor:
        """Add positions to a sequence (B, L, D) that starts at `time`, or to one token (B, D), and drop."""
        if self.positions is not None and x.dim() == 2:
            x = x + self.positions[time].to(x.dtype)
        elif self.positions is not None:
            start = int(time)
            end = start + x.shape[1]
            if end > len(self.positions):
                raise ValueError(f"length {end} exceeds the {len(self.positions)} positions this encoder has")
            x = x + self.positions[start:end].to(x.dtype)
        return self.embedding_dropout(x)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = clean_padding(x, mask, gaps=self.gaps and not self.causal)
        x = self.enter(x)
        for layer in self.blocks:
            x = layer(x, mask)
        return normalised(self.norm, x, mask)

    def cost(self, length: int) -> Cost:
        total = Cost(other=5.0 * length * self.d_model)
        for layer in self.blocks:
            total = total + layer.mixer.cost(length) + Cost(other=12.0 * length * self.d_model)
            if layer.ffn is not None:
                total = total + layer.ffn.cost(length)
        return total

    def init_state(self, batch: int) -> Any:
        if not self.causal:
            raise NotImplementedError(f"{type(self).__name__} has no recurrent mode when {self.direction}")
        if any(part.capacity for part in self.experts):
            raise NotImplementedError("no recurrent mode with a capacity: what an expert takes depends on the length")
        start = torch.zeros((), dtype=torch.int64, device=next(self.parameters()).device)
        return start, tuple(layer.mixer.init_state(batch) for layer in self.blocks)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        time, before = state
        x, after = self.enter(x, time), []
        for layer, own in zip(self.blocks, before, strict=True):
            x, own = layer.step(x, own)
            after.append(own)
        return self.norm(x), (time + 1, tuple(after))

    def chunk(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        time, before = state
        tokens, x, after = x.shape[1], self.enter(x, time), []
        for layer, own in zip(self.blocks, before, strict=True):
            x, own = layer.chunk(x, own)
            after.append(own)
        return self.norm(x), (time + tokens, tuple(after))

    def aux_loss(self) -> Tensor | None:
        return _sum_losses([*(layer.mixer for layer in self.blocks), *self.experts])

    def after_step(self) -> None:
        for part in self.experts:
            part.after_step()

    def diagnostics(self) -> dict[str, float]:
        """Values of each mixture of experts: `ffn<layer>.dropped`, `ffn<layer>.entropy`, `ffn<layer>.load_<expert>`."""
        found: dict[str, float] = {}
        for i, layer in enumerate(self.blocks):
            if isinstance(layer.ffn, Experts):
                found |= {f"ffn{i}.{name}": value for name, value in layer.ffn.diagnostics().items()}
        return found


def sinusoidal(length: int, d_model: int) -> Tensor:
    """Fixed positions of arXiv:1706.03762 section 3.5, sines in even and cosines in odd channels: (L, D)."""
    # float64: at position 16,384 float32 angles are off by 1e-3
    rate = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angle = torch.arange(length).unsqueeze(1) * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d_model].float()


def _sum_losses(parts: list[Any]) -> Tensor | None:
    losses = [loss for part in parts if part is not None and (loss := part.aux_loss()) is not None]
    return torch.stack(losses).sum() if losses else None
