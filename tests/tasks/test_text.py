"""Text: encodings, the carved validation split, duplicates across splits, sources and their failures."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_data import raw_data

from lra.data import prepared_sets
from lra.task import DataError, Protocol
from lra.tasks import _source
from lra.tasks._overlap import near_duplicates
from lra.tasks.lra.text import CHARACTERS, EOS, IDS, UNKNOWN, Text

WORDS = ["film", "story", "actor", "scene", "plot", "music", "camera", "ending", "script", "humour", "drama", "light"]
LONG = "x" * 5000


def review(number: int) -> str:
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS, 40)) + f" caf\u00e9 {number}"


def reviews(split: str) -> tuple[list[str], list[int]]:
    """40 reviews of a split, negative first. In test, rows 3 and 4 repeat train, 5 repeats it but for its end."""
    start = 0 if split == "train" else 100
    texts = [review(start + i) for i in range(40)]
    if split == "train":
        texts[7], texts[39] = texts[6], LONG
    else:
        texts[3], texts[4], texts[5] = review(10), review(11), review(12) + " and more"
    return texts, [0] * 20 + [1] * 20


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRA_DATA", raising=False)
    folder = tmp_path / "raw"
    (folder / "imdb").mkdir(parents=True)
    for split in ("train", "test"):
        texts, labels = reviews(split)
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / "imdb" / f"{split}.parquet")
    return folder


def small(name: str) -> Protocol:
    counts = {"train": 30, "validation": 10, "test": 40} if name == "strict" else dict.fromkeys(
        ("train", "validation", "test"), 40
    )  # fmt: skip
    return dataclasses.replace(Text.protocols[name], counts=counts, sha256={})


def texts_of(prepared: prepared_sets.Prepared, split: str) -> list[str]:
    opened = prepared.split(split)
    return [bytes(opened.document(d)).decode(errors="replace") for d in opened.index[:, 0]]


def test_strict_splits_by_content_and_loses_nothing(raw: Path) -> None:
    prepared = prepared_sets.load_prepared(Text(), small("strict"), source=raw)
    train, validation, test = (texts_of(prepared, s) for s in ("train", "validation", "test"))
    texts, labels = reviews("train")
    assert sorted(train + validation) == sorted(text[:4096] for text in texts)
    assert sorted(test) == sorted(reviews("test")[0])

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    expected = [sorted(digest(t) for t, y in zip(texts, labels, strict=True) if y == label)[:5] for label in range(2)]
    whole = {text[:4096]: text for text in texts}
    assert sorted(digest(whole[text]) for text in validation) == sorted(expected[0] + expected[1])
    # in the order of the hashes, so that the negative half is not first
    assert [digest(whole[t]) for t in train] == sorted(digest(whole[t]) for t in train)
    assert np.bincount(prepared.split("validation").labels).tolist() == [5, 5]
    truth = dict(zip(texts, labels, strict=True))
    assert [truth[whole[t]] for t in train] == prepared.split("train").labels.tolist()


def test_identical_reviews_stay_on_one_side(raw: Path) -> None:
    prepared = prepared_sets.load_prepared(Text(), small("strict"), source=raw)
    assert not set(texts_of(prepared, "train")) & set(texts_of(prepared, "validation"))


def test_duplicates_across_splits_are_found_and_listed(raw: Path) -> None:
    prepared = prepared_sets.load_prepared(Text(), small("lra2020-4000"), source=raw)
    assert prepared.notes["duplicate pairs"] == {
        "test and train": {"identical": 2, "similar": 1},
        "train": {"identical": 1, "similar": 0},
    }
    test = texts_of(prepared, "test")
    listed = {test[row] for row in prepared.notes["test rows with a duplicate in train or validation"]}
    assert listed == {reviews("test")[0][row] for row in (3, 4, 5)}


@pytest.mark.parametrize(("name", "length"), [("strict", 4096), ("lra2020", 1000), ("lra2020-4000", 4000)])
def test_bytes_are_cut_at_the_length(raw: Path, name: str, length: int) -> None:
    prepared = prepared_sets.load_prepared(Text(), small(name), source=raw)
    train = prepared.split("train")
    sizes = np.diff(train.offsets)
    assert sizes.max() == length == prepared.protocol.length
    assert "caf\u00e9".encode() in bytes(train.document(train.index[0, 0]))
    assert "film" in Text().describe(train, 0) or "x" in Text().describe(train, 0)


def test_the_published_protocols_validate_on_test(raw: Path) -> None:
    for name in ("lra2020", "s4"):
        prepared = prepared_sets.load_prepared(Text(), small(name), source=raw)
        assert prepared.protocol.selection == "test"
        assert np.array_equal(prepared.split("validation").index, prepared.split("test").index)


def test_s4_reads_characters_and_an_end_mark(raw: Path) -> None:
    (raw / "imdb" / "test.parquet").unlink()
    pq.write_table(pa.table({"text": ["ab\u00e9 \u4e16", LONG], "label": [0, 1]}), raw / "imdb" / "test.parquet")
    protocol = dataclasses.replace(
        Text.protocols["s4"], counts={"train": 40, "validation": 2, "test": 2}, sha256={}
    )  # fmt: skip
    test = prepared_sets.load_prepared(Text(), protocol, source=raw).split("test")
    documents = {len(d): d for d in (test.document(i) for i in test.index[:, 0])}
    assert documents[6].tolist() == [IDS["a"], IDS["b"], IDS["\u00e9"], IDS[" "], UNKNOWN, EOS]
    assert documents[4096].tolist() == [IDS["x"]] * 4095 + [EOS]
    row = int(np.flatnonzero(test.labels == 0)[0])
    assert Text().describe(test, row) == "negative, 6 tokens: ab\u00e9 \ufffd"


def test_the_hub_gives_the_same_bytes_as_a_folder(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, *, revision: str, split: str) -> object:
        asked.append((name, revision, split))
        return datasets.Dataset.from_dict(dict(zip(("text", "label"), reviews(split), strict=True)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(_source, "_reachable", lambda _: True)
    from_hub = prepared_sets.load_prepared(Text(), small("strict"))
    revision = "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"
    assert asked == [("stanfordnlp/imdb", revision, "train"), ("stanfordnlp/imdb", revision, "test")]
    monkeypatch.setenv("LRA_CACHE", str(raw / "other"))
    assert prepared_sets.load_prepared(Text(), small("strict"), source=raw).checksum == from_hub.checksum


def official(folder: Path) -> Path:
    """The reviews in the layout of the official folder, which has other files too."""
    for split in ("train", "test"):
        for number, (text, label) in enumerate(zip(*reviews(split), strict=True)):
            path = folder / "aclImdb" / split / ("neg", "pos")[label] / f"{number}_{7 * label + 1}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
    (folder / "aclImdb" / "train" / "unsup").mkdir()
    (folder / "aclImdb" / "train" / "unsup" / "0_0.txt").write_text("no label")
    (folder / "aclImdb" / "README").write_text("read me")
    return folder


def test_the_official_folder_and_archive_give_the_same_as_the_tables(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepared_sets.load_prepared(Text(), small("strict"), source=raw).checksum
    folder, packed = official(tmp_path / "official"), tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "aclImdb_v1.tar.gz", "w:gz") as tar:
        tar.add(folder / "aclImdb", "aclImdb")
    for number, source in enumerate((folder, folder / "aclImdb", packed)):
        monkeypatch.setenv("LRA_CACHE", str(tmp_path / f"cache {number}"))
        assert prepared_sets.load_prepared(Text(), small("strict"), source=source).checksum == expected


def test_a_damaged_official_folder_is_one_clear_line(raw: Path, tmp_path: Path) -> None:
    folder = official(tmp_path / "official")
    review = folder / "aclImdb" / "test" / "pos" / "30_8.txt"
    for content, message in (
        (b"\xff\xfe", r"aclImdb: a review of test is not UTF-8"),
        (b"x" * (1 << 21), r"aclImdb: aclImdb/test/pos/30_8.txt has more than 1,048,576 bytes"),
        (b"", r"test of .*: review \d+ is empty"),
    ):
        review.write_bytes(content)
        with pytest.raises(DataError, match=message):
            prepared_sets.load_prepared(Text(), small("strict"), source=folder)
    shutil.rmtree(review.parent)
    with pytest.raises(DataError, match=r"aclImdb does not hold aclImdb/test/pos/\*.txt; fetch it again"):
        prepared_sets.load_prepared(Text(), small("strict"), source=folder)
    (tmp_path / "packed" / "imdb").mkdir(parents=True)
    (tmp_path / "packed" / "imdb" / "aclImdb_v1.tar.gz").write_bytes(b"\x1f\x8b torn")
    with pytest.raises(DataError, match=r"aclImdb_v1.tar.gz is truncated or damaged"):
        prepared_sets.load_prepared(Text(), small("strict"), source=tmp_path / "packed")


def test_without_network_the_command_is_given(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def load(*_: object, **__: object) -> None:
        assert datasets.config.HF_HUB_OFFLINE, "the client would try again and again"
        raise ConnectionError("Couldn't reach the Hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # a port of this machine on which nothing listens
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError) as caught:
        prepared_sets.load_prepared("text")
    assert str(caught.value) == (
        "stanfordnlp/imdb cannot be fetched (ConnectionError: Couldn't reach the Hub); offline, with "
        "imdb/train.parquet and imdb/test.parquet, or the official aclImdb/ or aclImdb_v1.tar.gz, in a folder DIR, run "
        "`lra data prepare text --from DIR`"
    )


def test_bad_files_are_one_clear_line(raw: Path) -> None:
    with pytest.raises(DataError, match=r"the files in .*raw are not the data .*train has 0 examples, not 22,500"):
        prepared_sets.load_prepared("text", source=raw)
    path = raw / "imdb" / "train.parquet"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"train.parquet is not a complete Parquet file .*fetch it again"):
        prepared_sets.load_prepared("text", source=raw)
    pq.write_table(pa.table({"review": ["a"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"train.parquet has columns review, label; text is missing"):
        prepared_sets.load_prepared("text", source=raw)
    for table, said in (
        ({"text": ["a", ""], "label": [0, 1]}, "train of stanfordnlp/imdb: review 1 is empty"),
        ({"text": ["a", None], "label": [0, 1]}, "review 1 is empty"),
        ({"text": ["a", "b"], "label": [0, -1]}, "review 1 has the label -1, not 0 or 1"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, "holds no reviews"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(DataError, match=said):
            prepared_sets.load_prepared("text", source=raw)
    path.unlink()
    with pytest.raises(DataError, match=r"no imdb/train.parquet in .*raw; put imdb/train.parquet and"):
        prepared_sets.load_prepared("text", source=raw)


def test_near_duplicates_are_found_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 256, 2000).astype(np.uint8)
    edited = base.copy()
    edited[[300, 900, 1500]] ^= 1
    half = np.concatenate([base[:1000], random.integers(0, 256, 1000).astype(np.uint8)])
    others = [random.integers(0, 256, 2000).astype(np.uint8) for _ in range(20)]
    documents = [base, *others, edited, half, base]
    pairs = near_duplicates(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))
    # `half` shares a third of all windows with the three others: below one half
    assert sorted(map(tuple, pairs.tolist())) == [(0, 21), (0, 23), (21, 23)]


def test_boilerplate_alone_makes_no_duplicates() -> None:
    random = np.random.default_rng(0)
    boilerplate = random.integers(0, 256, 3000).astype(np.uint8)
    documents = [np.concatenate([boilerplate, random.integers(0, 256, 500).astype(np.uint8)]) for _ in range(60)]
    assert len(near_duplicates(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))) == 0


def test_the_characters_of_s4_are_those_of_the_training_reviews() -> None:
    folder = raw_data("imdb/train.parquet")
    texts = pq.read_table(folder / "imdb" / "train.parquet").column("text").to_pylist()
    counts = Counter("".join(text[:4095] for text in texts))
    kept = sorted((c for c in counts if counts[c] >= 15), key=lambda c: (-counts[c], c))
    assert "".join(kept) == CHARACTERS
    assert len(CHARACTERS) + 3 <= Text.protocols["s4"].vocabulary


def test_the_real_reviews_are_the_frozen_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = raw_data("imdb/train.parquet", "imdb/test.parquet")
    monkeypatch.setenv("LRA_CACHE", str(tmp_path))
    # preparation compares counts and SHA-256 of every split with the protocol's constants
    prepared = prepared_sets.load_prepared("text", source=folder)
    for split, each in (("train", 11_250), ("validation", 1_250), ("test", 12_500)):
        assert np.bincount(prepared.split(split).labels).tolist() == [each, each]
    pairs = prepared.notes["duplicate pairs"]
    # 123 texts of test are in train word for word
    assert pairs["test and train"]["identical"] + pairs["test and validation"]["identical"] == 123
    assert pairs["train and validation"]["identical"] == 0
    floors = prepared.task.floors(prepared.split("train"), prepared.split("test"))
    assert floors["majority class"] == 0.5
    assert 0.6 < floors["bag of tokens"] < 0.7
