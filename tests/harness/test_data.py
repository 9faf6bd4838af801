"""Batches: what is real, what is padding, and which examples a step sees."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.data.batches import DeviceSet, EvaluationLoader, Sampler, TrainingLoader, choose
from lra.task import Protocol, Split

CPU = torch.device("cpu")


def ragged(lengths: list[int], towers: int = 1, channels: int = 1, dtype: type[np.unsignedinteger] = np.uint8) -> Split:
    values = np.arange(sum(lengths) * channels).astype(dtype)
    offsets = np.concatenate([[0], np.cumsum(lengths)]) * channels
    n = len(lengths) // towers
    index = np.arange(n * towers, dtype=np.int32).reshape(n, towers)
    return Split(values, offsets.astype(np.int64), index, (np.arange(n) % 3).astype(np.uint8))


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_batch_holds_each_document_then_padding(towers: int, dtype: type[np.unsignedinteger]) -> None:
    split = ragged([3, 5, 1, 7, 2, 4], towers, dtype=dtype)
    data = DeviceSet.of(split, Protocol("p", length=6, vocabulary=300), CPU)
    batch = data.batch(np.array([1, 0]))
    assert batch.values.shape == batch.mask.shape == (2, towers, batch.values.shape[-1])
    for row, example in enumerate((1, 0)):
        for tower in range(towers):
            document = split.document(int(split.index[example, tower]))[:6]
            real = batch.mask[row, tower]
            assert real.sum() == len(document)
            assert real[: len(document)].all()
            assert batch.values[row, tower][real].tolist() == document.tolist()
            assert (batch.values[row, tower][~real] == 0).all()
    assert batch.labels.tolist() == [split.labels[1], split.labels[0]]
    assert batch.example.tolist() == [1, 0]


def test_continuous_input_keeps_its_channels_together() -> None:
    split = ragged([2, 3], channels=3)
    batch = DeviceSet.of(split, Protocol("p", length=3, channels=3), CPU).batch(np.array([0, 1]))
    assert batch.values.shape == (2, 1, 3, 3)
    assert batch.values[1, 0].flatten().tolist() == list(range(6, 15))
    assert batch.mask[0, 0].tolist() == [True, True, False]


def test_a_subset_keeps_only_its_documents() -> None:
    split = ragged([3, 5, 1, 7])
    data = DeviceSet.of(split, Protocol("p", length=9, vocabulary=99), CPU, np.array([1, 3]))
    assert len(data) == 2
    assert len(data.values) == 12
    batch = data.batch(np.array([1]))
    assert batch.values[batch.mask].tolist() == split.document(3).tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5), st.integers(0, 40))
def test_a_step_is_a_pure_function_and_an_epoch_sees_no_example_twice(
    lengths: list[int], batch_size: int, seed: int, step: int
) -> None:
    table = np.array(lengths).reshape(-1, 1)
    one, other = Sampler(table, batch_size, seed), Sampler(table, batch_size, seed)
    for earlier in range(step):
        one.batch(earlier)
    assert (one.batch(step) == other.batch(step)).all()
    start = step // one.per_epoch * one.per_epoch
    seen = np.concatenate([one.batch(s) for s in range(start, start + one.per_epoch)])
    assert len(set(seen.tolist())) == len(seen)
    assert len(seen) == (one.per_epoch * batch_size if len(lengths) >= batch_size else len(lengths))


def test_epochs_and_seeds_differ_and_buckets_are_narrow() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, (4000, 1))
    sampler = Sampler(lengths, 10, 0)
    first = [sampler.batch(s).tolist() for s in range(sampler.per_epoch)]
    second = [sampler.batch(s).tolist() for s in range(sampler.per_epoch, 2 * sampler.per_epoch)]
    assert sorted(map(sorted, first)) != sorted(map(sorted, second))
    assert first[0] != Sampler(lengths, 10, 1).batch(0).tolist()
    spans = [np.ptp(lengths[b]) for b in first]
    # windows of 500 examples cut into 50 batches: a tenth of the range would already be poor
    assert np.mean(spans) < 50
    means = [lengths[b].mean() for b in first]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2, "batches come in an order of length"


def test_steps_start_where_they_are_told() -> None:
    data = DeviceSet.of(ragged([2] * 20), Protocol("p", length=2, vocabulary=99), CPU)
    steps = TrainingLoader(data, Sampler(data.lengths, 4, 0), total=7)
    every = [b.example.tolist() for b in steps]
    steps.first = 5
    assert [b.example.tolist() for b in steps] == every[5:]
    assert len(every) == 7


def test_a_set_that_does_not_fit_stays_on_the_host_and_its_batches_move(monkeypatch: pytest.MonkeyPatch) -> None:
    split, protocol = ragged([3, 9, 1, 7, 2]), Protocol("p", length=9, vocabulary=99)
    here = [batch for data in [DeviceSet.of(split, protocol, CPU)] for batch in EvaluationLoader(data, 2)]
    monkeypatch.setattr("lra.data.batches.fits", lambda size, device: device.type == "cpu")
    away = DeviceSet.of(split, protocol, torch.device("meta"))
    assert not away.resident
    assert away.values.device == CPU
    sent = list(EvaluationLoader(away, 2))
    assert {part.device.type for batch in sent for part in batch} == {"meta"}
    assert [batch.values.shape for batch in sent] == [batch.values.shape for batch in here]
    steps = TrainingLoader(away, Sampler(away.lengths, 2, 0), total=3)
    assert len(list(steps)) == 3


def test_a_sweep_shows_every_example_once() -> None:
    data = DeviceSet.of(ragged([3, 9, 1, 7, 2]), Protocol("p", length=9, vocabulary=99), CPU)
    batches = list(EvaluationLoader(data, 2))
    assert sorted(torch.cat([b.example for b in batches]).tolist()) == list(range(5))
    assert [len(b.labels) for b in batches] == [2, 2, 1]


def test_the_chosen_subset_is_fixed() -> None:
    assert choose(10, 0) is None
    assert choose(10, 10) is None
    chosen = choose(1000, 30)
    assert chosen is not None
    assert len(set(chosen.tolist())) == 30
    assert (np.sort(chosen) == chosen).all()
    assert (chosen == choose(1000, 30)).all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the growth is that of glibc's heap")
def test_training_on_varying_lengths_keeps_its_memory() -> None:
    """Without the rounding of batch lengths it grows by 90 MiB from step 100 to step 300, and goes on growing."""
    script = Path(__file__).parents[1] / "varying_lengths.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    _, early, *later = json.loads(done.stdout)
    assert max(later) < early + 25
