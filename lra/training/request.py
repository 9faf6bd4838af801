"""The arguments of a run and the recipe that they resolve to. torch is imported only for a GPU or a budget."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lra import files
from lra.config import recipe as recipes
from lra.config.recipe import Recipe
from lra.config.sections import OBJECTIVES
from lra.errors import UserError, brief, unknown
from lra.registry import architectures, reference_of, tasks
from lra.results import result
from lra.training import device, loggers, sizes
from lra.training.placement import Placement

SHAPE = ("d_model", "n_layers", "length", "dropout", "direction")
"""Constructor arguments that the model section of a recipe sets."""
TABLES = ("block", "layer")
"""Constructor arguments that are tables: those of the residual stack, and those of a user's own layer."""
LARGEST_SEED = 2**32 - 1
MAX_THREADS = 1024


@dataclass(frozen=True)
class Request:
    """The arguments of one run.

    task, architecture: a registered name, `file.py:Class`, `package.module:Class`, or a class.
    recipe: a name, a TOML file, or "auto" ("diagnostic" for a generated task, "language" for one of that family, else
    "quick" on a CPU, "matched" on a GPU).
    settings: recipe values to override, as text: {"train.steps": "500"}.
    source: folder with the raw data. time_limit: seconds, counted from `created` (of `time.monotonic`).
    pretrain: one of OBJECTIVES; "" for that of the recipe. match: a budget that determines the width
    (lra.config.match). checkpoint_dir: folder for checkpoints, by default the run's own. search: description of the
    search that chose these settings. select_only: stop before the test set is read. init_from: run, exported folder or
    file with the initial weights. teacher: folder of the run that this one imitates (knowledge distillation). scorer:
    folder of the run that measures the difficulty of training examples (train.curriculum).
    threads: number of CPU threads; by default OMP_NUM_THREADS, else one for each core.
    """

    task: str | type
    architecture: str | type
    recipe: str = "auto"
    seed: int = 0
    protocol: str = ""
    settings: Mapping[str, str] | None = None
    source: Path | None = None
    time_limit: float | None = None
    resume: bool = False
    pretrain: str = ""
    match: str = ""
    placement: Placement = field(default_factory=Placement)
    checkpoint_dir: Path | None = None
    loggers: tuple[str, ...] = ()
    search: Mapping[str, Any] | None = None
    select_only: bool = False
    init_from: Path | None = None
    created: float = field(default_factory=time.monotonic, compare=False)
    threads: int = 0
    teacher: Path | None = None
    scorer: Path | None = None

    @property
    def task_name(self) -> str:
        return reference_of(self.task)

    @property
    def architecture_name(self) -> str:
        return reference_of(self.architecture)

    @property
    def recipe_name(self) -> str:
        """The recipe's name or file, with "auto" resolved for this machine."""
        if self.recipe != "auto":
            return self.recipe
        if own := _own_recipe(self.task):
            return own
        return "matched" if device.device_type() == "cuda" else "quick"

    @property
    def deadline(self) -> float | None:
        """The time of `time.monotonic` at which to stop; None without a limit."""
        return None if self.time_limit is None else self.created + self.time_limit

    def command(self, *more: str) -> str:
        """The shell command that repeats this run."""
        words = ["lra", "run", self.task_name, self.architecture_name]
        words += ["--recipe", self.recipe_name, "--seed", str(self.seed)]
        words += ["--protocol", self.protocol] if self.protocol else []
        for key, value in (self.settings or {}).items():
            words += ["--set", f"{key}={value}"]
        defaults = Placement()
        for name, given, default in (
            ("pretrain", self.pretrain, ""),
            ("match", self.match, ""),
            ("devices", self.placement.devices, defaults.devices),
            ("nodes", self.placement.nodes, defaults.nodes),
            ("strategy", self.placement.strategy, defaults.strategy),
            ("threads", self.threads, 0),
            ("from", self.source, None),
            ("checkpoint-dir", self.checkpoint_dir, None),
            ("init-from", self.init_from, None),
            ("teacher", self.teacher, None),
            ("scorer", self.scorer, None),
        ):
            words += [f"--{name}", str(given)] if given != default else []
        return shlex.join([*words, *more])


