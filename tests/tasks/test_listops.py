"""ListOps: the law, the evaluator, the released files and the floors."""

from __future__ import annotations

import dataclasses
import gzip
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from raw_data import raw_data

from lra.data import prepared_sets
from lra.task import DataError, Protocol, Split
from lra.tasks import _listops as law
from lra.tasks._listops import SYMBOLS, Law, evaluate, evaluate_many, expressions
from lra.tasks.lra.listops import IDS, ListOps

STRICT = ListOps.protocols["strict"]


def tokens(text: str) -> np.ndarray:
    return np.array([IDS[symbol] for symbol in text.split()], np.uint8)


def chunk(rules: Law, start: int, stop: int) -> list[np.ndarray]:
    """Examples start..stop of a law before repeats are redrawn."""
    bounds = (rules.depth, rules.arity, rules.longer_than, rules.shorter_than)
    values, lengths = law._generate_chunk(rules.seed, start, stop, *bounds)
    return np.split(values, lengths.cumsum()[:-1])


def meaning(expression: np.ndarray, deepest: int = 1000) -> int | None:
    """The value by recursion and Python's own median, leaving out what lies below `deepest`: a second evaluator."""
    operators: dict[str, Callable[[list[int]], float]] = {
        "[MIN": min, "[MAX": max, "[MED": statistics.median, "[SM": lambda x: sum(x) % 10
    }  # fmt: skip
    position = 0

    def node(depth: int) -> int | None:
        nonlocal position
        symbol = SYMBOLS[expression[position]]
        position += 1
        if symbol.isdigit():
            return int(symbol)
        found = []
        while SYMBOLS[expression[position]] != "]":
            found.append(node(depth + 1))
        position += 1
        known = [x for x in found if x is not None]
        return int(operators[symbol](known)) if known and depth <= deepest else None

    return node(1)


@pytest.fixture(scope="module")
def sample() -> list[np.ndarray]:
    return chunk(Law(), 0, 6000)


@pytest.fixture(scope="module")
def labels(sample: list[np.ndarray]) -> np.ndarray:
    return np.array([evaluate(x) for x in sample])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MIN 4 2 9 ]", 2),
        ("[MAX 4 2 9 ]", 9),
        ("[MED 4 2 9 ]", 4),
        ("[MED 4 5 ]", 4),
        ("[MED 1 2 8 9 ]", 5),
        ("[SM 7 8 9 ]", 4),
        ("[SM 1 [MAX 2 3 ] [MED 9 [MIN 0 1 ] 5 X X", 9),
        ("", -1),
        ("[MIN ]", -1),
        ("[MIN 1", -1),
        ("]", -1),
        ("1 2", -1),
        ("[MIN 1 ] ]", -1),
        ("[MAX 1 [MIN ] ]", -1),
    ],
)
def test_values_of_small_expressions(text: str, value: int) -> None:
    assert evaluate(tokens(text)) == value


def test_an_end_mark_is_allowed_at_the_end_only() -> None:
    assert evaluate(np.append(tokens("[MIN 4 2 ]"), np.uint8(law.EOS))) == 2
    assert evaluate(np.insert(tokens("[MIN 4 2 ]"), 2, law.EOS)) == -1


@pytest.mark.parametrize(
    # 4 alone; 4 + 6, [MIN without an argument; 4 + 6 + 7
    ("deepest", "value"),
    [(1, 4), (2, 0), (3, 7), (100, 7)],
)
def test_what_lies_below_a_depth_is_left_out(deepest: int, value: int) -> None:
    assert evaluate(tokens("[SM 4 [MAX 1 6 ] [MIN [SM 8 9 ] ] ]"), deepest) == value


def test_an_operator_left_without_arguments_is_left_out() -> None:
    assert evaluate(tokens("[MAX [MIN 3 4 ] [MIN 5 6 ] ]"), 1) == -1
    assert evaluate(tokens("[MAX 1 [MIN [MED 9 9 ] ] ]"), 2) == 1


def test_the_evaluator_agrees_with_a_recursive_one(sample: list[np.ndarray], labels: np.ndarray) -> None:
    assert labels[:150].tolist() == [meaning(x) for x in sample[:150]]
    for depth in (1, 2, 3, 9):
        assert [evaluate(x, depth) for x in sample[:50]] == [
            -1 if (value := meaning(x, depth)) is None else value for x in sample[:50]
        ]


