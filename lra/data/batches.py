"""Batches: a prepared split moved to the device once, and a sampler that is a pure function of seed and step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol as Interface

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lra.errors import UserError
from lra.model import Batch
from lra.task import UNSCORED, Protocol, Split

LENGTH_MULTIPLE = 64
"""Batch lengths are rounded up to multiples of this. Lengths that never repeat fragment the heap of a CPU process until
memory runs out, and cost compilers and GPU allocators a new shape each."""


@dataclass(frozen=True)
class DeviceSet:
    """A split from which batches on `device` are made: resident there, or on the host where it does not fit.

    lengths: (n, towers), in tokens, always on the host, so that planning a batch never waits for the device.
    limit: longest length of the protocol. labels: (n,), or (positions,) for a target at every position.
    """

    values: Tensor
    offsets: Tensor
    documents: Tensor
    labels: Tensor
    lengths: np.ndarray
    limit: int
    channels: int
    device: torch.device
    target: str = "class"

    @classmethod
    def of(
        cls, split: Split, protocol: Protocol, device: torch.device, examples: np.ndarray | None = None
    ) -> DeviceSet:
        """`split` (or the given `examples` of it) for `device`; documents are cut to the protocol's length."""
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
        if values.dtype not in (np.uint8, np.float32):
            # torch computes with signed integers
            values = values.astype(np.int32 if values.dtype == np.uint16 else np.int64)
        local = local.reshape(index.shape)
        labels = np.array(split.labels)
        if split.target == "position":
            parts = [labels[a : a + n] for a, n in zip(starts // channels, sizes // channels, strict=True)]
            labels = np.concatenate(parts)
        elif split.target != "next":
            labels = labels[keep].astype(np.float32 if split.target == "value" else np.int64)
        home = device if fits(values.nbytes, device) else torch.device("cpu")

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(home)

        lengths, width = sizes[local] // channels, channels if protocol.channels else 0
        return cls(
            tensor(values), tensor(offsets), tensor(local), tensor(labels), lengths, protocol.length, width, device,
            split.target,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.lengths)

    def documents_once(self) -> DeviceSet:
        """Every document once, towers by towers in their order, the last one again where the last example needs it; all
        labels are 0."""
        towers, sizes = self.documents.shape[1], np.diff(self.offsets.cpu().numpy()) // max(self.channels, 1)
        index = np.minimum(np.arange(-(-len(sizes) // towers) * towers), len(sizes) - 1).reshape(-1, towers)
        documents = torch.from_numpy(index).to(self.documents.device)
        return replace(self, documents=documents, lengths=sizes[index], labels=self.labels.new_zeros(len(index)))

    @property
    def resident(self) -> bool:
        return self.values.device.type == self.device.type

    def longest(self, examples: np.ndarray) -> int:
        """Tokens of the longest of the given examples."""
        return int(self.lengths[examples].max())

    def sampler(self, batch_size: int, seed: int, *, grow_from: int = 0, grow_steps: int = 0) -> Sampler:
        """The examples of each training step."""
        return Sampler(self.lengths, batch_size, seed, grow_from=grow_from, grow_steps=grow_steps)

    def batch(self, examples: np.ndarray) -> Batch:
        """The given examples, right-padded to the longest of them, rounded up to a multiple of LENGTH_MULTIPLE."""
        home, channels = self.values.device, max(self.channels, 1)
        length = min(-(-self.longest(examples) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.limit)
        index = torch.from_numpy(np.ascontiguousarray(examples)).to(home, non_blocking=True)
        documents = self.documents[index]
        start, stop = self.offsets[documents], self.offsets[documents + 1]
        place = start.unsqueeze(-1) + torch.arange(length * channels, device=home)
        real = place < stop.unsqueeze(-1)
        values = self.values[place.clamp_(max=len(self.values) - 1)].masked_fill_(~real, 0)
        if self.channels:
            values, real = values.unflatten(-1, (length, channels)), real[..., ::channels]
        if self.target == "next":
            labels = F.pad(values[:, 0, 1:].long(), (0, 1)).masked_fill_(~F.pad(real[:, 0, 1:], (0, 1)), UNSCORED)
        elif self.target == "position":
            spot = start // channels + torch.arange(length, device=home)
            labels = self.labels[spot.clamp_(max=len(self.labels) - 1)].long().masked_fill_(~real[:, 0], UNSCORED)
        else:
            labels = self.labels[index]
        batch = Batch(values, real, labels, index)
        if self.resident:
            return batch
        pin = self.device.type == "cuda"
        return Batch(*((part.pin_memory() if pin else part).to(self.device, non_blocking=True) for part in batch))


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes may stay on `device`: at most a quarter of its free memory, so that training has room."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 4


def choose(count: int, wanted: int) -> np.ndarray | None:
    """Indices of a random subset of `count` examples, sorted and the same for every seed of a run; None for all."""
    if wanted == 0 or wanted >= count:
        return None
    return np.sort(np.random.default_rng(0).permutation(count)[:wanted])


@dataclass
class Sampler:
    """Examples of each training step. batch(step) depends only on the arguments, so any step can be resumed exactly.

    Each epoch is a random permutation, cut into windows of `window` batches. Inside a window examples are sorted by
    length, which saves padding; the batches of the epoch are then shuffled. Examples that do not fill a last batch are
    left out of that epoch. Over the first `grow_steps` steps the longest example grows from `grow_from` tokens.
    """

    lengths: np.ndarray
    batch_size: int
    seed: int
    window: int = 50
    grow_from: int = 0
    grow_steps: int = 0
    _epoch: int = -1

    @property
    def per_epoch(self) -> int:
        return max(len(self.lengths) // self.batch_size, 1)

    def batch(self, step: int) -> np.ndarray:
        if step < self.grow_steps:
            return self._short(step)
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        return self._plan[place]

    def _short(self, step: int) -> np.ndarray:
        longest = self.lengths.max(axis=1)
        limit = self.grow_from + (longest.max() - self.grow_from) * step / self.grow_steps
        allowed, size = np.flatnonzero(longest <= limit), min(self.batch_size, len(longest))
        if len(allowed) < size:
            fitting = int(np.sort(longest)[size - 1])
            raise UserError(
                f"{len(allowed)} examples have at most {limit:.0f} tokens; train.curriculum_length >= {fitting}"
            )
        return np.random.default_rng([self.seed, step, 1]).choice(allowed, size, replace=False)

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


@dataclass(frozen=True)
class StreamPlan:
    """Row r of every batch follows one part of the examples, which stand in the order of a stream: at step t it has
    example r * per_epoch + t, and after its part it begins again. Examples that do not fill the parts are left out."""

    count: int
    batch_size: int

    @property
    def per_epoch(self) -> int:
        return self.count // self.batch_size

    def batch(self, step: int) -> np.ndarray:
        return np.arange(self.batch_size) * self.per_epoch + step % self.per_epoch


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one process works on."""

    rank: int = 0
    world_size: int = 1


class Batches(Interface):
    """A set that batches are made from."""

    @property
    def resident(self) -> bool: ...

    def batch(self, examples: np.ndarray) -> Batch: ...


class Plan(Interface):
    """Examples of each training step. per_epoch: number of steps after which every example was seen once."""

    @property
    def per_epoch(self) -> int: ...

    def batch(self, step: int) -> np.ndarray: ...


class TrainingLoader:
    """Iterates over the training batches of steps `first` to `total`. Resuming sets `first`.

    The batch of a step comes in `parts` equal parts for gradient accumulation; this process gets its shard of each.
    """

    def __init__(self, data: Batches, sampler: Plan, total: int, parts: int = 1, shard: Shard | None = None) -> None:
        self.data, self.sampler, self.total, self.first = data, sampler, total, 0
        self.parts, self.shard = parts, shard or Shard()

    def __len__(self) -> int:
        return self.total * self.parts

    def __iter__(self) -> Iterator[Batch]:
        return _prefetched(self.data, self._plan())

    def _plan(self) -> Iterator[np.ndarray]:
        for step in range(self.first, self.total):
            examples = self.sampler.batch(step)[self.shard.rank :: self.shard.world_size]
            yield from (examples[part :: self.parts] for part in range(self.parts))


class EvaluationLoader:
    """Iterates once over every example, sorted by length; the last batch may be smaller. Several processes share the
    examples: each gets its shard, in as many batches as the others, so that all can work on one model together."""

    def __init__(self, data: DeviceSet, batch_size: int, shard: Shard | None = None) -> None:
        self.data, shard = data, shard or Shard()
        order = np.argsort(data.lengths.max(axis=1), kind="stable")[shard.rank :: shard.world_size]
        if shard.world_size > 1:
            # one example more than batch_size in some where the numbers of examples differ by one
            batches = max(math.ceil(len(data) // shard.world_size / batch_size), 1)
            self.plan = np.array_split(order, batches)
        else:
            self.plan = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return _prefetched(self.data, iter(self.plan))


def _prefetched(data: Batches, plan: Iterator[np.ndarray]) -> Iterator[Batch]:
    """The planned batches. Where the set is on the host, the next batch is made while the device works."""
    if data.resident:
        yield from (data.batch(examples) for examples in plan)
        return
    with ThreadPoolExecutor(1) as worker:
        pending: deque[Future[Batch]] = deque()
        for examples in plan:
            pending.append(worker.submit(data.batch, examples))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
