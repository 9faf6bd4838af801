"""One byte changed, anywhere: what is read is what was written, or it is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_fuzz import CASES, edited, edits, flipped
from hypothesis import given
from hypothesis import strategies as st
from records import record, write
from tiny_task import Tiny

from lra import registry
from lra.config import recipe
from lra.data import pack, prepared_sets
from lra.data.floors import _code, floors
from lra.errors import UserError
from lra.results import result
from lra.results.collection import Collection
from lra.results.record import RunRecord
from lra.task import SPLITS, DataError
from lra.training import checkpoint
from lra.training.checkpoint_io import AtomicCheckpointIO


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> prepared_sets.Prepared:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRA_DATA", raising=False)
    return prepared_sets.load_prepared(Tiny())


@given(data=st.data())
@CASES
def test_a_prepared_set(prepared: prepared_sets.Prepared, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(p for p in prepared.folder.iterdir() if p.name != "manifest.json")))
    whole = path.read_bytes()
    path.write_bytes(data.draw(flipped(whole)))
    try:
        with pytest.raises(DataError, match=f"{path.name} changed since it was written; remove .* and run"):
            prepared_sets.load_prepared(Tiny())
    finally:
        path.write_bytes(whole)
    prepared_sets.load_prepared(Tiny())


@given(data=st.data())
@CASES
def test_a_manifest(prepared: prepared_sets.Prepared, data: st.DataObject) -> None:
    path = prepared.folder / "manifest.json"
    whole = path.read_bytes()
    path.write_bytes(data.draw(flipped(whole)))
    try:
        found = prepared_sets.find_prepared(Tiny())
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017  (most flips are refused, some only move a blank)
    else:
        assert found is None or found.manifest == prepared.manifest
    finally:
        path.write_bytes(whole)


def test_floors_are_computed_once_for_the_same_data(
    prepared: prepared_sets.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = prepared.task.floors(prepared.split("train"), prepared.split("test"))
    assert floors(prepared) == right
    monkeypatch.setattr(type(prepared.task), "floors", lambda *_: {"majority class": 0.0})
    assert floors(prepared) == right
    other = prepared.manifest | {"sha256": dict.fromkeys(SPLITS, "0" * 64)}
    assert floors(dataclasses.replace(prepared, manifest=other)) == {"majority class": 0.0}


def test_floors_of_earlier_code_are_computed_again(
    prepared: prepared_sets.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    floors(prepared)
    assert len(_code(prepared.task)) == 64
    monkeypatch.setattr(type(prepared.task), "floors", lambda *_: {"majority class": 0.0})
    monkeypatch.setattr("lra.data.floors._code", lambda _: "that of a new baseline")
    assert floors(prepared) == {"majority class": 0.0}


@given(data=st.data())
@CASES
def test_kept_floors(prepared: prepared_sets.Prepared, data: st.DataObject) -> None:
    place = prepared.folder.with_name("strict.floors.json")
    place.unlink(missing_ok=True)
    right = floors(prepared)
    whole = place.read_bytes()
    place.write_bytes(data.draw(flipped(whole)))
    assert floors(prepared) == right


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    content = {"global_step": 3, "state_dict": {"w": torch.arange(64.0), "b": torch.ones(3)}, "lra": {"schema": 1}}
    path = tmp_path / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path, content


@given(data=st.data())
@CASES
def test_a_checkpoint(saved: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    path, _ = saved
    whole = path.read_bytes()
    path.write_bytes(data.draw(flipped(whole)))
    with pytest.raises(UserError, match=f"{path} is damaged"):
        checkpoint.read(path)
    path.write_bytes(whole)
    assert checkpoint.read(path)["global_step"] == 3


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot write .*last.ckpt: (Not a directory|File exists); make room"):
        checkpoint.write({"global_step": 1}, tmp_path / "file" / "last.ckpt")


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    checkpoint.write([1, 2], tmp_path / "list.ckpt")  # type: ignore[arg-type]
    for name, says in (("list", "holds a list"), ("absent", "is missing")):
        with pytest.raises(UserError, match=rf"{name}.ckpt {says}|{name}.ckpt is damaged \(it {says}"):
            checkpoint.read(tmp_path / f"{name}.ckpt")


def test_a_trainer_reads_what_it_wrote(saved: tuple[Path, dict[str, Any]]) -> None:
    path, content = saved
    assert AtomicCheckpointIO().load_checkpoint(str(path))["lra"] == content["lra"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        AtomicCheckpointIO().load_checkpoint(str(path))


def test_a_checkpoint_is_still_one_of_torch(saved: tuple[Path, dict[str, Any]]) -> None:
    path, content = saved
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == hashlib.sha256(path.read_bytes()[:-64]).hexdigest().encode()
    found = torch.load(path, weights_only=True)
    assert found["lra"] == content["lra"]
    assert all(torch.equal(found["state_dict"][k], v) for k, v in content["state_dict"].items())


@pytest.fixture
def results(tmp_path: Path) -> tuple[Path, Path, RunRecord]:
    write(tmp_path, record("s4d", n=40))
    path = write(tmp_path, record("gru", n=40))
    return tmp_path, path, result.read(path)


@given(data=st.data())
@CASES
def test_a_result(results: tuple[Path, Path, RunRecord], data: st.DataObject) -> None:
    root, path, right = results
    place = data.draw(st.sampled_from([path, path.with_suffix(".npz")]))
    whole = place.read_bytes()
    place.write_bytes(data.draw(flipped(whole)))
    try:
        found = Collection.read(root)
        assert len(found.records) + len(found.problems) == 2
        assert all(str(path) in problem for problem in found.problems)
        assert found.problems or right in found.records
    finally:
        place.write_bytes(whole)


@given(data=st.data())
@CASES
def test_a_recipe_file(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(data.draw(flipped((recipe.FOLDER / "quick.toml").read_bytes())))
    try:
        found, _ = recipe.resolve(str(path), "listops", "s4d")
    except UserError as error:
        assert 10 < len(str(error).splitlines()[0]) < 500  # noqa: PT017
    else:
        # what cannot be told from a choice is at least another recipe to every reader
        assert found == recipe.from_dict(json.loads(json.dumps(found.as_dict())))


@pytest.fixture
def archive(prepared: prepared_sets.Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack before compression; another cache is there to take it."""
    monkeypatch.setattr(registry.tasks, "names", lambda: ["tiny"])
    monkeypatch.setattr(registry.tasks, "get", lambda _: Tiny)
    pack.pack(prepared, tmp_path / "tiny.tar.xz")
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "other"))
    (tmp_path / "tiny.tar").write_bytes(lzma.decompress((tmp_path / "tiny.tar.xz").read_bytes()))
    return tmp_path / "tiny.tar"


