"""Registries of architectures and tasks, looked up by name.

A file `architectures/<family>/<name>.py` or `tasks/<family>/<name>.py` registers itself. Listing names imports no file.

architectures.get("s4d")             a file of this project
architectures.get("s4d/inv")         a variant that its card declares
architectures.get("my.package:Net")  any importable class
architectures.get("net.py:Net")      a class in a user's file
architectures.get(Net)               a class
architectures.get("mynet")           an entry point of an installed package, in the group `lra.architectures`

`tasks` works in the same way, with the entry-point group `lra.tasks`.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from lra import __version__
from lra.errors import UserError, describe, unknown, user_line
from lra.files import atomic, cache_root
from lra.source import files_of, home_of, source_files

ROOT = Path(__file__).parent
PLUGIN = "plug-in"
"""The family of architectures and tasks that another package registers."""


@dataclass(frozen=True)
class Constructor:
    """A class with the arguments of a variant preset. Called with keyword arguments; unknown ones raise UserError."""

    name: str
    cls: type[Any]
    preset: Mapping[str, Any] = field(default_factory=dict)
    declared: bool = True
    """False for a wrapped torch module, which declares neither a card nor its cost."""
    source: Mapping[str, str] | None = None
    """`lra.source.source_files` of the class when it was imported."""

    def options(self) -> dict[str, Any]:
        """The constructor's keyword arguments and their defaults (`inspect.Parameter.empty` where required)."""
        parameters = inspect.signature(self.cls).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
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
            raise UserError(f"{self.name}: {error}{user_line(error)}") from error
        except Exception as error:
            # a file of this project should not raise anything else; running out of memory is explained elsewhere
            if ":" not in self.name or isinstance(error, UserError | MemoryError) or "memory" in str(error):
                raise
            raise UserError(f"{self.name}: its constructor {describe(error)}") from error


@dataclass(frozen=True)
class Declaration:
    """The declared properties of a name and its constructor.

    options: keyword arguments and their defaults, including those the variant sets (`inspect.Parameter.empty` where
    required; the source text of a default that is not a literal). preset: arguments that the variant sets. facts: name
    and card of an architecture, name and protocols of a task.
    """

    options: Mapping[str, Any]
    preset: Mapping[str, Any]
    facts: Mapping[str, Any]


def reference_of(target: str | type) -> str:
    """The name of an architecture or task in a record; `module:qualified name` for a class."""
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


