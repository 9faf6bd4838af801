"""Packed documents from the recipe to the table, and models at sequences longer than those of training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from sentences import LONGEST, TRAINED, Sentences

from lra.encoder import Encoder
from lra.model import Classifier
from lra.registry import architectures
from lra.reports import language
from lra.results import result
from lra.results.record import RunRecord
from lra.target import NextTarget, target_of
from lra.task import Protocol
from lra.training import longer
from lra.training.request import Request
from lra.training.run import run
from lra.training.trained_run import load

SMALL = {"train.steps": "20", "train.evaluate_every": "10", "search.rates": "[]", "model.d_model": "8",
         "model.n_layers": "1", "data.batch_size": "4", "optim.lr": "1e-2", "model.budget": "0"}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def encoder_of(name: str, length: int) -> Encoder:
    constructor = architectures.get(name)
    more: dict[str, Any] = {"direction": "causal"} if "direction" in constructor.options() else {}
    torch.manual_seed(0)
    return constructor(d_model=8, n_layers=2, length=length, **more).eval()


def classifier(name: str) -> Classifier:
    return Classifier(encoder_of(name, TRAINED), Sentences.protocols["packed"], 256, 1, "last", per_position=True)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gru", longer.CARRIED), ("mingru", longer.CARRIED), ("s4", longer.CARRIED), ("transformer", longer.CARRIED),
        ("transformer/rope", longer.CARRIED), ("switch", longer.WHOLE),
    ],
)  # fmt: skip
def test_longer_sequences_are_those_of_an_encoder_built_for_them(name: str, way: str) -> None:
    model = classifier(name)
    trained = model.encoder
    before = torch.get_rng_state()
    x, mask = torch.randn(2, LONGEST, 8), torch.ones(2, LONGEST, dtype=torch.bool)
    after = torch.get_rng_state()
    with longer.reading(model, TRAINED, LONGEST, lambda length: encoder_of(name, length)) as used, torch.no_grad():
        y = model.encoder(x, mask)
    assert used == way
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)
    assert model.encoder is trained
    if name == "s4":
        # its parameter stands for a number of steps; the recurrence has none
        state, rows = trained.init_state(2), []
        with torch.no_grad():
            for token in x.unbind(1):
                row, state = trained.step(token, state)
                rows.append(row)
        expected = torch.stack(rows, dim=1)
    else:
        whole = encoder_of(name, LONGEST)
        whole.load_state_dict(trained.state_dict())
        with torch.no_grad():
            expected = whole(x, mask)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformer/learned", "length 32 exceeds the 16 positions this encoder has"),
        ("hyena", "length 64 exceeds the 16 steps of this Hyena's filters"),
    ],
)
def test_what_ends_at_the_length_of_training_is_refused_with_the_reason(name: str, reason: str) -> None:
    model = classifier(name)
    with (
        pytest.raises(longer.TooLong, match=reason),
        longer.reading(model, TRAINED, LONGEST, lambda length: encoder_of(name, length)),
    ):
        pass
    assert isinstance(model.encoder, Encoder)


def test_an_encoder_that_computes_something_else_when_built_longer_does_not_take_over() -> None:
    trained, other = (encoder_of("gau", length) for length in (TRAINED, LONGEST))
    # attention of gau is divided by the length that it was built for; at the start it is next to nothing
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.normal_()
    assert longer._extended(trained, TRAINED, other) is None


def test_intervals_of_packed_pieces_are_over_documents() -> None:
    target = target_of(Sentences(), Sentences.protocols["packed"])
    assert isinstance(target, NextTarget)
    labels = np.array([5, 6, 0, 7, 8, 9, 0, 5, 5, 5])
    nats = np.random.default_rng(0).exponential(size=10)
    # pieces of 4, 4 and 2 tokens; documents of 2, 4 and 4
    answers = {"example": np.array([0] * 4 + [1] * 4 + [2] * 2), "nats": nats, "label": labels, "prediction": labels}
    score = target.score(answers)
    bits, groups = nats / math.log(2), ((0, 2), (2, 6), (6, 10))
    squares = sum((bits[a:b].sum() - bits.mean() * (b - a)) ** 2 for a, b in groups) / 2
    assert (score["bits_high"] - score["bits_low"]) / 2 == pytest.approx(1.959964 * math.sqrt(3 * squares) / 10)
    assert score["bits_at"] == pytest.approx(
        {"1-3": bits[[0, 1, 2, 4, 5, 6, 8, 9]].mean(), "4-15": bits[[3, 7]].mean()}
    )  # fmt: skip


def test_splits_of_longer_sequences_have_lengths_of_their_own() -> None:
    packed = Sentences.protocols["packed"]
    assert [packed.of_split(name).length for name in ("train", "test", "length-32", "length-64")] == [16, 16, 32, 64]
    shorter = Protocol("a", length=64, tests={"length-32": {"length": 32}, "noisy": {}})
    assert [shorter.of_split(name).length for name in shorter.splits] == [64] * 5


def trained(architecture: str) -> RunRecord:
    return result.read(run(Request(Sentences, architecture, "language", settings=SMALL), Console(quiet=True)))


def test_the_length_curve_stands_in_the_record_and_in_the_table(tmp_path: Path) -> None:
    carried = trained("mingru")
    assert carried.longer == {"length-32": longer.CARRIED, "length-64": longer.CARRIED}
    assert {name: score.length for name, score in carried.tests.items()} == {"length-32": 32, "length-64": 64}
    assert carried.test.n == carried.tests["length-32"].n == carried.tests["length-64"].n
    assert set(carried.test.bits_at) == {"1-3", "4-15"}
    assert set(carried.tests["length-64"].bits_at) == {"1-3", "4-15", "16-63"}
    (folder,) = (tmp_path / "lra_runs").iterdir()
    again = load(folder, task=Sentences).evaluate("length-64")
    assert again.more["bits"] == pytest.approx(carried.tests["length-64"].bits)
    plain, first = language.tables([carried])
    assert plain.columns[3:5] == ["1-3", "4-15"]
    assert first.columns == ["architecture", "bits", "at 32", "at 64", "16-63", "seed"]
    (row,) = first.rows
    shown = [*(carried.tests[f"length-{n}"].bits for n in (32, 64)), carried.tests["length-64"].bits_at["16-63"]]
    assert [cell.text for cell in row[2:5]] == [f"{bits:.3f}" for bits in shown]
    assert "by the model trained on 16. 16-63: in the longest of them" in first.notes[0]
    assert first.notes[1] == "Longer sequences, state carried by chunk: mingru"


@pytest.mark.slow
def test_a_run_records_why_longer_sequences_are_not_possible() -> None:
    refused = trained("transformer/learned")
    assert refused.tests == {}
    reason = "not possible: length 32 exceeds the 16 positions this encoder has"
    assert refused.longer["length-32"] == reason
    _, shown = language.tables([refused])
    assert shown.notes[1] == f"Longer sequences, {reason}: transformer/learned"
    row = next(row for row in shown.rows if row[0].text.startswith("transformer"))
    assert [cell.text for cell in row[2:4]] == ["-", "-"]
