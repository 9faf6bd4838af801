"""Processes that divide a model compute what one process does: the same loss, gradients and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import divided_models
import numpy as np
import pytest
import torch
from test_distributed import launched

import lra
from lra.config import recipe
from lra.config.sections import Optim
from lra.errors import UserError
from lra.model import Classifier
from lra.task import Protocol
from lra.training.distributed import trainer_options
from lra.training.module import Trainable
from lra.training.parallel import sharding
from lra.training.placement import Placement
from lra.training.stages import divide

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
two_processors = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")


def results_of_two(folder: Path, script: str, *arguments: str) -> list[Any]:
    command = [sys.executable, str(HERE / script)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, str(rank), "2", str(folder), *arguments], env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=900) for process in started] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_give_the_loss_and_the_clipped_gradients_of_one(tmp_path: Path) -> None:
    parts = results_of_two(tmp_path, "divided_models.py")
    for name in divided_models.CASES:
        whole = divided_models.whole(name)
        assert len(whole) > 10
        for part in parts:
            assert part[name].keys() == whole.keys()
            for key, value in whole.items():
                torch.testing.assert_close(part[name][key], value, rtol=0, atol=1e-12, msg=f"{name}: {key}")


def test_a_strategy_is_only_used_on_several_devices() -> None:
    for strategy in ("fsdp", "zero1", "tensor", "sequence", "pipeline"):
        alone, several = Placement(1, 1, strategy), Placement(1, 2, strategy)
        assert trainer_options(alone)["strategy"] == "auto"
        assert (alone.zero, alone.divides_weights, alone.divides_batches) == (0, False, False)
        assert several.divides_batches is (several.zero > 0)
    assert [Placement(2, 1, f"zero{stage}").zero for stage in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("strategy", "settings", "says"),
    [
        ("fsdp", {"optim.ema": "0.9"}, "optim.ema"),
        ("zero1", {"optim.name": "muon"}, "optim.name=muon"),
        ("tensor", {"pretrain.objective": "mlm"}, "pretrain.objective=mlm"),
        ("sequence", {"train.tbptt": "8"}, "train.tbptt"),
        ("pipeline", {"train.compile": "true"}, "train.compile"),
    ],
)
def test_settings_that_a_strategy_does_not_support_are_named(
    strategy: str, settings: dict[str, str], says: str
) -> None:
    found, _ = recipe.resolve("quick", "listops", "gru", settings)
    Placement(1, 1, strategy).validate("cpu", found)
    with pytest.raises(UserError, match=f"--strategy {strategy} does not work with {says}; use ddp"):
        Placement(1, 2, strategy).validate("cpu", found)


@pytest.mark.parametrize(
    ("strategy", "architecture", "options", "says"),
    [
        ("tensor", "mamba", {}, "Mamba has none that can be divided"),
        ("tensor", "transformer", {"n_heads": 1}, "1 heads of SoftmaxMixer are not divisible among 2"),
        ("sequence", "transformer", {}, "Transformer is bidirectional; set model.direction=causal"),
        ("sequence", "switch", {"direction": "causal"}, "what an expert takes depends on the length"),
        ("sequence", "gru", {"block": {"norm": "batch"}}, "batch normalisation of GRU"),
        ("pipeline", "tcn", {}, "sequence of blocks, but TCN is not"),
        ("pipeline", "gru", {"n_layers": 1}, "2 processes need as many blocks, but GRU has 1"),
        ("pipeline", "gru", {"block": {"norm": "batch"}}, "batch normalisation of GRU"),
        ("pipeline", "universal", {}, "Universal"),
        ("pipeline", "switch", {}, "auxiliary loss of Switch"),
    ],
)
def test_encoders_that_cannot_be_divided_are_named(
    strategy: str, architecture: str, options: dict[str, Any], says: str
) -> None:
    encoder = lra.create_encoder(architecture, **({"d_model": 8, "n_layers": 2, "length": 8} | options))
    model = Classifier(encoder, Protocol("test", length=8, vocabulary=4), 4, 1, "mean")
    with pytest.raises(UserError, match=says):
        divide(model, Placement(2, 1, strategy))


@pytest.mark.slow
@two_processors
@pytest.mark.parametrize(
    ("strategy", "architecture", "more"),
    [
        ("zero1", "s4d", ("train.accumulate=2",)),
        ("zero2", "gru", ()),
        ("fsdp", "s4d", ()),
        ("tensor", "transformer", ()),
        ("sequence", "s4d", ("model.direction=causal",)),
        ("pipeline", "gru", ("model.n_layers=2",)),
    ],
)
def test_a_run_trains_as_one_process_and_resumes_exactly(
    strategy: str, architecture: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    settings = [word for setting in ("optim.clip=0.5", *more) for word in ("--set", setting)]
    two_devices = ("--devices", "2", "--strategy", strategy)
    one = launched(tmp_path / "one", *settings, architecture=architecture)
    two = launched(tmp_path / "two", *settings, *two_devices, architecture=architecture)
    np.testing.assert_allclose(one["loss"], two["loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(one["validation loss"], two["validation loss"], atol=1e-5, rtol=0)
    assert two["record"].environment.strategy == strategy
    assert two["record"].speed.examples == one["record"].speed.examples
    assert (two["predictions"]["example"] == np.arange(150)).all()
    for key, value in one["weights"].items():
        # the gradient of key biases is 0, and Adam makes steps of its rounding
        if not key.endswith("qkv.bias"):
            torch.testing.assert_close(value, two["weights"][key], atol=1e-4, rtol=1e-4)
    again = launched(tmp_path / "again", *settings, *two_devices, architecture=architecture, stopped_at=13)
    for key, value in two["weights"].items():
        assert torch.equal(value, again["weights"][key]), key


def test_zero1_reduces_gradients_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three accumulated parts the last one; zero2 reduces those of each."""
    asked: list[bool] = []
    monkeypatch.setattr(sharding, "accumulate", lambda _, last: asked.append(last))
    monkeypatch.setattr(Trainable, "trainer", SimpleNamespace(global_step=0, accumulate_grad_batches=3))
    encoder = lra.create_encoder("gru", d_model=8, n_layers=1, length=8)
    model = Classifier(encoder, Protocol("test", length=8, vocabulary=4), 4, 1, "mean")
    module = Trainable(model, Optim(), 1)
    for module.zero in (1, 2):
        for part in range(6):
            module.on_train_batch_start(None, part)  # type: ignore[arg-type]
    assert asked == [False, False, True] * 2
