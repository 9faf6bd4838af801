"""The sections of a recipe as frozen dataclasses: every key with its meaning, default and range."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lra.errors import UserError

POOLINGS = ("mean", "max", "last", "cls")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt", "plateau")
PRECISIONS = ("auto", "32", "bf16")
OPTIMISERS = ("adamw", "adam", "sgd", "adafactor", "muon", "lion", "sophia", "schedule_free")
OWN_BETAS = {"lion": (0.9, 0.99), "sophia": (0.965, 0.99)}
"""Of optimisers whose authors give others than Adam's; a recipe that gives some overrides them."""
OBJECTIVES = ("none", "mlm", "causal")
PRETRAINING_LOSSES = ("auto", "cross_entropy", "l1")


def later(default: Any) -> Any:
    """A key added after results were committed: at its default it is no part of the hash, so that they keep theirs."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"later": True})
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class Data:
    """protocol: of the task ("" = its first); *_examples: how many are used (0 = all); batch_size: examples of one
    optimiser step, over all devices and accumulated parts.

    validation_examples limits the evaluations that choose the checkpoint; the test set is always scored whole unless
    test_examples says otherwise, and the result says so.
    """

    protocol: str = ""
    batch_size: int = 32
    evaluation_batch_size: int = 64
    train_examples: int = 0
    validation_examples: int = 0
    test_examples: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "evaluation_batch_size")
        _at_least(self, 0, "train_examples", "validation_examples", "test_examples")


@dataclass(frozen=True)
class Model:
    """Width, depth and surroundings of the encoder; direction: "causal" or "bidirectional" (see lra.encoder).

    budget: largest number of parameters of an encoder for 1,024 tokens, as a multiple of the Transformer's in the same
    recipe (0 = no limit). An architecture above it gets the widest d_model that meets it, a multiple of width_step
    below the d_model given here.
    """

    d_model: int = 64
    n_layers: int = 2
    dropout: float = 0.0
    pooling: str = "mean"
    direction: str = "bidirectional"
    budget: float = later(0.0)
    width_step: int = later(16)

    def __post_init__(self) -> None:
        _at_least(self, 1, "d_model", "n_layers", "width_step")
        _at_least(self, 0, "budget")
        _one_of(self, "pooling", POOLINGS)
        _one_of(self, "direction", ("causal", "bidirectional", "concat", "add", "shared"))
        _share(self, "dropout")


@dataclass(frozen=True)
class Optim:
    """name: one of OPTIMISERS or `module:attr`, called with the parameter groups and `options`; betas: of those that
    have two, by default OWN_BETAS. decay: what weight_decay acts on, "matrices" or "all" (an encoder's own settings
    come first).

    warmup: steps of linear warm-up; schedule: what follows it; "plateau" multiplies the rate by plateau_factor after
    plateau_patience validations without a better accuracy. clip: largest gradient norm (0 = no clipping).
    ema: decay of the averaged weights that are validated, tested and kept (0 = none).
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 1.0
    name: str = later("adamw")
    options: Mapping[str, Any] = later({})
    decay: str = later("matrices")
    plateau_factor: float = later(0.1)
    plateau_patience: int = later(5)
    ema: float = later(0.0)

    def __post_init__(self) -> None:
        _one_of(self, "schedule", SCHEDULES)
        _one_of(self, "decay", ("matrices", "all"))
        if ":" not in self.name:
            _one_of(self, "name", OPTIMISERS)
        _at_least(self, 0, "weight_decay", "warmup", "clip", "plateau_patience")
        _share(self, "ema", "plateau_factor")
        if not 0 < self.lr < math.inf:
            raise UserError(f"optim.lr is {self.lr}; more than 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas is {list(self.betas)}; each from 0 up to, not including, 1")
        if self.name == "schedule_free" and (self.schedule != "constant" or self.ema):
            raise UserError("optim.name 'schedule_free' averages by itself: schedule = \"constant\" and no ema")


@dataclass(frozen=True)
class Train:
    """steps: optimiser steps; evaluate_every: steps between validations; precision: auto = bf16 on devices with native
    bf16 arithmetic (CUDA; CPUs with AVX512-BF16 or AMX), else 32.

    accumulate: parts a step's batch is worked on in, one after the other; checkpointing: forget the activations inside
    each block and compute them again; compile: torch.compile the encoder. tbptt: tokens after which the gradient
    through the recurrent state is cut (0 = never); such an encoder is run in chunks of that many tokens.
    curriculum_steps: over these first steps the longest example grows from curriculum_length tokens to the longest.
    """

    steps: int = 1000
    evaluate_every: int = 250
    precision: str = "auto"
    accumulate: int = later(1)
    checkpointing: bool = later(False)
    compile: bool = later(False)
    tbptt: int = later(0)
    curriculum_length: int = later(0)
    curriculum_steps: int = later(0)

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "evaluate_every", "accumulate")
        _at_least(self, 0, "tbptt", "curriculum_length", "curriculum_steps")
        _one_of(self, "precision", PRECISIONS)
        if bool(self.curriculum_length) != bool(self.curriculum_steps):
            raise UserError("train.curriculum_length and train.curriculum_steps go together; give both or neither")


