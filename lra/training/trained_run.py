"""A trained classifier with its recipe, task and record: what `lra.train` and `lra.load` return."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lra import towers
from lra.config import recipe as recipes
from lra.config.recipe import Recipe
from lra.data import prepared_sets
from lra.data.batches import DeviceSet, EvaluationLoader, choose
from lra.data.examples import split_of
from lra.encoder import Encoder
from lra.errors import UserError, brief, unknown
from lra.model import Batch, Classifier
from lra.registry import Constructor, architectures, tasks
from lra.results import record as records
from lra.results import result, statistics
from lra.results.record import RunRecord
from lra.target import join, target_of
from lra.task import Protocol, Task
from lra.training import checkpoint, construction, generation, longer, run_folder
from lra.training.generation import Generated, Sampling
from lra.training.module import answers_to
from lra.training.precision import autocast

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1
"""Version of config.json."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on one split, with a 95 % Wilson interval; accuracies in [0, 1].

    more: further scores of the task's target, as in `lra.results.record.Score`.
    """

    split: str
    accuracy: float
    correct: int
    n: int
    low: float
    high: float
    more: dict[str, Any] = field(default_factory=dict)


class TrainedRun:
    """A trained classifier.

    model: the classifier, on the CPU in evaluation mode. recipe, seed, task, protocol: those of its training. folder:
    the folder that it was loaded from. constructor: that of its encoder, by default the one of the recipe. structure:
    the steps of its compression (lra.training.compression); empty without compression.
    """

    def __init__(
        self,
        model: Classifier,
        recipe: Recipe,
        task: Task,
        protocol: Protocol,
        folder: Path,
        record: RunRecord | None,
        seed: int,
    ) -> None:
        self.model, self.recipe, self.task, self.protocol = model, recipe, task, protocol
        self.folder, self.seed, self._record = folder, seed, record
        self.structure: list[dict[str, Any]] = []
        self.constructor: Constructor | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has a record: it was tested and its result was written."""
        return self._record is not None

    @property
    def record(self) -> RunRecord:
        """The record of the run. Raises UserError for a run that has none."""
        if self._record is None:
            raise UserError(f"{self.folder} has no record of a finished run; call evaluate() for its accuracy")
        return self._record

    @property
    def accuracy(self) -> float:
        """Test accuracy in [0, 1] as the record has it. Raises UserError for a run without a record."""
        return self.record.test.accuracy

    def predict(self, inputs: Any, *, probabilities: bool = False, batch_size: int = 0) -> Any:
        """Predicted classes (n,), or with `probabilities` (n, classes), in the order of the inputs; real values (n,)
        if they are the target. For targets at every position a list, with (L,) or (L, classes) for each example.

        inputs: the name of a split, or texts, arrays or tensors as in `lra.data.examples.split_of`.
        batch_size: by default that of the recipe's evaluations. Raises UserError.
        """
        target = target_of(self.task, self.protocol)
        if probabilities and self.task.target == "value":
            raise UserError(f"{self.task.name} predicts real values, which have no probabilities")

        def answer(batch: Batch) -> Any:
            output = self.model(batch)
            answers = output.float().softmax(dim=-1) if probabilities else target.predict(output)
            if not target.per_position:
                return answers
            lengths = batch.mask[:, 0].sum(dim=-1).tolist()
            return [row[:length].cpu().numpy() for row, length in zip(answers, lengths, strict=True)]

        answers = self._map(self._data(inputs), answer, batch_size)
        return answers if target.per_position else np.stack(answers)

    def features(self, inputs: Any, *, pooled: bool = True, batch_size: int = 0) -> Any:
        """Outputs of the encoder, float32. inputs: as in `predict`.

        pooled: an array (n, d_model), which the head maps to classes; for a task with two towers (n, 2, d_model), from
        before the towers are combined.
        Otherwise a list with one array (L, d_model) for each example, without padding; a pair of them for two towers.
        """
        data = self._data(inputs)
        if pooled:
            return np.stack(self._map(data, self._pooled, batch_size))
        return self._map(data, self._positions, batch_size)

    def evaluate(self, split: str = "test") -> Evaluation:
        """Accuracy on a split, computed again over the examples that the recipe evaluates; for pairs of two classes
        also the recall of the towers (`recall`). Raises UserError."""
        if split not in self.protocol.splits:
            raise unknown("split", split, self.protocol.splits)
        data, target = self._data(split), target_of(self.task, self.protocol)
        with self._evaluating(data):
            loader = EvaluationLoader(data, self._batch_size(data))
            score = target.score(join(answers_to(batch, self.model, target) for batch in loader))
        accuracy, correct, n = (score.pop(key) for key in ("accuracy", "correct", "n"))
        interval = statistics.of_test_set(accuracy, n)
        if self._retrieves:
            score |= {f"recall@{k}": share for k, share in self.recall(split).items()}
        return Evaluation(split, accuracy, correct, n, interval.low, interval.high, score)

    @property
    def _retrieves(self) -> bool:
        return (self.task.towers, self.task.target, self.task.classes) == (2, "class", 2)

    def recall(self, split: str = "test", k: tuple[int, ...] = (1, 10, 100)) -> dict[int, float]:
        """Recall@k of the pooled towers on a split: {k: recall}, as `lra.towers.recall_at` defines it, over the pairs
        that the recipe evaluates. Raises UserError for a task without pairs of two classes."""
        if not self._retrieves:
            raise UserError(f"{self.task.name} has no pairs of two classes, which recall@k needs")
        data = self._data(split)
        embedded = torch.from_numpy(np.concatenate(self._map(data.documents_once(), self._pooled, 0)))
        return towers.recall_at(embedded, data.documents.cpu(), data.labels.cpu(), k)

    def generate(
        self, prompt: str, *, tokens: int = 200, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 0,
    ) -> Generated:  # fmt: skip
        """Continue a text, in float32, with the recurrent mode of the encoder.

        tokens: number of tokens to draw; temperature, top_k, top_p: as in `lra.training.generation.Sampling`. Raises
        UserError if the target is not the next token, the encoder has no recurrent mode, or the text is too long.
        """
        sampling, length = Sampling(temperature, top_k, top_p), self.protocol.length
        if self.task.target != "next":
            raise UserError(
                f"the target of {self.task.name} is not the next token, so this model cannot generate text; train one "
                "with `lra run imdb_lm ARCH`"
            )
        given = self.task.encode(prompt, self.protocol)
        if not 1 <= tokens <= length - len(given):
            raise UserError(
                f"the prompt has {len(given):,} tokens, and {brief(tokens)} new ones are requested; at least one new "
                f"token, and together at most {length:,}, the length of the protocol"
            )
        device, training = next(self.model.parameters()).device, self.model.training
        self.model.eval()
        try:
            drawn, seconds, size = generation.generate(
                self.model, torch.tensor(given, device=device), tokens, sampling, seed
            )
        except NotImplementedError:
            raise UserError(
                f"{self.recipe.architecture} has no recurrent mode, which generates token by token; `lra list` shows "
                "the architectures that have one"
            ) from None
        finally:
            self.model.train(training)
        return Generated(self.task.decode(drawn.numpy()), tokens, seconds, size)

    def export(self, folder: str | Path) -> Path:
        """Write config.json, model.safetensors and README.md to a new folder and return it. Raises UserError."""
        from lra.training import export

        return export.write(self, Path(folder))

    def __repr__(self) -> str:
        accuracy = "not finished" if not self.finished else f"test accuracy {100 * self.accuracy:.2f} %"
        return f"<run of {self.recipe.architecture} on {self.task.name} ({self.protocol.name}): {accuracy}>"

    def _data(self, inputs: Any) -> DeviceSet:
        """A split by name, or a user's inputs, for the model's device."""
        device = next(self.model.parameters()).device
        if not (isinstance(inputs, str) and inputs in self.protocol.splits):
            return DeviceSet.of(split_of(inputs, self.task, self.protocol), self.protocol, device)
        split, protocol = prepared_sets.load_prepared(self.task, self.protocol).split(inputs), self.protocol
        limits = dict.fromkeys(("test", *self.protocol.tests), self.recipe.data.test_examples)
        limits |= {"train": self.recipe.data.train_examples, "validation": self.recipe.data.validation_examples}
        examples = choose(len(split), limits[inputs])
        return DeviceSet.of(split, protocol.of_split(inputs), device, examples)

    def _map(self, data: DeviceSet, function: Callable[[Batch], Any], batch_size: int) -> list[Any]:
        """function(batch) for batches of every example, as one entry for each example, in their order."""
        outputs: list[Any] = [None] * len(data)
        with self._evaluating(data):
            for batch in EvaluationLoader(data, batch_size or self._batch_size(data)):
                rows = function(batch)
                if isinstance(rows, Tensor):
                    rows = (rows.float() if rows.is_floating_point() else rows).cpu().numpy()
                for example, row in zip(batch.example.tolist(), rows, strict=True):
                    outputs[example] = row
        return outputs

    def _batch_size(self, data: DeviceSet) -> int:
        """That of the recipe's evaluations, smaller for a split of longer sequences."""
        return max(1, self.recipe.data.evaluation_batch_size * self.protocol.length // data.limit)

    @contextmanager
    def _evaluating(self, data: DeviceSet) -> Iterator[None]:
        """The model in evaluation mode and in the precision of its run, without gradients, at the length of a set."""
        training = self.model.training
        self.model.eval()

        def build(length: int) -> Encoder:
            constructor = self.constructor or architectures.get(self.recipe.architecture)
            return construction.build_encoder(self.recipe, constructor, length)

        try:
            with (
                torch.inference_mode(),
                self._autocast(data.device),
                longer.reading(self.model, self.protocol.length, data.limit, build),
            ):
                yield
        finally:
            self.model.train(training)

    def _pooled(self, batch: Batch) -> Tensor:
        model = self.model
        pooled = model.pool(*model.encode(batch.values.flatten(0, 1), batch.mask.flatten(0, 1)))
        return pooled if model.towers == 1 else pooled.unflatten(0, (-1, model.towers))

    def _positions(self, batch: Batch) -> list[Any]:
        encoded, _ = self.model.encode(batch.values.flatten(0, 1), batch.mask.flatten(0, 1))
        # without the position of a CLS token
        encoded = encoded[:, -batch.mask.shape[-1] :].float().cpu().unflatten(0, batch.mask.shape[:2])
        lengths = batch.mask.sum(dim=-1).tolist()
        examples = [
            tuple(tower[:length].numpy() for tower, length in zip(example, row, strict=True))
            for example, row in zip(encoded, lengths, strict=True)
        ]
        return examples if self.model.towers > 1 else [example[0] for example in examples]

    def _autocast(self, device: torch.device) -> torch.autocast:
        """The precision that the run was scored in; float32 where there is no record."""
        precision = str(self.record.environment.precision or "") if self.finished else ""
        return autocast(precision, device)


def load(
    folder: str | Path, *, checkpoints: str | Path | None = None, architecture: str | type | None = None,
    task: str | type | None = None,
) -> TrainedRun:  # fmt: skip
    """The trained model of a run's folder or of an exported folder.

    checkpoints: the checkpoint folder, if it was moved. architecture, task: the class, if it cannot be found by the
    name in the recipe. The global random state does not change. Raises UserError.
    """
    path = Path(folder).expanduser()
    if (path / CONFIG).is_file():
        return _load_export(path, architecture, task)
    try:
        recipe = recipes.from_dict(json.loads((path / run_folder.RECIPE).read_text(encoding="utf-8")))
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{path} is neither a run's folder nor an exported one: {error}") from None
    about = run_folder.read(path)
    best = run_folder.best_checkpoint(path, None if checkpoints is None else Path(checkpoints))
    if best is None:
        place = checkpoints or about.get("checkpoints") or path / "checkpoints"
        raise UserError(f"{path} has no trained model yet: no {run_folder.BEST} in {place}")
    run = _untrained(recipe, architecture, task, path, about.get("seed", 0))
    _load_weights(run.model, checkpoint.model_weights(checkpoint.read(best)), best)
    record = run_folder.finished_record(path, missing_ok=True)
    run._record = None if record is None else result.read(record)
    return run


def _load_export(path: Path, architecture: str | type | None, task: str | type | None) -> TrainedRun:
    from safetensors.torch import load_file

    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if config.get("format") != FORMAT:
            raise ValueError(f"format is {brief(config.get('format'))}; this version reads {FORMAT}")
        recipe = recipes.from_dict(config["recipe"])
        weights = load_file(path / WEIGHTS)
    except Exception as error:  # noqa: BLE001  (safetensors raises an exception type of its own)
        raise UserError(f"{path} is not an exported model of this version: {error}") from None
    run = _untrained(recipe, architecture, task, path, config.get("seed", 0))
    run.structure = config.get("structure", [])
    if run.structure:
        from lra.training import compression

        try:
            compression.rebuild(run.model, run.structure)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path / CONFIG}: structure does not fit the model of its recipe: {error}") from None
    # names that share a tensor are stored once
    weights |= {name: weights[stored] for name, stored in config.get("shared", {}).items()}
    _load_weights(run.model, weights, path / WEIGHTS)
    stored = config.get("record")
    run._record = None if stored is None else records.from_json(stored)
    return run


def _untrained(
    recipe: Recipe, architecture: str | type | None, task: str | type | None, folder: Path, seed: int
) -> TrainedRun:
    instance, protocol = prepared_sets.resolve(tasks.get(task or recipe.task)(), recipe.data.protocol or None)
    constructor = architectures.get(architecture or recipe.architecture)
    with construction.kept_random_state():
        model = construction.build(recipe, constructor, instance, protocol, seed)
    run = TrainedRun(model.eval(), recipe, instance, protocol, folder, None, seed)
    run.constructor = constructor
    return run


def _load_weights(model: Classifier, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} holds the weights of another model: {' '.join(str(error).split())[:300]}") from None
