"""The laws of the diagnostic tasks, computed again example by example, and their streams."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lra.conformance import tasks as conformance
from lra.data import prepared_sets
from lra.registry import tasks
from lra.task import UNSCORED, Task

NAMES = [name for name in tasks.names() if tasks.family(name) == "diagnostics"]

CHECKSUMS = {
    "adding": "101fa0e2",
    "copying_memory": "1f687956 636d2d2e",
    "cyclic_counting": "0b2214e0 545e3d1b",
    "flip_flop": "67bf30c1",
    "induction": "8d005f45",
    "modular_arithmetic": "3fe4b7be 9cacfc7e",
    "mqar": "2ae2ce2c 98413209 dd17c5d1",
    "parity": "675e9a86 66d38779",
    "selective_copy": "cd057968 541f915d",
    "string_copy": "1c49703b",
    "words_a4": "9034a982 c31d7f17",
    "words_a5": "c1fd1565 53feca3a",
    "words_s3": "e0c8262c",
    "words_s5": "23cbdb4c 3cb10b63 cd349156",
}
"""First digits of the checksum of every protocol, in their order."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path))


def drawn(name: str, protocol: str, size: int = 50) -> tuple[Task, np.ndarray, np.ndarray]:
    task = tasks.get(name)()
    return task, *task.training_batch(task.protocols[protocol], size, seed=3, step=7)


@pytest.mark.parametrize("name", NAMES)
def test_a_diagnostic_passes_the_checks_of_a_task(name: str) -> None:
    failed = [finding for finding in conformance.check(tasks.get(name)()) if finding.failed]
    assert not failed, "\n".join(f"{finding.check}: {finding.message}" for finding in failed)


@pytest.mark.parametrize("name", ["parity", "modular_arithmetic"])
def test_final_scores_the_last_position_alone(name: str) -> None:
    _, values, dense = drawn(name, "dense")
    _, same, final = drawn(name, "final")
    assert np.array_equal(values, same)
    assert (final[:, :-1] == UNSCORED).all()
    assert np.array_equal(final[:, -1], dense[:, -1])


def test_parity() -> None:
    _, bits, labels = drawn("parity", "dense")
    assert 3 <= bits.shape[1] <= 40
    for word, answer in zip(bits.tolist(), labels.tolist(), strict=True):
        assert answer == [sum(word[: t + 1]) % 2 for t in range(len(word))]


@pytest.mark.parametrize(("protocol", "steps"), [("generators", (1, 17)), ("all", tuple(range(60)))])
def test_cyclic_counting(protocol: str, steps: tuple[int, ...]) -> None:
    _, symbols, labels = drawn("cyclic_counting", protocol)
    for word, answer in zip(symbols.tolist(), labels.tolist(), strict=True):
        assert answer == [sum(steps[s] for s in word[: t + 1]) % 60 for t in range(len(word))]


@pytest.mark.parametrize(
    ("name", "protocol", "degree", "order"),
    [
        ("words_s3", "all", 3, 6), ("words_a4", "all", 4, 12), ("words_a4", "generators", 4, 12),
        ("words_a5", "all", 5, 60), ("words_a5", "generators", 5, 60), ("words_s5", "swaps", 5, 120),
        ("words_s5", "generators", 5, 120), ("words_s5", "all", 5, 120),
    ],
)  # fmt: skip
def test_words_are_products_of_permutations(name: str, protocol: str, degree: int, order: int) -> None:
    task, words, labels = drawn(name, protocol)
    group = [p for p in permutations(range(degree)) if order == len(list(permutations(range(degree)))) or even(p)]
    assert len(group) == order == task.classes
    symbols = task.symbols[protocol] or group  # type: ignore[attr-defined]
    assert words.max() == len(symbols) - 1 == task.protocols[protocol].vocabulary - 1
    for word, answer in zip(words.tolist(), labels.tolist(), strict=True):
        # the permutation acts on points: each factor moves what the ones before it have moved
        places = list(range(degree))
        for symbol, label in zip(word, answer, strict=True):
            places = [symbols[symbol][place] for place in places]
            assert tuple(places) == group[label]


def even(p: tuple[int, ...]) -> bool:
    return round(np.linalg.det(np.eye(len(p))[list(p)])) == 1


@pytest.mark.parametrize("name", ["words_a4", "words_a5", "words_s5"])
def test_the_symbols_of_a_group_generate_it(name: str) -> None:
    task: Any = tasks.get(name)()
    for symbols in filter(None, task.symbols.values()):
        reached = {tuple(range(task.degree))}
        while True:
            more = reached | {tuple(s[i] for i in p) for p in reached for s in symbols}
            if more == reached:
                break
            reached = more
        assert len(reached) == task.classes


@pytest.mark.parametrize(("split", "ignore"), [("test", 0.8), ("sparse", 0.98), ("dense", 0.1)])
def test_flip_flop(split: str, ignore: float) -> None:
    prepared = prepared_sets.load_prepared("flip_flop")
    found = prepared.split(split)
    tokens = np.stack([found.document(n) for n in range(len(found))])
    labels = np.stack([found.label(n) for n in range(len(found))])
    assert tokens.shape == (1024, 128)
    for row, answer in zip(tokens[:50].tolist(), labels[:50].tolist(), strict=True):
        written = None
        for place in range(0, len(row), 2):
            instruction, bit = row[place : place + 2]
            assert bit in (0, 1)
            assert answer[place + 1] == UNSCORED
            if instruction == 2:
                written = bit
            assert answer[place] == (written if instruction == 3 else UNSCORED)
            assert instruction != 3 or bit == written
        assert (row[0], row[-2]) == (2, 3)
    # five standard errors
    inner = tokens[:, 2:-2:2]
    for instruction, share in ((2, (1 - ignore) / 2), (3, (1 - ignore) / 2), (4, ignore)):
        assert abs((inner == instruction).mean() - share) < 5 * (share / inner.size) ** 0.5


