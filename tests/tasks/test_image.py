"""Image: grey, colour and token encodings, the carved validation split, and what a bad file is answered with."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow
from raw_data import raw_data

from lra.data import prepared_sets
from lra.task import DataError, Protocol
from lra.tasks import _source
from lra.tasks.lra.image import Image

SIZES = {"train": 60, "test": 20}


def pictures(split: str) -> np.ndarray:
    """Random 32 x 32 colours, among them black, white and the primaries: (n, 32, 32, 3) uint8."""
    drawn = np.random.default_rng(len(split)).integers(0, 256, (SIZES[split], 32, 32, 3)).astype(np.uint8)
    drawn[:, 0, :5] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    return drawn


def encoded(picture: np.ndarray, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(picture).save(file, form, lossless=True)
    return file.getvalue()


def write(path: Path, files: list[bytes], labels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": [{"bytes": f, "path": None} for f in files], "label": labels}), path)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every other image PNG or lossless WebP, as the two sources of CIFAR-10 have them."""
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRA_DATA", raising=False)
    for split, count in SIZES.items():
        files = [encoded(p, ("PNG", "WEBP")[i % 2]) for i, p in enumerate(pictures(split))]
        write(tmp_path / "raw" / "cifar10" / f"{split}.parquet", files, [i % 10 for i in range(count)])
    return tmp_path / "raw"


def small(name: str) -> Protocol:
    counts = {"train": 40, "validation": 20, "test": 20}
    return dataclasses.replace(Image.protocols[name], counts=counts, sha256={})


def pixels(prepared: prepared_sets.Prepared, split: str) -> np.ndarray:
    opened = prepared.split(split)
    return np.stack([opened.document(d) for d in opened.index[:, 0]])


def rows(prepared: prepared_sets.Prepared, split: str) -> list[int]:
    """Which training images a grey split holds."""
    known = {g.tobytes(): i for i, g in enumerate(grey(pictures("train")))}
    return [known[p.tobytes()] for p in pixels(prepared, split)]


def grey(images: np.ndarray) -> np.ndarray:
    """Pillow's own luma, a second source for ours: (n, 1024)."""
    return np.stack([np.asarray(Pillow.fromarray(p).convert("L")).ravel() for p in images])


@pytest.mark.parametrize("name", ["strict", "strict-tokens", "s4"])
def test_grey_is_the_luma_of_pillow(raw: Path, name: str) -> None:
    prepared = prepared_sets.load_prepared(Image(), small(name), source=raw)
    assert np.array_equal(pixels(prepared, "test"), grey(pictures("test")))
    assert np.array_equal(Image().picture(prepared.split("test"), 3).ravel(), grey(pictures("test"))[3])
    assert prepared.split("test").labels.tolist() == [i % 10 for i in range(20)]
    assert sorted(rows(prepared, "train") + rows(prepared, "validation")) == list(range(60))


def test_lra2020_is_grey_by_the_formula_of_tensorflow(raw: Path) -> None:
    found = pixels(prepared_sets.load_prepared(Image(), small("lra2020"), source=raw), "test")
    exact = (pictures("test").reshape(20, 1024, 3) / 255) @ np.array([0.2989, 0.587, 0.114]) * 255.5
    # float32 and float64 truncate differently only within rounding of a whole number
    safe = np.abs(exact - np.round(exact)) > 1e-3
    assert safe.mean() > 0.98
    assert np.array_equal(found[safe], np.floor(exact)[safe])
    assert np.abs(found - exact).max() < 1.001
    # black, white, red, green, blue
    assert found[0, :5].tolist() == [0, 255, 76, 149, 29]


def test_colour_keeps_three_values_per_pixel(raw: Path) -> None:
    prepared = prepared_sets.load_prepared(Image(), small("strict-colour"), source=raw)
    assert prepared.protocol.channels == 3
    assert np.array_equal(pixels(prepared, "test").reshape(20, 32, 32, 3), pictures("test"))
    assert "colour" in Image().describe(prepared.split("test"), 0)
    assert np.array_equal(Image().picture(prepared.split("test"), 3), pictures("test")[3])


def test_strict_holds_out_by_content_alike_in_every_encoding(raw: Path) -> None:
    prepared = {
        n: prepared_sets.load_prepared(Image(), small(n), source=raw)
        for n in ("strict", "strict-tokens", "strict-colour")
    }
    held = rows(prepared["strict"], "validation")
    images = pictures("train")
    hashes = [hashlib.sha256(p.tobytes()).hexdigest() for p in images]
    expected = [i for c in range(10) for i in sorted(range(c, 60, 10), key=hashes.__getitem__)[:2]]
    assert held == sorted(expected)
    assert rows(prepared["strict"], "train") == sorted(set(range(60)) - set(held))
    assert rows(prepared["strict-tokens"], "validation") == held
    assert np.array_equal(pixels(prepared["strict-colour"], "validation"), images[held].reshape(20, -1))


def test_lra2020_holds_out_the_last_and_s4_those_of_random_split(raw: Path) -> None:
    import torch
    from torch.utils.data import TensorDataset, random_split

    from_file = prepared_sets.load_prepared(Image(), small("lra2020"), source=raw)
    assert from_file.split("validation").labels.tolist() == [i % 10 for i in range(40, 60)]
    drawn = TensorDataset(torch.arange(60))
    held = random_split(drawn, [40, 20], generator=torch.Generator().manual_seed(42))[1].indices
    assert rows(prepared_sets.load_prepared(Image(), small("s4"), source=raw), "validation") == sorted(held)
    masked = prepared_sets.load_prepared(Image(), small("lra2020-masked"), source=raw)
    assert masked.checksum == from_file.checksum
    assert masked.protocol.hides_zeros


