"""The steps of `make gpu`: each is written when it is done and not repeated, and a fault does not keep the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import steps
from benchmarks.gpu import PARTS
from lra.operators import bench, parity

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of steps that ran."""
    ran: list[str] = []

    def step(name: str, **result: Any) -> steps.Step:
        def run(device: torch.device) -> dict[str, Any]:
            ran.append(name)
            if name == "broken":
                raise RuntimeError("illegal memory access\nand more")
            return result

        return steps.Step("parity" if name != "elsewhere" else "times", name, run, 4.0 if name == "ratio" else None)

    made = [step("ratio", value=3.14159), step("broken"), step("elsewhere"), step("apart", value=1.0, wrong=["bits"])]
    monkeypatch.setattr(steps, "steps", lambda: iter(made))
    return ran


def test_steps_are_written_one_by_one_and_not_repeated(calls: list[str], tmp_path: Path) -> None:
    path, said = tmp_path / "new" / "gpu.json", list[str]()
    written: list[int] = []

    def say(line: str) -> None:
        said.append(line)
        written.append(len(json.loads(path.read_text())["steps"]))

    assert not steps.run("parity", CPU, path, say)
    assert calls == ["ratio", "broken", "apart"]
    assert written == [1, 2, 3]
    assert said == [
        "ratio: 3.14 (predicted 4)",
        "broken: \n    wrong: RuntimeError: illegal memory access",
        "apart: 1\n    wrong: bits",
    ]
    assert json.loads(path.read_text())["steps"]["ratio"] == {"value": 3.14159, "predicted": 4.0}
    assert steps.run("times", CPU, path, said.append)
    assert not steps.run("parity", CPU, path, said.append)
    assert calls == ["ratio", "broken", "apart", "elsewhere"]
    assert said[-3] == "ratio: 3.14 (predicted 4) from an earlier run"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"machine": {}, "steps": {"ratio": {"value": 1}}}'])
def test_results_of_another_machine_are_not_continued(calls: list[str], tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    steps.run("times", CPU, path, lambda line: None)
    assert calls == ["elsewhere"]
    assert list(json.loads(path.read_text())["steps"]) == ["elsewhere"]


def test_every_part_has_steps_of_names_of_their_own() -> None:
    made = list(steps.steps())
    assert {step.part for step in made} == {*PARTS}
    assert len({step.name for step in made}) == len(made)


@pytest.mark.parametrize("op", steps.SIZES)
def test_inputs_of_the_timed_shapes_fit_the_operators(op: str) -> None:
    arguments = parity.arguments_of(steps.inputs(op, 1, 8, 128), torch.float32)
    (y,) = bench.forward(bench.Contender("cpu", parity.operator(op), arguments))()
    assert (y.shape[:2], y[0, 0].numel()) == ((1, 8), 128)