def resolve(request: Request) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a request, and the origin of the value of each dotted key. Raises UserError.

    Width and depth that meet a budget are found by building encoders, which imports torch.
    """
    recipe, origin = read(request)
    if request.match:
        return _matched(request, recipe, origin)
    return _within_budget(request, recipe, origin) if recipe.model.budget else (recipe, origin)


def read(request: Request) -> tuple[Recipe, dict[str, str]]:
    """Like `resolve`, without solving for the width: checks every argument without importing torch."""
    _check_task(request.task)
    architecture, name = architectures.declaration(request.architecture), request.architecture_name
    recipe, origin = recipes.resolve(request.recipe_name, request.task_name, name, request.settings)
    if request.protocol and request.protocol != (recipe.data.protocol or _protocols(request.task)[0]):
        recipe = replace(recipe, data=replace(recipe.data, protocol=request.protocol))
        origin["data.protocol"] = "--protocol"
    if origin["data.protocol"].startswith("--"):
        _check_protocol(request.task, recipe.data.protocol)
    if request.pretrain:
        if request.pretrain not in OBJECTIVES:
            raise unknown("objective", request.pretrain, OBJECTIVES, where="--pretrain")
        recipe = recipe.with_pretraining(request.pretrain)
        origin["pretrain.objective"] = "--pretrain"
    regimes = []
    for name, option, source in (
        ("warm start", "--init-from", request.init_from), ("distilled", "--teacher", request.teacher),
        ("curriculum", "--scorer", request.scorer),
    ):  # fmt: skip
        if source is not None:
            from lra.training import warm_start

            regimes.append(f"{name} ({warm_start.digest(source, option)[:8]})")
    if regimes:
        recipe = replace(recipe, regime=", ".join([*regimes, *([recipe.regime] if recipe.regime != "scratch" else [])]))
    own = [key for key in architecture.options if key not in SHAPE]
    for key in recipe.encoder:
        if key not in own:
            raise unknown("key", f"encoder.{key}", [f"encoder.{k}" for k in own], where=recipe.architecture)
        _check_option(key, recipe.encoder[key], architecture.options[key])
    return recipes.apply_variant(recipe, origin, architecture.preset)


_shapes: dict[tuple[type, str], tuple[int, int, str]] = {}
"""Width, depth and a line on the size that meet the budget of a recipe, by what they depend on."""


def _within_budget(request: Request, recipe: Recipe, origin: dict[str, str]) -> tuple[Recipe, dict[str, str]]:
    """The recipe with a width and a depth that keep to `model.budget`, relative to the Transformer in this recipe."""
    from lra.config import match
    from lra.training.construction import build_encoder

    common = {key: text for key, text in (request.settings or {}).items() if not key.startswith("encoder.")}
    reference, _ = recipes.resolve(request.recipe_name, recipe.task, "transformer", common)
    constructor, transformer = architectures.get(request.architecture), architectures.get("transformer")
    # a sweep asks once for each seed and task
    parts = [r.as_dict() for r in (recipe, reference)]
    key = (constructor.cls, json.dumps([[r["name"], r["architecture"], r["model"], r["encoder"]] for r in parts]))
    if key not in _shapes:
        _shapes[key] = match.find_shape(
            recipe, reference, lambda r: build_encoder(r, constructor, match.LENGTH),
            lambda r: build_encoder(r, transformer, match.LENGTH),
        )  # fmt: skip
    width, depth, note = _shapes[key]
    if (width, depth) == (recipe.model.d_model, recipe.model.n_layers):
        return recipe, origin
    notes = dict.fromkeys(("width", "depth"), f"model.budget: {note}")
    return replace(recipe, width=width, depth=depth), origin | notes


def _matched(request: Request, recipe: Recipe, origin: dict[str, str]) -> tuple[Recipe, dict[str, str]]:
    from lra.config import match
    from lra.data import prepared_sets
    from lra.training.construction import build, kept_random_state

    constructor = architectures.get(request.architecture)
    task, protocol = prepared_sets.resolve(tasks.get(request.task)(), recipe.data.protocol or None)
    with kept_random_state():
        width, note = match.find_width(
            request.match, recipe, lambda r: build(r, constructor, task, protocol, 0), protocol
        )
    origin["model.d_model"] = f"--match: {note}"
    return replace(recipe, model=replace(recipe.model, d_model=width)), origin


def check(request: Request, recipe: Recipe) -> None:
    """Raise UserError for every mistake in a request that can be found before data and model are loaded."""
    if type(request.seed) is not int or not 0 <= request.seed <= LARGEST_SEED:
        raise UserError(f"seed is {brief(request.seed)}; a whole number from 0 to {LARGEST_SEED}")
    if type(request.threads) is not int or not 0 <= request.threads <= MAX_THREADS:
        raise UserError(f"threads is {brief(request.threads)}; a whole number up to {MAX_THREADS}, 0 for the default")
    curriculum = recipe.train.curriculum
    if (curriculum == "length") != (request.scorer is None):
        raise UserError(
            f"train.curriculum={curriculum} needs the difficulty of examples for a finished run; name it with --scorer"
            if request.scorer is None
            else "--scorer is for train.curriculum=difficulty and train.curriculum=dynamic; set one, or leave it out"
        )
    kind = device.device_type()
    if recipe.train.precision == "fp16" and kind != "cuda":
        raise UserError("train.precision=fp16 needs a GPU, and PyTorch finds none here; use bf16 or 32")
    sizes.check_weights(recipe, kind)
    request.placement.validate(kind, recipe)
    loggers.check(request.loggers)
    if request.source is not None:
        from lra.data import prepared_sets

        prepared_sets.source_folder(request.source)


def result_folder(request: Request, recipe: Recipe) -> Path:
    """The folder of the record of a run."""
    return result.folder() / result.place_of(recipe) / _task_folder(request) / result.slug(request.architecture_name)


def folder_of(request: Request, recipe: Recipe) -> Path:
    """The folder of a run: its recipe, log and checkpoints."""
    recipe_name = files.safe_name(recipe.name.replace("/", "-"), 60)
    name = f"{_task_folder(request)}-{result.slug(request.architecture_name)}-{recipe_name}"
    return result.unfinished() / f"{name}-{recipe.hash[:8]}-s{request.seed}"


def checkpoint_folder(request: Request, folder: Path) -> Path:
    """The checkpoint folder of a run."""
    return request.checkpoint_dir / folder.name if request.checkpoint_dir else folder / "checkpoints"


def setting_texts(overrides: Mapping[str, Any] | None) -> dict[str, str]:
    """Recipe values as the text of `--set`: {"train.steps": 500} -> {"train.steps": "500"}; tables become dotted keys.
    Raises UserError for a value that no recipe can hold."""
    texts: dict[str, str] = {}
    for key, value in _dotted(overrides or {}):
        try:
            texts[key] = json.dumps(recipes.check_json(value, key))
        except TypeError:
            raise UserError(f"{key} is {brief(value)}; a number, a text, true, false, or a list of these") from None
    return texts


def _dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _check_task(task: str | type) -> None:
    """Raise UserError for a task that does not exist. A task of this project is not imported for that."""
    if isinstance(task, str) and ":" not in task:
        tasks.facts(task)
    else:
        tasks.get(task)


def _own_recipe(task: str | type) -> str:
    """The recipe of a task's family; of a user's task, that of diagnostics if it draws its examples. Empty if there is
    none. A task of this project is not imported for that."""
    if isinstance(task, str) and ":" not in task:
        return recipes.OF_FAMILY.get(tasks.family(task), "") if task in tasks.names() else ""
    return recipes.OF_FAMILY["diagnostics"] if tasks.get(task).cls.generated else ""


def _check_option(key: str, value: Any, default: Any) -> None:
    """Raise UserError for a constructor argument that is of another kind than its default."""
    if key in TABLES and not isinstance(value, Mapping):
        raise UserError(f"encoder.{key} is {brief(value)}; a table, whose values are set as encoder.{key}.<name>=...")
    if isinstance(default, int | float) and isinstance(value, str):
        raise UserError(f"encoder.{key} is {brief(value)}; expected {type(default).__name__}")


def _protocols(task: str | type) -> list[str]:
    """Names of the protocols of a task, its default first."""
    return list(tasks.declaration(task).facts["protocols"])


def _check_protocol(task: str | type, protocol: str) -> None:
    names = _protocols(task)
    if protocol not in names:
        raise unknown(f"protocol of {reference_of(task)}", protocol, names)


def _task_folder(request: Request) -> str:
    task = request.task
    return tasks.facts(task)["name"] if isinstance(task, str) and ":" not in task else tasks.get(task).cls.name
