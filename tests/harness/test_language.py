"""Language modelling from the recipe to the table, tied weights, and generation token by token."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from lra.cli.app import app
from lra.encoder import Encoder
from lra.errors import UserError
from lra.model import Batch, Classifier, Head
from lra.registry import architectures, tasks
from lra.results.collection import Collection
from lra.target import NextTarget
from lra.task import SPLITS, UNSCORED, Progress, Protocol, Split, Task
from lra.tasks.storage import open_split, write_documents, write_positions
from lra.training import rate_search
from lra.training.callbacks import BestCheckpoint
from lra.training.generation import Sampling
from lra.training.request import Request
from lra.training.run import run
from lra.training.trained_run import TrainedRun, load

TEXT = "the cat sat on the mat. "
SMALL = {"train.steps": "30", "train.evaluate_every": "15", "search.rates": "[]", "model.d_model": "16",
         "model.n_layers": "1", "data.batch_size": "8", "optim.lr": "1e-2", "optim.warmup": "0",
         "model.budget": "0"}  # fmt: skip


class Letters(Task):
    name = "letters"
    title = "one sentence, from any of its letters on"
    classes = 128
    target = "next"
    protocols: ClassVar = {"strict": Protocol("strict", length=40, vocabulary=128)}

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        for number, split in enumerate(SPLITS):
            random = np.random.default_rng(number)
            starts = random.integers(0, len(TEXT), 64)
            texts = [
                (TEXT * 3)[start : start + n] for start, n in zip(starts, random.integers(20, 41, 64), strict=True)
            ]
            write_documents(folder, split, [self.encode(text, protocol) for text in texts])
            write_positions(folder, split, None, len(texts))

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(map(chr, tokens))

    def floor_bits(self, train: Split, test: Split) -> dict[str, float]:
        return {"a guess": 7.0}

    def describe(self, split: Split, example: int) -> str:
        return self.decode(split.document(int(split.index[example, 0])))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("language")


@pytest.fixture(autouse=True)
def here(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(places / name.lower()))


@pytest.fixture
def trained(places: Path, here: None) -> TrainedRun:
    """One run for all tests of this file."""
    if not (places / "lra_runs").exists():
        run(Request(Letters, "mingru", "language", settings=SMALL), Console(quiet=True))
    return load(next((places / "lra_runs").iterdir()), task=Letters)


def test_bits_have_an_interval_over_examples_and_depend_on_the_context() -> None:
    random, sizes = np.random.default_rng(0), [3, 20, 7, 70]
    nats = [random.exponential(size=size) + number for number, size in enumerate(sizes)]
    answers: dict[str, np.ndarray] = {
        "example": np.repeat(np.arange(4), sizes), "nats": np.concatenate(nats).astype(np.float32),
        "prediction": np.zeros(100, np.int64), "label": np.zeros(100, np.int64),
    }  # fmt: skip
    score = NextTarget(4).score(answers)
    bits = [row / math.log(2) for row in nats]
    mean = sum(map(sum, bits)) / 100
    assert score["bits"] == pytest.approx(mean)
    # the standard error of a ratio of means (Cochran 1977, 2.45)
    squares = sum((sum(row) - mean * len(row)) ** 2 for row in bits) / 3
    assert (score["bits_high"] - score["bits_low"]) / 2 == pytest.approx(1.959964 * math.sqrt(4 * squares) / 100)
    groups: dict[str, list[float]] = {}
    for row in bits:
        for before, value in enumerate(row, 1):
            name = next(f"{low}-{4 * low - 1}" for low in (1, 4, 16, 64) if before < 4 * low)
            groups.setdefault(name, []).append(value)
    assert score["bits_at"] == pytest.approx({name: np.mean(values) for name, values in groups.items()})


def test_one_example_has_no_interval() -> None:
    labels = torch.tensor([[0, 1, UNSCORED]])
    answers = NextTarget(4).answers(torch.zeros(1, 3, 4), torch.arange(1), labels)
    score = NextTarget(4).score({name: column.numpy() for name, column in answers.items()})
    assert "bits_low" not in score


@pytest.mark.parametrize(("selects", "kept"), [("accuracy", [True, True, False]), ("loss", [True, False, True])])
def test_the_next_token_selects_by_loss(tmp_path: Path, selects: str, kept: list[bool]) -> None:
    assert NextTarget.selects == "loss"
    saving, found = BestCheckpoint(tmp_path, selects), []
    for accuracy, loss in ((0.5, 1.0), (0.6, 1.1), (0.4, 0.9)):
        metrics = {"validation_accuracy": torch.tensor(accuracy), "validation_loss": torch.tensor(loss)}
        trainer: Any = SimpleNamespace(
            callback_metrics=metrics, strategy=SimpleNamespace(reduce_boolean_decision=lambda decision: decision)
        )
        current = metrics[str(saving.monitor)]
        found.append(saving.check_monitor_top_k(trainer, current))
        if found[-1]:
            saving.best_model_score = current
    assert found == kept
    trials = [{"lr": 1.0, "accuracy": 0.6, "loss": 1.1}, {"lr": 2.0, "accuracy": 0.4, "loss": 0.9}]
    assert rate_search.best(trials, selects)["lr"] == (2.0 if selects == "loss" else 1.0)


def small_encoder() -> Encoder:
    return architectures.get("transformer")(d_model=8, n_layers=1, length=40, direction="causal")


def test_tied_weights_are_one_matrix_with_both_gradients() -> None:
    torch.manual_seed(0)
    protocol = Letters.protocols["strict"]
    model = Classifier(small_encoder(), protocol, 128, 1, "last", per_position=True, tie=True)
    assert len([p for p in model.parameters() if p.shape == (128, 8)]) == 1
    values = torch.randint(0, 128, (2, 1, 5))
    mask = torch.ones(2, 1, 5, dtype=torch.bool)
    output = model(Batch(values, mask, values[:, 0], torch.arange(2)))
    weight = model.embedding.weight
    assert isinstance(weight, torch.nn.Parameter)
    encoded = model.encoder(weight[values[:, 0]] * 8**0.5, mask[:, 0])
    torch.testing.assert_close(output, encoded @ weight.T + model.head.bias)
    output.square().sum().backward()
    # rows of tokens that do not occur get a gradient as outputs, and none as inputs
    assert weight.grad is not None
    assert (weight.grad.abs().sum(dim=1) > 0).all()
    assert 0.9 < float(weight.detach().std() * 8**0.5) < 1.1


def test_weights_that_cannot_be_tied_are_refused() -> None:
    protocol = Letters.protocols["strict"]
    for classes, per_position, head in ((2, True, None), (128, False, None), (128, True, Head("mlp", (4,)))):
        with pytest.raises(UserError, match=r"set model.tie=false, or model.head=linear"):
            Classifier(small_encoder(), protocol, classes, 1, "last", head, per_position, tie=True)


def test_a_run_has_a_place_and_a_table_of_its_own(trained: TrainedRun, places: Path) -> None:
    record = trained.record
    assert [path.name for path in (places / "lra_results").iterdir()] == ["language"]
    assert (record.recipe.name, record.recipe.model["tie"]) == ("language", True)
    test = record.test
    assert test.bits is not None
    assert test.bits_low is not None
    assert test.bits_high is not None
    assert test.bits_low < test.bits < test.bits_high
    assert test.perplexity == pytest.approx(2**test.bits)
    assert set(test.bits_at) == {"1-3", "4-15", "16-63"}
    assert record.floor_bits == {"a guess": 7.0}
    assert not Collection.read(places / "lra_results").records
    again = trained.evaluate()
    assert again.more["bits"] == pytest.approx(test.bits)
    (shown,) = language_tables(places)
    assert shown.title == "letters (strict), recipe language, modified runs"
    assert [row[0].text.partition(" (")[0] for row in shown.rows] == ["mingru", "a guess"]
    half = (test.bits_high - test.bits_low) / 2
    assert [row[1].text for row in shown.rows] == [f"{test.bits:.3f} ± {half:.3f}", "7.000"]
    assert shown.columns[3:6] == ["1-3", "4-15", "16-63"]
    assert [shown.rows[0][3 + k].text for k in range(3)] == [f"{test.bits_at[n]:.3f}" for n in shown.columns[3:6]]


def language_tables(places: Path) -> list[Any]:
    from lra.reports import language

    return language.tables(Collection.read(places / "lra_results", "language").records)


def test_the_leaderboard_command_prints_the_tables_of_the_family(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(places / "nothing"))
    assert "no results in" in CliRunner().invoke(app, ["leaderboard", "--task", "imdb_lm"]).output
    refused = CliRunner().invoke(app, ["leaderboard", "--task", "imdb_lm", "--format", "md"])
    assert (refused.exit_code, "are printed only" in refused.output) == (2, True)


def test_greedy_generation_is_what_the_whole_forward_pass_predicts(trained: TrainedRun) -> None:
    drawn = trained.generate("the cat", tokens=30, temperature=0)
    text = "the cat"
    for _ in range(30):
        text += chr(int(trained.predict([text])[0][-1]))
    assert drawn.text == text.removeprefix("the cat")
    assert drawn.tokens == 30
    assert drawn.tokens_per_second > 0
    assert drawn.state_bytes == trained.model.encoder.state_bytes(37)


def test_a_seed_repeats_a_text_and_another_one_does_not(trained: TrainedRun) -> None:
    texts = [trained.generate("t", temperature=2.0, tokens=30, seed=seed).text for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(0), [0, 1, 0, 0]),
        (Sampling(0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(top_p=0.3), [0, 1, 0, 0]),
        (Sampling(top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(top_p=0.8), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(top_k=2, top_p=0.5), [0, 1, 0, 0]),
    ],
)
def test_probabilities_of_the_next_token(sampling: Sampling, expected: list[float]) -> None:
    logits: Tensor = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    torch.testing.assert_close(
        sampling.probabilities(logits), torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=1e-5
    )


def test_what_cannot_be_sampled_is_refused() -> None:
    for arguments, message in (
        ({"temperature": -1.0}, "temperature is -1"), ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"), ({"top_p": 0.0}, "top_p is 0"), ({"top_p": 1.1}, "top_p is 1.1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Sampling(**arguments)


def test_a_text_longer_than_the_protocol_is_refused(trained: TrainedRun) -> None:
    with pytest.raises(UserError, match=r"the prompt has 10 tokens, and 31 new ones are requested; .* at most 40"):
        trained.generate("x" * 10, tokens=31)
    assert trained.generate("x" * 10, tokens=30).tokens == 30


def test_runs_that_generate_no_text_are_refused(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    other = TrainedRun(trained.model, trained.recipe, tasks.get("parity")(), trained.protocol, trained.folder, None, 0)
    with pytest.raises(UserError, match="the target of parity is not the next token"):
        other.generate("a")
    monkeypatch.setattr(type(trained.model.encoder), "init_state", Encoder.init_state)
    with pytest.raises(UserError, match="mingru has no recurrent mode"):
        trained.generate("a", tokens=3)


def test_the_command_prints_text_speed_and_state(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from lra.training import trained_run

    monkeypatch.setattr(trained_run, "load", lambda *_, **__: trained)
    words = ["generate", str(trained.folder), "--prompt", "the", "--tokens", "9", "--temperature", "0"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "the" + trained.generate("the", tokens=9, temperature=0).text in done.output
    assert "9 tokens, " in done.output
    assert " bytes of state" in done.output
    refused = CliRunner().invoke(app, [*words, "--top-p", "0"])
    assert (refused.exit_code, "--top-p is 0" in refused.output) == (2, True)
