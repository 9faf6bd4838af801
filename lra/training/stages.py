"""The stages of a run with Lightning's trainer: self-pretraining, training, scoring."""

from __future__ import annotations

import copy
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.console import Console

from lra.config.recipe import Recipe
from lra.data.batches import DeviceSet, EvaluationLoader, Plan, Sampler, StreamPlan, TrainingLoader, choose
from lra.data.drawn import DrawnSet, training_set
from lra.data.prepared_sets import Prepared
from lra.encoder import Encoder
from lra.errors import UserError
from lra.model import Classifier
from lra.profiling import memory
from lra.target import join, target_of
from lra.training import checkpoint, curriculum, distributed, execution, loggers, longer, precision, rate_search, sizes
from lra.training.callbacks import (
    ExpectationCheck,
    ProgressBar,
    ProgressLines,
    ProgressReport,
    ResumeState,
    StepProgress,
    Stop,
    ThroughputMeter,
    check_checkpoint,
    checkpoints,
)
from lra.training.checkpoint_io import AtomicCheckpointIO
from lra.training.curriculum import Ordered, Scorer
from lra.training.module import Trainable, Training, answers_to
from lra.training.parallel import pipeline, sequence, tensor
from lra.training.placement import Placement
from lra.training.pretraining import Pretraining
from lra.training.streams import Streams

TrainingSet = DeviceSet | DrawnSet


@dataclass(frozen=True)
class RunContext:
    """The context of a training run: everything that is not part of its recipe.

    console: where a progress bar is drawn and warnings are printed. progress: called instead of the bar, if given.
    deadline: of `time.monotonic`. teacher: the model that is imitated, on the device and in evaluation mode. scorer: of
    a curriculum by difficulty.
    """

    device: torch.device
    folder: Path
    checkpoints: Path
    console: Console
    seed: int
    placement: Placement = field(default_factory=Placement)
    loggers: tuple[str, ...] = ()
    deadline: float | None = None
    resume: bool = False
    progress: StepProgress | None = None
    teacher: Classifier | None = None
    scorer: Scorer | None = None


@dataclass
class TrainingResult:
    """A trained model and the measurements of its training.

    module: as it was trained. model: the same model; where processes divide the weights, a whole copy that has the
    initial ones. facts: fields of the record that only training knows.
    """

    module: Training
    model: Classifier
    trainer: L.Trainer
    meter: ThroughputMeter
    memory: dict[str, int | str]
    facts: dict[str, Any]


def train(recipe: Recipe, prepared: Prepared, model: Classifier, context: RunContext) -> TrainingResult:
    """Pretrain if the recipe has an objective for it, then train with validation. Raises UserError, Interrupted."""
    device = context.device
    peak = memory.Peak(device)
    memory.keep_freed()
    data = training_set(prepared, device, recipe.data.batch_size, context.seed, recipe.data.train_examples)
    scored = ((prepared.protocol.selection, recipe.data.validation_examples), ("test", recipe.data.test_examples))
    evaluated = max(count or len(prepared.split(name)) for name, count in scored)
    sizes.check_batches(recipe, device.type, data.lengths, evaluated)
    apply_execution(recipe, model)
    divide(model, context.placement)
    facts = compile_encoder(data, model.to(device)) if recipe.train.compile else {}
    if recipe.pretrain.objective != "none":
        facts["pretraining"] = _pretrain(recipe, prepared, data, model, context)
    selection = prepared.split(prepared.protocol.selection)
    examples = choose(len(selection), recipe.data.validation_examples)
    validation = DeviceSet.of(selection, prepared.protocol, device, examples)
    known = _difficulty(recipe, prepared, data, context)
    if recipe.search.rates:
        recipe, facts["rate_search"] = _search_rate(recipe, prepared, data, validation, model, context, known)
    whole = copy.deepcopy(model) if context.placement.divides_weights else model
    module = _training(recipe, prepared, model, context)
    sampler = _sampler(recipe, data, context, known, module)
    every = min(recipe.train.evaluate_every, recipe.train.steps)
    meter = ThroughputMeter(min(20, every), every)
    expectation = ExpectationCheck(recipe.expected, sampler.per_epoch, context.console)
    averaging = [EMAWeightAveraging(decay=recipe.optim.ema)] if recipe.optim.ema else []
    trainer = _fit(
        module, recipe, context, sampler, data, context.checkpoints, meter, [*averaging, expectation],
        validation=EvaluationLoader(
            validation, recipe.data.evaluation_batch_size, distributed.validation_shard(context.placement)
        ),
        val_check_interval=every * recipe.train.accumulate, check_val_every_n_epoch=None,
        selects=module.target.selects,
    )  # fmt: skip
    if context.placement.resolved == "sequence":
        # the first process counts FLOPs alone
        sequence.join(model.encoder)
    facts |= {"curve": module.curve} | ({"diagnostics": module.diagnostics} if module.diagnostics else {})
    facts |= {"off_course": expectation.warning} if expectation.warning else {}
    if context.scorer is not None and isinstance(sampler, Ordered):
        facts["curriculum"] = sampler.described(context.scorer)
    return TrainingResult(module, whole, trainer, meter, peak.read(), facts)


