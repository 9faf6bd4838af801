"""First-token recall: can an encoder carry the first token to the last position?

A sequence has L / 2 to L tokens. The first is one of 8 values, the others are drawn from 8 distractors. The label is
the first token, predicted from the output at the last real token. Every batch is newly sampled, so examples cannot be
memorised. Chance is 1/8.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lra.config.recipe import Optim
from lra.encoder import Card
from lra.model import Batch, Classifier
from lra.registry import Constructor, architectures
from lra.task import Protocol
from lra.training.optimisers import build

VALUES = 8
TARGET = 0.95
"""Accuracy at which the task counts as learned."""
TEST_EXAMPLES = 1024
LENGTH = 256
"""Sequence length at which the accuracy is measured."""
START_LENGTH = 16
"""Sequence length at the start of training."""


@dataclass(frozen=True)
class Recall:
    """accuracy: on TEST_EXAMPLES new examples after training; steps, seconds: duration of the training."""

    accuracy: float
    steps: int
    seconds: float

    @property
    def learned(self) -> bool:
        return self.accuracy >= TARGET


def examples(number: int, length: int, generator: torch.Generator) -> Batch:
    """Sample `number` sequences, padded to `length`. Tokens 0 to 7 are values, 8 to 15 distractors."""
    tokens = torch.randint(VALUES, 2 * VALUES, (number, length), generator=generator)
    labels = torch.randint(VALUES, (number,), generator=generator)
    tokens[:, 0] = labels
    lengths = torch.randint((length + 1) // 2, length + 1, (number, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return Batch(tokens.unsqueeze(1), mask.unsqueeze(1), labels, torch.arange(number))


def recall(
    reference: str | Constructor, *, direction: str = "causal", length: int = LENGTH, steps: int | None = None,
    seconds: float | None = 90.0, lr: float = 5e-3, seed: int = 0, on_step: Callable[[int, float], None] | None = None,
    **options: Any,
) -> Recall:  # fmt: skip
    """Train an encoder with 2 layers and d_model 32 in batches of 32, until an accuracy of 95 % or for at most `steps`
    or `seconds`.

    The sequences start at 16 tokens and double in length, up to `length`, whenever the accuracy reaches 95 %: without
    this curriculum, training may take long to receive a first signal. The accuracy returned is the one at `length`.
    Learning rates are those of the encoder's `optim`, else `lr`, after 20 steps of warm-up; gradients are clipped at
    norm 1. on_step: called with the step and the running accuracy. options: other constructor arguments; they replace
    those of `Card.recall`. Raises UserError for an unknown name, argument or direction.
    """
    constructor = architectures.get(reference) if isinstance(reference, str) else reference
    card = getattr(constructor.cls, "card", None)
    options = {**(card.recall if isinstance(card, Card) and not constructor.preset else {}), **options}
    if "direction" in constructor.options():
        options["direction"] = direction
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = constructor(d_model=32, n_layers=2, length=length, **options)
        model = Classifier(encoder, Protocol("recall", length, vocabulary=2 * VALUES), VALUES, 1, "last")
        return _train(model, length, lr, steps, seconds, torch.Generator().manual_seed(seed), on_step)


def _train(
    model: Classifier, length: int, lr: float, steps: int | None, seconds: float | None, generator: torch.Generator,
    on_step: Callable[[int, float], None] | None,
) -> Recall:  # fmt: skip
    optimizer = build(model, model.encoder, Optim(lr=lr, weight_decay=0.0))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    started, step, accuracy, current = time.perf_counter(), 0, 0.0, min(START_LENGTH, length)
    while (steps is None or step < steps) and (seconds is None or time.perf_counter() - started < seconds):
        batch = examples(32, current, generator)
        logits = model(batch)
        loss, aux_loss = F.cross_entropy(logits, batch.labels), model.encoder.aux_loss()
        optimizer.zero_grad()
        (loss if aux_loss is None else loss + aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        step += 1
        accuracy = 0.9 * accuracy + 0.1 * _accuracy(logits, batch.labels)
        if on_step is not None:
            on_step(step, accuracy)
        # the running mean lags behind the accuracy, so it is evaluated slightly below the target
        if accuracy >= TARGET - 0.02 and step % 10 == 0:
            longest = current == length
            if _evaluate(model, current, TEST_EXAMPLES if longest else 256, generator) >= TARGET:
                if longest:
                    break
                current = min(2 * current, length)
    duration = time.perf_counter() - started
    return Recall(_evaluate(model, length, TEST_EXAMPLES, generator), step, duration)


@torch.no_grad()
def _evaluate(model: Classifier, length: int, number: int, generator: torch.Generator) -> float:
    model.eval()
    parts = [examples(64, length, generator) for _ in range(number // 64)]
    accuracy = sum(_accuracy(model(part), part.labels) for part in parts) / len(parts)
    model.train()
    return accuracy


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()
