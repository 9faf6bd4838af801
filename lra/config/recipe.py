"""Recipes: TOML files read into frozen dataclasses, with the origin of every value.

A recipe file holds tables, from general to specific. A more specific table overrides a more general one, key by key:

    [default.train]                     for every run of this recipe
    [task.listops.data]                 for one task
    [architecture.s4d.encoder]          for one architecture ("s4d/inv" for one variant)
    [cell.listops.s4d.optim]            for one architecture on one task

A table may also hold a `note` for the reader and an `expected` table (lra.config.sections.Expected). Published settings
name their origin: `source` is the source of all values of a table, `sources` of single values by key, and `differences`
lists how the run departs from its source:

    [task.listops]
    source = "configs/listops.yaml"
    differences = ["the last checkpoint is scored there, the best one here"]
    [task.listops.sources]
    train.evaluate_every = "ours"

`--set train.steps=500` overrides every table. Unknown keys and values of the wrong type raise UserError.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lra.config.sections import OWN_BETAS, Data, Expected, Model, Optim, Pretrain, Search, Train, identity
from lra.config.sections import SECTIONS as TYPED
from lra.errors import UserError, brief, unknown

FOLDER = Path(__file__).parent
SECTIONS = ("data", "model", "encoder", "optim", "train", "pretrain", "search")
OF_FAMILY = {"diagnostics": "diagnostic", "language": "language"}
"""Families of tasks that have a recipe, and tables, of their own."""
STATEMENTS = ("source", "sources", "differences")
"""Keys of a table that name the origin of its values. They are not settings and not part of the hash."""


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: all settings of a run except its seed.

    note: a remark that is printed before the run; smoke: whether the run is a smoke test, which the tables leave out;
    width and depth: d_model and number of layers that meet `model.budget`, 0 if they are those of `model`. regime:
    "scratch", or the self-pretraining objective.
    """

    name: str
    task: str
    architecture: str
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    encoder: Mapping[str, Any] = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    pretrain: Pretrain = field(default_factory=Pretrain)
    search: Search = field(default_factory=Search)
    width: int = 0
    depth: int = 0
    regime: str = "scratch"
    note: str = ""
    smoke: bool = False
    expected: Expected = field(default_factory=Expected)

    def trial(self, rate: float) -> Recipe:
        """The short run at one rate of a search: `search.share` of the steps, with warm-up, schedule and curriculum
        shortened in proportion, and one validation. A dynamic curriculum, which depends on validations, is left out."""
        share = self.search.share
        steps = max(1, math.ceil(self.train.steps * share))
        train = replace(self.train, steps=steps, evaluate_every=steps)
        if train.curriculum == "dynamic":
            train = replace(train, curriculum="length")
        elif train.curriculum_steps:
            fewest = train.curriculum_bins - 1 if train.curriculum == "difficulty" else 1
            train = replace(train, curriculum_steps=max(fewest, math.ceil(train.curriculum_steps * share)))
        optim = replace(self.optim, lr=rate, warmup=math.ceil(self.optim.warmup * share))
        return replace(self, optim=optim, train=train)

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @property
    def d_model(self) -> int:
        """The width of the encoders built from this recipe."""
        return self.width or self.model.d_model

    @property
    def n_layers(self) -> int:
        """The number of layers of the encoders built from this recipe."""
        return self.depth or self.model.n_layers

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of all settings except name, note, smoke, width, depth and expected."""
        apart = ("name", "note", "smoke", "width", "depth", *TYPED)
        content = {k: v for k, v in self.as_dict().items() if k not in apart}
        parts = {s: identity(getattr(self, s)) for s in TYPED if s != "expected"}
        content |= {s: part for s, part in parts.items() if part}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def with_pretraining(self, objective: str) -> Recipe:
        """The same settings with another pretraining objective: "none", "mlm" or "causal". Raises UserError."""
        regime = "scratch" if objective == "none" else f"self-pretrained ({objective})"
        return replace(self, pretrain=replace(self.pretrain, objective=objective), regime=regime)


@dataclass(frozen=True)
class Provenance:
    """The source of a recipe's values, as stated in its file.

    sources: dotted key -> source, for values that have one; differences: how a run departs from the source.
    """

    sources: Mapping[str, str]
    differences: tuple[str, ...]


@cache
def names() -> tuple[str, ...]:
    """Sorted names of the shipped recipes, such as `paper/s4d`."""
    return tuple(sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.toml")))


def path_of(name: str, architecture: str) -> Path:
    """The file of a recipe. Raises UserError if there is none.

    name: a shipped recipe, a path ending in .toml, or "paper", which stands for paper/<architecture>-<variant> if that
    file exists, else for paper/<architecture>.
    """
    if name.endswith(".toml"):
        if not os.path.isfile(name):
            raise UserError(f"recipe file {name} does not exist")
        return Path(name)
    if name == "paper":
        own = f"paper/{architecture.replace('/', '-')}"
        name = own if own in names() else f"paper/{architecture.partition('/')[0]}"
        if name not in names():
            known = ", ".join(n.removeprefix("paper/") for n in names() if n.startswith("paper/"))
            raise UserError(f"there is no paper recipe for {architecture}; known: {known}")
    if name not in names():
        raise unknown("recipe", name, names())
    return FOLDER / f"{name}.toml"


def resolve(
    name: str, task: str, architecture: str, settings: Mapping[str, str] | None = None
) -> tuple[Recipe, dict[str, str]]:
    """Resolve the recipe of a task and an architecture.

    settings: dotted key -> value as text, as given to --set. Returns the recipe and, by dotted key, the origin of each
    value. Raises UserError.
    """
    path = path_of(name, architecture)
    tables = _read(path)
    values: dict[str, dict[str, Any]] = {section: {} for section in (*SECTIONS, "expected")}
    origin = {f"{s}.{f.name}": "built-in default" for s in SECTIONS if s != "encoder" for f in fields(TYPED[s])}
    note, smoke = "", False
    for where, table in _layers(tables, path, task, architecture):
        _statements(table, f"{path.name} [{where}]")
        for section, entries in table.items():
            if section in STATEMENTS:
                continue
            if section == "note" and isinstance(entries, str):
                note = entries
                continue
            if section == "smoke" and isinstance(entries, bool):
                smoke = entries
                continue
            if section not in values or not isinstance(entries, dict):
                raise unknown("section", section, values, where=f"{path.name} [{where}]")
            for key, value in _flatten(entries):
                _set_value(values, section, key, value, f"{path.name} [{where}]")
                origin[f"{section}.{key}"] = f"{path.name} [{where}]"
    for dotted, text in (settings or {}).items():
        section, _, key = dotted.partition(".")
        if section not in SECTIONS or not key:
            raise unknown("setting", dotted, origin, where="--set")
        _set_value(values, section, key, parse_setting(text), "--set")
        origin[dotted] = "--set"
    if "betas" not in values["optim"] and values["optim"].get("name") in OWN_BETAS:
        values["optim"]["betas"] = OWN_BETAS[values["optim"]["name"]]
        origin["optim.betas"] = "the optimiser's own"
    recipe = Recipe(
        name=name if not name.endswith(".toml") else Path(name).stem,
        task=task,
        architecture=architecture,
        encoder=values["encoder"],
        note=note,
        smoke=smoke,
        **{s: TYPED[s](**values[s]) for s in TYPED},
    )
    return recipe.with_pretraining(recipe.pretrain.objective), origin


def provenance(name: str, task: str, architecture: str) -> Provenance:
    """The source of the values of a recipe as stated in its file, for a task and an architecture. Raises
    UserError."""
    path = path_of(name, architecture)
    sources: dict[str, str] = {}
    differences: list[str] = []
    for where, table in _layers(_read(path), path, task, architecture):
        own, more = _statements(table, f"{path.name} [{where}]")
        sources = {key: text for key, text in sources.items() if key not in own} | {k: t for k, t in own.items() if t}
        differences += more
    return Provenance(sources, tuple(differences))


def _statements(table: Mapping[str, Any], where: str) -> tuple[dict[str, str], list[str]]:
    """The source of each value of a table, by dotted key ("" where none is stated), and the differences it lists."""
    keys = [
        f"{section}.{key}"
        for section, entries in table.items()
        if section in SECTIONS and isinstance(entries, dict)
        for key, _ in _flatten(entries)
    ]
    source, single = table.get("source", ""), table.get("sources", {})
    differences = table.get("differences", [])
    if not isinstance(single, dict):
        raise UserError(f"sources ({where}) is {brief(single)}; expected a table")
    single = dict(_flatten(single))
    if not isinstance(differences, list):
        raise UserError(f"differences ({where}) is {brief(differences)}; expected a list of texts")
    for text in (source, *single.values(), *differences):
        if not isinstance(text, str):
            raise UserError(f"source, sources or differences ({where}) hold {brief(text)}; expected a text")
    for key in single:
        if key not in keys:
            raise unknown("key", f"sources.{key}", [f"sources.{k}" for k in keys], where=where)
    return dict.fromkeys(keys, source) | single, differences


def _read(path: Path) -> dict[str, Any]:
    """The tables of a file. Raises UserError."""
    try:
        return _parse(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error


def encoder_options(settings: Mapping[str, str]) -> dict[str, Any]:
    """Constructor arguments from settings as text: {"encoder.layer.n_heads": "4"} -> {"layer": {"n_heads": 4}}. Raises
    UserError for a setting of another section."""
    options: dict[str, Any] = {}
    for dotted, text in settings.items():
        section, _, key = dotted.partition(".")
        if section != "encoder" or not key:
            raise UserError(f"--set {dotted}: only constructor arguments, encoder.<argument>=value, can be set here")
        _set_nested(options, key, parse_setting(text), "encoder", "--set")
    return options


@lru_cache
def _parse(content: bytes) -> dict[str, Any]:
    return tomllib.loads(content.decode())


@cache
def _types(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def apply_variant(
    recipe: Recipe, origin: Mapping[str, str], preset: Mapping[str, Any]
) -> tuple[Recipe, dict[str, str]]:
    """Apply the preset of a variant to a recipe. Returns the new recipe and the origin of its values.

    The preset overrides what the tables set for the plain architecture. An expected accuracy of the plain architecture
    is dropped. Raises UserError if --set or a table of the variant contradicts the preset.
    """
    arguments, encoder, origin = dict(_flatten(recipe.encoder)), json.loads(json.dumps(recipe.encoder)), dict(origin)
    changed = {key: value for key, value in _flatten(preset) if key not in arguments or arguments[key] != value}
    for key, value in changed.items():
        where, (*parents, last) = origin.get(f"encoder.{key}", ""), key.split(".")
        if where == "--set" or recipe.architecture in where:
            raise UserError(
                f"encoder.{key} is {brief(arguments[key])} ({where}), but {recipe.architecture} sets it to "
                f"{brief(value)}; use {recipe.architecture.partition('/')[0]} instead"
            )
        if key.partition(".")[0] not in encoder:
            continue
        table = encoder
        for part in parents:
            table = table.setdefault(part, {})
        table[last], origin[f"encoder.{key}"] = value, "variant"
    source = origin.get("expected.accuracy", "")
    own = recipe.architecture in source or source.startswith(f"{recipe.architecture.replace('/', '-')}.toml")
    return replace(recipe, encoder=encoder, expected=recipe.expected if own or not changed else Expected()), origin


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """The inverse of `as_dict`, also for records of earlier versions. Raises UserError for anything else."""
    sections = {}
    try:
        for name, kind in TYPED.items():
            hints, entries = _types(kind), content.get(name, {})
            sections[name] = kind(**{k: _check_type(v, hints[k], f"{name}.{k}") for k, v in entries.items()})
        plain = {f.name: content[f.name] for f in fields(Recipe) if f.name not in (*sections, "smoke", "width")}
        plain |= {"smoke": bool(content.get("smoke", False)), "width": int(content.get("width", 0))}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"not a recipe of this version: {type(error).__name__}: {error}") from None
    return Recipe(**plain, **sections)


def _layers(
    tables: Mapping[str, Any], path: Path, task: str, architecture: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables of a file that apply to a task and an architecture, with their names, the most general first."""
    for key in tables:
        if key not in ("default", "task", "architecture", "cell"):
            raise unknown("table", key, ("default", "task", "architecture", "cell"), where=path.name)
    base = architecture.partition("/")[0]
    names = list(dict.fromkeys((base, architecture)))
    keys = [("default",), ("task", task), *(("architecture", n) for n in names), *(("cell", task, n) for n in names)]
    for parts in keys:
        table: Any = tables
        for part in parts:
            table = table.get(part, {})
            if not isinstance(table, dict):
                raise UserError(f"{path.name}: {'.'.join(parts)} is {brief(table)}; expected a table")
        yield ".".join(parts), table