def divide(model: Classifier, placement: Placement) -> None:
    """Divide a model among the processes of a run, as far as they all hold its weights; raise UserError where it cannot
    be divided."""
    processes = placement.world_size
    if placement.divides_experts:
        execution.divide_experts(model.encoder, processes)
    elif placement.resolved == "sequence":
        sequence.check(model.encoder)
        sequence.divide(model.encoder, distributed.rank(), processes)
    elif placement.resolved == "tensor":
        tensor.check(model.encoder, processes)
    elif placement.resolved == "pipeline":
        pipeline.check(model, processes)


def _training(recipe: Recipe, prepared: Prepared, model: Classifier, context: RunContext) -> Training:
    target, placement = target_of(prepared.task, prepared.protocol), context.placement
    module = Training(model, recipe, target, context.teacher)
    module.divide, module.zero = distributed.division(placement), placement.zero
    if placement.resolved == "pipeline":
        if context.teacher is not None:
            raise UserError("--strategy pipeline does not support --teacher; use ddp or fsdp")
        module.pipeline = pipeline.Pipeline(model, target, distributed.rank(), placement.world_size)
    return module


def _search_rate(
    recipe: Recipe, prepared: Prepared, data: TrainingSet, validation: DeviceSet, model: Classifier,
    context: RunContext, known: np.ndarray | None,
) -> tuple[Recipe, dict[str, Any]]:  # fmt: skip
    """The recipe with the learning rate that did best in short runs, and what the search cost."""

    def run_trial(trial: Recipe) -> rate_search.Trial:
        rate, steps = trial.optim.lr, trial.train.steps
        context.console.print(f"learning rate {rate:g}: {steps:,} steps")
        module = _training(trial, prepared, model, context)
        meter = ThroughputMeter(min(20, steps), steps)
        folder = context.checkpoints / f"rate-{rate:g}"
        shard = distributed.validation_shard(context.placement)
        loader = EvaluationLoader(validation, trial.data.evaluation_batch_size, shard)
        _fit(
            module, trial, context, _sampler(trial, data, context, known, module), data, folder, meter, [],
            stage=f"rate-{rate:g}", validation=loader, val_check_interval=steps * trial.train.accumulate,
            check_val_every_n_epoch=None,
        )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        last, speed = module.curve[-1], meter.speed()
        return {
            "lr": rate, "steps": steps, "accuracy": last["validation_accuracy"], "loss": last["validation_loss"],
            "examples": speed["examples"], "seconds": round(meter.elapsed, 3),
        }  # fmt: skip

    leads = distributed.rank() == 0
    selects = target_of(prepared.task, prepared.protocol).selects
    return rate_search.search(recipe, model, context.checkpoints / "rates.json", run_trial, leads, selects)


def training_sampler(recipe: Recipe, data: TrainingSet, seed: int) -> Plan:
    """The sampler of the training stage, with the recipe's length curriculum; others need more than the recipe."""
    train, size = recipe.train, recipe.data.batch_size
    if train.curriculum == "length":
        return data.sampler(size, seed, grow_from=train.curriculum_length, grow_steps=train.curriculum_steps)
    return data.sampler(size, seed)


def _sampler(
    recipe: Recipe, data: TrainingSet, context: RunContext, known: np.ndarray | None, module: Training
) -> Plan:
    """The sampler of the training stage with any curriculum. known: the difficulty of each example; module: whose
    validations a dynamic curriculum follows."""
    plain = training_sampler(recipe, data, context.seed)
    if recipe.train.stream:
        return _stream(recipe, data, module)
    if recipe.train.curriculum == "length" or not isinstance(plain, Sampler):
        return plain
    return Ordered(recipe, plain, known, lambda: module.curve, context.placement.world_size == 1)