@given(changes=edits)
@CASES
def test_a_pack(
    prepared: prepared_sets.Prepared, archive: Path, tmp_path: Path, changes: list[tuple[str, int, int, bytes]]
) -> None:
    path, beside = tmp_path / "bad.tar.xz", {"bad.tar.xz", "cache", "other", "tiny.tar", "tiny.tar.xz"}
    path.write_bytes(lzma.compress(edited(archive.read_bytes(), changes), preset=0))
    try:
        found = pack.unpack(path)
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        assert prepared_sets.find_prepared(Tiny()) is None
    else:
        # what follows the last member, and blanks in the manifest, are nobody's data
        assert found.manifest["sha256"] == prepared.manifest["sha256"]
        shutil.rmtree(found.folder)
    assert {p.name for p in tmp_path.iterdir()} <= beside


@given(data=st.data())
@CASES
def test_arrays_of_a_split(prepared: prepared_sets.Prepared, data: st.DataObject) -> None:
    # past the checksum: what the loader itself makes of arrays that lie
    split = data.draw(st.sampled_from(SPLITS))
    part = data.draw(st.sampled_from(("offsets", "index", "labels", "values")))
    path = prepared.folder / f"{split}.{part}.npy"
    whole = path.read_bytes()
    path.write_bytes(data.draw(flipped(whole)))
    try:
        found = prepared.split(split)
    except DataError as error:
        assert str(prepared.folder) in str(error)  # noqa: PT017
    else:
        for row in np.asarray(found.index):
            for document in row:
                assert 0 <= len(found.document(int(document))) <= len(found.values)
    finally:
        path.write_bytes(whole)
