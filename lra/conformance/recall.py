"""First-token recall: does what the first token said arrive at the last one?

Sequences of L / 2 to L tokens. The first is one of 8 values, the others are drawn from 8 distractors, and the class is
the first token, read from the encoder's output at the last real token alone. Examples are drawn as they are needed, so
there is nothing to learn by heart; 1 in 8 is chance.
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
from lra.model import Batch, Classifier
from lra.registry import Constructor, architectures
from lra.task import Protocol
from lra.training.optimisers import build

VALUES = 8
GOAL, FRESH = 0.95, 1024
FIRST = 16
"""Tokens of the sequences that training begins with."""
CANNOT = {
    "bounded_cnn": "its output sees a fixed number of tokens, and the first is not among them",
    "local": "its blocks never meet, and the last token's does not hold the first",
    "elman": "what it holds passes through tanh at every token: the gradient of the first vanishes",
}
"""Architectures whose theory says that they cannot learn it, and why. They are expected to fail."""
OPTIONS: dict[str, dict[str, Any]] = {
    "lru": {"r_min": 0.98, "r_max": 0.9999, "max_phase": 0.1},  # section 3.4: a thin ring and small phases to go far
}
"""Arguments that a paper has one choose for how far back the task goes."""


@dataclass(frozen=True)
class Recall:
    """accuracy: of FRESH examples after training; steps and seconds: that training took."""

    accuracy: float
    steps: int
    seconds: float

    @property
    def learnt(self) -> bool:
        return self.accuracy >= GOAL


def examples(number: int, length: int, generator: torch.Generator) -> Batch:
    """`number` sequences, padded to `length`: tokens 0 to 7 are values, 8 to 15 distractors."""
    tokens = torch.randint(VALUES, 2 * VALUES, (number, length), generator=generator)
    labels = torch.randint(VALUES, (number,), generator=generator)
    tokens[:, 0] = labels
    lengths = torch.randint((length + 1) // 2, length + 1, (number, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return Batch(tokens.unsqueeze(1), mask.unsqueeze(1), labels, torch.arange(number))


def recall(
    reference: str | Constructor, *, direction: str = "causal", length: int = 256, steps: int | None = None,
    seconds: float | None = 90.0, lr: float = 5e-3, seed: int = 0, seen: Callable[[int, float], None] | None = None,
    **options: Any,
) -> Recall:  # fmt: skip
    """Train an encoder of 2 layers at d_model 32, in batches of 32, until 95 % or until `steps` or `seconds` are over.

    The sequences begin at 16 tokens and become twice as long, up to `length`, each time they are mastered: a long
    wait for the first signal says little of an architecture. Accuracy is that at `length`. Each parameter has the
    rate the encoder asks for, or `lr`, after a warm-up of 20 steps; gradients are clipped at norm 1. seen: called
    with step and accuracy. options: other constructor arguments. Raises UserError for an unknown name, argument or
    direction.
    """
    constructor = architectures.get(reference) if isinstance(reference, str) else reference
    options = {**OPTIONS.get(constructor.name, {}), **options}
    if "direction" in constructor.options():
        options["direction"] = direction
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = constructor(d_model=32, n_layers=2, length=length, **options)
        model = Classifier(encoder, Protocol("recall", length, vocabulary=2 * VALUES), VALUES, 1, "last")
        return _train(model, length, lr, steps, seconds, torch.Generator().manual_seed(seed), seen)


def _train(
    model: Classifier, length: int, lr: float, steps: int | None, seconds: float | None, draw: torch.Generator,
    seen: Callable[[int, float], None] | None,
) -> Recall:  # fmt: skip
    optimizer = build(model, model.encoder, Optim(lr=lr, weight_decay=0.0))
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    started, step, right, now = time.perf_counter(), 0, 0.0, min(FIRST, length)
    while (steps is None or step < steps) and (seconds is None or time.perf_counter() - started < seconds):
        batch = examples(32, now, draw)
        logits = model(batch)
        loss, extra = F.cross_entropy(logits, batch.labels), model.encoder.aux_loss()
        optimizer.zero_grad()
        (loss if extra is None else loss + extra).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        step += 1
        right = 0.9 * right + 0.1 * _accuracy(logits, batch.labels)
        if seen is not None:
            seen(step, right)
        # the running mean lags: a little below the goal is enough to look
        if right >= GOAL - 0.02 and step % 10 == 0:
            last = now == length
            if _evaluate(model, now, FRESH if last else 256, draw) >= GOAL:
                if last:
                    break
                now = min(2 * now, length)
    spent = time.perf_counter() - started
    return Recall(_evaluate(model, length, FRESH, draw), step, spent)


@torch.no_grad()
def _evaluate(model: Classifier, length: int, number: int, draw: torch.Generator) -> float:
    model.eval()
    parts = [examples(64, length, draw) for _ in range(number // 64)]
    accuracy = sum(_accuracy(model(part), part.labels) for part in parts) / len(parts)
    model.train()
    return accuracy


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()
