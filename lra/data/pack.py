"""Prepared sets as one compressed file, for a machine that has neither the network nor the raw data.

A pack is a tar archive under xz: the manifest first, then the files it lists. Nothing else is ever read from one, and a
set is taken into the cache only when every byte is as the manifest and the protocol say.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import shutil
import tarfile
from pathlib import Path
from typing import IO

from lra import registry
from lra.data import prepared_sets
from lra.data.prepared_sets import MANIFEST, Prepared, hash_file, misfit, write_manifest
from lra.errors import UserError, brief
from lra.files import atomic
from lra.task import DataError, Progress, silent

CHUNK = 1 << 20


class _Member(tarfile.TarInfo):
    """A member whose extended header, which tarfile reads into memory, is refused when it is no header's size, as is
    a sparse one, whose map has no size at all."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in tarfile.REGULAR_TYPES and self.size > CHUNK:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_sparse(self, *_: object) -> tarfile.TarInfo:
        raise tarfile.ReadError("a sparse member")

    _proc_gnusparse_10 = _proc_sparse


def pack(prepared: Prepared, target: Path, progress: Progress = silent) -> int:
    """Write a prepared set to `target`; returns its size in bytes. Raises DataError when a file of it has changed, and
    where the target cannot be written."""
    try:
        _pack(prepared, target, progress)
        return target.stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from None


def _pack(prepared: Prepared, target: Path, progress: Progress) -> None:
    # where the raw files lay is nobody else's business
    manifest = json.dumps(prepared.manifest | {"source": "packed"}, indent=2).encode()
    whole, done = sum(facts["bytes"] for facts in prepared.manifest["files"].values()), 0
    with atomic(target) as temporary, tarfile.open(temporary, "w:xz", preset=6) as archive:
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(manifest)
        archive.addfile(entry, io.BytesIO(manifest))
        for name, facts in prepared.manifest["files"].items():
            progress(f"packing {name}", done, whole)
            path = prepared.folder / name
            if hash_file(path) != facts["sha256"]:
                raise DataError(f"{path}: its SHA-256 is not the one in the manifest; remove {prepared.folder}")
            entry = tarfile.TarInfo(name)
            entry.size = facts["bytes"]
            with path.open("rb") as file:
                archive.addfile(entry, file)
            done += facts["bytes"]


def unpack(source: Path, progress: Progress = silent) -> Prepared:
    """Take the set in `source` into the cache. Raises DataError, and then nothing has changed there."""
    refused = f"{source} is not a pack of this version"
    try:
        with tarfile.open(source, "r|xz", tarinfo=_Member) as archive:
            return _unpack(archive, source, progress)
    except (tarfile.TarError, lzma.LZMAError, EOFError, RecursionError) as error:
        raise DataError(f"{refused}, or not a whole one ({error}); make it again with `lra data pack`") from None
    except FileNotFoundError:
        raise DataError(f"there is no file {source}") from None
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{refused}: {error}") from None


def _unpack(archive: tarfile.TarFile, source: Path, progress: Progress) -> Prepared:
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > CHUNK:
        raise DataError(f"{source} does not begin with a {MANIFEST}; make it with `lra data pack`")
    manifest = json.loads(_opened(archive, first).read())
    if problem := misfit(manifest):
        raise DataError(f"{source}: its {MANIFEST} {problem}; pack it again")
    if manifest["task"] not in registry.tasks.names():
        # a name such as package.module:Class would import what a stranger chose
        raise DataError(f"{source} is of the task {brief(manifest['task'])}, which is not registered here")
    try:
        task, protocol = prepared_sets.resolve(manifest["task"], str(manifest["protocol"]["name"]))
    except UserError as error:
        raise DataError(f"{source}: {error}") from None
    current = prepared_sets._identity(task, protocol)
    if differing := [key for key, value in current.items() if manifest.get(key) != value]:
        raise DataError(f"{source} holds {task.name} of another version ({', '.join(differing)} differ); pack it again")
    files, folder = manifest["files"], prepared_sets.cache_root() / task.name / protocol.name
    whole, done = sum(int(facts["bytes"]) for facts in files.values()), 0
    with prepared_sets._locked(folder, progress), prepared_sets._explained(folder):
        work = folder.parent / f".{folder.name}.unpacking"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            if whole > (free := shutil.disk_usage(work).free):
                raise DataError(f"{source} needs {whole:,} bytes below {folder.parent}; {free:,} are free")
            left = dict(files)
            while (entry := archive.next()) is not None:
                facts = left.pop(entry.name, None)
                if facts is None or not entry.isreg() or entry.size != facts["bytes"]:
                    raise DataError(f"{source} holds {entry.name!r}, which its manifest does not describe")
                progress(f"unpacking {entry.name}", done, whole)
                with open(work / entry.name, "wb") as file:
                    shutil.copyfileobj(_opened(archive, entry), file, CHUNK)
                if hash_file(work / entry.name) != facts["sha256"]:
                    raise DataError(f"{source}: {entry.name} is not as its manifest says; pack it again")
                done += entry.size
            if left:
                raise DataError(f"{source} lacks {', '.join(left)}; pack it again")
            counts, sums = prepared_sets._measure(task, work, progress)
            problems = prepared_sets._departures(task, protocol, counts, sums)
            if problems or counts != manifest["counts"] or sums != manifest["sha256"]:
                raise DataError(f"{source} is not the set it says it is {'; '.join(problems)}".rstrip())
            write_manifest(work, manifest)
            prepared_sets._swap(work, folder)
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(work)
    prepared = prepared_sets.find(task, protocol)
    assert prepared is not None
    return prepared


def _opened(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(entry)
    assert file is not None
    return file