def test_every_label_of_the_original_listops_is_reproduced() -> None:
    path = raw_data("listops/nyu_test_d20s.tsv.gz") / "listops" / "nyu_test_d20s.tsv.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    assert len(rows) == 10_000
    wrong = [r for r in rows if evaluate(tokens(r[1].replace("(", "").replace(")", ""))) != int(r[0])]
    assert wrong == []


def test_every_expression_is_within_the_law(sample: list[np.ndarray]) -> None:
    for x in sample[:2000]:
        assert 500 < len(x) < 2000
        opened = np.cumsum((x >= law.MIN) & (x <= law.SM)) - np.cumsum(x == law.CLOSE)
        # operators at depths 1 to 9, so digits at depth 10; every expression this long gets there
        assert opened.max() == 9
        assert opened[-1] == 0
        arity = arities(x)
        assert min(arity) >= 2
        assert max(arity) <= 10


def arities(expression: np.ndarray) -> list[int]:
    waiting: list[int] = []
    done = []
    for token in expression:
        if token == law.CLOSE:
            done.append(waiting.pop())
        elif waiting:
            waiting[-1] += 1
        if law.MIN <= token <= law.SM:
            waiting.append(0)
    return done


def within(observed: float, expected: float, error: float) -> bool:
    return abs(observed - expected) <= 4 * error


def test_labels_follow_the_published_law(labels: np.ndarray) -> None:
    # shares of 100,000 expressions drawn by the published generator
    law_of_labels = np.array([17.04, 9.05, 7.59, 8.51, 8.99, 8.44, 7.74, 7.29, 8.63, 16.73]) / 100
    shares = np.bincount(labels, minlength=10) / len(labels)
    for digit in range(10):
        p = law_of_labels[digit]
        assert within(shares[digit], p, (p * (1 - p) * (1 / len(labels) + 1 / 100_000)) ** 0.5), digit


def test_lengths_follow_the_published_law(sample: list[np.ndarray]) -> None:
    # median 954 and mean 1,036 of the same 100,000; the median's error by its density, about 1 / 1,300 there
    lengths = np.array([len(x) for x in sample])
    assert within(lengths.mean(), 1036, lengths.std() * (1 / len(lengths) + 1 / 100_000) ** 0.5)
    assert within(float(np.median(lengths)), 954, 650 * (1 / len(lengths) + 1 / 100_000) ** 0.5)


def test_choices_are_uniform_where_nothing_is_rejected() -> None:
    """Depth 2 without length bounds: a digit, or with probability 1/4 one operator of 2..10 digits."""
    drawn = chunk(Law(depth=2, longer_than=0, shorter_than=100), 0, 40_000)
    operators = [x for x in drawn if len(x) > 1]
    assert within(len(operators) / len(drawn), 0.25, (0.25 * 0.75 / len(drawn)) ** 0.5)
    for counts in (
        np.bincount([x[0] - law.MIN for x in operators], minlength=4),
        np.bincount([len(x) - 4 for x in operators], minlength=9),
        np.bincount(np.concatenate([x[1:-1] for x in operators]), minlength=10),
        np.bincount([x[0] for x in drawn if len(x) == 1], minlength=10),
    ):
        expected = counts.sum() / len(counts)
        # chi-square with k - 1 degrees of freedom: mean k - 1, variance 2 (k - 1)
        k = len(counts)
        assert ((counts - expected) ** 2 / expected).sum() < (k - 1) + 4 * (2 * (k - 1)) ** 0.5


def test_any_number_of_workers_draws_the_same(sample: list[np.ndarray]) -> None:
    one, two, more = (list(expressions(Law(), 2500, workers)) for workers in (1, 2, 5))
    for drawn in (one, two, more):
        assert all(np.array_equal(a, b) for a, b in zip(drawn, sample, strict=False))
    assert len(one) == len(two) == len(more) == 2500


def test_another_seed_draws_others(sample: list[np.ndarray]) -> None:
    assert not any(np.array_equal(a, b) for a, b in zip(chunk(Law(seed=1), 0, 20), sample, strict=False))


def test_repeats_are_redrawn_the_same_for_any_workers() -> None:
    # 10 digits and 4 operators over 100 pairs of digits: 410 expressions in all
    few = Law(depth=2, arity=2, longer_than=0, shorter_than=10)
    drawn = [x.tobytes() for x in expressions(few, 300, 1)]
    assert len(set(drawn)) == 300
    assert drawn == [x.tobytes() for x in expressions(few, 300, 2)]
    repeated = {x.tobytes() for x in chunk(few, 0, 300)}
    assert len(repeated) < 300
    assert drawn[:3] == [x.tobytes() for x in chunk(few, 0, 3)]
    with pytest.raises(DataError, match="too few different expressions"):
        list(expressions(few, 411, 1))


