"""A prepared task as a LightningDataModule, for a LightningModule and Trainer of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import torch

from lra.data import examples
from lra.data.batches import Batches, DeviceSet, EvaluationLoader, Plan, Shard, TrainingLoader, choose
from lra.data.drawn import training_set
from lra.data.examples import LoadedTask
from lra.errors import UserError
from lra.model import Batch
from lra.task import Task


class EpochLoader:
    """Iterates over the batches of one epoch, which depend on the seed and the epoch alone."""

    def __init__(self, data: Batches, sampler: Plan, shard: Shard, epoch: Callable[[], int]) -> None:
        self.data, self.sampler, self.shard, self.epoch = data, sampler, shard, epoch

    def __len__(self) -> int:
        return self.sampler.per_epoch

    def __iter__(self) -> Iterator[Batch]:
        first = self.epoch() * len(self)
        loader = TrainingLoader(self.data, self.sampler, first + len(self), shard=self.shard)
        loader.first = first
        return iter(loader)


class DataModule(L.LightningDataModule):
    """Batches of a task: `Trainer.fit(model, DataModule("image", batch_size=32))`.

    A batch is `lra.model.Batch`: values (B, towers, L) of tokens, or (B, towers, L, channels) of bytes or real values;
    mask (B, towers, L) bool, True = real; labels as the task's target has them (lra.target), (B,) for classes; example
    (B,), the places in the split. Batches hold examples of similar length and are padded to their longest. Several
    processes share every batch.

    task: a name, a class, a Task, or what `lra.load_task` returned. source: folder with the raw files. *_examples: how
    many are used (0 = all). Raises UserError.
    """

    def __init__(
        self,
        task: str | type | Task | LoadedTask,
        batch_size: int = 32,
        *,
        protocol: str = "",
        evaluation_batch_size: int = 64,
        seed: int = 0,
        source: str | Path | None = None,
        train_examples: int = 0,
        validation_examples: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or evaluation_batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, evaluation_batch_size {evaluation_batch_size}; at least 1")
        self.given, self.given_protocol, self.source = task, protocol, source
        self.batch_size, self.evaluation_batch_size, self.seed = batch_size, evaluation_batch_size, seed
        self.train_examples, self.validation_examples = train_examples, validation_examples
        self._task = task if isinstance(task, LoadedTask) else None
        self._epochs = 0

    @property
    def task(self) -> LoadedTask:
        """The task, prepared at the first access."""
        if self._task is None:
            assert not isinstance(self.given, LoadedTask)
            self._task = examples.load(self.given, self.given_protocol, source=self.source)
        return self._task

    def prepare_data(self) -> None:
        _ = self.task

    def train_dataloader(self) -> EpochLoader:
        shard = self._shard()
        if self.batch_size % shard.world_size:
            raise UserError(f"batch_size is {self.batch_size}, not divisible by {shard.world_size} processes")
        data = training_set(self.task.prepared, self._home(), self.batch_size, self.seed, self.train_examples)
        return EpochLoader(data, data.sampler(self.batch_size, self.seed), shard, self._epoch)

    def val_dataloader(self) -> EvaluationLoader:
        return self._evaluation(self.task.protocol.selection, self.validation_examples)

    def test_dataloader(self) -> EvaluationLoader:
        return self._evaluation("test", 0)

    def predict_dataloader(self) -> EvaluationLoader:
        return self._evaluation("test", 0)

    def _evaluation(self, split: str, count: int) -> EvaluationLoader:
        return EvaluationLoader(self._set(split, count), self.evaluation_batch_size, self._shard())

    def _set(self, name: str, count: int) -> DeviceSet:
        split = self.task.prepared.split(name)
        return DeviceSet.of(split, self.task.protocol, self._home(), choose(len(split), count))

    def _home(self) -> torch.device:
        # the trainer moves the batches of a set on the host
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        return device if device.type == "cuda" else torch.device("cpu")

    def _shard(self) -> Shard:
        return Shard() if self.trainer is None else Shard(self.trainer.global_rank, self.trainer.world_size)

    def _epoch(self) -> int:
        """The trainer's epoch; without a trainer, how often the training batches were iterated over before."""
        if self.trainer is not None:
            return self.trainer.current_epoch
        self._epochs += 1
        return self._epochs - 1
