"""The wheel: it holds what the links point to, and nothing else, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDERS = ("lra", "architectures", "kernels", "tasks")


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if c.startswith("Programming Language")]


def test_accepted_versions_agree() -> None:
    accepted = SpecifierSet(PROJECT["requires-python"])
    assert [v for v in (f"3.{minor}" for minor in range(8, 30)) if f"{v}.1" in accepted] == VERSIONS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    oldest, newest = VERSIONS[0].replace(".", ", "), VERSIONS[-1].replace(".", ", ")
    assert f"({oldest}) <= sys.version_info[:2] <= ({newest})" in makefile
    assert f"NEWEST := {VERSIONS[-1]}\n" in makefile
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"] == VERSIONS[0]
    assert f"Python {VERSIONS[0]} to {VERSIONS[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_pinned_packages_have_wheels_for_every_version(version: str, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.txt"
    extras = PROJECT["optional-dependencies"]
    wanted.write_text("\n".join([*PROJECT["dependencies"], *extras["dev"]]), encoding="utf-8")
    words = [
        "install",
        "--dry-run",
        "--quiet",
        "--ignore-installed",
        "--only-binary=:all:",
        "--target",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, "--python-version", version, "-c", str(ROOT / "constraints.txt"),
         "-r", str(wanted)],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    if "No matching distribution found" in done.stderr and "from versions: none" in done.stderr:
        pytest.skip("no network")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a copy, because setuptools writes beside its sources and packs what an earlier build left there
    copy = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", str(out), str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [built] = out.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    wanted = {
        ("" if folder == "lra" else "lra/") + path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in {".py", ".toml", ".md", ".html"}
    }
    assert packed == wanted
    assert any(name.startswith("lra/config/paper/") for name in packed)
    assert any(name.startswith("lra/kernels/linear_scan/") for name in packed)


def test_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import lra\n"
        "import lra.kernels\n"
        "from lra.config.recipe import FOLDER\n"
        "from lra.registry import architectures, tasks\n"
        "print(lra.__file__, *lra.kernels.__path__)\n"
        "print(*architectures.names(), *tasks.names(), *(p.name for p in FOLDER.glob('*.toml')))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    places, names = done.stdout.splitlines()
    assert places == f"{tmp_path}/lra/__init__.py {tmp_path}/lra/kernels"
    assert {"s4d", "listops", "quick.toml"} <= set(names.split())


def test_entry_point(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [points] = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
    assert "lra = lra.cli.app:main" in archive.read(points).decode()


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = (*project["dependencies"], *extras["dev"], *extras["cluster"], *extras["docs"])
    wanted = [Requirement(line) for line in needed]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in pins)
    version = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(version) == len(pins)
    assert [w.name for w in wanted if not w.specifier.contains(version[canonicalize_name(w.name)])] == []
    [lightning] = [w for w in wanted if w.name == "lightning"]
    # compromised releases
    assert not any(lightning.specifier.contains(bad) for bad in ("2.6.2", "2.6.3"))


def test_nothing_runs_at_installation() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert build["build-backend"] == "setuptools.build_meta"
    assert [r.partition(">")[0] for r in build["requires"]] == ["setuptools"]
    assert "backend-path" not in build
    assert not any((ROOT / name).exists() for name in ("setup.py", "setup.cfg", "MANIFEST.in"))
