"""Recipes: TOML files read into frozen dataclasses, layer by layer, every value with its origin.

A recipe file holds tables that apply ever more narrowly; a later one overrides an earlier one, key by key:

    [default.train]                     for every run of this recipe
    [task.listops.data]                 for one task
    [architecture.s4d.encoder]          for one architecture (and, as "s4d/inv", for one variant)
    [cell.listops.s4d.optim]            for one architecture on one task

A table may also hold a `note` for people and an `expected` table (lra.config.sections.Expected), and
`--set train.steps=500` overrides them all. Unknown keys and values of the wrong type are errors.
"""

from __future__ import annotations

import hashlib
import json
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


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: what a run does, apart from its seed. note: what to expect of it, told before it starts;
    smoke: a run shows that things work and is no comparison, so that it stays out of the tables; width: the d_model
    that meets `model.budget`, 0 where that is model.d_model itself.
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
    regime: str = "scratch"
    note: str = ""
    smoke: bool = False
    expected: Expected = field(default_factory=Expected)

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @property
    def d_model(self) -> int:
        """The width that encoders of this recipe are built with."""
        return self.width or self.model.d_model

    @property
    def hash(self) -> str:
        """SHA-256 of everything but name, note, smoke, width and expectation, as canonical JSON."""
        content = {k: v for k, v in self.as_dict().items() if k not in ("name", "note", "smoke", "width", *TYPED)}
        parts = {s: identity(getattr(self, s)) for s in TYPED if s != "expected"}
        content |= {s: part for s, part in parts.items() if part}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def trained_as(self, regime: str) -> Recipe:
        """The same settings under --pretrain: "none", "mlm" or "causal". Raises UserError."""
        changed = replace(self, pretrain=replace(self.pretrain, objective=regime))
        return replace(changed, regime="scratch" if regime == "none" else f"self-pretrained ({regime})")


def names() -> list[str]:
    return sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.toml"))


def path_of(name: str, architecture: str) -> Path:
    """The file of a recipe: a name in this folder, a path ending in .toml, or "paper": paper/<architecture>-<variant>
    where a variant has a file of its own, else paper/<architecture>."""
    if name.endswith(".toml"):
        if not os.path.isfile(name):
            raise UserError(f"no recipe file {name}")
        return Path(name)
    if name == "paper":
        own = f"paper/{architecture.replace('/', '-')}"
        name = own if own in names() else f"paper/{architecture.partition('/')[0]}"
        if name not in names():
            known = ", ".join(n.removeprefix("paper/") for n in names() if n.startswith("paper/"))
            raise UserError(f"no published settings of {architecture} are on file; there are: {known}")
    if name not in names():
        raise unknown("recipe", name, names())
    return FOLDER / f"{name}.toml"


