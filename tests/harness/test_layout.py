"""The shape of the repository: its folders, its links, its import contracts, and what no file may contain."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKED = ("architectures", "kernels", "tasks")
CODE = ("lra", *LINKED, "results", "tests")
TOP = {
    *CODE, ".ci", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "constraints.txt", "pyproject.toml",
}  # fmt: skip
OPTIONAL = {"SECURITY.md", "benchmarks", "docs", "examples"}
LONGEST = 600
# assembled from parts, so that this file does not hold what it looks for
MACHINE_PATHS = re.compile("|".join(("/" + "work/", "/" + "root/", "/" + "home/", r"\.\./" + "shared")))


def files(*suffixes: str) -> list[Path]:
    """The files of the six folders and of the top level, each once: links are not followed, caches are left out."""
    found = [p for p in ROOT.iterdir() if p.is_file()]
    for folder in (*CODE, ".ci", "benchmarks", "docs", "examples"):
        for here, folders, names in os.walk(ROOT / folder):
            folders[:] = [f for f in folders if not f.startswith((".", "__pycache__", "_build"))]
            found += [Path(here, name) for name in names]
    return sorted(p for p in found if not ignored(p) and (not suffixes or p.suffix in suffixes))


def ignored(path: Path) -> bool:
    patterns = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    return any(fnmatch.fnmatch(path.name, pattern.strip("/")) for pattern in patterns)


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


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--config", "pyproject.toml"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the code, to break."""
    for folder in ("lra", *LINKED):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("lra/config/recipe.py", "from lra.training import run", "import downwards only"),
        ("lra/encoder.py", "from lra import files", "import downwards only"),
        ("lra/training/stages.py", "from lra.tasks.lra import listops", "by name, through the registry"),
        ("architectures/recurrent/gru.py", "def f():\n    import lra.registry", "Architectures import the encoder"),
        ("architectures/recurrent/gru.py", "from lra.architectures.recurrent import lstm", "does not import another"),
        ("tasks/lra/text.py", "from lra.tasks.lra.listops import ListOps", "A task does not import another"),
        ("kernels/wkv/cpu.py", "from lra.encoder import Encoder", "Kernels stand alone"),
        ("kernels/wkv/cpu.py", "import triton", "imports triton"),
        ("lra/model.py", "import numba", "import numba"),
    ],
)
def test_a_wrong_import_breaks_its_contract(checkout: Path, file: str, line: str, contract: str) -> None:
    with (checkout / file).open("a", encoding="utf-8") as code:
        code.write(f"\n{line}\n")
    said = lint_imports(checkout)
    assert said.returncode == 1, said.stdout
    assert any(contract in line for line in said.stdout.splitlines() if " BROKEN" in line)


def test_files_are_short() -> None:
    lengths = {p.relative_to(ROOT): len(p.read_text(encoding="utf-8").splitlines()) for p in files(".py")}
    assert lengths
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}


def test_constructors_of_architectures_take_their_options_by_keyword() -> None:
    """Nobody can check ten values without names against a paper."""
    constructors = {
        f"{path.relative_to(ROOT)}:{part.lineno}": len(part.args.posonlyargs + part.args.args) - 1
        for path in files(".py")
        if path.is_relative_to(ROOT / "architectures")
        for part in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(part, ast.FunctionDef) and part.name == "__init__"
    }
    assert len(constructors) > 100
    assert {place: n for place, n in constructors.items() if n > 4} == {}


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
