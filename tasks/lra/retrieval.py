"""Retrieval: does one paper of the ACL Anthology Network cite the other? Two towers (task: arXiv:2011.04006).

The pairs are those of the LRA release, `new_aan_pairs.{train,eval,test}.tsv`: label, two ids and two texts per line,
without header or quoting. A text is written as a Python bytes literal (`b'...'`). The files are read from a folder or
from the archive `lra_release.gz`, in a folder or downloaded (7.7 GB); the archive is read member by member, without
unpacking.

    strict     the bytes of the text, 4,000 per document
    lra2020    the bytes of the literal with quotes and escapes, as in the published code, 4,000 per document
    s4         the characters of the literal (95 printable characters, padding, unknown, end mark: 98 ids), 4,000 per
               document with the end mark
"""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from lra.task import DataError, Progress, Protocol
from lra.tasks._archive import NAMES, download, find_file, lines, members
from lra.tasks._retrieval import PARTS, Pairs, Row, as_bytes, as_characters, write_pairs

FILES = {f"new_aan_pairs.{part}.tsv": split for split, part in PARTS.items()}
PLACES = (".", "retrieval", "aan", "tsv_data", "lra_release/tsv_data", "lra_release/lra_release/tsv_data")
COUNTS = {"train": 147_086, "validation": 18_090, "test": 17_437}
RAW = f"{', '.join(FILES)} of the LRA release, or its archive {NAMES[0]} (7.7 GB)"


class Retrieval(Pairs):
    name = "retrieval"
    title = "Retrieval"
    resumable = True
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "strict": Protocol(
            "strict", length=4000, vocabulary=256, counts=COUNTS, note="bytes, 4,000 per document", raw=RAW
        ),
        "lra2020": Protocol(
            "lra2020",
            length=4000,
            vocabulary=257,
            counts=COUNTS,
            note="bytes of the Python literal as in the file (id 256, padding, never occurs), 4,000 per document; "
            "every test pair is scored, where the published code dropped the last incomplete batch",
            raw=RAW,
        ),
        "s4": Protocol(
            "s4",
            length=4000,
            vocabulary=98,
            counts=COUNTS,
            note="characters of the Python literal as in the file and an end mark, 4,000 per document",
            raw=RAW,
        ),
    }

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        documents: dict[Hashable, np.ndarray] = {}
        archive = None
        if source is None:
            archive = folder / NAMES[0]
            download(
                archive,
                f"with {', '.join(FILES)} or {NAMES[0]} in a folder DIR, run `{self.command(protocol)} --from DIR`",
                progress,
            )
        rows: dict[str, list[Row]] = {}
        for split, where, content in _files(source, archive):
            progress(f"reading {split} pairs", len(rows), len(FILES))
            rows[split] = list(_rows(content, where, protocol, documents))
        write_pairs(folder, rows, documents.__getitem__, progress)
        if archive is not None:
            archive.unlink()

    def raw_files(self, protocol: Protocol, source: Path) -> Iterable[Path]:
        return _released(source)


def _released(source: Path) -> list[Path]:
    """The three files in a user's folder, in the order of FILES, or else the archive; [] if neither is there."""
    for place in PLACES:
        paths = [path for name in FILES if (path := find_file(source, [place], name))]
        if len(paths) == len(FILES):
            return paths
    return [source / name for name in NAMES if (source / name).is_file()][:1]


def _files(source: Path | None, archive: Path | None) -> Iterator[tuple[str, str, Iterable[bytes]]]:
    """Yield the split, a name for messages and the lines of each of the three files."""
    if source is not None:
        paths = _released(source)
        if len(paths) > 1:
            for path, split in zip(paths, FILES.values(), strict=True):
                yield split, str(path), lines(path)
            return
        archive = next(iter(paths), None)
    if archive is None:
        raise DataError(
            f"{source} holds neither {', '.join(FILES)} nor {NAMES[0]}; put them there, "
            "or leave out --from and unset LRA_DATA to download the archive (7.7 GB)"
        )
    for split, contents in members(archive, FILES):
        yield split, f"{archive}, {split} pairs", contents


def _rows(
    lines: Iterable[bytes], where: str, protocol: Protocol, documents: dict[Hashable, np.ndarray]
) -> Iterator[Row]:
    """Yield the label and the document keys of each line. Adds new documents, encoded, to `documents`."""
    for number, line in enumerate(lines, start=1):
        columns = line.rstrip(b"\r\n").split(b"\t")
        if len(columns) != 5:
            raise DataError(f"{where} line {number}: {len(columns)} columns instead of 5; is the file complete?")
        if columns[0] not in (b"0", b"1", b"0.0", b"1.0"):
            raise DataError(f"{where} line {number}: the label is {columns[0][:20]!r}, not 0 or 1")
        keys = []
        for text in columns[3:]:
            key = hashlib.blake2b(text, digest_size=16).digest()
            if key not in documents:
                documents[key] = _encode(text, protocol, f"{where} line {number}")
            keys.append(key)
        yield int(float(columns[0])), keys[0], keys[1]


def _encode(text: bytes, protocol: Protocol, where: str) -> np.ndarray:
    """Encode a text of a released file. where: file and line, for messages. Raises DataError for a damaged literal."""
    if protocol.name == "s4":
        return as_characters(text, protocol.length)
    if protocol.name == "strict" and text[:2] in (b"b'", b'b"'):
        try:
            with warnings.catch_warnings():
                # Python warns about unknown escapes and keeps them as they are
                warnings.simplefilter("ignore")
                literal = ast.literal_eval(text.decode("ascii"))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            literal = None
        if not isinstance(literal, bytes):
            raise DataError(f"{where}: a text is not a complete Python literal; is the file complete?")
        text = literal
    return as_bytes(text, protocol.length)
