"""Language modelling of IMDb: chunks, splits, and the baselines computed again from dictionaries."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import raw_data

from lra.conformance import tasks as conformance
from lra.data import prepared_sets
from lra.task import Protocol, Split
from lra.tasks._ngram import gzip_bits, ngram_bits
from lra.tasks.language.imdb_lm import ImdbLm
from lra.tasks.storage import open_split, write_documents, write_positions

TRAIN = [f"review {n} of a caf\u00e9 " + "so good " * (n % 5 * 4) for n in range(12)] + ["review 3 of a caf\u00e9 "]
TRAIN[3] = TRAIN[-1]
TEST = [TRAIN[5], *(f"another {n}, " + "so bad " * n * 2 for n in range(8))]


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "raw" / "imdb"
    folder.mkdir(parents=True)
    for split, texts in (("train", TRAIN), ("test", TEST)):
        pq.write_table(pa.table({"text": texts, "label": [0] * len(texts)}), folder / f"{split}.parquet")
    return folder.parent


def small() -> Protocol:
    return replace(ImdbLm.protocols["chunks"], length=32, counts={"validation": 4, "test": 6}, sha256={})


def hashed(texts: list[str]) -> list[str]:
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())


def documents(split: Split) -> list[bytes]:
    return [bytes(split.document(int(number))) for number in split.index[:, 0]]


def test_training_predicts_every_byte_of_a_review_once(raw: Path) -> None:
    prepared = prepared_sets.load_prepared(ImdbLm(), small(), source=raw)
    chunks = documents(prepared.split("train"))
    joined: list[bytes] = []
    for chunk in chunks:
        assert 2 <= len(chunk) <= 32
        if chunk[0] == 0:
            joined.append(chunk)
        else:
            assert chunk[0] == joined[-1][-1]
            joined[-1] += chunk[1:]
    assert joined == [b"\0" + text.encode() for text in hashed(TRAIN)[4:]]
    assert len(chunks) > len(joined)


def test_validation_and_test_are_first_chunks_of_reviews_that_training_does_not_have(raw: Path) -> None:
    prepared = prepared_sets.load_prepared(ImdbLm(), small(), source=raw)
    for split, texts in (("validation", hashed(TRAIN)[:4]), ("test", hashed(TEST[1:])[:6])):
        assert documents(prepared.split(split)) == [(b"\0" + text.encode())[:32] for text in texts]
    task, protocol = prepared.task, prepared.protocol
    assert task.encode("caf\u00e9", protocol).tolist() == list(b"\0caf\xc3\xa9")
    assert task.decode(np.array(list(b"caf\xc3\xa9 \xff"))) == "caf\u00e9 \ufffd"
    first = hashed(TEST[1:])[0][:31]
    assert task.describe(prepared.split("test"), 0) == f"{1 + len(first)} bytes: {first.strip()}"


def test_packed_pieces_join_to_all_reviews_in_a_row(raw: Path) -> None:
    packed = replace(
        ImdbLm.protocols["packed"], length=32, sha256={}, counts={}, budget={"validation": 4, "test": 6},
        tests={"length-64": {"length": 64}},
    )  # fmt: skip
    prepared = prepared_sets.load_prepared(ImdbLm(), packed, source=raw)
    tested = hashed(TEST[1:])[:6]
    for split, length, texts in (
        ("train", 32, hashed(TRAIN)[4:]), ("validation", 32, hashed(TRAIN)[:4]), ("test", 32, tested),
        ("length-64", 64, tested),
    ):  # fmt: skip
        pieces = documents(prepared.split(split))
        assert {len(piece) for piece in pieces[:-1]} == {length}
        assert all(left[-1] == right[0] for left, right in pairwise(pieces))
        joined = pieces[0] + b"".join(piece[1:] for piece in pieces[1:])
        assert joined == b"".join(b"\0" + text.encode() for text in texts)


def test_it_passes_the_checks_of_a_task(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImdbLm, "protocols", {"chunks": small()})
    failed = [finding for finding in conformance.check(ImdbLm(), source=raw) if finding.failed]
    assert not failed, "\n".join(f"{finding.check}: {finding.message}" for finding in failed)


def stored(folder: Path, split: str, texts: list[bytes]) -> Split:
    folder.mkdir(exist_ok=True)
    write_documents(folder, split, [np.frombuffer(text, np.uint8) for text in texts])
    write_positions(folder, split, None, len(texts))
    return open_split(folder, split)


def witten_bell(train: list[bytes], order: int, vocabulary: int) -> defaultdict[bytes, Counter[int]]:
    """Counts of every token after every context of fewer than `order` tokens."""
    counts: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for text in train:
        for i in range(1, len(text)):
            for k in range(min(order - 1, i) + 1):
                counts[text[i - k : i]][text[i]] += 1
    return counts


def probability(counts: defaultdict[bytes, Counter[int]], context: bytes, token: int, vocabulary: int) -> float:
    lower = probability(counts, context[1:], token, vocabulary) if context else 1 / vocabulary
    if context not in counts:
        return lower
    seen = counts[context]
    return (seen[token] + len(seen) * lower) / (seen.total() + len(seen))


@pytest.mark.parametrize("order", [1, 2, 5])
def test_ngrams_are_those_of_dictionaries(tmp_path: Path, order: int) -> None:
    random = np.random.default_rng(0)
    texts = [bytes(random.choice(6, n, p=[0.4, 0.2, 0.2, 0.1, 0.06, 0.04]).tolist()) for n in (90, 2, 140, 3, 60)]
    train, test = texts[:3], [*texts[3:], bytes([7, 5, 6, 7, 7]), bytes([1, 0])]
    counts = witten_bell(train, order, 8)
    asked = [(text[max(0, i - order + 1) : i], text[i]) for text in test for i in range(1, len(text))]
    bits = [-math.log2(probability(counts, context, token, 8)) for context, token in asked]
    found = ngram_bits(stored(tmp_path / "a", "train", train), stored(tmp_path / "a", "test", test), order, 8)
    assert found == pytest.approx(sum(bits) / len(bits), rel=1e-12)
    context = asked[30][0]
    assert sum(probability(counts, context, token, 8) for token in range(8)) == pytest.approx(1)


def test_tokens_that_do_not_fit_a_key_are_refused(tmp_path: Path) -> None:
    split = stored(tmp_path / "a", "train", [b"\0ab"])
    with pytest.raises(ValueError, match="4 tokens of 16 bits exceed 63 bits"):
        ngram_bits(split, split, 4, 1 << 16)


def test_gzip_reads_all_documents_as_one_file(tmp_path: Path) -> None:
    texts = [b"\0" + b"so good " * 20, b"\0" + b"so bad " * 20]
    size = len(gzip.compress(texts[0][1:] + texts[1][1:], 9, mtime=0))
    assert gzip_bits(stored(tmp_path / "a", "test", texts)) == pytest.approx(8 * size / 300)


@pytest.mark.parametrize("protocol", ImdbLm.protocols)
def test_the_real_reviews_are_the_frozen_ones(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = raw_data("imdb/train.parquet", "imdb/test.parquet")
    monkeypatch.setenv("LRA_CACHE", str(tmp_path))
    # preparation compares counts and SHA-256 of every split with the protocol's constants
    prepared = prepared_sets.load_prepared("imdb_lm", protocol, source=folder)
    for split in ("train", "validation", "test") if protocol == "chunks" else ():
        starts = [document[0] == 0 for document in documents(prepared.split(split))]
        assert all(starts) == (split != "train")
        # the byte 0 stands nowhere but at the start of a review
        assert int((prepared.split(split).values == 0).sum()) == sum(starts)
