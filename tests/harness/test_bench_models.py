"""Encoders beside those of other packages: what is timed on both sides is the same but for the mixer."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from benchmarks import models, precision
from benchmarks.__main__ import app
from benchmarks.models import MATCHES, Match, Peer, Shape, contestants

SMALL = Shape(batch=2, length=24, d_model=8, n_layers=2, n_heads=2)
HERE = torch.device("cpu")


class Watched(nn.Linear):
    seen: ClassVar[list[tuple[int, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        Watched.seen.append(tuple(x.shape))
        return super().forward(x)


def matched(*peers: Peer) -> Match:
    return Match("gru", SMALL, peers)


@pytest.mark.parametrize("match", MATCHES, ids=lambda m: m.architecture)
def test_ours_is_what_the_match_says(match: Match) -> None:
    encoder: Any = replace(match, shape=SMALL).build()
    assert (encoder.d_model, len(encoder.blocks)) == (8, 2)
    assert encoder(torch.randn(2, 24, 8), torch.ones(2, 24, dtype=torch.bool)).shape == (2, 24, 8)


def test_a_layer_takes_the_place_of_every_mixer_and_of_nothing_else() -> None:
    peer = Peer("watched", "torch", lambda s: Watched(s.d_model, s.d_model))
    match = matched(peer)
    ours, theirs = match.build(), peer.build(match)
    names = [{n.partition(".mixer.")[0] for n, _ in m.named_parameters()} for m in (ours, theirs)]
    assert names[0] == names[1]
    assert sum(isinstance(m, Watched) for m in theirs.modules()) == SMALL.n_layers
    Watched.seen.clear()
    assert [c.name for c in contestants(match, HERE)] == ["lra", "watched"]
    for one in contestants(match, HERE):
        one.step()
    assert Watched.seen == [(2, 24, 8)] * SMALL.n_layers


def test_a_step_trains_and_torch_lstm_has_the_same_parameters() -> None:
    (lstm,) = (replace(m, shape=SMALL) for m in MATCHES if m.architecture == "lstm")
    ours, theirs = contestants(lstm, HERE)
    # torch adds a second bias to each layer
    assert theirs.parameters - ours.parameters == SMALL.n_layers * 4 * SMALL.d_model
    model = lstm.peers[0].build(lstm)
    step = models._contestant("", model, torch.randn(2, 24, 8), torch.ones(2, 24, dtype=torch.bool)).step
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if b.ndim > 1)


def test_packages_that_are_not_here_are_left_out() -> None:
    match = matched(*(Peer(name, name, lambda s: nn.Identity()) for name in ("no_such_package", "no_such.module")))
    assert [c.name for c in contestants(match, HERE)] == ["lra"]


def test_steps_are_timed_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(replace(m, shape=SMALL) for m in MATCHES if m.architecture in ("gru", "elman"))
    monkeypatch.setattr(models, "MATCHES", small)
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    done = CliRunner().invoke(app, ["models", "--budget", "0.1"])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(io.StringIO((tmp_path / "bench" / "models-cpu.csv").read_text())))
    assert [(r["architecture"], r["by"]) for r in rows] == [
        ("gru", "lra"), ("gru", "torch.nn.GRU"), ("elman", "lra"), ("elman", "torch.nn.RNN")
    ]  # fmt: skip
    assert all(float(r["low"]) <= float(r["seconds"]) <= float(r["high"]) for r in rows)
    assert tuple(rows[0])[:3] == ("architecture", "by", "batch")


def test_an_architecture_without_peers_is_refused() -> None:
    done = CliRunner().invoke(app, ["models", "grru"])
    assert done.exit_code == 2
    assert "did you mean 'gru'" in " ".join(done.output.split())


def test_precision_compares_both_kinds_of_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "LENGTH", 16)
    monkeypatch.setattr(precision, "names", lambda: ["fnet"])
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    kinds: list[bool] = []
    step = precision.Workload.step

    def counted(self: precision.Workload, kind: bool) -> Tensor:
        kinds.append(kind)
        return step(self, kind)

    monkeypatch.setattr(precision.Workload, "step", counted)
    done = CliRunner().invoke(app, ["precision", "--rounds", "2"])
    assert done.exit_code == 0, done.output
    assert kinds == [False, True] * 3
    content = json.loads((tmp_path / "bench" / "precision-cpu.json").read_text())
    (row,) = content["steps"]
    assert (row["architecture"], row["rounds"], content["task"]) == ("fnet", 2, "image")
    assert row["ratio"] == round(row["float32"] / row["bfloat16"], 3)
