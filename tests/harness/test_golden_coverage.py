"""The check that tests use every stored result: what counts as use, what it finds, and that it fails a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_coverage import READ, faults, is_result
from golden_tensors import assert_close, golden
from torch import Tensor

STORED = {"one": {"y", "grad.x"}}


@pytest.mark.parametrize(
    ("read", "unused", "found"),
    [
        ({"one": {"y", "grad.x"}}, {}, []),
        ({"one": {"y"}}, {"one": {"grad.x": "why"}}, []),
        ({"one": {"y"}}, {}, ["one: no test compares grad.x"]),
        ({}, {}, ["one: no test opens it"]),
        ({"one": {"y", "grad.x"}}, {"one": {"y": "why"}}, ["one: UNUSED names y, which is compared"]),
        ({"one": {"y", "grad.x"}}, {"one": {"z": "why"}}, ["one: UNUSED names z, which is not stored"]),
        ({"one": {"y", "grad.x"}}, {"two": {"y": "why"}}, ["UNUSED names two, which is not in golden/"]),
    ],
)
def test_what_is_found(read: dict[str, set[str]], unused: dict[str, dict[str, str]], found: list[str]) -> None:
    assert faults(read, STORED, unused) == found


@pytest.mark.parametrize(
    ("use", "noted"),
    [
        (lambda t: assert_close(t + 0, t), True),
        (lambda t: torch.stack([t, t]), True),
        (lambda t: t.mT, True),
        (lambda t: t.shape, False),
        (lambda t: t, False),
    ],
)
def test_an_operation_is_use(use: Callable[[Tensor], object], noted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READ, "mgu", set())
    use(golden("mgu")["grad.x"])
    assert READ["mgu"] == ({"grad.x"} if noted else set())


def test_outputs_and_gradients_are_results() -> None:
    assert all(map(is_result, ("y", "h_n", "grad.x", "causal.grad.x", "gradparam.0.bias", "mid.grad_loss_x", "real.y")))
    assert not any(map(is_result, ("x", "in.y0", "y0", "w", "param.gamma", "cfg.n", "mid.kernel")))


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["-p", "xdist", "-n2"], 1, ["FAILED golden tensors: three: no test opens it"]),
        (["-k", "one"], 0, []),
    ],
)
def test_a_session_fails(options: list[str], code: int, said: list[str], tmp_path: Path) -> None:
    """Two of three sets are used, each by a test of its own; the tests are spread over two workers."""
    shutil.copy(Path(__file__).parents[1] / "golden_coverage.py", tmp_path)
    (tmp_path / "golden").mkdir()
    for name in ("one", "two", "three"):
        np.savez(tmp_path / "golden" / f"{name}.npz", y=np.zeros(1))
    tests = [f"def test_{name}(): READ['{name}'] = {{'y'}}  # golden()" for name in ("one", "two")]
    (tmp_path / "test_all.py").write_text("\n".join(["from golden_coverage import READ", *tests]) + "\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "golden_coverage", "-p", "no:cacheprovider", *options]
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    environment |= {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    assert [line for line in result.stdout.splitlines() if "golden tensors" in line] == said