def resolve(
    name: str, task: str, architecture: str, settings: Mapping[str, str] | None = None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe of one cell and, per dotted key, where its value comes from. Raises UserError."""
    path = path_of(name, architecture)
    try:
        tables = _parse(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    values: dict[str, dict[str, Any]] = {section: {} for section in (*SECTIONS, "expected")}
    origin = {f"{s}.{f.name}": "built-in default" for s in SECTIONS if s != "encoder" for f in fields(TYPED[s])}
    note, smoke = "", False
    for where, table in _layers(tables, path, task, architecture):
        for section, entries in table.items():
            if section == "note" and isinstance(entries, str):
                note = entries
                continue
            if section == "smoke" and isinstance(entries, bool):
                smoke = entries
                continue
            if section not in values or not isinstance(entries, dict):
                raise unknown("section", section, values, where=f"{path.name} [{where}]")
            for key, value in _flat(entries):
                _put(values, section, key, value, f"{path.name} [{where}]")
                origin[f"{section}.{key}"] = f"{path.name} [{where}]"
    for dotted, text in (settings or {}).items():
        section, _, key = dotted.partition(".")
        if section not in SECTIONS or not key:
            raise unknown("setting", dotted, origin, where="--set")
        _put(values, section, key, _parsed(text), "--set")
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
    return recipe.trained_as(recipe.pretrain.objective), origin


@lru_cache
def _parse(content: bytes) -> dict[str, Any]:
    return tomllib.loads(content.decode())


@cache
def _types(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def of_variant(recipe: Recipe, origin: Mapping[str, str], preset: Mapping[str, Any]) -> tuple[Recipe, dict[str, str]]:
    """The recipe of an architecture's variant: its preset before what the tables say of the plain architecture, whose
    expected accuracy is not its own. Raises UserError where a table or --set names the variant and contradicts it."""
    given, encoder, origin = dict(_flat(recipe.encoder)), json.loads(json.dumps(recipe.encoder)), dict(origin)
    changed = {key: value for key, value in _flat(preset) if key not in given or given[key] != value}
    for key, value in changed.items():
        where, (*parents, last) = origin.get(f"encoder.{key}", ""), key.split(".")
        if where == "--set" or recipe.architecture in where:
            raise UserError(
                f"encoder.{key} is {brief(given[key])} ({where}), which is not {recipe.architecture}: that has "
                f"{brief(value)}; name {recipe.architecture.partition('/')[0]} instead"
            )
        if key.partition(".")[0] not in encoder:
            continue
        place = encoder
        for part in parents:
            place = place.setdefault(part, {})
        place[last], origin[f"encoder.{key}"] = value, "variant"
    about = origin.get("expected.accuracy", "")
    own = recipe.architecture in about or about.startswith(f"{recipe.architecture.replace('/', '-')}.toml")
    return replace(recipe, encoder=encoder, expected=recipe.expected if own or not changed else Expected()), origin


def from_dict(content: Mapping[str, Any]) -> Recipe:
    """The recipe that `as_dict` wrote, by this version or an earlier one. Raises UserError for what no recipe holds."""
    sections = {}
    try:
        for name, kind in TYPED.items():
            hints = _types(kind)
            sections[name] = kind(**{k: _typed(v, hints[k], f"{name}.{k}") for k, v in content.get(name, {}).items()})
        plain = {f.name: content[f.name] for f in fields(Recipe) if f.name not in (*sections, "smoke", "width")}
        plain |= {"smoke": bool(content.get("smoke", False)), "width": int(content.get("width", 0))}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"not a recipe of this version: {type(error).__name__}: {error}") from None
    return Recipe(**plain, **sections)


def _layers(
    tables: Mapping[str, Any], path: Path, task: str, architecture: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in tables:
        if key not in ("default", "task", "architecture", "cell"):
            raise unknown("table", key, ("default", "task", "architecture", "cell"), where=path.name)
    base = architecture.partition("/")[0]
    names = list(dict.fromkeys((base, architecture)))
    inside = [("default",), ("task", task), *(("architecture", n) for n in names), *(("cell", task, n) for n in names)]
    for parts in inside:
        table: Any = tables
        for part in parts:
            table = table.get(part, {})
            if not isinstance(table, dict):
                raise UserError(f"{path.name}: {'.'.join(parts)} is {brief(table)}; a table")
        yield ".".join(parts), table


def _flat(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _put(values: dict[str, dict[str, Any]], section: str, key: str, value: Any, where: str) -> None:
    if section == "encoder":
        _nest(values["encoder"], key, value, "encoder", where)
        return
    hints = _types(TYPED[section])
    head, _, rest = key.partition(".")
    if rest and get_origin(hints.get(head)) is Mapping:
        _nest(values[section].setdefault(head, {}), rest, value, f"{section}.{head}", where)
    elif key not in hints:
        raise unknown("key", f"{section}.{key}", [f"{section}.{k}" for k in hints], where=where)
    else:
        values[section][key] = _typed(value, hints[key], f"{section}.{key} ({where})")


def _nest(place: dict[str, Any], key: str, value: Any, inside: str, where: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        place, inside = place.setdefault(parent, {}), f"{inside}.{parent}"
        if not isinstance(place, dict):
            raise UserError(f"{inside} is both a value and a table ({where})")
    place[last] = plain(value, f"{inside}.{last} ({where})")


def plain(value: Any, where: str) -> Any:
    """What JSON can hold and a constructor may be given."""
    if isinstance(value, list):
        return [plain(part, where) for part in value]
    if isinstance(value, dict):
        return {key: plain(part, where) for key, part in value.items()}
    fine = isinstance(value, str) or (isinstance(value, int | float) and abs(value) < 2**63)
    if not fine:
        raise UserError(f"{where} is {brief(value)}; a finite number, a text, true, false, or a list of these")
    return value


def _typed(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if parts[-1] is Ellipsis and isinstance(value, list):
            parts = parts[:1] * len(value)
        if not isinstance(value, list) or len(value) != len(parts):
            raise UserError(f"{where} is {brief(value)}; a list of {len(parts)} numbers")
        return tuple(_typed(v, k, where) for v, k in zip(value, parts, strict=True))
    if get_origin(kind) is Mapping:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {brief(value)}; expected a table")
        return value
    if kind is float and type(value) is int:
        return float(plain(value, where))
    if type(value) is not kind:
        raise UserError(f"{where} is {brief(value)}; expected {kind.__name__}")
    # a float that is none is the section's to refuse: it says the range
    return value if kind is float else plain(value, where)


def _parsed(text: str) -> Any:
    """A --set value: TOML where it is valid TOML, a plain string otherwise."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
