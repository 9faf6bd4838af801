"""Comparison of a run with the settings of the shipped recipe.

    official        the shipped recipe of that name resolves to exactly these settings
    modified        the run changed some of them: --set, --match, --pretrain, or another recipe file of that name
    earlier recipe  nothing was changed, but the shipped recipe is a different one now
    own recipe      no recipe of that name is shipped

The protocol does not count as a setting: results of different protocols are never in one table anyway.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import msgspec

from lra.config import recipe as recipes
from lra.config.recipe import Recipe
from lra.errors import UserError
from lra.registry import architectures
from lra.results.record import RunRecord

OFFICIAL, MODIFIED, EARLIER, OWN = "official", "modified", "earlier recipe", "own recipe"
OPTIONS = ("--set", "--match", "--pretrain", "--init-from", "--teacher", "--scorer")
"""Options of `lra run` that change settings of a recipe."""
ABSENT = "-"


@dataclass(frozen=True)
class Settings:
    """Relation of a run to the shipped recipe. changed: setting -> (value of the run, value of the recipe), as text."""

    status: str
    changed: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def ranked(self) -> bool:
        """Modified runs and runs of an earlier recipe are listed apart."""
        return self.status in (OFFICIAL, OWN)

    def describe(self) -> str:
        """The changed settings in one line."""
        return ", ".join(f"{key} {used} (recipe: {shipped})" for key, (used, shipped) in self.changed.items())


def settings_of(record: RunRecord) -> Settings:
    """The settings of a run beside those of the shipped recipe of that name."""
    protocol = record.recipe.data.get("protocol")
    shipped = shipped_recipe(record.recipe.name, record.task, record.architecture, str(protocol or ""))
    if shipped is None:
        return Settings(OWN)
    if shipped.hash == record.recipe_hash:
        return Settings(OFFICIAL)
    used = recipe_settings(record) | {"regime": record.regime}
    if record.changed:
        return Settings(MODIFIED, {k: (used.get(k, ABSENT), _text(v)) for k, v in sorted(record.changed.items())})
    changed = differences(used, dict(flatten(_settings(shipped.as_dict()))) | {"regime": record.regime})
    by_option = record.changed is None and _has_option(record.command)
    return Settings(MODIFIED if by_option else EARLIER, changed)


def changed_settings(recipe: Recipe) -> dict[str, Any] | None:
    """Settings in which a resolved recipe departs from the shipped one, with the shipped values (None: it has none).
    Returns None if no recipe of that name is shipped."""
    shipped = shipped_recipe(recipe.name, recipe.task, recipe.architecture, recipe.data.protocol)
    if shipped is None:
        return None
    used, official = (dict(_leaves(_settings(r.as_dict()))) for r in (recipe, shipped))
    if recipe.regime.startswith(("warm start", "distilled", "curriculum")):
        used, official = used | {"regime": recipe.regime}, official | {"regime": shipped.regime}
    return {
        key: official.get(key) for key in sorted(used.keys() | official.keys()) if used.get(key) != official.get(key)
    }


@lru_cache(maxsize=4096)
def shipped_recipe(name: str, task: str, architecture: str, protocol: str = "") -> Recipe | None:
    """The resolved shipped recipe for a task, protocol and architecture; None if it is not shipped."""
    if name != "paper" and name not in recipes.names():
        return None
    try:
        recipe, origin = recipes.resolve(name, task, architecture)
        base, _, variant = architecture.partition("/")
        if variant and base in architectures.names():
            preset = architectures.facts(base)["variants"].get(variant, {})
            recipe, _ = recipes.apply_variant(recipe, origin, preset)
    except UserError:
        return None
    return replace(recipe, data=replace(recipe.data, protocol=protocol)) if protocol else recipe


def flatten(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of nested mappings, in the order of the keys."""
    for key, value in _leaves(content):
        yield key, _text(value)


def differences(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Key -> (value in a, value in b) where they differ; "-" where one has no such key."""
    pairs = {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in sorted(a.keys() | b.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def recipe_settings(record: RunRecord) -> dict[str, str]:
    """The settings of a run as text, by dotted key, with today's defaults for settings that are newer than the run."""
    content = msgspec.to_builtins(record.recipe)
    # the recipe of another version may not be valid in this one; its settings are shown as they are then
    with suppress(UserError):
        content = recipes.from_dict(content).as_dict()
    return dict(flatten(_settings(content)))


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a recipe that its hash covers."""
    kept = {section: dict(content[section]) for section in recipes.SECTIONS}
    kept["data"].pop("protocol", None)
    if kept["pretrain"].get("objective", "none") == "none":
        del kept["pretrain"]
    return kept


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in sorted(content):
        value = content[key]
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _has_option(command: str) -> bool:
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return any(word.partition("=")[0] in OPTIONS for word in words)
