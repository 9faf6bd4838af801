"""Batches: a prepared split moved to the device once, and a sampler that is a pure function of seed, epoch and step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lra.errors import UserError
from lra.model import Batch
from lra.task import Protocol, Split

LENGTH_MULTIPLE = 64
"""Batch lengths are rounded up to multiples of this. Lengths that never repeat fragment the heap of a CPU process until
memory runs out, and cost compilers and GPU allocators a new shape each."""


@dataclass(frozen=True)
class DeviceSet:
    """A split for batches on `device`: resident there, or on the host where it does not fit (`fits`).

    `lengths` (n, towers) stays on the host, so that batching never waits for it. `limit`: longest length
    of the protocol.
    """

    values: Tensor
    offsets: Tensor
    documents: Tensor
    labels: Tensor
    lengths: np.ndarray
    limit: int
    channels: int
    device: torch.device

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
        if values.dtype == np.uint16:
            values = values.astype(np.int32)
        local = local.reshape(index.shape)
        labels = np.asarray(split.labels)[keep].astype(np.int64)
        home = device if fits(values.nbytes, device) else torch.device("cpu")

        def held(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(home)

        lengths, width = sizes[local] // channels, channels if protocol.channels else 0
        return cls(held(values), held(offsets), held(local), held(labels), lengths, protocol.length, width, device)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def resident(self) -> bool:
        return self.values.device.type == self.device.type

    def batch(self, examples: np.ndarray) -> Batch:
        """The given examples, right-padded to the longest of them, rounded up to a multiple of LENGTH_MULTIPLE."""
        home, channels = self.values.device, max(self.channels, 1)
        longest = int(self.lengths[examples].max())
        length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.limit)
        index = torch.from_numpy(np.ascontiguousarray(examples)).to(home, non_blocking=True)
        documents = self.documents[index]
        start, stop = self.offsets[documents], self.offsets[documents + 1]
        place = start.unsqueeze(-1) + torch.arange(length * channels, device=home)
        real = place < stop.unsqueeze(-1)
        values = self.values[place.clamp_(max=len(self.values) - 1)].masked_fill_(~real, 0)
        if self.channels:
            values, real = values.unflatten(-1, (length, channels)), real[..., ::channels]
        batch = Batch(values, real, self.labels[index], index)
        if self.resident:
            return batch
        pin = self.device.type == "cuda"
        return Batch(*((part.pin_memory() if pin else part).to(self.device, non_blocking=True) for part in batch))


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes may live on `device`: a quarter of its free memory leaves room to train."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 4


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
    is left out of that epoch. Over the first `grow_steps` steps the longest example grows from `grow_from` tokens.
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
class Share:
    """Which part of every batch this process works on: `rank` of `world`."""

    rank: int = 0
    world: int = 1


class Steps:
    """The training batches of steps `first` to `total`, as the iterable a trainer reads; `first` moves on resuming.

    A step's batch comes in `parts` equal parts, of each of which this process has its share.
    """

    def __init__(
        self, data: DeviceSet, sampler: Sampler, total: int, parts: int = 1, share: Share | None = None
    ) -> None:
        self.data, self.sampler, self.total, self.first = data, sampler, total, 0
        self.parts, self.share = parts, share or Share()

    def __len__(self) -> int:
        return self.total * self.parts

    def __iter__(self) -> Iterator[Batch]:
        return _ahead(self.data, self._plan())

    def _plan(self) -> Iterator[np.ndarray]:
        for step in range(self.first, self.total):
            examples = self.sampler.batch(step)[self.share.rank :: self.share.world]
            yield from (examples[part :: self.parts] for part in range(self.parts))


class Sweep:
    """Every example once, in order of length, for evaluation; the last batch may be smaller. Several processes have
    every example once between them."""

    def __init__(self, data: DeviceSet, batch_size: int, share: Share | None = None) -> None:
        self.data = data
        rank, world = (share.rank, share.world) if share else (0, 1)
        order = np.argsort(data.lengths.max(axis=1), kind="stable")[rank::world]
        self.plan = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return _ahead(self.data, iter(self.plan))


def _ahead(data: DeviceSet, plan: Iterator[np.ndarray]) -> Iterator[Batch]:
    """The planned batches. Those of a set held elsewhere are made while the device works on the one before."""
    if data.resident:
        yield from (data.batch(examples) for examples in plan)
        return
    with ThreadPoolExecutor(1) as worker:
        coming: deque[Future[Batch]] = deque()
        for examples in plan:
            coming.append(worker.submit(data.batch, examples))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
