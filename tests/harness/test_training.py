"""How a run trains: parts of a batch, averaged weights, recomputed blocks, cut gradients, growing lengths, budgets."""

from __future__ import annotations

import csv
import math
import sys
import tarfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from rich.console import Console
from stopped_run import stopped_after
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import placement_types
from torch.utils.flop_counter import FlopCounterMode

from lra.config import match
from lra.config.sections import Expected
from lra.data import prepared_sets
from lra.data.batches import DeviceSet, Sampler
from lra.errors import Interrupted, UserError
from lra.model import Classifier
from lra.registry import architectures
from lra.results import result
from lra.results.record import RunRecord
from lra.training import execution
from lra.training.callbacks import ExpectationCheck
from lra.training.construction import build
from lra.training.pretraining import Predictor
from lra.training.request import Request, resolve
from lra.training.run import run
from lra.training.trained_run import load

TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"
SMALL = {
    "train.steps": "12", "train.evaluate_every": "6", "model.d_model": "8", "data.batch_size": "16",
    "model.n_layers": "1", "optim.warmup": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path


def go(settings: dict[str, str] | None = None, architecture: str = "gru", **more: Any) -> RunRecord:
    request = Request(TINY, architecture, "quick", settings=SMALL | (settings or {}), **more)
    return result.read(run(request, Console(quiet=True)))


def weights(places: Path, number: int = -1) -> dict[str, torch.Tensor]:
    found = sorted((places / "lra_runs").glob("*/checkpoints/best.ckpt"), key=lambda p: p.stat().st_mtime_ns)
    return torch.load(found[number], weights_only=True)["state_dict"]


def encoder(name: str = "gru", **more: Any) -> Any:
    torch.manual_seed(0)
    return architectures.get(name)(d_model=8, n_layers=2, length=20, **more)


def test_a_batch_in_parts_is_the_batch(places: Path) -> None:
    # only evaluated at the end, so that the best weights are the last
    settings = {"train.evaluate_every": "12", "train.precision": '"32"'}
    whole = go(settings)
    before = weights(places)
    parts = go(settings | {"train.accumulate": "4"})
    after = weights(places)
    assert whole.recipe_hash != parts.recipe_hash
    assert parts.speed.steps == 12
    assert parts.speed.examples == whole.speed.examples
    for key, value in before.items():
        torch.testing.assert_close(value, after[key], atol=2e-5, rtol=1e-4)


def test_averaged_weights_are_the_average(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lra.training.module import Training

    seen: list[torch.Tensor] = []
    plain = Training.on_train_batch_end

    def watching(self: Training, *rest: Any) -> None:
        seen.append(self.model.get_parameter("head.weight").detach().clone())
        plain(self, *rest)

    monkeypatch.setattr(Training, "on_train_batch_end", watching)
    go({"optim.ema": "0.5", "train.evaluate_every": "12"})
    kept = weights(places)["model.head.weight"]
    average = seen[0]
    for value in seen[1:]:
        average = 0.5 * average + 0.5 * value
    torch.testing.assert_close(kept, average)
    assert not torch.equal(kept, seen[-1])
    # what is restored is what was tested
    assert torch.equal(load(next((places / "lra_runs").iterdir())).model.get_parameter("head.weight"), kept)


def gradients(net: Any, x: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    net.zero_grad()
    torch.manual_seed(1)
    net(x, mask).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def test_recomputed_blocks_give_the_same_gradients_with_dropout() -> None:
    net = encoder("transformer", dropout=0.3)
    x, mask = torch.randn(3, 20, 8), torch.ones(3, 20, dtype=torch.bool)
    plain = gradients(net, x, mask)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    net.layers[0].mixer.register_forward_hook(count)
    execution.recompute(net)
    again = gradients(net, x, mask)
    assert runs == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_truncation_cuts_the_gradient_and_nothing_else() -> None:
    net = encoder()
    x, mask = torch.randn(2, 20, 8, requires_grad=True), torch.ones(2, 20, dtype=torch.bool)
    whole = net(x, mask)
    execution.truncate(net, 5)
    cut = net(x, mask)
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)
    # the sum of a normalised vector has no gradient
    seen = [(y[:, 12] * torch.arange(8)).sum() for y in (whole, cut)]
    reach = [torch.autograd.grad(y, x, retain_graph=True)[0].abs().sum((0, 2)) for y in seen]
    assert (reach[0][:13] > 0).all()
    assert (reach[1][:10] == 0).all()
    assert (reach[1][10:13] > 0).all()
    with pytest.raises(UserError, match="recurrent mode"):
        execution.truncate(encoder(direction="bidirectional"), 5)


@pytest.mark.parametrize("name", ["gru", "s4d", "mamba", "tcn", "linear_ssm", "s4"])
def test_a_cut_longer_than_the_sequence_changes_no_gradient(name: str) -> None:
    net = encoder(name).double()
    net._apply(lambda t: t.to(torch.complex128) if t.is_complex() else t)
    x, mask = torch.randn(2, 20, 8, dtype=torch.float64), torch.ones(2, 20, dtype=torch.bool)
    whole = gradients(net, x, mask)
    execution.truncate(net, 50)
    for a, b in zip(gradients(net, x, mask), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "parameters"), [("linear_ssm", ("A", "B", "log_dt")), ("s4", ("C_tilde", "B"))])
def test_parameters_in_the_state_learn_from_every_chunk(name: str, parameters: tuple[str, ...]) -> None:
    net = encoder(name)
    execution.truncate(net, 5)
    y = net(torch.randn(2, 20, 8), torch.ones(2, 20, dtype=torch.bool))
    (y[:, -1] * torch.arange(8)).sum().backward()
    for parameter in parameters:
        assert net.layers[0].mixer.get_parameter(parameter).grad.abs().sum() > 0


def test_chunks_are_recomputed_as_well() -> None:
    net = encoder("gru", dropout=0.3)
    x, mask = torch.randn(3, 20, 8), torch.ones(3, 20, dtype=torch.bool)
    execution.truncate(net, 5)
    plain, runs = gradients(net, x, mask), 0
    inner = net.layers[0].mixer.chunk

    def counted(*given: Any) -> Any:
        nonlocal runs
        runs += 1
        return inner(*given)

    net.layers[0].mixer.chunk = counted
    execution.recompute(net)
    again = gradients(net, x, mask)
    assert runs == 8
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_run_may_be_truncated_and_recomputed(places: Path) -> None:
    record = go({"train.tbptt": "6", "model.direction": "causal", "train.checkpointing": "true"})
    assert record.recipe.train["tbptt"] == 6


def test_compiling_says_how_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    net = encoder("transformer")
    x, mask = torch.randn(2, 20, 8), torch.ones(2, 20, dtype=torch.bool)
    plain = net(x, mask)

    def refuse(*_: Any, **__: Any) -> None:
        net._compiled_call_impl = lambda *_, **__: 1 / 0

    monkeypatch.setattr(net, "compile", refuse)
    said = execution.compiled(net, lambda: net(x, mask))
    assert said["status"] == "refused"
    assert "ZeroDivisionError" in said["reason"]
    assert torch.equal(net(x, mask), plain)
    assert all(p.grad is None for p in net.parameters())


def test_lengths_grow_and_every_step_is_a_function_of_its_number() -> None:
    lengths = np.random.default_rng(0).integers(5, 101, (400, 1))
    sampler = Sampler(lengths, 8, 0, grow_from=20, grow_steps=10)
    longest = [int(lengths[sampler.batch(step)].max()) for step in range(10)]
    assert all(n <= 20 + 80 * step / 10 for step, n in enumerate(longest))
    assert max(longest[:3]) < 40 < 60 < max(longest[7:])
    assert (sampler.batch(3) == Sampler(lengths, 8, 0, grow_from=20, grow_steps=10).batch(3)).all()
    assert (sampler.batch(12) == Sampler(lengths, 8, 0).batch(12)).all()
    with pytest.raises(UserError, match="curriculum_length >="):
        Sampler(lengths, 8, 0, grow_from=5, grow_steps=10).batch(0)


def test_a_run_below_its_source_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    check = ExpectationCheck(Expected(epoch=2, by=0.5), 10, Console(width=200))

    class Seen:
        global_step, callback_metrics = 0, {"validation_accuracy": torch.tensor(0.3)}

    for step in (10, 19, 20, 30):
        Seen.global_step = step
        check.on_validation_end(Seen(), None)  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("30.0 %, below the 50 %") == 1
    assert check.warning


@pytest.mark.parametrize("objective", ["mlm", "causal"])
def test_self_pretraining_learns_from_inputs_alone_and_is_charged(objective: str, places: Path) -> None:
    settings = {"pretrain.steps": "40", "pretrain.lr": "0.01", "model.direction": "causal"}
    record = go(settings, pretrain=objective)
    assert record.regime == f"self-pretrained ({objective})"
    assert record.pretraining
    assert record.pretraining.steps == 40
    charged = record.compute
    assert charged
    assert charged["total"].examples == 16 * (40 + 12)
    assert charged["total"].flops == sum(charged[k].flops for k in ("pretraining", "fine-tuning"))
    (log,) = places.rglob("pretraining/metrics.csv")
    losses = [float(row["loss"]) for row in csv.DictReader(log.read_text().splitlines()) if row["loss"]]
    # tokens are drawn evenly from four: no prediction is better than log 4, and an untrained head is worse
    untrained = Predictor(
        model_of("gru", **{"model.direction": "causal"})[0], prepared_sets.resolve(TINY)[1], objective, 0.15, "auto"
    )
    batch = DeviceSet.of(
        prepared_sets.load_prepared(TINY).split("train"), prepared_sets.resolve(TINY)[1], torch.device("cpu")
    )
    before = float(untrained(batch.batch(np.arange(64))).detach())
    assert losses[-1] < before - 0.1
    assert losses[-1] == pytest.approx(math.log(4), abs=0.1)


def test_pretrained_weights_are_what_training_starts_from(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lra.training import stages
    from lra.training.module import Training

    starts: list[dict[str, torch.Tensor]] = []

    class Watched(Training):
        def on_train_start(self) -> None:
            starts.append({k: v.clone() for k, v in self.model.state_dict().items()})
            super().on_train_start()

    monkeypatch.setattr(stages, "Training", Watched)
    go({"pretrain.steps": "4", "pretrain.objective": "mlm"})
    done = torch.load(next(places.rglob("done.ckpt")), weights_only=True)["model"]
    assert all(torch.equal(done[key], value) for key, value in starts[0].items())
    plain = model_of("gru")[0].state_dict()
    changed = [k for k in plain if not torch.equal(plain[k], done[k])]
    assert any(k.startswith("encoder.") for k in changed)
    assert not any(k.startswith("head.") for k in changed)


def test_causal_pretraining_of_an_encoder_that_sees_the_future_is_refused() -> None:
    with pytest.raises(UserError, match=r"set model\.direction=causal"):
        go({"pretrain.objective": "causal"})
    with pytest.raises(UserError, match="this protocol has tokens"):
        go({"pretrain.objective": "mlm", "pretrain.loss": "l1"})


def model_of(name: str, **settings: str) -> tuple[Classifier, Any]:
    found, _ = resolve(Request(TINY, name, "quick", settings=SMALL | settings))
    task, protocol = prepared_sets.resolve(TINY)
    return build(found, architectures.get(name), task, protocol, 0), found


@pytest.mark.parametrize("name", ["gru", "s4d", "transformer"])
def test_a_width_is_solved_for_a_budget(name: str) -> None:
    found, origin = resolve(Request(TINY, name, "quick", settings=SMALL, match="params=60k"))
    model, _ = model_of(name, **{"model.d_model": str(found.model.d_model)})
    size = sum(p.numel() for p in model.parameters())
    assert f"{size:,}" in origin["model.d_model"]
    # no neighbouring width that can be built is nearer
    step = architectures.declaration(name).options.get("n_heads", 1)
    for other in (found.model.d_model - step, found.model.d_model + step):
        near, _ = model_of(name, **{"model.d_model": str(other)})
        assert abs(sum(p.numel() for p in near.parameters()) - 60_000) >= abs(size - 60_000)


def test_more_of_a_budget_is_more_width() -> None:
    for kind, small, large in (("flops", "5M", "50M"), ("memory", "10M", "100M")):
        widths = [
            resolve(Request(TINY, "gru", "quick", settings=SMALL, match=f"{kind}={b}"))[0].model.d_model
            for b in (small, large)
        ]
        assert widths[0] < widths[1]


@pytest.mark.parametrize(
    ("text", "says"),
    [("parms=6k", "did you mean 'params'"), ("params=6q", "for example params=600k"), ("flops", "a number")],
)
def test_a_wrong_budget_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        match.parse_budget(text)


def test_a_record_holds_its_learning_curve_resumed_or_not(places: Path) -> None:
    whole = go().curve
    assert [point.step for point in whole] == [6, 12]
    with stopped_after(8), pytest.raises(Interrupted):
        go()
    record = go(resume=True)
    assert record.curve == whole
    assert record.validation.accuracy == pytest.approx(max(point.validation_accuracy or 0 for point in whole))


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_what_an_encoder_changes_itself_changes_once_a_step(accumulate: str, places: Path) -> None:
    """The balancing biases of its experts move by 0.001."""
    go({"train.accumulate": accumulate, "train.steps": "6"}, "deepseek_moe")
    moved = weights(places)["model.encoder.layers.0.ffn.e_score_correction_bias"] / 0.001
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-3)
    assert 0 < moved.abs().max() <= 6


def test_diagnostics_of_an_encoder_are_in_the_record(monkeypatch: pytest.MonkeyPatch, places: Path) -> None:
    cls = architectures.get("gru").cls
    monkeypatch.setattr(cls, "diagnostics", lambda self: {"dropped": 0.25}, raising=False)
    assert go().diagnostics == {"dropped": 0.25}
    (log,) = places.rglob("metrics.csv")
    assert "diagnostics/dropped" in log.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("package", "owner", "name"),
    [
        ("torch", placement_types, "_StridedShard"),
        ("torch", _fsdp_param, "free_storage"),
        ("torch", torch.nn.Module, "_compiled_call_impl"),
        ("torch", torch._dynamo.utils, "counters"),
        ("torch", FlopCounterMode(display=False), "mod_tracker"),
        ("python", tarfile.TarInfo, "_proc_member"),
        ("python", tarfile.TarInfo, "_proc_gnusparse_10"),
    ],
)
def test_private_names_of_other_packages_are_where_they_are_used(package: str, owner: Any, name: str) -> None:
    moved = f"{package} {sys.version if package == 'python' else version(package)} has moved {name}"
    assert hasattr(owner, name), moved


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()
