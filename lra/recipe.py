"""Recipes: TOML files read into frozen dataclasses, layer by layer, every value with its origin.

A recipe file holds tables that apply ever more narrowly; a later one overrides an earlier one, key by key:

    [default.train]                     for every run of this recipe
    [task.listops.data]                 for one task
    [architecture.s4d.encoder]          for one architecture (and, as "s4d/inv", for one variant)
    [cell.listops.s4d.optim]            for one architecture on one task

A table may also hold a `note` for people, and `--set train.steps=500` overrides them all. Unknown keys and values of
the wrong type are errors.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lra.errors import UserError, unknown

FOLDER = Path(__file__).parent / "recipes"
SECTIONS = ("data", "model", "encoder", "optim", "train")
POOLINGS = ("mean", "max", "last", "cls")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")
PRECISIONS = ("auto", "32", "bf16")


@dataclass(frozen=True)
class Data:
    """protocol: of the task ("" = its first); *_examples: how many are used (0 = all); batch_size: per step.

    validation_examples limits the evaluations that choose the checkpoint; the test set is always scored whole unless
    test_examples says otherwise, and the result says so.
    """

    protocol: str = ""
    batch_size: int = 32
    evaluation_batch_size: int = 64
    train_examples: int = 0
    validation_examples: int = 0
    test_examples: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "evaluation_batch_size")
        _at_least(self, 0, "train_examples", "validation_examples", "test_examples")


@dataclass(frozen=True)
class Model:
    """Width, depth and surroundings of the encoder; direction: "causal" or "bidirectional" (see lra.encoder)."""

    d_model: int = 64
    n_layers: int = 2
    dropout: float = 0.0
    pooling: str = "mean"
    direction: str = "bidirectional"

    def __post_init__(self) -> None:
        _at_least(self, 1, "d_model", "n_layers")
        _one_of(self, "pooling", POOLINGS)
        _one_of(self, "direction", ("causal", "bidirectional", "concat", "add", "shared"))
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}; from 0 up to, not including, 1")


@dataclass(frozen=True)
class Optim:
    """AdamW; weight_decay acts on matrices only; clip: largest gradient norm (0 = no clipping); warmup: in steps."""

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        _one_of(self, "schedule", SCHEDULES)
        _at_least(self, 0, "weight_decay", "warmup", "clip")
        if not 0 < self.lr < math.inf:
            raise UserError(f"optim.lr is {self.lr}; more than 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim.betas is {list(self.betas)}; each from 0 up to, not including, 1")


@dataclass(frozen=True)
class Train:
    """steps: optimiser steps; evaluate_every: steps between validations; precision: auto = bf16 on CUDA, else 32."""

    steps: int = 1000
    evaluate_every: int = 250
    precision: str = "auto"

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "evaluate_every")
        _one_of(self, "precision", PRECISIONS)


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: what a run does, apart from its seed. note: what to expect of it, told before it starts."""

    name: str
    task: str
    architecture: str
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    encoder: Mapping[str, Any] = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    regime: str = "scratch"
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @property
    def hash(self) -> str:
        """SHA-256 of everything but name and note, as canonical JSON."""
        content = {k: v for k, v in self.as_dict().items() if k not in ("name", "note")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def names() -> list[str]:
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.toml"))


def path_of(name: str, architecture: str) -> Path:
    """The file of a recipe: a name in `recipes/`, "paper" (= paper/<architecture>), or a path ending in .toml."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UserError(f"no recipe file {name}")
        return Path(name)
    if name == "paper":
        name = f"paper/{architecture.partition('/')[0]}"
    if name not in names():
        raise unknown("recipe", name, names())
    return FOLDER / f"{name}.toml"


def resolve(
    name: str, task: str, architecture: str, settings: Mapping[str, str] | None = None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe of one cell and, per dotted key, where its value comes from. Raises UserError."""
    path = path_of(name, architecture)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origin = {f"{s}.{f.name}": "built-in default" for s in SECTIONS if s != "encoder" for f in fields(_class(s))}
    note = ""
    for where, table in _layers(tables, path, task, architecture):
        for section, entries in table.items():
            if section == "note" and isinstance(entries, str):
                note = entries
                continue
            if section not in SECTIONS or not isinstance(entries, dict):
                raise unknown("section", section, SECTIONS, where=f"{path.name} [{where}]")
            for key, value in _flat(entries):
                _put(values, section, key, value, f"{path.name} [{where}]")
                origin[f"{section}.{key}"] = f"{path.name} [{where}]"
    for dotted, text in (settings or {}).items():
        section, _, key = dotted.partition(".")
        if section not in SECTIONS or not key:
            raise unknown("setting", dotted, origin, where="--set")
        _put(values, section, key, _parsed(text), "--set")
        origin[dotted] = "--set"
    recipe = Recipe(
        name=name if not name.endswith(".toml") else Path(name).stem,
        task=task,
        architecture=architecture,
        encoder=values["encoder"],
        note=note,
        **{s: _class(s)(**values[s]) for s in SECTIONS if s != "encoder"},
    )
    return recipe, origin


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """The recipe that `as_dict` wrote. Raises UserError for what no recipe holds."""
    sections = {s: _class(s)(**{k: _typed(v, get_type_hints(_class(s))[k], f"{s}.{k}") for k, v in content[s].items()})
                for s in SECTIONS if s != "encoder"}  # fmt: skip
    plain = {f.name: content[f.name] for f in fields(Recipe) if f.name not in sections}
    return Recipe(**plain, **sections)


def _layers(
    tables: Mapping[str, Any], path: Path, task: str, architecture: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in tables:
        if key not in ("default", "task", "architecture", "cell"):
            raise unknown("table", key, ("default", "task", "architecture", "cell"), where=path.name)
    base = architecture.partition("/")[0]
    yield "default", tables.get("default", {})
    yield f"task.{task}", tables.get("task", {}).get(task, {})
    for name in dict.fromkeys((base, architecture)):
        yield f"architecture.{name}", tables.get("architecture", {}).get(name, {})
    for name in dict.fromkeys((base, architecture)):
        yield f"cell.{task}.{name}", tables.get("cell", {}).get(task, {}).get(name, {})


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(values: dict[str, dict[str, Any]], section: str, key: str, value: Any, where: str) -> None:
    if section == "encoder":
        *parents, last = key.split(".")
        place = values["encoder"]
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise UserError(f"encoder.{parent} is both a value and a table ({where})")
        place[last] = value
        return
    hints = get_type_hints(_class(section))
    if key not in hints:
        raise unknown("key", f"{section}.{key}", [f"{section}.{k}" for k in hints], where=where)
    values[section][key] = _typed(value, hints[key], f"{section}.{key} ({where})")


def _typed(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if not isinstance(value, list) or len(value) != len(parts):
            raise UserError(f"{where} is {value!r}; a list of {len(parts)} numbers")
        return tuple(_typed(v, k, where) for v, k in zip(value, parts, strict=True))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where} is {value!r}; expected {kind.__name__}")
    return value


def _parsed(text: str) -> Any:
    """A --set value: TOML where it is valid TOML, a plain string otherwise."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _class(section: str) -> Any:
    return types.MappingProxyType({"data": Data, "model": Model, "optim": Optim, "train": Train})[section]


def _at_least(section: Any, least: float, *keys: str) -> None:
    for key in keys:
        if not least <= getattr(section, key) < math.inf:
            raise UserError(f"{type(section).__name__.lower()}.{key} is {getattr(section, key)}; at least {least}")


def _one_of(section: Any, key: str, allowed: tuple[str, ...]) -> None:
    if getattr(section, key) not in allowed:
        name = f"{type(section).__name__.lower()}.{key}"
        raise UserError(f"{name} is {getattr(section, key)!r}; one of {', '.join(allowed)}")
