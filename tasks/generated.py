"""Generated tasks: every example is drawn from a seed. Training examples are drawn at every step.

Every split, and every training step of every seed, has its own random stream. An example depends on its split or on
(seed, step), and on its index there, but not on the number of workers or on earlier examples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from lra.task import UNSCORED, Progress, Protocol, Split, Task
from lra.tasks.storage import DocumentWriter, open_split, write_examples, write_positions, write_values

COUNTS = {"train": 1024, "validation": 512, "test": 1024}
"""Examples of each split: 1,024 give a standard error of 0.3 points at 99 %. `train` is a sample."""
BLOCK = 64
"""Examples that are drawn at once, with one length."""
SHOWN = 40
"""Positions that `describe` prints."""


class GeneratedTask(Task):
    """Base class of tasks whose examples come from `draw`; causal by default.

    In `Protocol.law`, a pair (low, high) stands for a whole number that each training batch draws uniformly; test
    splits take `high`. All sequences of one draw have the same length.
    """

    generated = True
    causal = True

    @abstractmethod
    def draw(self, random: np.random.Generator, count: int, **law: Any) -> tuple[np.ndarray, np.ndarray]:
        """`count` examples: values (count, L) of tokens, or (count, L, channels) of real values, and labels: (count,)
        classes or values, or (count, L) classes with UNSCORED where none is asked. For the next token, the labels
        are not read."""

    def training_batch(self, protocol: Protocol, size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self._draw(np.random.default_rng([crc32(b"training"), seed, step]), size, protocol.law)

    def _draw(self, random: np.random.Generator, count: int, law: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        chosen = {
            key: int(random.integers(value[0], value[1] + 1)) if isinstance(value, tuple) else value
            for key, value in law.items()
        }
        values, labels = self.draw(random, count, **chosen)
        if self.target == "next":
            labels = np.pad(values[:, 1:].astype(np.int64), ((0, 0), (0, 1)), constant_values=UNSCORED)
        return values, labels

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        kind = np.float32 if protocol.real else np.min_scalar_type(protocol.vocabulary - 1).type
        for number, split in enumerate(protocol.splits):
            progress("drawing examples", number, len(protocol.splits))
            law = {**protocol.law, **protocol.tests.get(split, {})}
            if split not in ("train", "validation"):
                law = {key: value[1] if isinstance(value, tuple) else value for key, value in law.items()}
            count = protocol.counts.get(split, protocol.counts["test"])
            labels: list[np.ndarray] = []
            with DocumentWriter(folder, split, kind) as writer:
                for block, start in enumerate(range(0, count, BLOCK)):
                    random = np.random.default_rng([crc32(split.encode()), block])
                    drawn, answers = self._draw(random, min(BLOCK, count - start), law)
                    writer.append(drawn.ravel(), np.full(len(drawn), drawn[0].size))
                    labels.extend(answers)
            if self.target in ("position", "next"):
                write_positions(folder, split, labels if self.target == "position" else None, count)
            elif self.target == "value":
                write_values(folder, split, np.array(labels))
            else:
                write_examples(folder, split, np.array(labels))

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def describe(self, split: Split, example: int) -> str:
        """Tokens and, where positions are scored, the label behind each: `3/1`."""
        values, label = split.document(int(split.index[example, 0])), split.label(example)
        if split.target in ("position", "next"):
            shown = [f"{v}" if y == UNSCORED else f"{v}/{y}" for v, y in zip(values[:SHOWN], label, strict=False)]
            return " ".join(shown) + (f" ... ({len(values)} positions)" if len(values) > SHOWN else "")
        shown = [f"{value:.3g}" for value in values[:SHOWN]]
        return f"{' '.join(shown)}{' ...' if len(values) > SHOWN else ''} = {label:.4g}"


def longer(*lengths: int) -> dict[str, dict[str, int]]:
    """Test splits of longer sequences: {"length-64": {"length": 64}}."""
    return {f"length-{length}": {"length": length} for length in lengths}


def last_only(labels: np.ndarray) -> np.ndarray:
    """The labels of the last position alone: (count, L) -> (count, L)."""
    final = np.full_like(labels, UNSCORED)
    final[:, -1] = labels[:, -1]
    return final