@pytest.mark.parametrize(("split", "start"), [("validation", 96_000), ("test", 98_000)])
def test_the_frozen_checksums_are_those_of_the_generator(split: str, start: int) -> None:
    drawn = chunk(Law(), start, start + 2000)
    offsets = np.cumsum([0, *map(len, drawn)])
    values = np.concatenate(drawn)
    found = Split(
        values, offsets, np.arange(2000, dtype=np.int32)[:, None], evaluate_many(values, offsets).astype(np.uint8)
    )
    assert prepared_sets.split_checksum(found) == STRICT.sha256[split]


def small(name: str = "strict", **counts: int) -> Protocol:
    return dataclasses.replace(ListOps.protocols[name], counts=counts, sha256={})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRA_DATA", raising=False)
    return tmp_path


def test_a_prepared_set_is_the_law_in_order_and_floors_are_right(
    cache: Path, sample: list[np.ndarray], labels: np.ndarray
) -> None:
    progress: list[tuple[int, int]] = []
    prepared = prepared_sets.load_prepared(
        ListOps(),
        small(train=3000, validation=1000, test=2000),
        progress=lambda what, done, total: progress.append((done, total)) if "expressions" in what else None,
    )
    assert progress == [(1000 * i, 6000) for i in range(1, 7)]
    train, test = prepared.split("train"), prepared.split("test")
    assert np.array_equal(train.document(7), sample[7])
    assert np.array_equal(test.document(7), sample[4007])
    assert np.array_equal(test.labels, labels[4000:])
    floors = prepared.task.floors(train, test)
    error = 0.5 / 2000**0.5
    # published simulation: root operator .353 and .3705, depths .491, .676, .794, .865
    assert 0.353 - 4 * error < floors["root operator"] < 0.3705 + 4 * error
    for depth, published in ((1, 0.491), (2, 0.676), (3, 0.794), (4, 0.865)):
        assert within(floors[f"depth {depth}"], published, error * 2**0.5), depth
    majority = np.bincount(labels[:3000]).argmax()
    assert floors["majority class"] == (labels[4000:] == majority).mean()
    assert 0.1 < floors["bag of tokens"] < 0.3


def test_an_example_is_described_by_its_expression(cache: Path) -> None:
    train = prepared_sets.load_prepared(ListOps(), small(train=2, validation=1, test=1)).split("train")
    text, _, value = ListOps().describe(train, 1).rpartition(" = ")
    assert np.array_equal(tokens(text), train.document(1))
    assert int(value) == train.labels[1] == evaluate(tokens(text))


ROWS = {"train": ["[SM 3 4 [MIN 9 8 ] ]", "[MED 1 2 ]"], "val": ["[MAX 0 5 ]"], "test": ["[MIN 7 6 5 ]"]}


def binary(text: str) -> str:
    """The release's form: each symbol is folded in with a pair of parentheses of its own."""
    parts: list[list[str]] = []
    for symbol in text.split():
        if symbol[0] == "[":
            parts.append([symbol])
            continue
        done = symbol
        if symbol == "]":
            head, *arguments = parts.pop()
            folded = head
            for argument in [*arguments, "]"]:
                folded = f"( {folded} {argument} )"
            done = folded
            if not parts:
                return done
        parts[-1].append(done)
    raise AssertionError(text)


