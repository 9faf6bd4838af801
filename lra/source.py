"""The source of a user's class, which identifies it together with its name.

A class of this project has no source: its record holds the commit. Every other class is identified by the SHA-256 of
the file that defines it and of the files that it imports from its own folder, or, for a file in a package, from the
whole package. Imports are read from the text, so imports of a computed name are not followed.
"""

from __future__ import annotations

import ast
import inspect
import json
import linecache
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from lra.files import sha256

PROJECT = "lra"
INSTALLED = tuple(Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib"))


def source_files(cls: type) -> dict[str, str] | None:
    """File -> SHA-256, with names relative to the folder of the class; None for a class of this project.

    A class of a notebook has one entry: its name, and the SHA-256 of the cells that define its methods. {} if Python
    does not know the text.
    """
    if cls.__module__.partition(".")[0] == PROJECT:
        return None
    try:
        path = Path(inspect.getsourcefile(cls) or "")
        if path.is_file():
            return files_of(path)
    except (OSError, TypeError):
        # a class that is not of a file
        pass
    cells = sorted({method.__code__.co_filename for method in vars(cls).values() if inspect.isfunction(method)})
    text = "".join(line for cell in cells for line in linecache.getlines(cell))
    return {cls.__qualname__: sha256(text.encode())} if text else {}


def files_of(path: Path) -> dict[str, str]:
    """File -> SHA-256 of a Python file and of the files that it imports, directly or not, from its own folder."""
    path = path.resolve()
    home = home_of(path)
    contents: dict[Path, bytes] = {}
    pending = [path]
    while pending:
        file = pending.pop()
        if file not in contents:
            contents[file] = file.read_bytes()
            pending += _imported(file, contents[file], home)
    return {file.relative_to(home).as_posix(): sha256(contents[file]) for file in sorted(contents)}


def digest(files: Mapping[str, str] | None) -> str:
    """One SHA-256 for all files; empty without files."""
    return sha256(json.dumps(dict(files), sort_keys=True).encode()) if files else ""


def home_of(path: Path) -> Path:
    """The folder that names in `files_of` are relative to: that of the file, or, of a module in a package that is not
    installed, the folder of the outermost package."""
    home = path.parent
    if any(home.is_relative_to(folder) for folder in INSTALLED):
        return home
    while (home / "__init__.py").is_file():
        home = home.parent
    return home


def _imported(file: Path, content: bytes, home: Path) -> Iterator[Path]:
    """The files below `home` that a file imports."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        # such a file cannot be imported; where the attempt is caught, its own bytes still count
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(alias.name.split("."), (file.parent, home), home)
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            for alias in node.names:
                names = [*module, alias.name]
                yield from _module_files(
                    names, (file.parents[node.level - 1],) if node.level else (file.parent, home), home
                )


def _module_files(names: list[str], folders: tuple[Path, ...], home: Path) -> Iterator[Path]:
    """The files that importing `names`, joined by dots, runs. The last name may be that of an object in a module."""
    if names[0] == PROJECT:
        return
    for folder in folders:
        parts = [folder.joinpath(*names[:count]) for count in range(len(names) + 1)]
        candidates = [part / "__init__.py" for part in parts] + [part.with_suffix(".py") for part in parts[1:]]
        for candidate in candidates:
            if candidate.is_file() and candidate.is_relative_to(home):
                yield candidate
