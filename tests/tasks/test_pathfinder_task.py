"""Pathfinder: preparation, resuming, the released files and the floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset, random_split

from lra import registry
from lra.data import prepared_sets
from lra.task import SPLITS, DataError, Protocol, Split, silent
from lra.tasks import _pathfinder_task as task
from lra.tasks._pathfinder import Drawing, generate, lra_drawing
from lra.tasks.lra.pathfinder import Pathfinder
from lra.tasks.lra.pathx import PathX

FEW = {"train": 12, "validation": 5, "test": 4}
SMALL = replace(Pathfinder.protocols["strict"], counts=FEW, sha256={})
LEVEL = "curv_contour_length_14"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "PART", 4)


def prepare(folder: Path, protocol: Protocol = SMALL, source: Path | None = None, workers: int = 1) -> dict[str, Split]:
    folder.mkdir(parents=True, exist_ok=True)
    Pathfinder().prepare(folder, protocol, source=source, workers=workers, progress=silent)
    return {split: Pathfinder().load(folder, split) for split in SPLITS}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["pathfinder", "pathfinder64", "pathx", "path256"])
def test_every_size_declares_tokens_and_pixels_and_freezes_what_it_generates(name: str) -> None:
    found = registry.tasks.get(name)()
    assert list(found.protocols)[:2] == ["strict-continuous", "strict"]
    strict, continuous = found.protocols["strict"], found.protocols["strict-continuous"]
    assert (strict.encoding, strict.vocabulary) == ("tokens", 256)
    assert (continuous.encoding, continuous.channels, continuous.scale) == ("continuous", 1, (0.5, 0.5))
    assert strict.sha256 == continuous.sha256
    for protocol in found.protocols.values():
        assert protocol.length == found.size**2
        assert protocol.name.endswith("-small") or list(protocol.counts.values()) == [160_000, 20_000, 20_000]
        assert [len(protocol.sha256.get(split, "")) for split in SPLITS] == [0 if protocol.raw else 64] * 3


def test_splits_follow_one_another_and_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    splits = prepare(tmp_path / "one")
    images, labels, _ = generate(lra_drawing(32), task.seed_of(lra_drawing(32)), 0, 21)
    start = 0
    for name, split in splits.items():
        assert len(split) == FEW[name]
        np.testing.assert_array_equal(split.labels, labels[start : start + FEW[name]])
        for example in range(FEW[name]):
            np.testing.assert_array_equal(Pathfinder().picture(split, example), images[start + example])
        start += FEW[name]
    prepare(tmp_path / "three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert all(name.endswith(".npy") for name in contents(tmp_path / "one"))


def test_an_interrupted_preparation_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(drawing: Drawing, seed: int, start: int, stop: int) -> tuple[np.ndarray, ...]:
        if len(drawn) == 3:
            raise OSError("the disk is full")
        drawn.append(start)
        return generate(drawing, seed, start, stop)

    folder = tmp_path / "set"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(task, "generate", counted)
        with pytest.raises(OSError, match="the disk is full"):
            prepare(folder)
        assert len(list(folder.glob("*.part"))) == 3
        assert not list(folder.glob("*.npy"))
        cut = folder / "images-000004.part"
        cut.write_bytes(cut.read_bytes()[:-9])
        (folder / "images-000099.part-unfinished").write_bytes(b"of another size")
        drawn[:] = [-1, -1, -1, -1]
        prepare(folder)
    assert sorted(drawn[4:]) == [4, 12, 16, 17]
    monkeypatch.setattr(task, "PART", 500)
    prepare(tmp_path / "at once")
    assert contents(folder) == contents(tmp_path / "at once")


def test_the_cache_accepts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path))
    found = prepared_sets.load_prepared(Pathfinder(), SMALL)
    assert found.manifest["counts"] == FEW
    assert prepared_sets.verify(Pathfinder(), SMALL) == []


def test_an_example_in_words(tmp_path: Path) -> None:
    split = prepare(tmp_path)["train"]
    line = Pathfinder().describe(split, 0)
    assert line.startswith(f"{split.labels[0]}, markers on {('two contours', 'one contour')[split.labels[0]]}, 32 x 32")


@pytest.mark.parametrize("found", [Pathfinder(), PathX()], ids=lambda t: t.name)
def test_the_centre_crop_sees_the_middle_and_a_bag_of_tokens_only_what_is_there(found: task.PathfinderTask) -> None:
    """A block in the middle of one class and in a corner of the other: equal histograms, unequal centres."""
    side = found.size
    labels = np.arange(40) % 2
    images = np.zeros((40, side, side), np.uint8)
    images[labels == 1, side // 2 - 2 : side // 2 + 2, side // 2 - 2 : side // 2 + 2] = 200
    images[labels == 0, :4, :4] = 200
    index = np.arange(40, dtype=np.int32)[:, None]
    split = Split(images.ravel(), np.arange(41) * side**2, index, labels.astype(np.uint8))
    floors = found.floors(split, split)
    assert set(floors) == {"majority class", "bag of tokens", "centre crop", "marker distance"}
    assert [floors[name] for name in ("majority class", "bag of tokens", "centre crop")] == [0.5, 0.5, 1.0]


@pytest.mark.parametrize("size", [32, 128])
def test_the_marker_distance_is_that_of_the_discs(size: int) -> None:
    images, _, tips = generate(lra_drawing(size), 777, 0, 12)
    index = np.arange(12, dtype=np.int32)[:, None]
    split = Split(images.ravel(), np.arange(13) * size**2, index, np.zeros(12, np.uint8))
    found = (Pathfinder() if size == 32 else PathX())._marker_distance(split, np.arange(12))
    distance = np.hypot(*(tips[:, 0] - tips[:, 1]).T) / size
    # the centre of an even square lies half a pixel off
    np.testing.assert_allclose(found[:, 0], distance, atol=2 / size)
    np.testing.assert_array_equal(found[:, 1:], np.stack([found[:, 0] ** 2, found[:, 0] ** 3], axis=1))


def test_the_marker_distance_tells_the_labels_apart_where_they_differ_in_it() -> None:
    """Discs 4 pixels apart in one class and 20 in the other, at random places."""
    random, labels = np.random.default_rng(0), np.arange(40, dtype=np.uint8) % 2
    images = np.zeros((40, 32, 32), np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = random.integers(1, 10, 2)
        for start in (x, x + (20 if label else 5)):
            image[y : y + 3, start : start + 3] = 255
    split = Split(images.ravel(), np.arange(41) * 32**2, np.arange(40, dtype=np.int32)[:, None], labels)
    assert Pathfinder().floors(split, split)["marker distance"] == 1.0


Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Writes a release of 23 images in three metadata files, two of whose names sort wrongly as text."""

    def write(place: str = "lra_release/pathfinder32", array: bool = False) -> Path:
        root = tmp_path / "raw" / place / LEVEL
        (root / "metadata").mkdir(parents=True)
        (root / "metadata" / "combined.npy").write_bytes(b"not read")
        random = np.random.default_rng(0)
        for number, count in ((0, 9), (2, 8), (10, 6)):
            folder = root / "imgs" / str(number)
            folder.mkdir(parents=True)
            rows = []
            for i in range(count):
                Image.fromarray(random.integers(0, 256, (32, 32), np.uint8)).save(folder / f"sample_{i}.png")
                rows.append([f"imgs/{number}", f"sample_{i}.png", str(i), str((number + i) % 2), "1.0", "14", "4"])
            file = root / "metadata" / f"{number}.npy"
            if array:
                np.save(file, np.array(rows))
            else:
                file.write_text("".join(" ".join(row) + "\n" for row in rows))
        return tmp_path / "raw"

    return write


