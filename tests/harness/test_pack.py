"""Packs: a set travels whole, and nothing else gets in."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_task import Tiny

from lra import registry
from lra.data import pack as kit
from lra.data import prepared_sets
from lra.data.prepared_sets import MANIFEST, Prepared
from lra.task import SPLITS, DataError


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    names, get = registry.tasks.names(), registry.tasks.get
    monkeypatch.setattr(registry.tasks, "names", lambda: [*names, "tiny"])
    monkeypatch.setattr(registry.tasks, "get", lambda name: Tiny if name == "tiny" else get(name))
    return prepared_sets.load_prepared(Tiny())


@pytest.fixture
def packed(prepared: Prepared, tmp_path: Path) -> Path:
    size = kit.pack(prepared, tmp_path / "tiny.tar.xz")
    assert size == (tmp_path / "tiny.tar.xz").stat().st_size
    return tmp_path / "tiny.tar.xz"


def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "other"))
    return tmp_path / "other"


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as archive:
        return [(entry, archive.extractfile(entry).read()) for entry in archive]  # type: ignore[union-attr]


def write(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        for entry, content in entries:
            entry.size = 0 if entry.issym() else len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_a_set_arrives_as_it_left(
    prepared: Prepared, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = elsewhere(tmp_path, monkeypatch)
    assert kit.unpack(packed).checksum == prepared.checksum
    for name in prepared.manifest["files"]:
        assert (cache / "tiny" / "strict" / name).read_bytes() == (prepared.folder / name).read_bytes()
    assert prepared_sets.verify(Tiny()) == []
    assert sorted(p.name for p in (cache / "tiny").iterdir()) == [".strict.lock", "strict"]
    assert "cache" not in (cache / "tiny" / "strict" / MANIFEST).read_text()


def test_a_changed_file_is_not_packed(prepared: Prepared, tmp_path: Path) -> None:
    path = prepared.folder / "train.labels.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(DataError, match=r"train.labels.npy: SHA-256 differs"):
        kit.pack(prepared, tmp_path / "bad.tar.xz")
    assert not (tmp_path / "bad.tar.xz").exists()


def link(entries: list[tuple[tarfile.TarInfo, bytes]]) -> list[tuple[tarfile.TarInfo, bytes]]:
    entry = entries[1][0]
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return entries


def renamed(entries: list[tuple[tarfile.TarInfo, bytes]], name: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    manifest = json.loads(entries[0][1])
    manifest["files"][name] = manifest["files"].pop(entries[1][0].name)
    entries[1][0].name = name
    return [(entries[0][0], json.dumps(manifest).encode()), *entries[1:]]


def told(
    entries: list[tuple[tarfile.TarInfo, bytes]], key: str, value: object = None
) -> list[tuple[tarfile.TarInfo, bytes]]:
    """With another value in the manifest, or without it."""
    manifest = json.loads(entries[0][1]) | {key: value}
    if value is None:
        del manifest[key]
    return [(entries[0][0], json.dumps(manifest).encode()), *entries[1:]]


def headed(
    entries: list[tuple[tarfile.TarInfo, bytes]], kind: bytes, content: bytes, times: int = 1
) -> list[tuple[tarfile.TarInfo, bytes]]:
    """With headers of another kind before the last member, `times` of them in a row."""
    extended = []
    for _ in range(times):
        entry = tarfile.TarInfo("header")
        entry.type = kind
        extended.append((entry, content))
    return [*entries[:-1], *extended, entries[-1]]


SPOILT = {
    "a link": (link, "which its manifest does not list"),
    "a name above": (lambda e: renamed(e, "../out.npy"), "manifest.json does not have the layout of a manifest"),
    "an absolute name": (lambda e: renamed(e, "/tmp/out.npy"), "manifest.json does not have the layout of a manifest"),
    "twice the same": (lambda e: [*e, e[-1]], "which its manifest does not list"),
    "one missing": (lambda e: e[:-1], "lacks "),
    "another byte": (lambda e: [*e[:-1], (e[-1][0], e[-1][1][:-1] + b"\7")], "differs from the manifest"),
    "no manifest": (lambda e: e[1:], "does not begin with a manifest.json"),
    "another task": (lambda e: told(e, "task", "os:system"), "'os:system', which is not registered"),
    "another version": (lambda e: told(e, "version", 99), "another version of tiny .different: version"),
    "another protocol": (lambda e: told(e, "protocol", {"name": "strickt"}), "bad.tar.xz: unknown protocol of tiny"),
    "other counts": (lambda e: told(e, "counts", dict.fromkeys(SPLITS, 3)), "the arrays differ from manifest.json"),
    "a header bomb": (lambda e: headed(e, tarfile.XHDTYPE, bytes(kit.CHUNK + 1)), "a header of 1,048,577 bytes"),
    "a long name": (lambda e: headed(e, tarfile.GNUTYPE_LONGNAME, b"x" * (kit.CHUNK + 1)), "a header of 1,048,577"),
    "headers without end": (lambda e: headed(e, tarfile.XHDTYPE, b"", 2000), "or is truncated .maximum recursion"),
    "a sparse member": (lambda e: headed(e, tarfile.GNUTYPE_SPARSE, b""), "a sparse member"),
    "a sparse map": (
        lambda e: headed(e, tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
        "a sparse member",
    ),
    "no files": (lambda e: told(e, "files", 3), "manifest.json does not have the layout of a manifest"),
    "a key too few": (lambda e: told(e, "lra"), "manifest.json lacks lra; create it again"),
    "no object": (lambda e: [(e[0][0], b"3"), *e[1:]], "manifest.json lacks format, task"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_not_whole_and_plain_is_refused(
    packed: Path, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, said = SPOILT[fault]
    bad = write(tmp_path / "bad.tar.xz", spoil(members(packed)))
    cache = elsewhere(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=said) as caught:
        kit.unpack(bad)
    assert "\n" not in str(caught.value)
    assert not [p for p in cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    assert not (tmp_path / "out.npy").exists()


def test_a_torn_or_foreign_file_is_named(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packed.read_bytes()
    elsewhere(tmp_path, monkeypatch)
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:-40] + bytes(40)):
        packed.write_bytes(content)
        with pytest.raises(DataError, match="not a pack of this version, or is truncated"):
            kit.unpack(packed)
    with pytest.raises(DataError, match="does not exist"):
        kit.unpack(tmp_path / "absent")


def told_progress(seen: list[tuple[str, int, int]], verb: str) -> list[tuple[int, int]]:
    return [(done, total) for what, done, total in seen if what.startswith(verb)]


def test_progress_counts_the_bytes_of_the_files(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [facts["bytes"] for facts in prepared.manifest["files"].values()]
    wanted = [(sum(sizes[:i]), sum(sizes)) for i in range(len(sizes))]
    seen: list[tuple[str, int, int]] = []
    kit.pack(prepared, tmp_path / "a.tar.xz", lambda *told: seen.append(told))
    assert told_progress(seen, "packing") == wanted
    elsewhere(tmp_path, monkeypatch)
    kit.unpack(tmp_path / "a.tar.xz", lambda *told: seen.append(told))
    assert told_progress(seen, "unpacking") == wanted


@pytest.mark.parametrize("more", [0, 1])
def test_a_manifest_has_a_largest_size(
    packed: Path, more: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry, content), *others = members(packed)
    padded = write(tmp_path / "padded.tar.xz", [(entry, content + b" " * (2**20 + more - len(content))), *others])
    elsewhere(tmp_path, monkeypatch)
    if more:
        with pytest.raises(DataError, match="does not begin with a manifest"):
            kit.unpack(padded)
    else:
        assert kit.unpack(padded).folder.is_dir()


@pytest.mark.parametrize("short", [0, 1])
def test_a_pack_that_does_not_fit_is_not_begun(
    prepared: Prepared, packed: Path, short: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(facts["bytes"] for facts in prepared.manifest["files"].values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=whole - short))
    cache = elsewhere(tmp_path, monkeypatch)
    if short:
        with pytest.raises(DataError, match=f"needs {whole:,} bytes in .*; {whole - 1:,} are free"):
            kit.unpack(packed)
        assert [p.name for p in (cache / "tiny").iterdir()] == [".strict.lock"]
    else:
        assert kit.unpack(packed).checksum == prepared.checksum


def test_files_that_cannot_be_read_or_written_are_named(prepared: Prepared, packed: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / ("x" * 300), Path("\0")):
        with pytest.raises(DataError) as caught:
            kit.unpack(place)
        assert "\n" not in str(caught.value)
    for place in (tmp_path, packed / "inside.tar.xz", tmp_path / ("x" * 300), Path("\0")):
        with pytest.raises(DataError, match="cannot write"):
            kit.pack(prepared, place)
    assert packed.is_file()
