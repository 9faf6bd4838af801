"""Retrieval: the released pairs from files, archive or download, the stand-ins, and floors that see shared words."""

from __future__ import annotations

import ast
import base64
import dataclasses
import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import raw_data

from lra.data import prepared_sets
from lra.task import DataError, Protocol
from lra.tasks import _archive
from lra.tasks.lra.retrieval import Retrieval
from lra.tasks.lra.retrieval_aan_mini import RetrievalAanMini
from lra.tasks.lra.retrieval_rfc import RetrievalRfc

COUNTS = {"train": 8, "validation": 4, "test": 6}
PARTS = {"train": "train", "validation": "eval", "test": "test"}
NAMES = {split: f"new_aan_pairs.{part}.tsv" for split, part in PARTS.items()}
TEXTS = [b'It\'s a \xc3\xa9tude\nof "parsing"', b"plain words", b"", b"tab\tand \\ slash", b"y" * 9000]


def pairs(split: str) -> list[tuple[int, int, int]]:
    random = np.random.default_rng(len(split))
    shown = random.integers(0, len(TEXTS), (COUNTS[split], 2)).tolist()
    return [(i % 2, one, two) for i, (one, two) in enumerate(shown)]


def lines(split: str) -> bytes:
    """The release's form: float label, ids, texts as Python literals of bytes; no header, no quoting."""
    rows = [f"{y}.0\tP{a}\tP{b}\t{TEXTS[a]!r}\t{TEXTS[b]!r}\n" for y, a, b in pairs(split)]
    return "".join(rows).encode()


def small(name: str = "strict", task: type[Retrieval] = Retrieval) -> Protocol:
    return dataclasses.replace(task.protocols[name], counts=COUNTS, sha256={})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRA_DATA", raising=False)
    return tmp_path


@pytest.fixture
def raw(place: Path) -> Path:
    folder = place / "raw"
    (folder / "tsv_data").mkdir(parents=True)
    for split, name in NAMES.items():
        (folder / "tsv_data" / name).write_bytes(lines(split))
    return folder