def order(raw: Path) -> list[tuple[np.ndarray, int]]:
    """Images and labels in the order of the metadata."""
    root = next(raw.rglob(LEVEL))
    names = [(number, i) for number, count in ((0, 9), (2, 8), (10, 6)) for i in range(count)]
    return [(np.asarray(Image.open(root / f"imgs/{n}/sample_{i}.png")).ravel(), (n + i) % 2) for n, i in names]


def released(name: str) -> Protocol:
    return replace(Pathfinder.protocols[name], counts={})


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize("place", ["lra_release/lra_release/pathfinder32", "pathfinder32"])
def test_released_images_are_read_in_the_order_of_their_metadata(
    tmp_path: Path, tree: Tree, place: str, array: bool
) -> None:
    raw = tree(place, array)
    splits = prepare(tmp_path / "set", released("lra2020"), raw, workers=2)
    assert [len(split) for split in splits.values()] == [18, 2, 3]
    found = [(s.document(s.index[i, 0]), s.labels[i]) for s in splits.values() for i in range(len(s))]
    for (pixels, label), (expected, wanted) in zip(found, order(raw), strict=True):
        np.testing.assert_array_equal(pixels, expected)
        assert label == wanted


def test_s4_splits_as_torch_does(tmp_path: Path, tree: Tree) -> None:
    raw = tree()
    splits = prepare(tmp_path / "set", released("s4"), raw / "lra_release" / "pathfinder32")
    parts = random_split(TensorDataset(torch.arange(23)), [19, 2, 2], torch.Generator().manual_seed(42))
    for split, part in zip(splits.values(), parts, strict=True):
        for example, row in enumerate(part.indices):
            np.testing.assert_array_equal(split.document(split.index[example, 0]), order(raw)[row][0])