@pytest.mark.parametrize("protocol", ["4-pairs", "8-pairs", "4-pairs-noise"])
def test_mqar(protocol: str) -> None:
    task, tokens, labels = drawn("mqar", protocol)
    pairs, noise = task.protocols[protocol].law["pairs"], protocol.endswith("noise")
    for row, answer in zip(tokens.tolist(), labels.tolist(), strict=True):
        known = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(known) == len(set(known.values())) == pairs
        assert all(1 <= key < 128 <= value < 256 for key, value in known.items())
        asked = [place for place, label in enumerate(answer) if label != UNSCORED]
        assert sorted(row[place] for place in asked) == sorted(known)
        assert all(place >= 2 * pairs and place % 2 == 0 and answer[place] == known[row[place]] for place in asked)
        assert noise or all(row[place] == 0 for place in range(2 * pairs, 64) if place not in asked)


def test_gaps_of_mqar_follow_the_power_law() -> None:
    """The first key drawn, that of the first pair, has the distance k with a probability proportional to its weight."""
    _, tokens, _ = drawn("mqar", "4-pairs", 20_000)
    place = (tokens[:, 8:] == tokens[:, :1]).argmax(axis=1) // 2
    weight = np.arange(1, 29) ** (0.01 - 1)
    expected = weight / weight.sum()
    found = np.bincount(place, minlength=28) / len(place)
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / len(place))).all()


@pytest.mark.parametrize("protocol", ["selective", "regular"])
def test_selective_copy(protocol: str) -> None:
    _, tokens, labels = drawn("selective_copy", protocol)
    for row, answer in zip(tokens.tolist(), labels.tolist(), strict=True):
        data = [token for token in row[:48] if token]
        assert len(data) == 8
        assert set(data) <= set(range(1, 9))
        assert row[48:] == [9] * 8
        assert answer == [UNSCORED] * 48 + [symbol - 1 for symbol in data]
        assert protocol == "selective" or row[:8] == data


@pytest.mark.parametrize(("protocol", "delay"), [("t200", 200), ("t1000", 1000)])
def test_copying_memory(protocol: str, delay: int) -> None:
    _, tokens, labels = drawn("copying_memory", protocol, 5)
    for row, answer in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert set(row[:10]) <= set(range(1, 9))
        assert row[10:] == [0] * (delay - 1) + [9] * 11
        assert answer == [UNSCORED] * (delay + 10) + [symbol - 1 for symbol in row[:10]]


def test_induction() -> None:
    _, tokens, labels = drawn("induction", "64")
    for row, answer in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert [place for place, token in enumerate(row) if token == 16] == [row.index(16), 63]
        assert row.index(16) < 62
        assert answer == [UNSCORED] * 63 + [row[row.index(16) + 1]]


def test_string_copy() -> None:
    _, tokens, labels = drawn("string_copy", "32")
    letters = tokens.shape[1] // 2
    assert 8 <= letters <= 32
    for row, answer in zip(tokens.tolist(), labels.tolist(), strict=True):
        assert row == [*row[:letters], 26, *row[: letters - 1]]
        assert answer == [UNSCORED] * letters + row[:letters]


def test_modular_arithmetic() -> None:
    _, tokens, labels = drawn("modular_arithmetic", "dense")
    assert labels.shape[1] > 4
    for row, answer in zip(tokens.tolist(), labels.tolist(), strict=True):
        for end in range(0, len(row), 2):
            assert answer[end] == eval("".join("01234+-*"[token] for token in row[: end + 1])) % 5
        assert answer[1::2] == [UNSCORED] * (len(row) // 2)


def test_adding() -> None:
    _, values, labels = drawn("adding", "100")
    assert values.shape == (50, 100, 2)
    assert ((values[..., 0] >= 0) & (values[..., 0] <= 1)).all()
    for numbers, total in zip(values, labels, strict=True):
        marked = [number for number, mark in numbers if mark == 1]
        assert len(marked) == 2
        assert (numbers[:, 1] != 0).sum() == 2
        assert total == pytest.approx(sum(marked))


def test_test_splits_are_the_longest_and_the_further_ones_what_their_name_says() -> None:
    prepared = prepared_sets.load_prepared("parity")
    lengths = {name: set(np.diff(prepared.split(name).offsets).tolist()) for name in prepared.protocol.splits}
    assert lengths["test"] == {40}
    assert [lengths[f"length-{n}"] for n in (64, 128, 256)] == [{64}, {128}, {256}]
    assert lengths["train"] != {40}
    assert max(lengths["validation"]) <= 40


@pytest.mark.parametrize("name", NAMES)
def test_the_prepared_splits_are_frozen(name: str) -> None:
    """Another version of NumPy, or a changed law, gives other examples: a reason to raise the task's `version`."""
    found = [prepared_sets.load_prepared(name, protocol).checksum[:8] for protocol in tasks.get(name).cls.protocols]
    assert " ".join(found) == CHECKSUMS[name]
