"""Names to things: a file `architectures/<family>/<name>.py` or `tasks/<family>/<name>.py` is its own
registration, and nothing is imported to list it.

architectures.get("s4d")             a file of this project
architectures.get("s4d/inv")         a variant its card declares
architectures.get("my.package:Net")  any importable class
architectures.get("net.py:Net")      a class in a file of the user's own
architectures.get(Net)               a class
entry-point group `lra.architectures` (or `lra.tasks`) of an installed package: by its entry-point name
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from lra.errors import UserError, unknown

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Constructor:
    """A class with a variant's arguments preset. Called with keyword arguments only; unknown ones are a UserError."""

    name: str
    cls: type[Any]
    preset: Mapping[str, Any] = field(default_factory=dict)
    declared: bool = True
    """False for a plain module that was wrapped: what it did not declare is reported as not declared."""

    def options(self) -> dict[str, Any]:
        """The constructor's keyword arguments and their defaults (`inspect.Parameter.empty` where required)."""
        own = inspect.signature(self.cls).parameters.values()
        named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {p.name: self.preset.get(p.name, p.default) for p in named}

    def __call__(self, **arguments: Any) -> Any:
        known = self.options()
        for key in arguments:
            if key not in known:
                raise unknown("argument", key, known, where=self.name)
        missing = [k for k, default in known.items() if default is inspect.Parameter.empty and k not in arguments]
        if missing:
            raise UserError(f"{self.name} needs {', '.join(missing)}")
        try:
            return self.cls(**{**self.preset, **arguments})
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class Declaration:
    """What a name declares about its constructor.

    options: keyword arguments and their defaults, those of the variant included (`inspect.Parameter.empty` where
    required; a default that is not a literal is its source text). preset: what the variant sets. facts: name and card
    of an architecture, name and protocols of a task.
    """

    options: Mapping[str, Any]
    preset: Mapping[str, Any]
    facts: Mapping[str, Any]


def reference_of(thing: str | type) -> str:
    """The name under which a record keeps an architecture or task: of a class, `module:qualified name`."""
    return thing if isinstance(thing, str) else f"{thing.__module__}:{thing.__qualname__}"