def test_a_centred_set_has_the_bytes_of_s4_and_another_scale(tmp_path: Path, tree: Tree) -> None:
    raw = tree() / "lra_release" / "pathfinder32"
    for name in ("s4", "s4-centred"):
        prepare(tmp_path / name, released(name), raw)
    assert contents(tmp_path / "s4") == contents(tmp_path / "s4-centred")
    assert [Pathfinder.protocols[name].scale for name in ("s4", "s4-centred")] == [(0.0, 1.0), (0.5, 0.5)]


def test_metadata_as_other_programs_save_them_give_the_same(tmp_path: Path, tree: Tree) -> None:
    raw = tree()
    prepare(tmp_path / "as released", released("lra2020"), raw)
    for file in (raw / "lra_release/pathfinder32" / LEVEL / "metadata").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    prepare(tmp_path / "saved again", released("lra2020"), raw)
    assert contents(tmp_path / "as released") == contents(tmp_path / "saved again")


def test_the_empty_file_is_left_out_and_noted(tmp_path: Path, tree: Tree) -> None:
    raw = tree()
    (raw / "lra_release/pathfinder32" / LEVEL / "imgs/2/sample_3.png").write_bytes(b"")
    splits = prepare(tmp_path / "set", released("lra2020"), raw)
    assert sum(map(len, splits.values())) == 22
    assert "imgs/2/sample_3.png" in (tmp_path / "set" / "notes.json").read_text()


def pickled(root: Path) -> None:
    np.save(root / "metadata/2.npy", np.array([["imgs/2", 1]], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (pickled, "pickled files are rejected"),
        (lambda root: (root / "metadata/2.npy").write_bytes(b"\x80\x04\x95"), "neither text nor an array"),
        (lambda root: (root / "metadata/2.npy").write_text("imgs/2 sample_0.png 0\n"), "2.npy row 1 is not a folder"),
        (lambda root: (root / "metadata/2.npy").write_text("imgs/2 sample_0.png 0 7\n"), "label 0 or 1"),
        (lambda root: (root / "metadata/2.npy").write_text("../../x y.png 0 1\n"), "row 1 is not a folder"),
        (lambda root: (root / "imgs/2/sample_1.png").unlink(), "sample_1.png, which is missing"),
        (lambda root: (root / "imgs/2/sample_1.png").write_bytes(b"\x89PNG cut"), "is not a complete PNG image"),
        (lambda root: Image.new("L", (64, 64)).save(root / "imgs/2/sample_1.png"), "64 x 64 pixels, not 32 x 32"),
        (lambda root: [p.unlink() for p in (root / "metadata").iterdir()], "holds no numbered .npy files"),
    ],
)
def test_damaged_releases_are_named(tmp_path: Path, tree: Tree, damage: Callable[[Path], object], said: str) -> None:
    raw = tree()
    damage(raw / "lra_release/pathfinder32" / LEVEL)
    with pytest.raises(DataError, match=said):
        prepare(tmp_path / "set", released("lra2020"), raw)


def test_a_release_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name its parent folder with --from DIR or LRA_DATA"):
        prepare(tmp_path / "set", released("s4"))
    with pytest.raises(DataError, match="no pathfinder32/curv_contour_length_14/metadata in"):
        prepare(tmp_path / "set", released("s4"), tmp_path)
