"""First-token recall: its examples, who learns it in little time, who by its theory cannot, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lra.cli.app import app
from lra.conformance import recall as kit
from lra.encoder import lengths_of
from lra.errors import UserError
from lra.registry import architectures
from lra.results import recall as records

ROOT = Path(__file__).parents[2]
LENGTH, FAR, STEPS = 32, 128, 400


def directions(name: str) -> list[str]:
    """Those it has: what sees the future by its mathematics refuses to be causal."""
    try:
        architectures.get(name)(d_model=8, n_layers=1, length=LENGTH, direction="causal")
    except UserError:
        return ["bidirectional"]
    return ["causal", "bidirectional"]


# one of each family that learns it in a second or two; all others take minutes together
QUICK = ("gru", "s4d", "retnet", "transformer", "tcn")
CELLS = [
    pytest.param(name, direction, marks=() if name in QUICK else pytest.mark.slow)
    for name in architectures.names() for direction in directions(name)
]  # fmt: skip


def test_examples_are_what_they_are_said_to_be() -> None:
    batch = kit.examples(500, 40, torch.Generator().manual_seed(0))
    tokens, mask = batch.values[:, 0], batch.mask[:, 0]
    assert torch.equal(tokens[:, 0], batch.labels)
    assert set(tokens[:, 0].tolist()) == set(range(8))
    assert set(tokens[:, 1:].flatten().tolist()) == set(range(8, 16))
    lengths = lengths_of(mask)
    assert (int(lengths.min()), int(lengths.max())) == (20, 40)
    assert torch.equal(mask, torch.arange(40) < lengths.unsqueeze(1))


@pytest.mark.parametrize(("name", "direction"), CELLS)
def test_architecture_recalls_the_first_token(name: str, direction: str) -> None:
    cannot = architectures.get(name).cls.card.no_recall
    length = FAR if cannot else LENGTH
    recall = kit.recall(name, direction=direction, length=length, steps=STEPS, seconds=None)
    if cannot:
        assert recall.accuracy < 0.3, f"{name} learns it, {recall}: delete Card.no_recall"
    else:
        assert recall.learned, recall


def test_measured_architectures_recall_the_first_of_256_tokens_or_say_why_not() -> None:
    measured = records.read(ROOT / "results")
    assert measured
    assert set(measured) <= set(architectures.names())
    for name, record in measured.items():
        assert record.learned == (not architectures.facts(name).get("no_recall")), record


def test_a_record_of_recall_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = records.RecallRecord("a/b", "causal", 256, 0.97, True, 90, 3.5, 0, {"cpu": "x1"})
    path = records.write(record, tmp_path)
    assert records.read(tmp_path) == {"a/b": record}
    path.write_text(path.read_text().replace('"steps": 90', '"steps": "many"'))
    with pytest.raises(UserError, match=r"a-b.json: .*steps"):
        records.read(tmp_path)


def test_one_seed_gives_the_same_training_twice() -> None:
    one, two = (kit.recall("qrnn", length=8, steps=15, seconds=None) for _ in range(2))
    assert (one.accuracy, one.steps) == (two.accuracy, two.steps)


def test_time_is_limited_and_options_reach_the_constructor() -> None:
    assert kit.recall("lru", length=8, seconds=0.0).steps == 0
    with pytest.raises(Exception, match="did you mean 'state_size'"):
        kit.recall("lru", length=8, steps=1, state_siz=3)


def test_command_reports_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "recall", lambda *given, **options: kit.Recall(0.5, 7, 1.0))
    done = CliRunner().invoke(app, ["check", "elman", "--recall"])
    assert done.exit_code == 0
    assert "causal: 50.0 % after 7 steps, 1 s\nbidirectional: 50.0 %" in done.output
    assert "elman is not expected to learn it: its state passes" in done.output
