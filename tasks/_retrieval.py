"""Shared by the retrieval tasks: pairs of documents, each document stored once, and floors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, diags

from lra.task import SPLITS, DataError, Progress, Protocol, Split, Task
from lra.tasks._archive import find_file, lines
from lra.tasks._floors import MAX_FITTED, bag_of_tokens
from lra.tasks._overlap import sampled_windows
from lra.tasks.storage import SHARED, open_split, write_documents, write_examples, write_notes

EOS = 2
PRINTABLE = "".join(map(chr, range(32, 127)))
PARTS = {"train": "train", "validation": "eval", "test": "test"}
BUCKETS = 1 << 20
"""Buckets of hashed n-grams."""
WINDOW = 8
"""Tokens of an n-gram."""

Row = tuple[int, Hashable, Hashable]
"""A label and the keys of the two documents."""


class Pairs(Task):
    """Base class of the retrieval tasks: are two documents related?"""

    classes = 2
    towers = 2

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def encode(self, text: str, protocol: Protocol) -> np.ndarray:
        return (as_characters if protocol.name == "s4" else as_bytes)(text.encode(), protocol.length)

    def floors(self, train: Split, test: Split) -> dict[str, float]:
        """Majority class, bag of tokens and n-gram cosine.

        "n-gram cosine" is a threshold, fitted to at most MAX_FITTED training examples, on the cosine of TF-IDF vectors.
        """
        floors = super().floors(train, test) | {"bag of tokens": bag_of_tokens(train, test, self.classes)}
        rows = np.linspace(0, len(train) - 1, min(MAX_FITTED, len(train))).astype(np.int64)
        vectors = _vectors(train)
        cosine, labels = _cosine(vectors, np.asarray(train.index)[rows]), np.asarray(train.labels)[rows]
        order = np.argsort(cosine, kind="stable")
        correct = np.cumsum(labels[order] == 0) + (labels == 1).sum() - np.cumsum(labels[order] == 1)
        threshold = cosine[order][correct.argmax()]
        guess = _cosine(vectors, np.asarray(test.index)) > threshold
        return floors | {"n-gram cosine": float((guess == np.asarray(test.labels)).mean())}

    def describe(self, split: Split, example: int) -> str:
        documents = [np.asarray(split.document(number)) for number in split.index[example]]
        label = ("unrelated", "related")[split.labels[example]]
        return f"{label}: " + " | ".join(f"{len(d):,} tokens, {_readable(d)[:200]!r}" for d in documents)


def write_pairs(
    folder: Path, rows: Mapping[str, Iterable[Row]], document: Callable[[Hashable], np.ndarray], progress: Progress
) -> None:
    """Write the three splits. Documents are numbered by first occurrence in train, validation, test.

    rows: split -> rows; document: key -> tokens, called once per document after all rows have been read.
    """
    numbers: dict[Hashable, int] = {}
    used: dict[str, set[int]] = {}
    pairs: dict[str, set[tuple[int, int]]] = {}
    for split in SPLITS:
        labels, index = [], []
        for label, first, second in rows[split]:
            labels.append(label)
            index.append([numbers.setdefault(key, len(numbers)) for key in (first, second)])
        if not labels:
            raise DataError(f"{split} holds no pairs; is the file complete?")
        write_examples(folder, split, np.array(labels), np.array(index))
        used[split] = {n for pair in index for n in pair}
        pairs[split] = {(min(pair), max(pair)) for pair in index}
    progress("writing documents", 0, len(numbers))
    write_documents(folder, SHARED, map(document, numbers))
    progress("writing documents", len(numbers), len(numbers))
    notes = {
        "documents": len(numbers),
        "test documents that train shows too": len(used["test"] & used["train"]),
        "test documents": len(used["test"]),
        "test pairs that train or validation shows too": len(pairs["test"] & (pairs["train"] | pairs["validation"])),
    }
    write_notes(folder, notes)


def write_collection(
    folder: Path, name: str, length: int, source: Path | None, command: str, progress: Progress
) -> None:
    """Prepare `<name>.docs.parquet` (id, text) and `<name>.{train,eval,test}.pairs.tsv.gz` (label, id, id)."""
    import pyarrow.parquet as pq

    names = [f"{name}.docs.parquet", *(f"{name}.{part}.pairs.tsv" for part in PARTS.values())]
    paths = [] if source is None else [find_file(source, (".", "retrieval"), name) for name in names]
    found = [path for path in paths if path is not None]
    if len(found) < len(names):
        problem = "no source folder is given" if source is None else f"{source} lacks some of the files"
        files = ", ".join([names[0], *(f"{name}.gz" for name in names[1:])])
        raise DataError(f"{problem}: with {files} in a folder DIR, run `{command} --from DIR`")
    documents, *pairs = found
    progress(f"reading {documents.parent}", 0, 0)
    try:
        table = pq.read_table(documents, columns=["id", "text"])
    except (ValueError, OSError) as error:
        raise DataError(f"{documents} cannot be read ({str(error).splitlines()[0]}); copy it again") from None
    texts: dict[Hashable, str] = dict(
        zip(table.column("id").to_pylist(), table.column("text").to_pylist(), strict=True)
    )
    rows = {split: _identifiers(path, texts) for split, path in zip(PARTS, pairs, strict=True)}
    write_pairs(folder, rows, lambda key: as_bytes(texts[key].encode(), length), progress)


def _identifiers(path: Path, known: Mapping[Hashable, str]) -> Iterator[Row]:
    """The rows of a file of pairs. known: the documents by id. Raises DataError naming the line."""
    for number, line in enumerate(lines(path), start=1):
        columns = line.decode(errors="replace").rstrip("\r\n").split("\t")
        if len(columns) != 3 or columns[0] not in ("0", "1"):
            raise DataError(f"{path} line {number}: not a label 0 or 1 and two ids, separated by tabs")
        for key in columns[1:]:
            if key not in known:
                raise DataError(f"{path} line {number}: there is no document {key!r}")
        yield int(columns[0]), columns[1], columns[2]


def as_bytes(text: bytes, length: int) -> np.ndarray:
    """The first `length` bytes as tokens."""
    # a sequence needs at least one real token
    return np.frombuffer(text[:length] or b" ", np.uint8)


def as_characters(text: bytes, length: int) -> np.ndarray:
    """Encode as characters: padding 0, unknown 1, end mark 2, then printable ASCII. `length` includes the end mark."""
    codes = np.frombuffer(text[: length - 1], np.uint8)
    printable = (codes >= 32) & (codes < 127)
    return np.append(np.where(printable, codes - 32 + EOS + 1, 1).astype(np.uint8), np.uint8(EOS))


def _readable(document: np.ndarray) -> str:
    """Decode the tokens of a document to text."""
    if document[-1] == EOS:
        return "".join(PRINTABLE[token - EOS - 1] if token > EOS else "\ufffd" for token in document[:-1])
    return bytes(document).decode(errors="replace")


def _vectors(split: Split) -> csr_matrix:
    """TF-IDF vectors of hashed n-grams, normalised to length 1: one row per document."""
    hashes, owners = sampled_windows(np.asarray(split.values), np.asarray(split.offsets), WINDOW)
    documents = len(split.offsets) - 1
    buckets = (hashes % np.uint64(BUCKETS)).astype(np.int64)
    counts = csr_matrix((np.ones(len(buckets)), (owners, buckets)), shape=(documents, BUCKETS))
    idf = np.log(documents / np.maximum(np.bincount(counts.indices, minlength=BUCKETS), 1))
    counts.data = (1 + np.log(counts.data)) * idf[counts.indices]
    norm = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    return csr_matrix(diags(1 / np.maximum(norm, 1e-12)) @ counts)


def _cosine(vectors: csr_matrix, index: np.ndarray) -> np.ndarray:
    """Cosine similarity of the two documents of each example: (n,)."""
    parts = [index[start : start + 2000] for start in range(0, len(index), 2000)]
    products = [vectors[pairs[:, 0]].multiply(vectors[pairs[:, 1]]).sum(axis=1) for pairs in parts]
    return np.concatenate([np.asarray(product).ravel() for product in products])
