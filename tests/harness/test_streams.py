"""Persistent streams: rows that follow the packed documents, with a state that outlives the step and the process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sentences import Sentences
from stopped_run import stopped_after

from lra.config import recipe as recipes
from lra.config.sections import Train
from lra.data.batches import DeviceSet, StreamPlan
from lra.data.prepared_sets import load_prepared
from lra.errors import Interrupted, UserError
from lra.model import Batch
from lra.registry import architectures
from lra.results import result
from lra.target import target_of
from lra.task import UNSCORED
from lra.training import stages
from lra.training.placement import Placement
from lra.training.request import Request
from lra.training.run import run
from lra.training.streams import Streams

SMALL = {"train.steps": "24", "train.evaluate_every": "12", "search.rates": "[]", "model.d_model": "8",
         "model.n_layers": "1", "data.batch_size": "4", "optim.lr": "1e-2", "model.budget": "0",
         "train.stream": "true"}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def go(architecture: str = "gru", settings: dict[str, str] | None = None, **more: Any) -> Any:
    request = Request(Sentences, architecture, "language", settings=SMALL | (settings or {}), **more)
    return result.read(run(request, Console(quiet=True)))


def test_each_row_goes_through_its_part_in_order() -> None:
    plan = StreamPlan(23, 4)
    steps = [plan.batch(step).tolist() for step in range(6)]
    assert steps == [[0, 5, 10, 15], [1, 6, 11, 16], [2, 7, 12, 17], [3, 8, 13, 18], [4, 9, 14, 19], [0, 5, 10, 15]]


@pytest.mark.parametrize("name", ["gru", "s4d"])
@pytest.mark.parametrize(("tokens", "parts"), [(0, 1), (5, 2)])
def test_outputs_are_those_of_one_pass_over_the_stream(name: str, tokens: int, parts: int) -> None:
    torch.manual_seed(0)
    encoder = architectures.get(name)(d_model=8, n_layers=2, length=16, direction="causal")
    stream = torch.randn(4, 3 * 15 + 1, 8)
    whole = encoder(stream, torch.ones(4, 46, dtype=torch.bool))
    streams = Streams(encoder, 16, tokens, parts, per_epoch=3)
    streams.attach()
    for lap in range(2):
        for place in range(3):
            for part in range(parts):
                rows = torch.arange(4)[part::parts]
                x = stream[rows, 15 * place : 15 * place + 16]
                streams.begin(rows * 3 + place, (3 * lap + place) * parts + part)
                for _ in range(2):
                    # a second pass of the same batch, as of an estimate of the curvature, starts from the same state
                    y = encoder(x, torch.ones(len(rows), 16, dtype=torch.bool))
                streams.end()
                torch.testing.assert_close(y[:, :15], whole[rows, 15 * place : 15 * place + 15], atol=1e-5, rtol=1e-4)
    y.sum().backward()
    assert all(p.grad is not None for p in encoder.layers.parameters())
    x, mask = stream[:, :16], torch.ones(4, 16, dtype=torch.bool)
    torch.testing.assert_close(encoder.eval()(x, mask), type(encoder).forward(encoder, x, mask))
    streams.detach()
    torch.testing.assert_close(encoder.train()(x, mask), type(encoder).forward(encoder, x, mask))


def test_a_resumed_stream_goes_on_with_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"train.accumulate": "2"}
    whole = go(settings=settings)
    monkeypatch.setenv("LRA_RUNS", str(tmp_path / "other"))
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path / "others"))
    with pytest.raises(Interrupted), stopped_after(14):
        go(settings=settings)
    again = go(settings=settings, resume=True)
    assert again.resumed
    assert (again.test.bits, again.test.bits_at) == (whole.test.bits, whole.test.bits_at)
    assert [point.validation_loss for point in again.curve] == [point.validation_loss for point in whole.curve]


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("transformer", "train.stream: length 32 exceeds the 16 positions this encoder has; a stream has no end"),
        ("transformer/rope", "the state of Transformer grows with every token"),
        ("hyena", "no recurrent mode"),
    ],
)
def test_encoders_without_a_state_of_one_size_are_refused(architecture: str, says: str) -> None:
    encoder = architectures.get(architecture)(d_model=8, n_layers=1, length=16, direction="causal")
    with pytest.raises(UserError, match=says):
        Streams(encoder, 16, 0, 1, 4)


@pytest.mark.parametrize(
    ("settings", "protocol", "says"),
    [
        ({"data.train_examples": "20"}, "packed", "leave out data.train_examples"),
        ({"data.batch_size": "4000"}, "packed", "data.batch_size is 4000, of"),
        ({}, "chunks", "needs a protocol that packs documents"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, str], protocol: str, says: str) -> None:
    found, _ = recipes.resolve("language", "imdb_lm", "gru", SMALL | settings)
    prepared = load_prepared(Sentences(), protocol)
    target = target_of(prepared.task, prepared.protocol)
    data = DeviceSet.of(prepared.split("train"), prepared.protocol, torch.device("cpu"))
    module: Any = SimpleNamespace(target=target)
    with pytest.raises(UserError, match=says):
        stages._stream(found, data, module)
    with pytest.raises(UserError, match=r"so does train\.curriculum"):
        Train(stream=True, curriculum_steps=4, curriculum_length=8)
    with pytest.raises(UserError, match=r"train\.compile"):
        Train(stream=True, compile=True)


def test_strategies_that_divide_a_model_are_refused() -> None:
    found, _ = recipes.resolve("language", "imdb_lm", "gru", {"train.stream": "true"})
    for strategy in ("tensor", "sequence", "pipeline", "fsdp"):
        with pytest.raises(UserError, match=r"train\.stream|search\.rates"):
            Placement(1, 2, strategy).validate("cpu", found)


def test_shards_of_a_batch_are_always_of_the_same_rows() -> None:
    plan = StreamPlan(40, 8)
    for rank in range(2):
        rows = {tuple((plan.batch(step)[rank::2] // plan.per_epoch).tolist()) for step in range(12)}
        assert rows == {tuple(range(rank, 8, 2))}


def test_examples_of_a_row_join_to_a_piece_of_the_stream() -> None:
    train = load_prepared(Sentences(), "packed").split("train")
    plan = StreamPlan(len(train), 4)
    for step in range(plan.per_epoch - 1):
        for now, after in zip(plan.batch(step), plan.batch(step + 1), strict=True):
            assert train.document(int(now))[-1] == train.document(int(after))[0]
    assert np.unique(np.concatenate([plan.batch(step) for step in range(plan.per_epoch)])).size == 4 * plan.per_epoch


def test_the_labels_of_the_last_token_are_not_scored() -> None:
    protocol = Sentences.protocols["packed"]
    data = DeviceSet.of(load_prepared(Sentences(), "packed").split("train"), protocol, torch.device("cpu"))
    batch: Batch = data.batch(np.arange(4))
    assert (batch.labels[:, -1] == UNSCORED).all()
    assert (batch.labels[:, :-1] != UNSCORED).all()
