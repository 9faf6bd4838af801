"""ListOps: the value of a nested expression of list operators, arXiv:1804.06028 at the lengths of arXiv:2011.04006.

`strict` is generated from a seed with the published distribution (tasks/_listops.py). `lra2020` and `s4` read the
released files `basic_{train,val,test}.tsv`, which were drawn from the same distribution without a seed. Token ids are
the same in all three: 0 to 9 for digits, then [MIN, [MAX, [MED, [SM and the closing bracket. `s4` ends each expression
with id 15.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from lra.task import SPLITS, DataError, Progress, Protocol, Split, Task
from lra.tasks._archive import find_file, lines
from lra.tasks._floors import bag_of_tokens
from lra.tasks._listops import CLOSE, EOS, SYMBOLS, Law, evaluate, evaluate_many, expressions
from lra.tasks.storage import DocumentWriter, open_split, write_examples

IDS = {symbol: number for number, symbol in enumerate(SYMBOLS)} | {"X": CLOSE}
FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}
PLACES = (".", "listops", "listops-1000", "lra_release/listops-1000")
COUNTS = {"train": 96_000, "validation": 2_000, "test": 2_000}
RAW = "basic_train.tsv, basic_val.tsv and basic_test.tsv of the LRA release (folder listops-1000)"


def released(source: Path | None, split: str, command: str) -> Iterator[np.ndarray]:
    """Read the expressions of a released file and compare each with its label.

    Accepts "]" and "X" as closing brackets, with and without binary parentheses, and gzipped files. Raises DataError
    naming file and line.
    """
    name = FILES[split]
    if source is None:
        raise DataError(f"{RAW} are needed; with these in a folder DIR, run `{command} --from DIR`")
    path = find_file(source, PLACES, name)
    if path is None:
        raise DataError(f"no {name} in {source} or in listops-1000/ below it; {RAW} are needed")
    rows = (line.decode(errors="replace") for line in lines(path))
    if next(rows, "").split() != ["Source", "Target"]:
        raise DataError(f"{path} line 1: the header is not Source, Target; is this the released file?")
    for number, line in enumerate(rows, start=2):
        yield _parse_line(line, f"{path} line {number}")


def _parse_line(line: str, where: str) -> np.ndarray:
    """Token ids of a line of a released file. where: file and line, for messages."""
    columns = line.rstrip("\r\n").split("\t")
    if len(columns) != 2 or not columns[1].isdecimal():
        raise DataError(f"{where}: {len(columns)} columns instead of an expression and a digit; is the file complete?")
    tokens = _tokens(columns[0], where)
    value = evaluate(tokens)
    if value != int(columns[1]):
        problem = "the expression is malformed" if value < 0 else f"the value of the expression is {value}"
        raise DataError(f"{where}: the label is {columns[1]}, but {problem}; the file is damaged")
    return tokens


def _tokens(expression: str, where: str) -> np.ndarray:
    """Token ids of an expression. Raises DataError for an unknown symbol."""
    symbols = expression.replace("(", " ").replace(")", " ").split()
    try:
        return np.array([IDS[symbol] for symbol in symbols], np.uint8)
    except KeyError as error:
        raise DataError(f"{where}: unknown symbol {error}; known: {' '.join(IDS)}") from None


class ListOps(Task):
    name = "listops"
    title = "ListOps"
    classes = 10
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "strict": Protocol(
            "strict",
            length=2000,
            vocabulary=15,
            counts=COUNTS,
            sha256={
                "train": "7d39e47dcb855c5739fb97ec8040b39d823e7ef4bcbaed60722edafe81c61457",
                "validation": "651e20ded2f039c9efa45e60c3c5658ab1c608d7cc64e40e022a3cb180a78cea",
                "test": "03128e11527706e31f1fea9f522a23248f864cf173bc38411d488fca7e709780",
            },
            note="generated from a seed with the published distribution; 15 symbols, no end mark, no padding id",
        ),
        "lra2020": Protocol(
            "lra2020",
            length=2000,
            vocabulary=17,
            counts=COUNTS,
            note="released files; brackets kept; ids 15 and 16 (padding, unknown) never occur",
            raw=RAW,
        ),
        "s4": Protocol(
            "s4",
            length=2048,
            vocabulary=18,
            counts=COUNTS,
            note="released files; an end mark after each expression; ids 16 and 17 (padding, unknown) never occur",
            raw=RAW,
        ),
    }

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        total = sum(protocol.counts[split] for split in SPLITS)
        generated = iter(expressions(Law(), total, workers))
        done = 0
        for split in SPLITS:
            rows = (
                released(source, split, self.command(protocol))
                if protocol.raw
                else islice(generated, protocol.counts[split])
            )
            labels = []
            with DocumentWriter(folder, split) as writer:
                for expression in rows:
                    labels.append(evaluate(expression))
                    writer.append(np.append(expression, np.uint8(EOS)) if protocol.name == "s4" else expression)
                    done += 1
                    if done % 1000 == 0:
                        progress("reading expressions" if protocol.raw else "generating expressions", done, total)
            write_examples(folder, split, np.array(labels))

    def raw_files(self, protocol: Protocol, source: Path) -> Iterable[Path]:
        return [path for name in FILES.values() if (path := find_file(source, PLACES, name))]

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        tokens = _tokens(text, repr(text[:60]))
        return np.append(tokens, np.uint8(EOS)) if protocol.name == "s4" else tokens

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def floors(self, train: Split, test: Split) -> dict[str, float]:
        """Majority class, bag of tokens, root operator and depths 1 to 4.

        "root operator" predicts the most frequent training label of the operator at the root. "depth d" evaluates the
        expression without operators below depth d (see `evaluate`), and predicts the majority class if nothing is left.
        """
        floors = super().floors(train, test) | {"bag of tokens": bag_of_tokens(train, test, self.classes)}
        common = np.zeros((16, 10), np.int64)
        np.add.at(common, (train.values[train.offsets[:-1]], train.labels), 1)
        guess = common.argmax(axis=1)[test.values[test.offsets[:-1]]]
        floors["root operator"] = float((guess == test.labels).mean())
        majority = np.bincount(train.labels).argmax()
        for depth in range(1, 5):
            value = evaluate_many(test.values, test.offsets, depth)
            floors[f"depth {depth}"] = float((np.where(value < 0, majority, value) == test.labels).mean())
        return floors

    def describe(self, split: Split, example: int) -> str:
        symbols = (SYMBOLS[token] for token in split.document(split.index[example, 0]) if token != EOS)
        return f"{' '.join(symbols)} = {split.labels[example]}"