def archive(order: tuple[str, ...] = ("test", "train", "validation")) -> bytes:
    """A release archive: other members around the wanted ones, in an order of its own."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in [
            ("listops-1000/basic_val.tsv", b"x"),
            *((f"tsv_data/{NAMES[s]}", lines(s)) for s in order),
        ]:
            member = tarfile.TarInfo(f"lra_release/lra_release/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read(prepared: prepared_sets.Prepared, split: str) -> list[tuple[int, bytes, bytes]]:
    opened = prepared.split(split)
    documents = [[bytes(opened.document(d)) for d in pair] for pair in opened.index]
    return [(int(y), a, b) for y, (a, b) in zip(opened.labels, documents, strict=True)]


def test_strict_reads_the_bytes_themselves(raw: Path) -> None:
    prepared = prepared_sets.load_prepared(Retrieval(), small(), source=raw)
    whole = [text[:4000] or b" " for text in TEXTS]
    for split in COUNTS:
        assert read(prepared, split) == [(y, whole[a], whole[b]) for y, a, b in pairs(split)]
    # each text once, however many pairs show it
    assert len(prepared.split("train").offsets) - 1 == len(TEXTS) == prepared.notes["documents"]
    assert prepared.notes["test documents that train shows too"] > 0


def test_lra2020_and_s4_read_the_literal_as_the_file_has_it(raw: Path) -> None:
    literal = [repr(text).encode() for text in TEXTS]
    rows = pairs("test")
    found = read(prepared_sets.load_prepared(Retrieval(), small("lra2020"), source=raw), "test")
    assert found == [(y, literal[a][:4000], literal[b][:4000]) for y, a, b in rows]
    s4 = prepared_sets.load_prepared(Retrieval(), small("s4"), source=raw)
    for (_, one, two), (_, a, b) in zip(read(s4, "test"), rows, strict=True):
        for document, number in ((one, a), (two, b)):
            assert document[-1] == 2
            assert bytes(token - 3 + 32 for token in document[:-1]) == literal[number][:3999]
            assert max(document) < s4.protocol.vocabulary
    shown = Retrieval().describe(s4.split("test"), 0)
    assert all(repr(literal[number][:200].decode()) in shown for number in rows[0][1:])


def test_the_archive_gives_the_same_as_the_files(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = prepared_sets.load_prepared(Retrieval(), small(), source=raw).checksum
    monkeypatch.setenv("LRA_CACHE", str(raw / "other"))
    (raw / "packed").mkdir()
    (raw / "packed" / "lra_release.gz").write_bytes(archive())
    assert prepared_sets.load_prepared(Retrieval(), small(), source=raw / "packed").checksum == files


@pytest.mark.parametrize(
    ("ending", "form"),
    [
        ("", lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")), (".gz", gzip.compress),
    ],
    ids=["byte-order mark and CRLF", "gzip"],
)  # fmt: skip
def test_files_as_other_programs_save_them_give_the_same(
    raw: Path, monkeypatch: pytest.MonkeyPatch, ending: str, form: Callable[[bytes], bytes]
) -> None:
    expected = prepared_sets.load_prepared(Retrieval(), small(), source=raw).checksum
    for split, name in NAMES.items():
        (raw / "tsv_data" / name).unlink()
        (raw / "tsv_data" / f"{name}{ending}").write_bytes(form(lines(split)))
    monkeypatch.setenv("LRA_CACHE", str(raw / "other"))
    assert prepared_sets.load_prepared(Retrieval(), small(), source=raw).checksum == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(("train", "test")), r"lra_release.gz does not hold new_aan_pairs.eval.tsv; is it the LRA release"),
        (archive()[:-200], r"lra_release.gz is truncated or damaged"),
        (b"not an archive", r"lra_release.gz is truncated or damaged"),
    ],
    ids=["member missing", "truncated", "not an archive"],
)
def test_a_bad_archive_is_one_clear_line(place: Path, content: bytes, message: str) -> None:
    (place / "lra_release.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepared_sets.load_prepared(Retrieval(), small(), source=place)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1.0\tP0\tP1\tb'text'\n", r"train.tsv line 9: 4 columns instead of 5"),
        (b"2.0\tP0\tP1\tb'a'\tb'b'\n", r"train.tsv line 9: the label is b'2.0', not 0 or 1"),
        (b"1.0\tP0\tP1\tb'a'\tb'cut", r"train.tsv line 9: a text is not a complete Python literal"),
    ],
)
def test_a_bad_line_is_named(raw: Path, line: bytes, message: str) -> None:
    with (raw / "tsv_data" / NAMES["train"]).open("ab") as file:
        file.write(line)
    with pytest.raises(DataError, match=message):
        prepared_sets.load_prepared(Retrieval(), small(), source=raw)


def test_a_folder_without_the_release_is_one_clear_line(place: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds neither new_aan_pairs.train.tsv, .* nor lra_release.gz; put them there"
    ):
        prepared_sets.load_prepared("retrieval", source=place)


def test_the_sample_in_the_form_of_the_release_is_read(place: Path) -> None:
    sample = raw_data("retrieval/sample_lra_format.tsv.gz") / "retrieval" / "sample_lra_format.tsv.gz"
    rows = gzip.decompress(sample.read_bytes()).splitlines(keepends=True)
    for name in NAMES.values():
        (place / name).write_bytes(b"".join(rows))
    protocol = dataclasses.replace(small(), counts=dict.fromkeys(COUNTS, 50))
    prepared = prepared_sets.load_prepared(Retrieval(), protocol, source=place)
    columns = [row.split(b"\t") for row in rows]
    assert prepared.split("test").labels.tolist() == [int(float(c[0])) for c in columns]
    assert read(prepared, "test")[0][1] == ast.literal_eval(columns[0][3].decode())[:4000]
    assert prepared.notes["documents"] == len({text.strip() for c in columns for text in c[3:]})


class Server(BaseHTTPRequestHandler):
    """Serves `content`, with ranges as an object store does; `cut` breaks off every answer after so many bytes."""

    content: ClassVar[bytes] = b""
    cut: ClassVar[int | None] = None
    md5: ClassVar[str] = ""
    status: ClassVar[int] = 206
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        type(self).asked.append(self.headers["Range"])
        part = self.content[start:]
        status = 416 if start >= len(self.content) else self.status
        self.send_response(status)
        self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={self.md5}")
        self.send_header("Content-Length", str(len(part) if status == 206 else 0))
        self.end_headers()
        if status == 206:
            self.wfile.write(part[: self.cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    class Fresh(Server):
        content = archive()
        md5 = base64.b64encode(hashlib.md5(archive()).digest()).decode()
        asked: ClassVar[list[str]] = []

    running = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(_archive, "URL", f"http://127.0.0.1:{running.server_port}/lra_release.gz")
    yield Fresh
    running.shutdown()
    running.server_close()
    thread.join()


def partial(place: Path) -> list[Path]:
    return list((place / "cache" / "retrieval").glob(".strict.*.partial/lra_release.gz"))


def test_the_download_is_announced_used_and_removed(place: Path, raw: Path, server: type[Server]) -> None:
    said: list[str] = []
    prepared = prepared_sets.load_prepared(Retrieval(), small(), progress=lambda what, *_: said.append(what))
    assert "downloading lra_release.gz, 0.0 GB" in said[0]
    assert "checking the download" in said
    assert read(prepared, "test") == [
        (y, TEXTS[a][:4000] or b" ", TEXTS[b][:4000] or b" ") for y, a, b in pairs("test")
    ]
    assert [p.name for p in (place / "cache" / "retrieval").iterdir() if p.is_dir()] == ["strict"]
    assert not (prepared.folder / "lra_release.gz").exists()


def test_a_broken_download_is_kept_and_continued(place: Path, server: type[Server]) -> None:
    server.cut = 300
    with pytest.raises(DataError, match=r"broke off at 300 of .* bytes; run the same command to resume it"):
        prepared_sets.load_prepared(Retrieval(), small())
    assert partial(place)[0].stat().st_size == 300
    server.cut = None
    assert len(prepared_sets.load_prepared(Retrieval(), small()).split("train")) == 8
    assert server.asked == ["bytes=0-", "bytes=300-"]


def test_a_download_that_was_complete_is_not_fetched_again(place: Path, server: type[Server]) -> None:
    server.content = archive(("train", "test"))
    server.md5 = base64.b64encode(hashlib.md5(server.content).digest()).decode()
    for _ in range(2):
        with pytest.raises(DataError, match=r"does not hold new_aan_pairs.eval.tsv"):
            prepared_sets.load_prepared(Retrieval(), small())
    assert server.asked == ["bytes=0-", f"bytes={len(server.content)}-"]


def test_a_damaged_download_is_removed(place: Path, server: type[Server]) -> None:
    server.md5 = base64.b64encode(bytes(16)).decode()
    with pytest.raises(DataError, match=r"is damaged \(wrong MD5\) and was removed; run the same command again"):
        prepared_sets.load_prepared(Retrieval(), small())
    assert partial(place) == []


def test_a_refusing_or_absent_server_is_answered_with_the_command(
    place: Path, server: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 403
    command = r"new_aan_pairs.train.tsv, .* or lra_release.gz in a folder DIR, run `lra data prepare retrieval --from"
    with pytest.raises(DataError, match=r"the server refused .* \(403 Forbidden\); with " + command):
        prepared_sets.load_prepared(Retrieval(), small())
    monkeypatch.setattr(_archive, "URL", "http://127.0.0.1:9/lra_release.gz")
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*\); offline, with " + command):
        prepared_sets.load_prepared(Retrieval(), small())


def test_too_small_a_disk_is_noticed_before_the_first_byte(
    place: Path, server: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_archive, "SPARE", 1 << 60)
    with pytest.raises(DataError, match=r"GB free and the download needs .* GB; point LRA_CACHE at a larger disk"):
        prepared_sets.load_prepared(Retrieval(), small())
    assert partial(place) == []


def collection(folder: Path, name: str) -> Path:
    """60 documents in 6 topics; two of one topic are related."""
    random = np.random.default_rng(0)
    topics = [[f"word{t}{w}" for w in range(30)] for t in range(6)]
    texts = [" ".join(random.choice(topics[i % 6], 80)) for i in range(60)]
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": [f"d{i}" for i in range(60)], "text": texts})
    pq.write_table(table, folder / f"{name}.docs.parquet")
    for split, part in PARTS.items():
        rows = []
        for i in range({"train": 300, "validation": 40, "test": 100}[split]):
            a, b = random.integers(0, 60, 2)
            b = a // 6 * 6 % 54 + a % 6 if i % 2 else (b if b % 6 != a % 6 else (b + 1) % 60)
            rows.append(f"{int(a % 6 == b % 6)}\td{a}\td{b}\n")
        (folder / f"{name}.{part}.pairs.tsv.gz").write_bytes(gzip.compress("".join(rows).encode()))
    return folder


def mini(task: type[RetrievalAanMini] | type[RetrievalRfc]) -> Protocol:
    counts = {"train": 300, "validation": 40, "test": 100}
    return dataclasses.replace(task.protocols["strict"], counts=counts, sha256={})


@pytest.mark.parametrize(("task", "name"), [(RetrievalAanMini, "aan_mini"), (RetrievalRfc, "rfc")])
def test_a_stand_in_is_read_and_its_floors_see_shared_words(
    place: Path, task: type[RetrievalAanMini] | type[RetrievalRfc], name: str
) -> None:
    source = collection(place / "raw" / "retrieval", name).parent
    prepared = prepared_sets.load_prepared(task(), mini(task), source=source)
    assert prepared.folder.parent.name == f"retrieval_{name}"
    test = prepared.split("test")
    for row in range(10):
        a, b = ({w[:5] for w in bytes(test.document(d)).decode().split()} for d in test.index[row])
        assert (a == b) == bool(test.labels[row])
    floors = task().floors(prepared.split("train"), test)
    assert floors["n-gram cosine"] > 0.95
    assert floors["majority class"] < 0.7
    assert task().describe(test, 0).startswith("related" if test.labels[0] else "unrelated")


def test_a_bad_stand_in_is_one_clear_line(place: Path) -> None:
    folder = collection(place / "raw", "rfc")
    with pytest.raises(
        DataError,
        match=r"no source folder is given: with rfc.docs.parquet, .* run `lra data prepare retrieval_rfc --from",
    ):
        prepared_sets.load_prepared("retrieval_rfc")
    path = folder / "rfc.eval.pairs.tsv.gz"
    for content, message in (
        (gzip.compress(b"1\td0\n"), r"eval.pairs.tsv.gz line 1: not a label 0 or 1 and two ids"),
        (gzip.compress(b"1\td0\td1\n0\td0\tdx\n"), r"eval.pairs.tsv.gz line 2: there is no document 'dx'"),
        (path.read_bytes()[:-20], r"eval.pairs.tsv.gz is truncated or damaged"),
        (gzip.compress(b""), r"validation holds no pairs"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            prepared_sets.load_prepared(RetrievalRfc(), mini(RetrievalRfc), source=folder)
    (folder / "rfc.docs.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"rfc.docs.parquet cannot be read"):
        prepared_sets.load_prepared("retrieval_rfc", source=folder)
    path.unlink()
    with pytest.raises(DataError, match=r"raw lacks some of the files: with rfc.docs"):
        prepared_sets.load_prepared("retrieval_rfc", source=folder)


def test_the_real_papers_are_the_frozen_ones(place: Path) -> None:
    folder = raw_data("retrieval/aan_mini.docs.parquet", "retrieval/aan_mini.train.pairs.tsv.gz")
    # preparation compares counts and SHA-256 of every split with the protocol's constants
    prepared = prepared_sets.load_prepared("retrieval_aan_mini", source=folder)
    assert np.bincount(prepared.split("train").labels).tolist() == [8332, 8424]
    assert prepared.notes["test documents"] == 1307


def test_the_real_rfcs_are_the_frozen_ones(place: Path) -> None:
    folder = raw_data("retrieval/rfc.docs.parquet", "retrieval/rfc.train.pairs.tsv.gz")
    prepared = prepared_sets.load_prepared("retrieval_rfc", source=folder)
    assert np.bincount(prepared.split("test").labels).tolist() == [8985, 9116]
    assert prepared.notes["test pairs that train or validation shows too"] == 0