class Registry:
    """One kind of thing: its folder inside `lra/`, its contract class, its entry-point group."""

    def __init__(self, kind: str, folder: str, contract: str) -> None:
        self.kind, self.folder, self.contract = kind, folder, contract

    @cache  # noqa: B019  (two registries live as long as the process)
    def _files(self) -> Mapping[str, Path]:
        """Name -> file: `<folder>/<family>/<name>.py`, where no part starts with an underscore."""
        files: dict[str, Path] = {}
        for path in sorted((ROOT / self.folder).glob("[!_]*/[!_]*.py")):
            if path.stem in files:
                raise UserError(f"two {self.kind}s are called {path.stem!r}: {files[path.stem]} and {path}; rename one")
            files[path.stem] = path
        return MappingProxyType(files)

    @cache  # noqa: B019
    def _plugins(self) -> Mapping[str, EntryPoint]:
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=f"lra.{self.folder}"):
            taken = point.name in points or point.name in self._files()
            if taken and (point.name in self._files() or points[point.name].value != point.value):
                raise UserError(f"two {self.kind}s are called {point.name!r}: one comes from {point.value}; rename it")
            points[point.name] = point
        return MappingProxyType(points)

    def names(self, variants: bool = False) -> list[str]:
        """Every registered name, with `name/variant` for declared variants of this project's own files on request."""
        names = sorted({*self._files(), *self._plugins()})
        if not variants:
            return names
        return [full for name in names for full in (name, *(f"{name}/{v}" for v in self.facts(name)["variants"]))]

    def family(self, name: str) -> str:
        """Folder of a name, such as `state_space`; empty for a plug-in. Raises UserError for unknown names."""
        if name in self._plugins():
            return ""
        if name not in self._files():
            raise unknown(self.kind, name, self.names())
        return self._files()[name].parent.name

    def facts(self, name: str) -> dict[str, Any]:
        """What a file says of itself (card or class attributes written as literals), read without importing it.
        Raises UserError for a name without variant that does not exist, and a file that cannot be read this way."""
        facts: dict[str, Any] = {"name": name, "family": self.family(name), "variants": {}}
        if name in self._plugins():
            return facts | {"plugin": self._plugins()[name].value}
        if name not in self._files():
            raise unknown(self.kind, name, self.names())
        path = self._files()[name]
        try:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef):
                    facts |= _literals(node)
        except (SyntaxError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read without importing it, a card holds literals only: {error}"
            ) from None
        return facts

    def declaration(self, reference: str | type) -> Declaration:
        """What a name declares; a file of this project is read without importing it, everything else is imported.
        Raises UserError with the nearest right name."""
        name, _, variant = str(reference).partition("/")
        if isinstance(reference, str) and name in self._files() and name not in self._plugins():
            facts = self.facts(name)
            if variant and variant not in facts["variants"]:
                raise unknown(f"variant of {name}", variant, facts["variants"])
            preset = facts["variants"].get(variant, {})
            if "protocols" in facts:
                return Declaration({}, {}, facts)
            if (options := _signature(self._files()[name])) is not None:
                return Declaration({k: preset.get(k, default) for k, default in options.items()}, preset, facts)
        constructor = self.get(reference)
        card = getattr(constructor.cls, "card", None)
        facts = {"name": getattr(constructor.cls, "name", constructor.name), **(vars(card) if card else {})}
        if self.kind == "task":
            facts["protocols"] = list(constructor.cls.protocols)
        return Declaration(constructor.options(), constructor.preset, facts)

    def get(self, reference: str | type) -> Constructor:
        """The constructor behind a name or a class. Raises UserError with the nearest right name."""
        if not isinstance(reference, str):
            return self._checked(reference_of(reference), reference, getattr(reference, "__name__", "the layer"))
        if ":" in reference:
            return self._checked(reference, *_load(reference, self.kind))
        name, _, variant = reference.partition("/")
        if name in self._plugins():
            cls = self._loaded(self._plugins()[name])
        elif name in self._files():
            module = importlib.import_module(f"lra.{self.folder}.{self.family(name)}.{name}")
            cls = self._only_class(module)
        else:
            raise unknown(self.kind, name, self.names())
        constructor = self._checked(reference, cls, name)
        if not variant:
            return constructor
        variants = cls.card.variants if hasattr(cls, "card") else {}
        if variant not in variants:
            raise unknown(f"variant of {name}", variant, variants)
        return Constructor(reference, cls, dict(variants[variant]))

    def _loaded(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except Exception as error:  # a stranger's package may raise anything
            said = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.kind} {point.name!r}: loading {point.value} failed: {said}") from error

    def _only_class(self, module: ModuleType) -> type:
        contract = self._contract()
        classes = [
            c for n, c in vars(module).items()
            if inspect.isclass(c) and issubclass(c, contract) and c.__module__ == module.__name__ and n[0] != "_"
        ]  # fmt: skip
        if len(classes) != 1:
            raise UserError(f"{module.__file__} defines {len(classes)} public {contract.__name__} classes; exactly one")
        return classes[0]

    def _contract(self) -> type:
        return getattr(importlib.import_module(f"lra.{self.kind if self.kind == 'task' else 'encoder'}"), self.contract)

    def _checked(self, reference: str, cls: Any, name: str) -> Constructor:
        contract = self._contract()
        if inspect.isclass(cls) and issubclass(cls, contract):
            return Constructor(reference, cls)
        if self.kind == "architecture":
            adopt = importlib.import_module("lra.architectures._adopted").adopt
            try:
                return Constructor(reference, adopt(cls, name), declared=False)
            except TypeError as error:
                raise UserError(f"{reference}: {error}") from error
        raise UserError(f"{reference} is not a {contract.__name__}")


def _literals(node: ast.ClassDef) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            target, value = line.targets[0].id, line.value
            if target == "card" and isinstance(value, ast.Call):
                facts |= {k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg}
            elif isinstance(value, ast.Constant):
                facts[target] = value.value
        elif isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Dict):
            keys = [key.value for key in line.value.keys if isinstance(key, ast.Constant)]
            if (
                isinstance(line.target, ast.Name)
                and line.target.id == "protocols"
                and len(keys) == len(line.value.keys)
            ):
                facts["protocols"] = keys
    return facts


def _signature(path: Path) -> dict[str, Any] | None:
    """Keyword arguments and defaults of the constructor of the class with a card; None where they cannot be read."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or "card" not in {
            t.id for line in node.body if isinstance(line, ast.Assign) for t in line.targets if isinstance(t, ast.Name)
        }:
            continue
        for function in node.body:
            if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                given = function.args
                if given.vararg or given.kwarg or len(given.args) > 1:
                    return None
                return {k.arg: _default(d) for k, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)}
    return None


def _default(node: ast.expr | None) -> Any:
    if node is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _load(reference: str, kind: str) -> tuple[Any, str]:
    """The object behind `file.py:Name` or `package.module:Name`, and its name."""
    place, _, attribute = reference.rpartition(":")
    try:
        if place.endswith(".py"):
            module = _module_of(Path(place))
        else:
            module = importlib.import_module(place)
    except FileNotFoundError:
        raise UserError(f"{kind} {reference}: no file {place}") from None
    except Exception as error:
        raise UserError(f"{kind} {reference}: importing {place} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise unknown("class", attribute, classes, where=place)
    return getattr(module, attribute), attribute


def _module_of(path: Path) -> ModuleType:
    # unlike Path.is_file it takes an impossible name for a missing file
    if not os.path.isfile(path):
        raise FileNotFoundError(path)
    name = f"lra_user_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and Path(str(known.__file__)).resolve() == path.resolve():
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


architectures = Registry("architecture", "architectures", "Encoder")
tasks = Registry("task", "tasks", "Task")
