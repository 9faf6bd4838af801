"""The shape of the repository: its folders, its links, the direction of imports, and what no file may contain."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("architectures", "kernels", "tasks")
CODE = ("lra", *LINKED, "results", "tests")
TOP = {
    *CODE, ".ci", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "constraints.txt", "pyproject.toml",
}  # fmt: skip
OPTIONAL = {"SECURITY.md"}
LONGEST = 600
# assembled from parts, so that this file does not hold what it looks for
MACHINE_PATHS = re.compile("|".join(("/" + "work/", "/" + "root/", "/" + "home/", r"\.\./" + "shared")))


def files(*suffixes: str) -> list[Path]:
    """The files of the six folders and of the top level, each once: links are not followed, caches are left out."""
    found = [p for p in ROOT.iterdir() if p.is_file()]
    for folder in (*CODE, ".ci"):
        for here, folders, names in os.walk(ROOT / folder):
            folders[:] = [f for f in folders if not f.startswith((".", "__pycache__"))]
            found += [Path(here, name) for name in names]
    return sorted(p for p in found if not ignored(p) and (not suffixes or p.suffix in suffixes))


def ignored(path: Path) -> bool:
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return any(fnmatch.fnmatch(path.name, pattern.strip("/")) for pattern in patterns)


def module_name(path: Path) -> str:
    """The name a file is imported by: `kernels/x/cpu.py` is lra.kernels.x.cpu."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in (("lra",) if parts[0] in LINKED else ()) + parts if p != "__init__")


def imports(source: str, module: str, package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a source file imports, wherever in the file, relative names resolved.

    `from a import b` yields a.b: b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + package]
                start = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def objection(module: str, wanted: str) -> str:
    """Why `module` may not import `wanted`, or nothing."""
    head, *rest = wanted.split(".")
    if head in LINKED:
        return f"imports the flat name {wanted}; write lra.{wanted}"
    folder, *inside = module.split(".")[1:] if module.startswith("lra.") else [""]
    in_kernels = folder == "kernels"
    if head == "triton" and not (in_kernels and inside[-1:] == ["gpu"]) and not module.startswith("tests."):
        return "imports triton, which only kernels/*/gpu.py and tests may"
    if head == "numba" and not in_kernels and folder != "tasks":
        return "imports numba, which only kernels and task generators may"
    if in_kernels and head not in {"llvmlite", "lra", "numba", "numpy", "torch", "triton", *sys.stdlib_module_names}:
        return f"imports {head}, which kernels do without"
    if head != "lra" or not module.startswith("lra"):
        return ""
    allowed: dict[str, tuple[str, ...]] = {
        "kernels": ("lra.kernels.",),
        "encoder": (),
        "task": (),
        "errors": (),
        "model": ("lra.encoder.", "lra.task."),
        "architectures": ("lra.encoder.", "lra.kernels.", "lra.architectures._"),
        "tasks": ("lra.task.", "lra.tasks._"),
    }
    if folder in allowed:
        fine = any(f"{wanted}.".startswith(prefix) for prefix in allowed[folder])
        return "" if fine else f"imports {wanted}; a file of {folder} may import {', '.join(allowed[folder]) or 'none'}"
    if rest and rest[0] in ("architectures", "tasks"):
        return f"imports {wanted}; the harness reaches {rest[0]} by name, through lra.registry"
    return ""


def test_top_level() -> None:
    assert {p.name for p in ROOT.iterdir()} >= TOP
    # what people leave beside the project is their own; what is committed is not
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert {Path(line).parts[0] for line in tracked.splitlines()} - TOP - OPTIONAL == set()


@pytest.mark.parametrize("folder", LINKED)
def test_links(folder: str) -> None:
    link = ROOT / "lra" / folder
    assert link.is_symlink()
    assert os.readlink(link) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists(), "a flat package would shadow others of that name"


def test_direction_of_imports() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {why}"
        for path in files(".py")
        for line, wanted in imports(
            path.read_text(encoding="utf-8"), module_name(path), package=path.name == "__init__.py"
        )
        if (why := objection(module_name(path), wanted))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lra.architectures.recurrent.a", "from lra.architectures.recurrent.b import B"),
        ("lra.architectures.recurrent.a", "from lra.architectures import b"),
        ("lra.architectures.recurrent.a", "from .b import B"),
        ("lra.architectures.recurrent.a", "from lra.registry import architectures"),
        ("lra.architectures.recurrent.a", "def f():\n    import lra.training.run"),
        ("lra.architectures.recurrent.a", "import triton"),
        ("lra.tasks.lra.t", "from lra.architectures.recurrent.a import A"),
        ("lra.tasks.lra.t", "from lra.tasks.lra.u import U"),
        ("lra.kernels.k.cpu", "from lra.encoder import Encoder"),
        ("lra.kernels.k.cpu", "from ... import encoder"),
        ("lra.kernels.k.cpu", "import triton"),
        ("lra.kernels.k.reference", "import scipy"),
        ("lra.encoder", "from lra.errors import UserError"),
        ("lra.task", "from . import errors"),
        ("lra.training.module", "from lra.tasks import listops"),
        ("lra.training.module", "import lra.architectures.state_space.s4d"),
        ("tests.test_x", "import kernels.linear_scan"),
        ("tests.test_x", "from tasks import listops"),
    ],
)
def test_wrong_imports_are_seen(module: str, source: str) -> None:
    assert any(objection(module, wanted) for _, wanted in imports(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "lra.architectures.recurrent.a",
            "from lra.architectures._stack import Stack\nfrom lra.kernels.linear_scan import x",
        ),
        ("lra.architectures.recurrent.a", "from lra.encoder import Encoder\nimport torch\nimport scipy.linalg"),
        ("lra.kernels.k.gpu", "import triton.language as tl\nfrom lra.kernels import _dispatch\nfrom . import cpu"),
        ("lra.tasks.lra.t", "from lra.task import Task\nfrom lra.tasks._storage import write"),
        ("lra.training.module", "from lra.encoder import Encoder\nfrom lra.kernels import _dispatch"),
        ("tests.test_x", "from lra.architectures.recurrent.a import A\nfrom lra.tasks.lra.t import T"),
    ],
)
def test_right_imports_are_let_through(module: str, source: str) -> None:
    assert [objection(module, wanted) for _, wanted in imports(source, module) if objection(module, wanted)] == []


def test_files_are_short() -> None:
    lengths = {p.relative_to(ROOT): len(p.read_text(encoding="utf-8").splitlines()) for p in files(".py")}
    assert lengths
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}


def test_no_machine_paths() -> None:
    text = files(".py", ".toml", ".md", ".txt", ".cff", ".csv", "")
    assert any(p.name == "Makefile" for p in text)
    found = [
        f"{path.relative_to(ROOT)}:{number} {line.strip()[:80]}"
        for path in text
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATHS.search(line)
    ]
    assert not found, "\n".join(found)