def _stream(recipe: Recipe, data: TrainingSet, module: Training) -> StreamPlan:
    """The order of the examples in which each row of a batch is a stream; `module` carries its state from now on."""
    plan = StreamPlan(len(data), recipe.data.batch_size)
    if not isinstance(data, DeviceSet) or module.target.start is None:
        raise UserError("train.stream needs a protocol that packs documents, such as `--protocol packed` of imdb_lm")
    if recipe.data.train_examples:
        raise UserError("train.stream goes through all training examples in their order; leave out data.train_examples")
    if not plan.per_epoch:
        raise UserError(f"data.batch_size is {plan.batch_size}, of {len(data)} training examples; at most that many")
    parts, tokens = recipe.train.accumulate, recipe.train.tbptt
    module.streams = Streams(module.model.encoder, data.limit, tokens, parts, plan.per_epoch)
    return plan


def _difficulty(recipe: Recipe, prepared: Prepared, data: TrainingSet, context: RunContext) -> np.ndarray | None:
    """The difficulty of each training example for the scorer; None without a scorer."""
    if context.scorer is None:
        return None
    if not isinstance(data, DeviceSet):
        raise UserError(
            f"train.curriculum={recipe.train.curriculum}: {prepared.task.name} draws its training examples step by "
            "step, so they cannot be scored in advance"
        )
    target, size = target_of(prepared.task, prepared.protocol), recipe.data.evaluation_batch_size
    return curriculum.difficulty(context.scorer, data, target, size, context.checkpoints, context.resume)


def apply_execution(recipe: Recipe, model: Classifier) -> None:
    """Switch on gradient checkpointing and truncated backpropagation if the recipe sets them."""
    if recipe.train.checkpointing:
        execution.recompute(model.encoder)
    if recipe.train.tbptt:
        execution.truncate(model.encoder, recipe.train.tbptt)


def compile_encoder(data: TrainingSet, model: Classifier) -> dict[str, Any]:
    """Compile the encoder and try it on two examples; the random state is left as it was."""
    batch = data.batch(np.arange(min(2, len(data))))
    with torch.random.fork_rng(devices=[data.device] if data.device.type == "cuda" else []):
        return {"compile": execution.compiled(model.encoder, lambda: model(batch))}


def _pretrain(
    recipe: Recipe, prepared: Prepared, data: TrainingSet, model: Classifier, context: RunContext
) -> dict[str, Any]:
    """Give the model pretrained weights and return what that took. A resumed run does not repeat a finished stage."""
    folder = context.checkpoints / "pretraining"
    done = folder / "done.ckpt"
    module = Pretraining(model, recipe, prepared.protocol)
    if not (context.resume and done.is_file()):
        sampler = data.sampler(module.batch_size, context.seed)
        meter = ThroughputMeter(min(20, recipe.pretrain.steps))
        _fit(module, recipe, context, sampler, data, folder, meter, [], stage="pretraining")
        if distributed.rank() == 0:
            state = {k: v.cpu() for k, v in model.state_dict().items()}
            checkpoint.write({"model": state, "speed": meter.speed(), "random": torch.get_rng_state()}, done)
            (folder / "last.ckpt").unlink(missing_ok=True)
        if distributed.world_size() > 1:
            torch.distributed.barrier()
    saved = checkpoint.read(done)
    model.load_state_dict(saved["model"])
    torch.set_rng_state(saved["random"])
    return {"objective": recipe.pretrain.objective, **saved["speed"]}


def _fit(
    module: Trainable, recipe: Recipe, context: RunContext, sampler: Plan, data: TrainingSet, folder: Path,
    meter: ThroughputMeter, callbacks: list[Any], validation: EvaluationLoader | None = None, stage: str = "",
    selects: str = "accuracy", **options: Any,
) -> L.Trainer:  # fmt: skip
    """Train one stage to its last step, resuming from `folder` if asked to. stage: "" for training proper.
    selects: as of a Target."""
    parts, last = recipe.train.accumulate, folder / "last.ckpt"
    loader = TrainingLoader(data, sampler, module.steps, parts, distributed.training_shard(context.placement))
    meter.shares = loader.shard.world_size
    resumed_from = last if context.resume and last.is_file() else None
    resume_step = None if resumed_from is None else check_checkpoint(resumed_from, recipe.hash)
    reports = [ProgressReport(context.progress, meter.every)] if context.progress else []
    trainer = _trainer(
        recipe, context,
        callbacks=[
            meter, *reports, ResumeState(loader, recipe.hash, same_draws=context.placement.resolved == "tensor"),
            Stop(last, context.deadline, meter.validate_every),
            *callbacks, *checkpoints(folder, meter.validate_every, selects),
        ],
        logger=loggers.create(
            context.loggers if distributed.rank() == 0 else (), context.folder / "log", stage, resume_step
        ),
        enable_checkpointing=True, max_steps=module.steps, max_epochs=-1, log_every_n_steps=meter.every,
        accumulate_grad_batches=parts, gradient_clip_val=recipe.optim.clip or None, plugins=[AtomicCheckpointIO()],
        **options, **distributed.trainer_options(context.placement),
    )  # fmt: skip
    # Lightning's own handler of SIGTERM waits in it for the other processes, which hangs; `Stop` handles signals
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    with quiet():
        trainer.fit(module, loader, validation, ckpt_path=resumed_from, weights_only=True)
    return trainer