def release(folder: Path, form: Callable[[str], str], header: str = "Source\tTarget") -> Path:
    folder.mkdir(parents=True)
    for part, texts in ROWS.items():
        lines = [f"{form(text)}\t{evaluate(tokens(text))}" for text in texts]
        (folder / f"basic_{part}.tsv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def test_the_binary_form_is_the_published_one() -> None:
    assert binary("[SM 6 [MIN 5 4 ] ]") == "( ( ( [SM 6 ) ( ( ( [MIN 5 ) 4 ) ] ) ) ] )"


@pytest.mark.parametrize("place", [".", "listops", "listops-1000"])
@pytest.mark.parametrize("form", [str, binary, lambda text: text.replace("]", "X")], ids=["plain", "binary", "X"])
def test_released_files_are_read_in_every_form(cache: Path, place: str, form: Callable[[str], str]) -> None:
    release(cache / "raw" / place, form)
    protocol = small("lra2020", train=2, validation=1, test=1)
    prepared = prepared_sets.load_prepared(ListOps(), protocol, source=cache / "raw")
    train = prepared.split("train")
    assert [train.document(i).tolist() for i in range(2)] == [tokens(text).tolist() for text in ROWS["train"]]
    assert train.labels.tolist() == [5, 1]
    assert prepared.split("validation").document(0).tolist() == tokens(ROWS["val"][0]).tolist()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("", lambda content: b"\xef\xbb\xbf" + content), ("", lambda content: content.replace(b"\n", b"\r\n")),
        (".gz", gzip.compress), ("", gzip.compress),
        (".gz", lambda content: gzip.compress(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))),
    ],
    ids=["byte-order mark", "CRLF", "gzip", "gzip without the ending", "all three"],
)  # fmt: skip
def test_files_as_other_programs_save_them_give_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: Callable[[bytes], bytes]
) -> None:
    source, protocol = release(cache / "raw", str), small("lra2020", train=2, validation=1, test=1)
    expected = prepared_sets.load_prepared(ListOps(), protocol, source=source).checksum
    for path in list(source.iterdir()):
        content = form(path.read_bytes())
        path.unlink()
        path.with_name(path.name + name).write_bytes(content)
    monkeypatch.setenv("LRA_CACHE", str(cache / "other"))
    assert prepared_sets.load_prepared(ListOps(), protocol, source=source).checksum == expected


def test_a_changed_released_file_is_read_again(cache: Path) -> None:
    source, protocol = release(cache / "raw", str), small("lra2020", train=2, validation=1, test=1)
    prepared_sets.load_prepared(ListOps(), protocol, source=source)
    (source / "not of the release.txt").write_text("")
    assert prepared_sets.load_prepared(ListOps(), protocol).replaced == ""
    path = source / "basic_test.tsv"
    path.write_text(path.read_text().replace("[MIN 7 6 5 ]\t5", "[MIN 7 6 4 ]\t4"))
    prepared = prepared_sets.load_prepared(ListOps(), protocol)
    assert prepared.replaced == f"the raw files in {source} changed"
    assert prepared.split("test").labels.tolist() == [4]


def test_s4_ends_each_expression_with_a_mark(cache: Path) -> None:
    source = release(cache / "raw", binary)
    prepared = prepared_sets.load_prepared(ListOps(), small("s4", train=2, validation=1, test=1), source=source)
    assert prepared.split("test").document(0).tolist() == [*tokens(ROWS["test"][0]).tolist(), law.EOS]
    assert ListOps().describe(prepared.split("test"), 0) == "[MIN 7 6 5 ] = 5"
    assert prepared.protocol.vocabulary == 18


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Source\tTarget", "Quelle\tZiel", r"basic_train.tsv line 1: the header is not Source, Target"),
        ("[MED 1 2 ]\t1\n", "[MED 1", r"basic_train.tsv line 3: 1 columns instead of an expression and a digit"),
        ("[MED 1 2 ]", "[MID 1 2 ]", r"basic_train.tsv line 3: unknown symbol '\[MID'"),
        (
            "[MED 1 2 ]\t1",
            "[MED 1 2 ]\t2",
            r"basic_train.tsv line 3: the label is 2, but the value of the expression is 1",
        ),
        ("[MED 1 2 ]", "[MED 1 2", r"basic_train.tsv line 3: the label is 1, but the expression is malformed"),
    ],
)
def test_damaged_files_are_refused_with_their_line(cache: Path, old: str, new: str, message: str) -> None:
    path = release(cache / "raw", str) / "basic_train.tsv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        prepared_sets.load_prepared(ListOps(), small("lra2020", train=2, validation=1, test=1), source=cache / "raw")


def test_missing_files_and_short_files_are_refused(cache: Path) -> None:
    with pytest.raises(
        DataError, match=r"basic_train.tsv, .* are needed; .* `lra data prepare listops --protocol lra2020 --from DIR`"
    ):
        prepared_sets.load_prepared("listops", "lra2020")
    release(cache / "raw", str)
    with pytest.raises(DataError, match=r"train has 2 examples, not 96,000"):
        prepared_sets.load_prepared("listops", "lra2020", source=cache / "raw")
    (cache / "raw" / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"no basic_val.tsv in .*raw"):
        prepared_sets.load_prepared("listops", "s4", source=cache / "raw")


def test_ids_are_a_constant() -> None:
    assert tokens("0 9 [MIN [MAX [MED [SM ] X").tolist() == [0, 9, 10, 11, 12, 13, 14, 14]
    assert len(SYMBOLS) == STRICT.vocabulary == 15