def _flatten(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested tables."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set_value(values: dict[str, dict[str, Any]], section: str, key: str, value: Any, where: str) -> None:
    """Set one key of a section after checking its name and type. where: origin of the value, for messages."""
    if section == "encoder":
        _set_nested(values["encoder"], key, value, "encoder", where)
        return
    hints = _types(TYPED[section])
    head, _, rest = key.partition(".")
    if rest and get_origin(hints.get(head)) is Mapping:
        _set_nested(values[section].setdefault(head, {}), rest, value, f"{section}.{head}", where)
    elif key not in hints:
        raise unknown("key", f"{section}.{key}", [f"{section}.{k}" for k in hints], where=where)
    else:
        values[section][key] = _check_type(value, hints[key], f"{section}.{key} ({where})")


def _set_nested(table: dict[str, Any], key: str, value: Any, name: str, where: str) -> None:
    """Set a dotted key of a table, creating the tables in between. name: dotted name of the table."""
    *parents, last = key.split(".")
    for parent in parents:
        table, name = table.setdefault(parent, {}), f"{name}.{parent}"
        if not isinstance(table, dict):
            raise UserError(f"{name} is both a value and a table ({where})")
    table[last] = check_json(value, f"{name}.{last} ({where})")


def check_json(value: Any, where: str) -> Any:
    """Return a value that JSON can represent: numbers below 2^63, strings, booleans, lists and tables of these.

    where: name of the setting, for messages. Raises UserError for anything else, such as dates and infinities.
    """
    if isinstance(value, list):
        return [check_json(part, where) for part in value]
    if isinstance(value, dict):
        return {key: check_json(part, where) for key, part in value.items()}
    valid = isinstance(value, str) or (isinstance(value, int | float) and abs(value) < 2**63)
    if not valid:
        raise UserError(f"{where} is {brief(value)}; a finite number, a string, true, false, or a list of these")
    return value


def _check_type(value: Any, kind: Any, where: str) -> Any:
    """Convert a TOML value to the type of its key. Raises UserError if it has another type."""
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if parts[-1] is Ellipsis and isinstance(value, list):
            parts = parts[:1] * len(value)
        if not isinstance(value, list) or len(value) != len(parts):
            raise UserError(f"{where} is {brief(value)}; a list of {len(parts)} numbers")
        return tuple(_check_type(v, k, where) for v, k in zip(value, parts, strict=True))
    if get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {brief(value)}; expected a table")
        return value
    if kind is float and type(value) is int:
        return float(check_json(value, where))
    if kind is str and type(value) is int:
        return str(value)  # train.precision=32
    if type(value) is not kind:
        raise UserError(f"{where} is {brief(value)}; expected {kind.__name__}")
    # sections check the range of their floats, infinities and NaN included
    return value if kind is float else check_json(value, where)


def parse_setting(text: str) -> Any:
    """Parse a --set value as TOML; text that is not valid TOML is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