def _trainer(recipe: Recipe, context: RunContext, **options: Any) -> L.Trainer:
    kind: Any = precision.of_run(recipe, context.device)
    draw_bar = context.console.is_terminal and context.progress is None
    defaults = {"devices": 1, "logger": False, "enable_checkpointing": False}
    shown = ProgressBar(leave=False) if draw_bar else ProgressLines(context.console)
    callbacks = [*options.pop("callbacks", []), *([shown] if context.progress is None else [])]
    with quiet():
        return L.Trainer(
            accelerator="gpu" if context.device.type == "cuda" else "cpu", precision=kind, callbacks=callbacks,
            default_root_dir=context.folder, num_sanity_val_steps=0, enable_progress_bar=draw_bar,
            enable_model_summary=False, **(defaults | options),
        )  # fmt: skip


def score(
    recipe: Recipe, prepared: Prepared, trained: TrainingResult, context: RunContext, build: Callable[[int], Encoder],
    test: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Score the best checkpoint on the selection split and, if `test`, once on the test splits.

    build: of `longer.reading`, for splits of longer sequences. Returns {split: fields of its Score}, best_step, the
    predictions for the split `test`, and for each split of longer sequences how it was read, or why it was not.
    """
    best = checkpoint.read(context.checkpoints / "best.ckpt")
    trained.model.load_state_dict(checkpoint.model_weights(best))
    scores: dict[str, Any] = {"best_step": int(best["global_step"]), "longer": {}}
    target = target_of(prepared.task, prepared.protocol)
    counts = {prepared.protocol.selection: recipe.data.validation_examples}
    if test:
        counts |= dict.fromkeys(("test", *prepared.protocol.tests), recipe.data.test_examples)
    for name, count in counts.items():
        split = prepared.split(name)
        examples = choose(len(split), count)
        protocol = prepared.protocol.of_split(name)
        data = DeviceSet.of(split, protocol, context.device, examples)
        clock = time.perf_counter()
        try:
            with longer.reading(trained.model, prepared.protocol.length, protocol.length, build) as way:
                # as many tokens in a batch as in one of training sequences
                size = max(1, recipe.data.evaluation_batch_size * prepared.protocol.length // protocol.length)
                answers = _answers(recipe, trained, data, context, size)
        except longer.TooLong as error:
            scores["longer"][name] = f"not possible: {error}"
            continue
        seconds = time.perf_counter() - clock
        scored = np.unique(answers["example"]) if target.per_position else answers["example"]
        if not np.array_equal(scored, np.arange(len(data))):
            raise RuntimeError(f"scoring {name} covered {len(scored)} examples, not each of {len(data)} once")
        scores[name] = target.score(answers) | {"seconds": round(seconds, 3)}
        if way:
            scores["longer"][name] = way
        if way or (prepared.task.generated and name != prepared.protocol.selection):
            scores[name]["length"] = int(data.lengths.max())
        if name == "test":
            numbers = np.arange(len(split)) if examples is None else examples
            scores["predictions"] = target.stored(answers) | {"example": numbers[answers["example"]].astype(np.int32)}
    return scores


def _answers(
    recipe: Recipe, trained: TrainingResult, data: DeviceSet, context: RunContext, batch_size: int
) -> dict[str, np.ndarray]:
    """The answers on all examples (`Target.answers`), from all processes, in the order of the examples."""
    loader = EvaluationLoader(data, batch_size, distributed.shard(context.placement))
    if context.placement.world_size == 1:
        with quiet():
            parts: Any = _trainer(recipe, context).predict(trained.module, loader) or []
    else:
        model = trained.model.to(context.device).eval()
        with torch.inference_mode(), precision.autocast(precision.of_run(recipe, context.device), context.device):
            parts = [answers_to(batch, model, trained.module.target) for batch in loader]
    return join(part for parts in distributed.gather(parts) for part in parts)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's advice on data loaders and devices: the data are on the device already."""
    names = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in names]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        for logger in names:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(names, levels, strict=True):
                logger.setLevel(level)