@dataclass(frozen=True)
class Pretrain:
    """Training on the task's own inputs before the labels are shown. objective: "mlm" predicts masked positions,
    "causal" the next one, "none" leaves this stage out, and the rest then means nothing.

    steps, lr, warmup (then constant), batch_size (0 = the data's own). mask: share of real positions that is hidden.
    loss: "l1" on continuous values, "cross_entropy" over tokens or the 256 byte values; auto: by encoding.
    """

    objective: str = later("none")
    steps: int = later(1000)
    lr: float = later(1e-3)
    warmup: int = later(0)
    batch_size: int = later(0)
    mask: float = later(0.15)
    loss: str = later("auto")

    def __post_init__(self) -> None:
        _one_of(self, "objective", OBJECTIVES)
        _one_of(self, "loss", PRETRAINING_LOSSES)
        _at_least(self, 1, "steps")
        _at_least(self, 0, "warmup", "batch_size")
        if not 0 < self.mask < 1:
            raise UserError(f"pretrain.mask is {self.mask}; between 0 and 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"pretrain.lr is {self.lr}; more than 0")


@dataclass(frozen=True)
class Search:
    """The learning rate by a search on the selection split. rates: each is tried from the same initial weights for
    `share` of the steps, with warm-up and schedule shortened alike; the one with the best validation accuracy (of
    equals, the lowest validation loss) trains the model. Empty: optim.lr as it stands."""

    rates: tuple[float, ...] = later(())
    share: float = later(0.1)

    def __post_init__(self) -> None:
        if not all(0 < rate < math.inf for rate in self.rates) or len(set(self.rates)) != len(self.rates):
            raise UserError(f"search.rates is {list(self.rates)}; different numbers above 0")
        if not 0 < self.share <= 1:
            raise UserError(f"search.share is {self.share}; above 0, at most 1")


@dataclass(frozen=True)
class Expected:
    """What to expect, for people and for an early warning; no part of a recipe's identity.

    accuracy: of the source that the settings come from; low, high: range across reports; all in [0, 1], 0 = not given.
    by: validation accuracy that the source had reached after `epoch` epochs.
    """

    accuracy: float = 0.0
    low: float = 0.0
    high: float = 0.0
    epoch: int = 0
    by: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        _at_least(self, 0, "accuracy", "low", "high", "epoch", "by")
        if max(self.accuracy, self.low, self.high, self.by) > 1 or self.low > self.high:
            raise UserError("expected: accuracies from 0 to 1, low at most high")
        if bool(self.epoch) != bool(self.by):
            raise UserError("expected.epoch and expected.by go together; give both or neither")
        if self.accuracy and not self.source:
            raise UserError("expected.accuracy needs its source")


SECTIONS = {
    "data": Data,
    "model": Model,
    "optim": Optim,
    "train": Train,
    "pretrain": Pretrain,
    "search": Search,
    "expected": Expected,
}


def identity(section: Any) -> dict[str, Any]:
    """What of a section counts in a recipe's hash."""
    unused = (isinstance(section, Pretrain) and section.objective == "none") or (
        isinstance(section, Search) and not section.rates
    )
    if unused:
        return {}
    untouched = {f.name for f in fields(section) if f.metadata.get("later") and getattr(section, f.name) == _default(f)}
    return {f.name: getattr(section, f.name) for f in fields(section) if f.name not in untouched}


def _default(key: Any) -> Any:
    return {} if callable(key.default_factory) else key.default


def _at_least(section: Any, least: float, *keys: str) -> None:
    for key in keys:
        if not least <= getattr(section, key) < math.inf:
            raise UserError(f"{type(section).__name__.lower()}.{key} is {getattr(section, key)}; at least {least}")


def _share(section: Any, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(section, key) < 1:
            name = f"{type(section).__name__.lower()}.{key}"
            raise UserError(f"{name} is {getattr(section, key)}; from 0 up to, not including, 1")


def _one_of(section: Any, key: str, allowed: tuple[str, ...]) -> None:
    if getattr(section, key) not in allowed:
        name = f"{type(section).__name__.lower()}.{key}"
        raise UserError(f"{name} is {getattr(section, key)!r}; one of {', '.join(allowed)}")
