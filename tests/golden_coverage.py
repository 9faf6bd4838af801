"""A plugin of pytest: a session that ran all tests of golden/ fails if none of them used some result that is there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

FOLDER = Path(__file__).parent / "golden"
READ: dict[str, set[str]] = {}
"""Set -> its results that took part in an operation. `golden_tensors.golden` fills it."""
UNUSED: dict[str, dict[str, str]] = {}
"""Set -> its results that no test compares -> why not."""
RESULT = re.compile(r"(.*\.)?(y|grad.*|[a-z]_n)")

PARTIAL, FAULTS = pytest.StashKey[bool](), pytest.StashKey[list[str]]()


def is_result(key: str) -> bool:
    return RESULT.fullmatch(key) is not None


def stored_results() -> dict[str, set[str]]:
    found = {}
    for path in FOLDER.glob("*.npz"):
        with ZipFile(path) as file:
            found[path.stem] = {key for name in file.namelist() if is_result(key := name.removesuffix(".npy"))}
    return found


def faults(
    read: Mapping[str, Set[str]], stored: Mapping[str, Set[str]], unused: Mapping[str, Mapping[str, str]]
) -> list[str]:
    lines = [f"UNUSED names {name}, which is not in golden/" for name in sorted(unused.keys() - stored.keys())]
    for name, results in sorted(stored.items()):
        if name not in read:
            lines.append(f"{name}: no test opens it")
            continue
        declared = unused.get(name, {}).keys()
        lines += [f"{name}: no test compares {key}" for key in sorted(results - read[name] - declared)]
        lines += [f"{name}: UNUSED names {key}, which is not stored" for key in sorted(declared - results)]
        lines += [f"{name}: UNUSED names {key}, which is compared" for key in sorted(declared & read[name])]
    return lines


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.config.stash[PARTIAL] = True


def pytest_collection_finish(session: pytest.Session) -> None:
    tests = FOLDER.parent.rglob("test_*.py")
    using = {path for path in tests if "golden(" in path.read_text(encoding="utf-8")}
    chosen = any("::" in argument for argument in session.config.args)
    if chosen or using - {item.path for item in session.items}:
        session.config.stash[PARTIAL] = True


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The controller of pytest-xdist takes in what a worker read."""
    output = getattr(node, "workeroutput", {})
    for name, keys in output.get("golden", {}).items():
        READ.setdefault(name, set()).update(keys)
    if output.get("golden_partial", True):
        node.config.stash[PARTIAL] = True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["golden"] = {name: sorted(keys) for name, keys in READ.items()}
        config.workeroutput["golden_partial"] = config.stash.get(PARTIAL, False)
    elif not (exitstatus or config.option.collectonly or config.stash.get(PARTIAL, False)):
        config.stash[FAULTS] = faults(READ, stored_results(), UNUSED)
        if config.stash[FAULTS]:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (lines := config.stash.get(FAULTS, None)) is not None:
        for line in lines:
            terminalreporter.write_line(f"FAILED golden tensors: {line}", red=True)
        if not lines:
            terminalreporter.write_line(f"golden tensors: every result of {len(READ)} sets is compared or declared")