class Registry:
    """All architectures, or all tasks. folder: inside `lra/`; contract: name of the base class."""

    def __init__(self, kind: str, folder: str, contract: str) -> None:
        self.kind, self.folder, self.contract = kind, folder, contract

    @cache  # noqa: B019  (the two registries live as long as the process)
    def _files(self) -> Mapping[str, Path]:
        """Name -> file: `<folder>/<family>/<name>.py`, without folders and files that start with an underscore."""
        files: dict[str, Path] = {}
        for path in sorted((ROOT / self.folder).glob("[!_]*/[!_]*.py")):
            if path.stem in files:
                raise UserError(
                    f"two {self.kind}s are named {path.stem!r}: {files[path.stem]} and {path}; rename one of them"
                )
            files[path.stem] = path
        return MappingProxyType(files)

    @cache  # noqa: B019
    def _plugins(self) -> Mapping[str, EntryPoint]:
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=f"lra.{self.folder}"):
            taken = point.name in points or point.name in self._files()
            if taken and (point.name in self._files() or points[point.name].value != point.value):
                raise UserError(f"two {self.kind}s are named {point.name!r}: one is {point.value}; rename one of them")
            points[point.name] = point
        return MappingProxyType(points)

    def names(self, variants: bool = False) -> list[str]:
        """Sorted registered names. variants: add `name/variant` for every variant that a file of this project has."""
        names = sorted({*self._files(), *self._plugins()})
        if not variants:
            return names
        return [full for name in names for full in (name, *(f"{name}/{v}" for v in self.facts(name)["variants"]))]

    def family(self, name: str) -> str:
        """The folder of a name, such as `state_space`; PLUGIN for a plug-in. Raises UserError for an unknown name."""
        if name in self._plugins():
            return PLUGIN
        if name not in self._files():
            raise self._unknown(name)
        return self._files()[name].parent.name

    def _unknown(self, name: str) -> UserError:
        """The error of an unknown name. It suggests the class in a file of that name in the working directory."""
        own, classes = f"{name}.py", list[str]()
        with suppress(OSError, ValueError):
            classes = re.findall(r"^class (\w+)", Path(own).read_text(encoding="utf-8"), re.MULTILINE)
        if not classes:
            return unknown(self.kind, name, self.names())
        return UserError(f"unknown {self.kind} {name!r}; for the class in {own} give {own}:{classes[-1]}")

    def facts(self, name: str) -> dict[str, Any]:
        """Card or class attributes of a file, as far as they are literals, read without importing it.

        For an architecture also `direction` ("causal", "two-way", or "either" if the recipe chooses) and `recurrent`
        (whether it has a recurrent mode; a class whose default options rule it out sets `recurrent = False`). A plug-in
        is imported to read them; if that fails, `problem` has the reason. `name` has no variant. Raises UserError for
        an unknown name and for a card that is not made of literals.
        """
        facts: dict[str, Any] = {"name": name, "family": self.family(name), "variants": {}}
        if name in self._plugins():
            return facts | {"plugin": self._plugins()[name].value} | self._plugin_facts(name)
        if name not in self._files():
            raise self._unknown(name)
        path = self._files()[name]
        try:
            for node in _parsed(path).body:
                # a file may hold helper classes; the registered one declares a card or a task's name
                if isinstance(node, ast.ClassDef) and _assigned_names(node) & {"card", "name"}:
                    facts |= _read_literals(node)
            if "causal" in facts:
                chosen = "direction" in (_read_signature(path) or {}) and not facts.pop("refuses_causal", False)
                stateful = bool(_stateful_classes(path)) and (chosen or facts["causal"])
                facts = {"recurrent": stateful} | facts | {"direction": _direction(facts["causal"], chosen)}
        except (SyntaxError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read without importing it ({error}); write the card as literals"
            ) from None
        return facts

    def all_facts(self) -> dict[str, dict[str, Any]]:
        """`facts` of every registered name, as JSON values. They are cached until a file changes. Raises UserError."""
        shared = (ROOT / self.folder).glob("_*.py")
        states = [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in (*self._files().values(), *sorted(shared))]
        state = hashlib.sha256(json.dumps([__version__, states]).encode()).hexdigest()
        path = cache_root() / f"{self.folder}.json"
        with suppress(OSError, ValueError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(kept, dict) and kept.get("state") == state:
                return kept["facts"] | {name: self.facts(name) for name in self._plugins()}
        facts = {name: self.facts(name) for name in self._files() if name not in self._plugins()}
        with suppress(OSError), atomic(path) as temporary:
            temporary.write_text(json.dumps({"state": state, "facts": facts}), encoding="utf-8")
        return facts | {name: self.facts(name) for name in self._plugins()}

    def _plugin_facts(self, name: str) -> dict[str, Any]:
        """`facts` of the class of a plug-in."""
        try:
            constructor = self.get(name)
        except UserError as error:
            return {"problem": str(error)}
        card, cls = getattr(constructor.cls, "card", None), constructor.cls
        if self.kind == "task":
            return {"title": cls.title, "classes": cls.classes, "protocols": list(cls.protocols)}
        chosen = "direction" in constructor.options() and not getattr(cls, "refuses_causal", False)
        facts = {**vars(card), "direction": _direction(card.causal, chosen)} if card else {}
        options = {"direction": "causal"} if chosen else {}
        try:
            constructor(d_model=16, n_layers=1, length=16, **options).init_state(1)
            return facts | {"recurrent": True}
        except NotImplementedError:
            return facts | {"recurrent": False}
        except Exception as error:  # noqa: BLE001  (another package may raise anything)
            return facts | {"problem": f"cannot be built: {type(error).__name__}: {error}"}

    def declaration(self, reference: str | type) -> Declaration:
        """The declaration of a name or class. Files of this project are read without importing them, everything else is
        imported. Raises UserError, with a suggestion, for unknown names."""
        name, _, variant = str(reference).partition("/")
        if isinstance(reference, str) and name in self._files() and name not in self._plugins():
            facts = self.facts(name)
            if variant and variant not in facts["variants"]:
                raise unknown(f"variant of {name}", variant, facts["variants"])
            preset = facts["variants"].get(variant, {})
            if "protocols" in facts:
                return Declaration({}, {}, facts)
            if (options := _read_signature(self._files()[name])) is not None:
                return Declaration({k: preset.get(k, default) for k, default in options.items()}, preset, facts)
        constructor = self.get(reference)
        card = getattr(constructor.cls, "card", None)
        facts = {"name": getattr(constructor.cls, "name", constructor.name), **(vars(card) if card else {})}
        if self.kind == "task":
            facts["protocols"] = list(constructor.cls.protocols)
        return Declaration(constructor.options(), constructor.preset, facts)

    def get(self, reference: str | type) -> Constructor:
        """The constructor of a name or class. Raises UserError, with a suggestion, for unknown names."""
        if not isinstance(reference, str):
            return self._constructor(reference_of(reference), reference, getattr(reference, "__name__", "the layer"))
        if ":" in reference:
            return self._constructor(reference, *_import_object(reference, self.kind))
        name, _, variant = reference.partition("/")
        if name in self._plugins():
            cls = self._load_plugin(self._plugins()[name])
        elif name in self._files():
            module = importlib.import_module(f"lra.{self.folder}.{self.family(name)}.{name}")
            cls = self._only_class(module)
        else:
            raise self._unknown(name)
        constructor = self._constructor(reference, cls, name)
        if not variant:
            return constructor
        variants = cls.card.variants if hasattr(cls, "card") else {}
        if variant not in variants:
            raise unknown(f"variant of {name}", variant, variants)
        return replace(constructor, preset=dict(variants[variant]))

    def source(self, reference: str | type) -> Mapping[str, str] | None:
        """`Constructor.source` of a name or class. Files of this project, which have none, are not imported."""
        if isinstance(reference, str) and reference.partition("/")[0] in self._files():
            return None
        return self.get(reference).source

    def _load_plugin(self, point: EntryPoint) -> Any:
        try:
            return point.load()
        except (Exception, SystemExit) as error:  # another package may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{self.kind} {point.name!r}: loading {point.value} failed: {reason}") from error

    def _only_class(self, module: ModuleType) -> type:
        contract = self._contract()
        classes = [
            c for n, c in vars(module).items()
            if inspect.isclass(c) and issubclass(c, contract) and c.__module__ == module.__name__ and n[0] != "_"
        ]  # fmt: skip
        if len(classes) != 1:
            raise UserError(
                f"{module.__file__} defines {len(classes)} public {contract.__name__} classes; define exactly one"
            )
        return classes[0]

    def _contract(self) -> type:
        return getattr(importlib.import_module(f"lra.{self.kind if self.kind == 'task' else 'encoder'}"), self.contract)

    def _constructor(self, reference: str, cls: Any, name: str) -> Constructor:
        contract = self._contract()
        source = _sources.get(getattr(cls, "__module__", "")) or (source_files(cls) if inspect.isclass(cls) else None)
        if inspect.isclass(cls) and issubclass(cls, contract):
            return Constructor(reference, cls, source=source)
        if self.kind == "architecture":
            adopt = importlib.import_module("lra.architectures._adopted").adopt
            try:
                return Constructor(reference, adopt(cls, name), declared=False, source=source)
            except TypeError as error:
                raise UserError(f"{reference}: {error}") from error
        raise UserError(f"{reference} is not a subclass of {contract.__module__}.{contract.__name__}")


def _parsed(path: Path) -> ast.Module:
    """The syntax tree of a file; a file is parsed again only after it has changed."""
    return _parse(path, path.stat().st_mtime_ns)


@cache
def _parse(path: Path, changed: int) -> ast.Module:
    # the collector would walk the many objects of a tree again and again
    collecting = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        if collecting:
            gc.enable()


def _assigned_names(node: ast.ClassDef) -> set[str]:
    """Names assigned in the body of a class."""
    targets = [target for line in node.body if isinstance(line, ast.Assign) for target in line.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _read_literals(node: ast.ClassDef) -> dict[str, Any]:
    """Card values, constant class attributes and protocol names of a class."""
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


def _direction(causal: bool, chosen: bool) -> str:
    return "either" if chosen else "causal" if causal else "two-way"


@cache
def _stateful_classes(path: Path) -> frozenset[str]:
    """Names of the classes that a file defines or imports from a shared file, and that have a method `init_state` or
    mixers with one."""
    tree = _parsed(path)
    known: set[str] = set()
    for node in tree.body:
        # the residual stack has the method for mixers that have it
        known |= {n for n, p in _shared_names(node).items() if p.stem != "_stack" and n in _stateful_classes(p)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            own = any(isinstance(part, ast.FunctionDef) and part.name == "init_state" for part in node.body)
            # by its base, or by what it builds
            if own or any(isinstance(part, ast.Name) and part.id in known for part in ast.walk(node)):
                known.add(node.name)
    return frozenset(known)


def _read_signature(path: Path) -> dict[str, Any] | None:
    """Keyword arguments and defaults of the class that has a card; None where they cannot be read from files."""
    for node in _parsed(path).body:
        if isinstance(node, ast.ClassDef) and "card" in _assigned_names(node):
            function = _constructor_of(node)
            return None if function is None or len(function.args.args) > 1 else _read_options(path, node)
    return None


def _read_options(path: Path, node: ast.ClassDef) -> dict[str, Any] | None:
    """As `lra.encoder.signature_of`, of a class of a file; None where a base that it passes `**` on to is neither in
    the file nor in a shared one."""
    function, own = _constructor_of(node), {}
    if function is not None:
        if function.args.vararg:
            return None
        defaults = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        own = {argument.arg: _read_default(default) for argument, default in defaults}
        if function.args.kwarg is None:
            return own
    base = node.bases[0].id if node.bases and isinstance(node.bases[0], ast.Name) else ""
    home = next((p for line in _parsed(path).body for n, p in _shared_names(line).items() if n == base), path)
    for other in _parsed(home).body:
        if isinstance(other, ast.ClassDef) and other.name == base and other is not node:
            inherited = _read_options(home, other)
            return None if inherited is None else inherited | own
    return None


def _constructor_of(node: ast.ClassDef) -> ast.FunctionDef | None:
    return next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)


def _shared_names(node: ast.stmt) -> dict[str, Path]:
    """Names that a statement imports from a shared file of the architectures -> that file."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("lra.architectures._"):
        return {}
    path = ROOT / "architectures" / f"{str(node.module).rpartition('.')[2]}.py"
    return {name.name: path for name in node.names if name.asname is None and path.is_file()}


def _read_default(node: ast.expr | None) -> Any:
    if node is None:
        return inspect.Parameter.empty
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _import_object(reference: str, kind: str) -> tuple[Any, str]:
    """Import `file.py:Name` or `package.module:Name`. Returns the object and its name."""
    location, _, attribute = reference.rpartition(":")
    try:
        if location.endswith(".py"):
            module = _import_file(Path(location))
        else:
            module = importlib.import_module(location)
    except FileNotFoundError:
        raise UserError(f"{kind} {reference}: no file {location}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{kind} {reference}: importing {location} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise unknown("class", attribute, classes, where=location)
    return getattr(module, attribute), attribute


_sources: dict[str, Mapping[str, str]] = {}
"""`lra.source.files_of` of each user's file when it was imported, by the name of its module."""
_helpers: set[str] = set()
"""Names of the modules that users' files imported from their own folders."""


def _import_file(path: Path) -> ModuleType:
    """Import a Python file, which may import modules from its own folder. Once per process, unless one of these files
    was changed meanwhile."""
    # unlike Path.is_file, os.path.isfile returns False for a name the file system does not allow
    if not os.path.isfile(path):
        raise FileNotFoundError(path)
    name, path = f"lra_user_{path.stem}", path.resolve()
    imported, source = sys.modules.get(name), files_of(path)
    if imported is not None and Path(str(imported.__file__)) == path and _sources[name] == source:
        return imported
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    for helper in _helpers:
        # changed since, or of another folder
        sys.modules.pop(helper, None)
    before, sys.modules[name], _sources[name] = set(sys.modules), module, source
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
        own = {str(home_of(path) / file) for file in source}
        new = set(sys.modules) - before - {name}
        _helpers.update(key for key in new if getattr(sys.modules[key], "__file__", None) in own)
    return module


architectures = Registry("architecture", "architectures", "Encoder")
tasks = Registry("task", "tasks", "Task")
