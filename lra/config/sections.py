"""The sections of a recipe as frozen dataclasses: meaning, default and range of every key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lra.errors import UserError

POOLINGS = ("mean", "max", "last", "cls", "first")
HEADS = ("auto", "linear", "mlp")
PAIRS = ("products", "concat", "cross", "gated")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt", "plateau")
PRECISIONS = ("auto", "32", "bf16", "fp16")
OPTIMISERS = ("adamw", "adam", "sgd", "adafactor", "muon", "lion", "sophia", "schedule_free")
OWN_BETAS = {"lion": (0.9, 0.99), "sophia": (0.965, 0.99)}
"""Default betas of optimisers whose authors recommend others than Adam's."""
OBJECTIVES = ("none", "mlm", "causal")
CURRICULA = ("length", "difficulty", "dynamic")
PRETRAINING_LOSSES = ("auto", "cross_entropy", "l1")


def unhashed(default: Any) -> Any:
    """A key that was added after results had been recorded. Its default is left out of the recipe's hash, so the hashes
    of those results stay valid."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"unhashed": True})
    return field(default=default, metadata={"unhashed": True})


@dataclass(frozen=True)
class Data:
    """The data of a run.

    protocol: protocol of the task ("" = its first). batch_size: examples per optimiser step, over all devices and
    accumulated micro-batches. train_examples, validation_examples, test_examples: number of examples used (0 = all).

    validation_examples limits the evaluations that select the checkpoint. A result on part of the test set is marked.
    """

    protocol: str = ""
    batch_size: int = 32
    evaluation_batch_size: int = 64
    train_examples: int = 0
    validation_examples: int = 0
    test_examples: int = 0

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "batch_size", "evaluation_batch_size")
        _check_at_least(self, 0, "train_examples", "validation_examples", "test_examples")


@dataclass(frozen=True)
class Model:
    """Width, depth, dropout, pooling and direction of the model.

    pooling: over the real tokens; "cls" reads a learned token that is added in front, "first" the first token.
    direction: "causal" or "bidirectional", or how the two directions are combined (see lra.encoder.DIRECTIONS).

    budget: largest number of parameters of the encoder at 1,024 tokens, as a multiple of the Transformer's in the same
    recipe (0 = no limit); in a mixture of experts, only parameters that process one token count. An architecture above
    the limit gets the largest d_model that meets it among the multiples of width_step below d_model. One below the
    limit gets as many layers as meet it, at most max_layers.

    head, head_hidden, head_activation, pair: the map from pooled vectors to classes, and how two sequences are combined
    (lra.model.Head). tie: embedding and head share their weights; for tasks whose target is the next token.

    contrastive: weight of the contrastive loss of two sequences, added to the loss of the classes, 0 = none;
    temperature: its initial temperature (lra.towers.Contrast).
    """

    d_model: int = 64
    n_layers: int = 2
    dropout: float = 0.0
    pooling: str = "mean"
    direction: str = "bidirectional"
    budget: float = unhashed(0.0)
    width_step: int = unhashed(16)
    max_layers: int = unhashed(0)
    head: str = unhashed("auto")
    head_hidden: tuple[int, ...] = unhashed(())
    head_activation: str = unhashed("gelu")
    pair: str = unhashed("products")
    tie: bool = unhashed(False)
    contrastive: float = unhashed(0.0)
    temperature: float = unhashed(0.07)

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "d_model", "n_layers", "width_step")
        _check_at_least(self, 0, "budget", "max_layers", "contrastive")
        _check_at_least(self, 0.01, "temperature")
        _check_choice(self, "pooling", POOLINGS)
        _check_choice(self, "direction", ("causal", "bidirectional", "concat", "add", "shared"))
        _check_share(self, "dropout")
        _check_choice(self, "head", HEADS)
        _check_choice(self, "head_activation", ("gelu", "relu"))
        _check_choice(self, "pair", PAIRS)
        if (self.head == "mlp") != bool(self.head_hidden) or any(width < 1 for width in self.head_hidden):
            raise UserError(
                f"model.head is {self.head!r} and model.head_hidden is {list(self.head_hidden)}; set both for an MLP "
                "('mlp' and the widths of its hidden layers), or neither"
            )


@dataclass(frozen=True)
class Optim:
    """The optimiser and its schedule.

    name: one of OPTIMISERS, or `module:attr`, which is called with the parameter groups and `options`. betas: for
    optimisers that have two; OWN_BETAS lists other defaults than Adam's. decay: parameters that weight_decay applies
    to, "matrices" or "all" (settings of the encoder take precedence).

    warmup: steps of warm-up, in which the learning rate grows as the step to the power of warmup_power; schedule: the
    schedule after the warm-up. "plateau" multiplies the rate by plateau_factor after plateau_patience validations
    without a better accuracy. clip: largest gradient norm (0 = no clipping). ema: decay of the moving average of the
    weights; the average is validated, tested and saved (0 = none).
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 1.0
    name: str = unhashed("adamw")
    options: Mapping[str, Any] = unhashed({})
    decay: str = unhashed("matrices")
    plateau_factor: float = unhashed(0.1)
    plateau_patience: int = unhashed(5)
    ema: float = unhashed(0.0)
    warmup_power: float = unhashed(1.0)

    def __post_init__(self) -> None:
        _check_choice(self, "schedule", SCHEDULES)
        _check_choice(self, "decay", ("matrices", "all"))
        if ":" not in self.name:
            _check_choice(self, "name", OPTIMISERS)
        _check_at_least(self, 0, "weight_decay", "warmup", "clip", "plateau_patience")
        _check_share(self, "ema", "plateau_factor")
        if not 0 < self.warmup_power < math.inf:
            raise UserError(f"optim.warmup_power is {self.warmup_power}; more than 0")
        if self.warmup_power != 1 and self.name == "schedule_free":
            raise UserError("optim.name 'schedule_free' has a linear warm-up of its own: set warmup_power = 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"optim.lr is {self.lr}; more than 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas is {list(self.betas)}; each from 0 up to, not including, 1")
        if self.name == "schedule_free" and (self.schedule != "constant" or self.ema):
            raise UserError("optim.name 'schedule_free' averages the weights: set schedule = \"constant\" and ema = 0")


@dataclass(frozen=True)
class Train:
    """Training steps and how they are executed.

    steps: optimiser steps; evaluate_every: steps between validations; precision: auto = bf16 on devices with native
    bf16 arithmetic (CUDA; CPUs with AVX512-BF16 or AMX), else 32. fp16, with loss scaling, needs a GPU.

    accumulate: micro-batches per optimiser step; checkpointing: recompute the activations of each block in the backward
    pass; compile: torch.compile the encoder. tbptt: chunk length in tokens of truncated backpropagation through time (0
    = off). stream: each row of a batch follows the packed documents in their order, and its recurrent state is carried
    from step to step. distill_alpha, distill_temperature: with a teacher (--teacher), the weight of the distillation
    loss, and the temperature of both outputs.

    curriculum: the order of the examples. "length": in the first curriculum_steps steps (0 = off) the length limit
    grows from curriculum_length tokens to the protocol's length. "difficulty": the examples, sorted by their
    difficulty for another run (--scorer), are divided into curriculum_bins bins; training begins with the easiest bin,
    and in the first curriculum_steps steps the others are added one by one. "dynamic": the share of hard examples (the
    more difficult half) in a batch is the accuracy of the last validation (lra.data.curriculum).
    """

    steps: int = 1000
    evaluate_every: int = 250
    precision: str = "auto"
    accumulate: int = unhashed(1)
    checkpointing: bool = unhashed(False)
    compile: bool = unhashed(False)
    tbptt: int = unhashed(0)
    stream: bool = unhashed(False)
    distill_alpha: float = unhashed(0.5)
    distill_temperature: float = unhashed(2.0)
    curriculum: str = unhashed("length")
    curriculum_length: int = unhashed(0)
    curriculum_steps: int = unhashed(0)
    curriculum_bins: int = unhashed(5)

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "steps", "evaluate_every", "accumulate")
        _check_at_least(self, 0, "tbptt", "curriculum_length", "curriculum_steps")
        _check_choice(self, "precision", PRECISIONS)
        if not 0 <= self.distill_alpha <= 1:
            raise UserError(f"train.distill_alpha is {self.distill_alpha}; from 0 to 1")
        if not 0 < self.distill_temperature < math.inf:
            raise UserError(f"train.distill_temperature is {self.distill_temperature}; more than 0")
        _check_choice(self, "curriculum", CURRICULA)
        _check_at_least(self, 2, "curriculum_bins")
        if self.curriculum == "length" and bool(self.curriculum_length) != bool(self.curriculum_steps):
            raise UserError("train.curriculum_length and train.curriculum_steps go together; give both or neither")
        if self.curriculum != "length" and self.curriculum_length:
            raise UserError(
                f"train.curriculum_length is for train.curriculum=length, not {self.curriculum}; leave it out"
            )
        if self.stream and (self.curriculum != "length" or self.curriculum_steps):
            raise UserError("train.stream sets the order of the examples, and so does train.curriculum; leave one out")
        if self.stream and self.compile:
            raise UserError("train.stream keeps a state outside of what train.compile compiles; leave one out")
        if self.curriculum == "difficulty" and self.curriculum_steps < self.curriculum_bins - 1:
            raise UserError(
                f"train.curriculum_steps is {self.curriculum_steps}; at least {self.curriculum_bins - 1}, so that each "
                f"of {self.curriculum_bins} bins has a step (train.curriculum=difficulty)"
            )
        if self.curriculum == "dynamic" and self.curriculum_steps:
            raise UserError("train.curriculum_steps: a dynamic curriculum covers the whole training; leave it out")


