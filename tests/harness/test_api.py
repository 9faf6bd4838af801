"""The Python API, and the commands that use a trained run: every function of `lra`, on a tiny task."""

from __future__ import annotations

import csv
import importlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import records
import torch
from tiny_task import COUNTS, Tiny
from torch import Tensor, nn
from typer.testing import CliRunner

import lra
from lra.cli.app import app
from lra.config import recipe as recipes
from lra.data.examples import split_of
from lra.data.module import EpochLoader
from lra.errors import Interrupted, UserError
from lra.model import Batch
from lra.registry import tasks
from lra.results import result
from lra.task import Protocol
from lra.training.request import Request, resolve

SMALL = {"train.steps": 12, "train.evaluate_every": 6, "model.d_model": 8, "model.n_layers": 1, "data.batch_size": 16}


class MyLayer(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.map = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(1)


class Stranger(L.LightningModule):
    """A module that knows nothing of this project but what a batch is."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 16), nn.Linear(16, 4)
        self.losses: list[float] = []

    def training_step(self, batch: Batch, _: int) -> Tensor:
        first = self.table(batch.values[:, 0, 0].int())
        loss = nn.functional.cross_entropy(self.head(first), batch.labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        predicted = self.head(self.table(batch.values[:, 0, 0].int())).argmax(-1)
        self.log("accuracy", (predicted == batch.labels).float().mean(), batch_size=len(batch.labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.03)


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
            patch.setenv(name, str(folder / name.lower()))
        yield folder


@pytest.fixture(scope="module")
def steps() -> list[tuple[int, int, Mapping[str, float]]]:
    return []


@pytest.fixture(scope="module")
def run(places: Path, steps: list[Any]) -> lra.TrainedRun:
    """A run of a class on a class, with everything about it that must not leak."""
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["pos"], random.getstate()
    trained = lra.train(
        Tiny, MyLayer, recipe="quick", seed=1, overrides=SMALL, progress=lambda *seen: steps.append(seen)
    )
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state(legacy=False)["state"]["pos"] == before[1]
    assert random.getstate() == before[2]
    return trained


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, time; t = time.process_time(); import lra; t = time.process_time() - t\n"
        "heavy = {'torch', 'pandas', 'numpy', 'lightning', 'rich'} & set(sys.modules)\n"
        "import lra.architectures._stack, lra.results.result\n"
        "print(t < 0.2, heavy, callable(lra.architectures), callable(lra.results))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["True", "set()", "True", "True"]


def test_every_public_name_exists() -> None:
    for name in ("architectures", "results", *lra._MODULES):
        assert callable(getattr(lra, name)), name
        assert name in dir(lra)
    with pytest.raises(AttributeError, match="trian"):
        _ = lra.trian


def test_architectures_are_listed_with_their_cards() -> None:
    assert {"s4", "s4d"} <= set(lra.list_architectures("*s4*"))
    assert all("s4" in name for name in lra.list_architectures("*s4*"))
    assert "s4d/inv" in lra.list_architectures("s4d/*")
    cards = lra.architectures().set_index("name")
    assert cards.loc["s4d", "family"] == "state_space"
    assert "inv" in cards.loc["s4d", "variants"]
    assert importlib.import_module("lra.architectures._stack").Stack is not None


def test_an_encoder_is_made_by_name_or_class() -> None:
    x, mask = torch.randn(2, 10, 8), torch.ones(2, 10, dtype=torch.bool)
    for architecture in ("s4d/inv", MyLayer):
        encoder = lra.create_encoder(architecture, d_model=8, n_layers=1, length=16)
        assert encoder(x, mask).shape == x.shape
    with pytest.raises(UserError, match="did you mean 's4d'"):
        lra.create_encoder("s4dd", d_model=8, n_layers=1, length=16)
    with pytest.raises(UserError, match="did you mean 'd_model'"):
        lra.create_encoder("s4d", d_modle=8, n_layers=1, length=16)


def test_a_task_is_a_sequence_of_examples() -> None:
    task = lra.load_task(Tiny)
    assert task.sizes == COUNTS
    assert (len(task.train), len(task.validation), len(task.test)) == (512, 100, 150)
    first, last = task.train[0], task.train[-1]
    assert first.values.tolist()[0] == first.label
    assert last.label == task.train[511].label
    assert [example.label for example in task.train[2:5]] == [task.train[i].label for i in (2, 3, 4)]
    assert sum(1 for _ in task.test) == 150
    with pytest.raises(IndexError):
        _ = task.train[512]
    with pytest.raises(UserError, match="did you mean 'test'"):
        task.split("tset")


def test_a_run_is_returned_with_its_record(run: lra.TrainedRun, steps: list[Any]) -> None:
    assert run.accuracy == run.record.test.accuracy
    assert run.record.architecture == f"{MyLayer.__module__}:MyLayer"
    assert run.record.seed == run.seed == 1
    assert result.read(next(result.folder().rglob("*.json"))) == run.record
    assert [step for step, *_ in steps] == [6, 6, 12, 12]
    assert all(total == 12 for _, total, _ in steps)
    assert {"loss", "validation_accuracy"} <= set(steps[-1][2])


def test_the_recorded_command_is_rebuilt_from_the_request(run: lra.TrainedRun) -> None:
    words = run.record.command.split()
    assert words[:4] == ["lra", "run", f"{Tiny.__module__}:Tiny", f"{MyLayer.__module__}:MyLayer"]
    assert words[words.index("--recipe") + 1] == "quick"
    assert "train.steps=12" in words
    request = Request("listops", "gru", settings={"optim.lr": "0.5"}, match="params=6k", resume=True, time_limit=3.0)
    recipe = "matched" if torch.cuda.is_available() else "quick"
    assert request.command() == f"lra run listops gru --recipe {recipe} --seed 0 --set optim.lr=0.5 --match params=6k"


def test_overrides_are_python_values(run: lra.TrainedRun) -> None:
    from lra.training.request import setting_texts

    texts = setting_texts({"train.compile": True, "optim": {"lr": 1e-5, "betas": (0.9, 0.95)}, "optim.name": "adam"})
    recipe, _ = recipes.resolve("quick", "listops", "gru", texts)
    assert recipe.train.compile is True
    assert (recipe.optim.lr, recipe.optim.betas, recipe.optim.name) == (1e-5, (0.9, 0.95), "adam")
    for wrong in (None, object(), float("nan")):
        with pytest.raises(UserError, match=r"train\.steps"):
            setting_texts({"train.steps": wrong})
    with pytest.raises(UserError, match=r"did you mean 'train\.steps'"):
        lra.train(Tiny, "gru", recipe="quick", overrides={"train.step": 3})


def test_predictions_are_those_of_the_record_for_every_kind_of_input(run: lra.TrainedRun) -> None:
    predicted = run.predict("test")
    stored = np.load(next(result.folder().rglob("*.npz")))["prediction"]
    assert (predicted == stored).all()
    test = lra.load_task(Tiny).test
    values = [example.values for example in test[:5]]
    assert (run.predict(values) == stored[:5]).all()
    assert (run.predict([torch.from_numpy(v).long() for v in values]) == stored[:5]).all()
    assert (run.predict(values[0]) == stored[:1]).all()
    rows = np.stack([v[:5] for v in values])
    assert (run.predict(rows) == run.predict(list(rows))).all()
    chances = run.predict(values, probabilities=True)
    assert chances.shape == (5, 4)
    assert chances.sum(1) == pytest.approx(1)
    assert (chances.argmax(1) == stored[:5]).all()


def test_features_are_what_the_head_is_given(run: lra.TrainedRun) -> None:
    values = [example.values for example in lra.load_task(Tiny).test[:5]]
    pooled = run.features(values)
    assert pooled.shape == (5, 8)
    with torch.no_grad():
        logits = run.model.head(torch.from_numpy(pooled))
    assert (logits.argmax(-1).numpy() == run.predict(values)).all()
    positions = run.features(values, pooled=False)
    assert [p.shape for p in positions] == [(len(v), 8) for v in values]
    np.testing.assert_allclose(np.stack([p.mean(0) for p in positions]), pooled, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("0 1 2", "does not encode texts"), ([], "no input"), ([[0, 4]], "from 0 to 3"), ([[0.5]], "whole number"),
        ([[]], "at least one"), (np.zeros((2, 3, 4), int), "shape"), ([[0, 1], [[0], [1, 2]]], "an input is"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_line(inputs: Any, says: str, run: lra.TrainedRun) -> None:
    with pytest.raises(UserError, match=says) as error:
        run.predict(inputs)
    assert "\n" not in str(error.value)


def test_tasks_encode_their_texts_as_they_were_prepared() -> None:
    text, listops, pairs = (tasks.get(name)() for name in ("text", "listops", "retrieval_rfc"))
    split = split_of(["héllo", "x" * 9000], text, text.protocols["strict"])
    assert bytes(split.document(0)).decode() == "héllo"
    assert len(split.document(1)) == 4096
    split = split_of("[MAX 3 [MIN 7 2 ] ]", listops, listops.protocols["strict"])
    assert listops.describe(split, 0).startswith("[MAX 3 [MIN 7 2 ] ]")
    with pytest.raises(UserError, match="unknown symbol"):
        split_of("[MAXX 3 ]", listops, listops.protocols["strict"])
    split = split_of([("one", "two"), ("three", "four")], pairs, pairs.protocols["strict"])
    assert split.index.tolist() == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="takes pairs"):
        split_of(["one", "two", "three"], pairs, pairs.protocols["strict"])
    pixels = split_of(np.zeros((2, 5, 3), np.uint8), text, Protocol("pixels", length=4, channels=3))
    assert [len(pixels.document(i)) for i in range(2)] == [12, 12]


def test_a_run_is_loaded_from_its_folder_wherever_its_checkpoints_are(run: lra.TrainedRun, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for folder in (run.folder, str(run.folder)):
        again = lra.load(folder)
        assert again.record == run.record
        assert (again.predict("test") == run.predict("test")).all()
    assert torch.equal(torch.get_rng_state(), before)
    elsewhere = lra.train(Tiny, "gru", recipe="quick", overrides=SMALL, checkpoint_dir=tmp_path / "one")
    assert not (elsewhere.folder / "checkpoints").exists()
    assert lra.load(elsewhere.folder).accuracy == elsewhere.accuracy
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(UserError, match=r"no best\.ckpt in"):
        lra.load(elsewhere.folder)
    assert lra.load(elsewhere.folder, checkpoints=tmp_path / "two").accuracy == elsewhere.accuracy
    with pytest.raises(UserError, match="neither a run's folder nor an exported one"):
        lra.load(tmp_path)


def test_a_finished_run_is_not_trained_again(run: lra.TrainedRun, steps: list[Any]) -> None:
    count, files = len(steps), len(list(result.folder().rglob("*.json")))
    again = lra.train(
        Tiny, MyLayer, recipe="quick", seed=1, overrides=SMALL, resume=True, progress=lambda *seen: steps.append(seen)
    )
    assert again.record == run.record
    assert (len(steps), len(list(result.folder().rglob("*.json")))) == (count, files)


def test_an_interrupted_run_says_how_to_resume(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="the time limit") as error:
        lra.train(Tiny, "gru", recipe="quick", seed=5, overrides=SMALL, time_limit=0.0)
    assert isinstance(error.value, UserError)
    assert error.value.command.startswith("lra run tiny_task:Tiny gru --recipe quick --seed 5 --set ")
    assert error.value.command.endswith(" --resume")
    assert lra.train(Tiny, "gru", recipe="quick", seed=5, overrides=SMALL, resume=True).record.speed.steps == 12


def test_an_export_is_a_model_that_loads(run: lra.TrainedRun, tmp_path: Path) -> None:
    folder = run.export(tmp_path / "hub")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]
    again = lra.load(folder)
    assert again.accuracy == run.accuracy
    assert (again.predict("test") == run.predict("test")).all()
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe_hash"] == run.recipe.hash
    text = (folder / "README.md").read_text()
    assert f"{100 * run.accuracy:.2f} % of 150" in text
    assert run.record.command in text
    assert "95 % interval" in text
    assert "2011.04006" in text
    with pytest.raises(UserError, match="not empty"):
        run.export(folder)
    config["recipe"]["model"]["d_model"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds the weights of another model"):
        lra.load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="format is None"):
        lra.load(folder)


def test_a_failed_export_leaves_nothing(run: lra.TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        run.export(tmp_path / "hub")
    assert not list(tmp_path.iterdir())


def test_shared_tensors_are_stored_once() -> None:
    from lra.training.export import distinct

    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    weights, shared = distinct(model)
    assert shared == {"b.weight": "a.weight"}
    assert sorted(weights) == ["a.bias", "a.weight", "b.bias"]


def test_results_and_a_comparison(run: lra.TrainedRun) -> None:
    other = lra.train(Tiny, "gru", recipe="quick", seed=1, overrides=SMALL)
    rows = lra.results(smoke=True).set_index("id")  # type: ignore[operator]
    assert rows.loc[run.record.id, "accuracy"] == run.accuracy
    # a run with overrides is not ranked
    assert lra.leaderboard("tiny", smoke=True).empty
    compared = lra.compare(run, other.record.id)
    assert compared.difference is not None
    assert compared.p is not None
    assert compared.difference.mean == pytest.approx(run.accuracy - other.accuracy)
    assert compared.difference.low <= compared.difference.mean <= compared.difference.high
    assert 0 <= compared.p <= 1
    with pytest.raises(UserError, match="unknown run"):
        lra.compare(run, "nothing")


def test_the_leaderboard_is_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_RESULTS", str(tmp_path))
    records.filled(tmp_path)
    board = lra.leaderboard("listops")
    assert sorted(board["architecture"]) == sorted(records.ACCURACIES)
    assert board.set_index("architecture")["rank"].idxmin() == "s4d"
    with pytest.raises(UserError, match="did you mean 'listops'"):
        lra.leaderboard("listop")


def test_checks_and_profiles_are_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    from lra.conformance import suite
    from lra.profiling import profiler

    monkeypatch.setattr(suite, "CHECKS", {name: suite.CHECKS[name] for name in ("signature", "shape")})
    findings = lra.check(MyLayer)
    assert findings["check"].tolist() == ["signature", "shape"]
    assert (findings["status"] == "pass").all()

    def measured(cells: list[profiler.Cell], root: Path) -> list[dict[str, Any]]:
        return [{"cell": {"architecture": c.architecture, "length": c.length}, "flops": 1.0} for c in cells]

    monkeypatch.setattr(profiler, "profile", measured)
    frame = lra.profile(["s4d", "gru"], lengths=[64, 32])
    assert frame["architecture"].tolist() == ["s4d", "gru"] * 2
    assert frame["length"].tolist() == [32, 32, 64, 64]
    with pytest.raises(UserError, match="did you mean 'gru'"):
        lra.profile(["grru"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_strangers_module_trains_on_a_data_module(tmp_path: Path) -> None:
    module = Stranger()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, lra.DataModule(Tiny, batch_size=32))
    assert len(module.losses) == 2 * (512 // 32)
    assert module.losses[-1] < 0.5 < module.losses[0]
    assert trainer.callback_metrics["accuracy"] > 0.9
    assert trainer.validate(module, lra.DataModule(lra.load_task(Tiny)), verbose=False)[0]["accuracy"] > 0.9


def test_an_epoch_is_a_function_of_seed_and_epoch_and_processes_share_it() -> None:
    def examples(loader: EpochLoader) -> list[int]:
        return [example for batch in loader for example in batch.example.tolist()]

    one, same, other = (lra.DataModule(Tiny, 64, seed=seed) for seed in (0, 0, 1))
    loader = one.train_dataloader()
    first, second = examples(loader), examples(loader)
    assert sorted(first) == sorted(second) == list(range(512))
    assert first != second
    assert examples(same.train_dataloader()) == first != examples(other.train_dataloader())

    class Attached:
        current_epoch, world_size = 1, 2

        def __init__(self, rank: int) -> None:
            self.global_rank = rank
            self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

    shards = []
    for rank in range(2):
        part = lra.DataModule(Tiny, 64)
        part.trainer = Attached(rank)  # type: ignore[assignment]
        shards.append(examples(part.train_dataloader()))
    assert sorted(shards[0] + shards[1]) == list(range(512))
    assert shards[0][0::32] == second[0::64]
    part.batch_size = 31
    with pytest.raises(UserError, match="not divisible by 2"):
        part.train_dataloader()


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_commands_of_a_trained_run(run: lra.TrainedRun, tmp_path: Path) -> None:
    folder, out = str(run.folder), tmp_path / "out.csv"
    assert f"{100 * run.accuracy:.2f} % of 150" in invoke("evaluate", folder)
    assert f"accuracy in the record: {100 * run.accuracy:.2f} %" in invoke(
        "evaluate", folder, "--out", str(tmp_path / "s.json")
    )
    assert json.loads((tmp_path / "s.json").read_text())["correct"] == run.record.test.correct
    file = tmp_path / "inputs.jsonl"
    file.write_text("\n".join(json.dumps(e.values.tolist()) for e in lra.load_task(Tiny).test[:7]))
    printed = list(csv.DictReader(invoke("predict", folder, str(file)).splitlines()))
    assert [int(row["class"]) for row in printed] == run.predict("test")[:7].tolist()
    invoke("predict", folder, "test", "--probabilities", "--out", str(out))
    assert len(out.read_text().splitlines()) == 151
    invoke("export", folder, str(tmp_path / "hub"))
    assert lra.load(tmp_path / "hub").accuracy == run.accuracy
    before = sorted(tmp_path.rglob("*"))
    for words in (
        ("export", folder, str(tmp_path / "new")), ("predict", folder, "test", "--out", str(tmp_path / "new")),
        ("evaluate", folder, "--out", str(tmp_path / "new")), ("run", "listops", "gru", "--recipe", "quick"),
    ):  # fmt: skip
        assert invoke(*words, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("evaluate", "nowhere"), "is not a folder"), (("evaluate", "RUN", "--split", "tset"), "did you mean 'test'"),
        (("predict", "RUN", "a.csv"), "neither a split"), (("predict", "RUN", "none.txt"), "cannot be read"),
        (("export", "RUN", "RUN"), "not empty"), (("predict", "RUN", "test", "--out", "RUN"), "cannot write"),
        (("list", "nosuch*"), "no architecture matches"),
        (("list", "--family", "attentio"), "did you mean 'attention'"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(words: tuple[str, ...], says: str, run: lra.TrainedRun) -> None:
    done = CliRunner().invoke(app, [str(run.folder) if word == "RUN" else word for word in words])
    assert done.exit_code == 2, done.output
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_resolving_a_recipe_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from lra.cli.app import app\n"
        "for words in (['show', 'listops', 's4d/inv'], ['run', 'listops', 's4d', '--set', 'train.step=3'],\n"
        "              ['run', 'text', 'gru', '--protocol', 'strickt'], ['run', 'pathx', 'lru', '--dry-run']):\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    print(done.exit_code, sorted({'torch', 'lightning', 'numba', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    # a plan names the task's data, whose generators numba compiles
    assert done.stdout.splitlines() == ["0 []", "2 []", "2 []", "0 ['numba']"] or torch.cuda.is_available()


@pytest.mark.parametrize("name", [*lra.list_architectures(), *lra.list_architectures("*/*")])
def test_options_read_from_a_file_are_those_of_the_class(name: str) -> None:
    from lra.registry import architectures

    declaration, constructor = architectures.declaration(name), architectures.get(name)
    assert list(declaration.options) == list(constructor.options())
    assert declaration.preset == constructor.preset
    for key, default in constructor.options().items():
        # a default that is no literal is its source text
        given = declaration.options[key]
        assert given == default or eval(given, {"math": __import__("math")}) == default
    assert resolve(Request("listops", name, "quick"))[0].architecture == name