def test_any_number_of_workers_gives_the_same(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = prepared_sets.load_prepared(Image(), small("strict"), source=raw, workers=1).checksum
    monkeypatch.setenv("LRA_CACHE", str(raw / "other"))
    assert prepared_sets.load_prepared(Image(), small("strict"), source=raw, workers=4).checksum == one


def test_the_hub_is_asked_for_undecoded_images(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, *, revision: str, split: str) -> object:
        asked.append((name, revision, split))
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        table = pq.read_table(raw / "cifar10" / f"{split}.parquet")
        return datasets.Dataset.from_dict(table.to_pydict(), features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(_source, "_reachable", lambda _: True)
    found = prepared_sets.load_prepared(Image(), small("strict"))
    assert asked[0] == ("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", "train")
    assert np.array_equal(pixels(found, "test"), grey(pictures("test")))


def batch(images: np.ndarray, labels: list[int]) -> bytes:
    """A batch byte for byte as Python 2 pickled those of the release, which no pickler of Python 3 does."""
    planes = images.transpose(0, 3, 1, 2).tobytes()
    parts = [
        b"\x80\x02}(U\x0bbatch_labelU\x07a batchU\x04data",
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
        b"(K\x01J", struct.pack("<i", len(images)), b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R",
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T", struct.pack("<i", len(planes)), planes,
        b"tbU\x06labels](", b"".join(b"K" + bytes([label]) for label in labels), b"eu.",
    ]  # fmt: skip
    return b"".join(parts)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    folder = tmp_path / "official" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    train, test = pictures("train"), pictures("test")
    for number in range(5):
        rows = np.arange(12 * number, 12 * number + 12)
        content = batch(train[rows], (rows % 10).tolist())
        (folder / f"data_batch_{number + 1}").write_bytes(content)
    (folder / "test_batch").write_bytes(batch(test, [i % 10 for i in range(len(test))]))
    (folder / "batches.meta").write_bytes(b"not read")
    return folder


def test_the_official_batches_give_the_same_as_the_tables(
    raw: Path, official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepared_sets.load_prepared(Image(), small("s4"), source=raw).checksum
    packed = tmp_path / "packed" / "cifar10"
    packed.mkdir(parents=True)
    with tarfile.open(packed / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(official, official.name)
    for number, source in enumerate((official.parent, official, packed.parent)):
        monkeypatch.setenv("LRA_CACHE", str(tmp_path / f"cache {number}"))
        assert prepared_sets.load_prepared(Image(), small("s4"), source=source).checksum == expected


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_calls_anything_is_refused_unread(raw: Path, official: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pickle.loads(pickle.dumps(Harmful(trace)))
    assert trace.exists(), "the pickle is not harmful at all"
    trace.unlink()
    (official / "data_batch_2").write_bytes(pickle.dumps({b"data": Harmful(trace), b"labels": []}))
    with pytest.raises(DataError, match=r"data_batch_2 is not a batch of CIFAR-10 \(it calls .*\); fetch it again"):
        prepared_sets.load_prepared(Image(), small("s4"), source=official)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"data_batch_3 is not a batch of CIFAR-10"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, 2), r"data_batch_3 is not a batch"),
        (pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, 2), r"data_batch_3 is not .* data are float64"),
        (batch(np.zeros((1, 32, 32, 3), np.uint8), [10]), r"holds labels other than 0 to 9"),
    ],
    ids=["empty", "counts", "type", "label"],
)
def test_a_bad_batch_is_one_clear_line(raw: Path, official: Path, content: bytes, message: str) -> None:
    (official / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepared_sets.load_prepared(Image(), small("s4"), source=official)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", r"image 1 of train cannot be decoded"),
        (encoded(pictures("test")[0])[:400], r"image 1 of train cannot be decoded"),
        (encoded(np.zeros((32, 16, 3), np.uint8)), r"image 1 of train is 16 x 32 pixels, not 32 x 32"),
    ],
    ids=["empty", "truncated", "other size"],
)
def test_a_bad_image_is_named(raw: Path, file: bytes, message: str) -> None:
    write(raw / "cifar10" / "train.parquet", [encoded(pictures("test")[0]), file], [0, 1])
    with pytest.raises(DataError, match=message):
        prepared_sets.load_prepared(Image(), small("strict"), source=raw)


def test_bad_labels_and_missing_files_are_one_clear_line(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(raw / "cifar10" / "train.parquet", [encoded(pictures("test")[0])], [10])
    with pytest.raises(DataError, match="train of uoft-cs/cifar10 holds labels other than 0 to 9"):
        prepared_sets.load_prepared("image", source=raw)
    (raw / "cifar10" / "train.parquet").unlink()
    monkeypatch.setenv("LRA_DATA", str(raw))
    with pytest.raises(DataError, match=r"no cifar10/train.parquet in .*raw; put .*unset LRA_DATA"):
        prepared_sets.load_prepared("image")


def test_the_real_test_images_are_the_frozen_ones() -> None:
    from lra.task import Split
    from lra.tasks.lra.image import _encode, _read

    folder = raw_data("cifar10/test.parquet")
    images, labels = _read("test", folder, "", 2, lambda *_: None)
    for protocol in Image.protocols.values():
        values = _encode(images, protocol).reshape(10_000, -1)
        split = Split(
            values.ravel(),
            np.arange(10_001, dtype=np.int64) * values.shape[1],
            np.arange(10_000, dtype=np.int32)[:, None],
            labels.astype(np.uint8),
        )
        assert prepared_sets.split_checksum(split) == protocol.sha256["test"], protocol.name
    assert np.bincount(labels).tolist() == [1000] * 10