@dataclass(frozen=True)
class Pretrain:
    """Self-supervised pretraining on the inputs of the task.

    objective: "mlm" predicts masked positions, "causal" the next position; "none" skips this stage, and the other keys
    are ignored. warmup: steps of linear warm-up to a constant rate; batch_size: 0 = data.batch_size; mask: share of
    real positions that is masked. loss: "l1" on continuous values, "cross_entropy" on tokens or the 256 byte values;
    "auto" chooses by encoding.
    """

    objective: str = unhashed("none")
    steps: int = unhashed(1000)
    lr: float = unhashed(1e-3)
    warmup: int = unhashed(0)
    batch_size: int = unhashed(0)
    mask: float = unhashed(0.15)
    loss: str = unhashed("auto")

    def __post_init__(self) -> None:
        _check_choice(self, "objective", OBJECTIVES)
        _check_choice(self, "loss", PRETRAINING_LOSSES)
        _check_at_least(self, 1, "steps")
        _check_at_least(self, 0, "warmup", "batch_size")
        if not 0 < self.mask < 1:
            raise UserError(f"pretrain.mask is {self.mask}; between 0 and 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"pretrain.lr is {self.lr}; more than 0")


@dataclass(frozen=True)
class Search:
    """Search for the learning rate on the selection split.

    rates: candidates. Each is trained from the same initial weights for `share` of the steps, with warm-up and schedule
    shortened in proportion. The rate with the best validation accuracy trains the model; ties are broken by the lower
    validation loss. Without rates there is no search, and optim.lr applies.
    """

    rates: tuple[float, ...] = unhashed(())
    share: float = unhashed(0.1)

    def __post_init__(self) -> None:
        if not all(0 < rate < math.inf for rate in self.rates) or len(set(self.rates)) != len(self.rates):
            raise UserError(f"search.rates is {list(self.rates)}; different numbers above 0")
        if not 0 < self.share <= 1:
            raise UserError(f"search.share is {self.share}; above 0, at most 1")


@dataclass(frozen=True)
class Expected:
    """Expected results, shown to the user and used for an early warning. Not part of the recipe's hash.

    accuracy: as in the source of the settings; low, high: range over several reports; all in [0, 1], 0 = unknown.
    by: validation accuracy of the source after `epoch` epochs.
    """

    accuracy: float = 0.0
    low: float = 0.0
    high: float = 0.0
    epoch: int = 0
    by: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        _check_at_least(self, 0, "accuracy", "low", "high", "epoch", "by")
        if max(self.accuracy, self.low, self.high, self.by) > 1 or self.low > self.high:
            raise UserError("expected: accuracies are from 0 to 1, and low is at most high")
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
    """The keys and values of a section that enter the hash of a recipe."""
    unused = (isinstance(section, Pretrain) and section.objective == "none") or (
        isinstance(section, Search) and not section.rates
    )
    if unused:
        return {}
    values = {f.name: getattr(section, f.name) for f in fields(section)}
    default = {f.name for f in fields(section) if f.metadata.get("unhashed") and values[f.name] == _default(f)}
    return {name: value for name, value in values.items() if name not in default}


def _default(key: Any) -> Any:
    return {} if callable(key.default_factory) else key.default


def _check_at_least(section: Any, minimum: float, *keys: str) -> None:
    for key in keys:
        if not minimum <= getattr(section, key) < math.inf:
            raise UserError(f"{type(section).__name__.lower()}.{key} is {getattr(section, key)}; at least {minimum}")


def _check_share(section: Any, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(section, key) < 1:
            name = f"{type(section).__name__.lower()}.{key}"
            raise UserError(f"{name} is {getattr(section, key)}; from 0 up to, not including, 1")


def _check_choice(section: Any, key: str, allowed: tuple[str, ...]) -> None:
    if getattr(section, key) not in allowed:
        name = f"{type(section).__name__.lower()}.{key}"
        raise UserError(f"{name} is {getattr(section, key)!r}; one of {', '.join(allowed)}")
