"""Batches: a prepared split moved to the device once, and a sampler that is a pure function of seed, epoch and step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lra.task import Protocol, Split


class Batch(NamedTuple):
    """values: (B, towers, L) integer tokens, or bytes (B, towers, L, channels) of a continuous protocol;
    mask: (B, towers, L) bool, True = real; labels: (B,) int64; example: (B,) int64, places in the set."""

    values: Tensor
    mask: Tensor
    labels: Tensor
    example: Tensor


@dataclass(frozen=True)
class DeviceSet:
    """A split resident on a device. `lengths` (n, towers) stays on the host, so that batching never waits for it."""

    values: Tensor
    offsets: Tensor
    documents: Tensor
    labels: Tensor
    lengths: np.ndarray
    channels: int

    @classmethod
    def of(
        cls, split: Split, protocol: Protocol, device: torch.device, examples: np.ndarray | None = None
    ) -> DeviceSet:
        """`split` (or the given `examples` of it) on `device`; documents are cut to the protocol's length."""
        keep = np.arange(len(split)) if examples is None else examples
        index = np.asarray(split.index)[keep].astype(np.int64)
        used, local = np.unique(index, return_inverse=True)
        channels = max(protocol.channels, 1)
        starts = np.asarray(split.offsets[:-1])[used]
        sizes = np.minimum(np.diff(np.asarray(split.offsets))[used], protocol.length * channels)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        if len(used) == len(split.offsets) - 1 and offsets[-1] == len(split.values):
            values = np.array(split.values)
        else:
            values = np.concatenate([split.values[a : a + n] for a, n in zip(starts, sizes, strict=True)])
        if values.dtype == np.uint16:
            values = values.astype(np.int32)
        local = local.reshape(index.shape)
        return cls(
            torch.from_numpy(values).to(device),
            torch.from_numpy(offsets).to(device),
            torch.from_numpy(local).to(device),
            torch.from_numpy(np.asarray(split.labels)[keep].astype(np.int64)).to(device),
            sizes[local] // channels,
            channels if protocol.channels else 0,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, examples: np.ndarray) -> Batch:
        """The given examples, right-padded to the longest among them."""
        device, channels = self.values.device, max(self.channels, 1)
        length = int(self.lengths[examples].max())
        index = torch.from_numpy(np.ascontiguousarray(examples)).to(device, non_blocking=True)
        documents = self.documents[index]
        start, stop = self.offsets[documents], self.offsets[documents + 1]
        place = start.unsqueeze(-1) + torch.arange(length * channels, device=device)
        real = place < stop.unsqueeze(-1)
        values = self.values[place.clamp_(max=len(self.values) - 1)].masked_fill_(~real, 0)
        if self.channels:
            values, real = values.unflatten(-1, (length, channels)), real[..., ::channels]
        return Batch(values, real, self.labels[index], index)


def choose(count: int, wanted: int) -> np.ndarray | None:
    """A fixed random subset of `count` examples (the same for every run seed), in order; None for all of them."""
    if wanted == 0 or wanted >= count:
        return None
    return np.sort(np.random.default_rng(0).permutation(count)[:wanted])


@dataclass
class Sampler:
    """Training batches: batch(step) depends on nothing but the arguments, so any step can be resumed exactly.

    Each epoch is a permutation cut into windows of `window` batches; inside a window examples are ordered by length,
    so that little is spent on padding, and the batches of the epoch are then shuffled. The tail that fills no batch
    is left out of that epoch.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    window: int = 50
    _epoch: int = -1

    @property
    def per_epoch(self) -> int:
        return max(len(self.lengths) // self.batch_size, 1)

    def batch(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        return self._plan[place]

    def _plan_of(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        size = min(self.batch_size, len(self.lengths))
        order = random.permutation(len(self.lengths))[: self.per_epoch * size]
        longest = self.lengths.max(axis=1)
        if longest.min() != longest.max():
            span = self.window * size
            windows = [order[i : i + span] for i in range(0, len(order), span)]
            order = np.concatenate([w[np.argsort(longest[w], kind="stable")] for w in windows])
        return random.permutation(order.reshape(self.per_epoch, size))


class Steps:
    """The training batches of steps `first` to `total`, as the iterable a trainer reads; `first` moves on resuming."""

    def __init__(self, data: DeviceSet, sampler: Sampler, total: int) -> None:
        self.data, self.sampler, self.total, self.first = data, sampler, total, 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first, self.total):
            yield self.data.batch(self.sampler.batch(step))


class Sweep:
    """Every example once, in order of length, for evaluation; the last batch may be smaller."""

    def __init__(self, data: DeviceSet, batch_size: int) -> None:
        self.data = data
        order = np.argsort(data.lengths.max(axis=1), kind="stable")
        self.plan = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return (self.data.batch(examples) for examples in self.plan)
