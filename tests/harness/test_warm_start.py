"""`--init-from`: the weights of another run, by name and shape; what did not fit is said and recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lra
from lra.cli.app import app
from lra.errors import UserError
from lra.results import result
from lra.results.official import settings_of
from lra.training.request import Request, resolve
from lra.training.run import run

TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "2", "train.evaluate_every": "2", "model.d_model": "8", "data.batch_size": "16",
    "model.n_layers": "1", "optim.lr": "1e-12", "optim.weight_decay": "0.0",
}  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two layers whose weights are not those of a seed."""
    root = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        places(root, patch)
        go(settings={"optim.lr": "0.01", "model.n_layers": "2"}, seed=5)
        (folder,) = (root / "lra_runs").iterdir()
    return folder


def places(root: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        patch.setenv(name, str(root / name.lower()))


def go(settings: dict[str, str] | None = None, **more: Any) -> Path:
    return run(Request(TINY, "gru", "quick", settings=SMALL | (settings or {}), **more), Console(quiet=True))


def test_weights_are_taken_by_name_and_shape_and_the_rest_is_recorded(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places(tmp_path, monkeypatch)
    exported = lra.load(first).export(tmp_path / "exported")
    for source in (first, exported):
        record = result.read(go(init_from=source, seed=int(source is exported)))
        began = record.init_from
        assert began is not None
        before, after = (
            lra.load(first).model.state_dict(),
            lra.load(sorted((tmp_path / "lra_runs").iterdir())[-1]).model,
        )
        own = after.state_dict()
        assert (began["loaded"], began["tensors"], began["missing"]) == (len(own), len(own), {})
        assert began["unused"] == sorted(before.keys() - own.keys())
        # the learning rate is too small to move anything
        assert all(torch.allclose(before[key], value) for key, value in own.items())
        assert record.regime.startswith("warm start (")
        assert "--init-from" in record.command
        assert settings_of(record).status == "modified"


def test_a_tensor_of_another_shape_keeps_its_initial_values(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places(tmp_path, monkeypatch)
    settings = [f"{key}={value}" for key, value in (SMALL | {"model.d_model": "16"}).items()]
    words = ["run", TINY, "gru", "--recipe", "quick", "--init-from", str(first)]
    done = CliRunner().invoke(app, [*words, *(word for setting in settings for word in ("--set", setting))])
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.output.splitlines() if line.startswith("initial weights: "))
    record = result.read(next((tmp_path / "lra_results").rglob("*.json")))
    assert record.init_from is not None
    missing = record.init_from["missing"]
    assert missing
    assert all("in the file (" in why and f"{name} ({why})" in line for name, why in missing.items())
    assert record.init_from["loaded"] == record.init_from["tensors"] - len(missing) > 0


def test_a_source_without_weights_is_refused_and_another_one_is_another_run(first: Path, tmp_path: Path) -> None:
    plain = Request(TINY, "gru", "quick", settings=SMALL)
    with pytest.raises(UserError, match="no weights there"):
        resolve(Request(TINY, "gru", "quick", settings=SMALL, init_from=tmp_path))
    warm, _ = resolve(Request(TINY, "gru", "quick", settings=SMALL, init_from=first))
    assert warm.hash != resolve(plain)[0].hash
