"""Packs: prepared sets as one compressed file, for machines without network and raw data.

A pack is a tar archive compressed with xz. It holds the manifest, then the files that the manifest lists; other members
are rejected. A set enters the cache only if the files have the checksums in the manifest and the arrays those of the
protocol.
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
from lra.data.prepared_sets import MANIFEST, Prepared, hash_file, manifest_problem, write_manifest
from lra.errors import UserError, brief
from lra.files import atomic, cache_root
from lra.task import DataError, Progress, silent

CHUNK = 1 << 20


class _Member(tarfile.TarInfo):
    """A member of a pack. Rejects headers above 1 MiB, which tarfile reads into memory, and sparse members, whose size
    map is unlimited."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in tarfile.REGULAR_TYPES and self.size > CHUNK:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_sparse(self, *_: object) -> tarfile.TarInfo:
        raise tarfile.ReadError("a sparse member")

    _proc_gnusparse_10 = _proc_sparse


def pack(prepared: Prepared, target: Path, progress: Progress = silent) -> int:
    """Write a prepared set to `target` and return the size of the pack in bytes.

    Raises DataError if a file of the set has changed or if the target cannot be written.
    """
    try:
        _pack(prepared, target, progress)
        return target.stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from None


def _pack(prepared: Prepared, target: Path, progress: Progress) -> None:
    # the path of the raw files is private
    manifest = json.dumps(prepared.manifest | {"source": "packed"}, indent=2).encode()
    total, done = sum(facts["bytes"] for facts in prepared.manifest["files"].values()), 0
    with atomic(target) as temporary, tarfile.open(temporary, "w:xz", preset=6) as archive:
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(manifest)
        archive.addfile(entry, io.BytesIO(manifest))
        for name, facts in prepared.manifest["files"].items():
            progress(f"packing {name}", done, total)
            path = prepared.folder / name
            if hash_file(path) != facts["sha256"]:
                raise DataError(f"{path}: SHA-256 differs from the manifest; remove {prepared.folder}")
            entry = tarfile.TarInfo(name)
            entry.size = facts["bytes"]
            with path.open("rb") as file:
                archive.addfile(entry, file)
            done += facts["bytes"]


def unpack(source: Path, progress: Progress = silent) -> Prepared:
    """Add the set in the pack `source` to the cache. Raises DataError, and then leaves the cache unchanged."""
    problem = f"{source} is not a pack of this version"
    try:
        with tarfile.open(source, "r|xz", tarinfo=_Member) as archive:
            return _unpack(archive, source, progress)
    except (tarfile.TarError, lzma.LZMAError, EOFError, RecursionError) as error:
        raise DataError(f"{problem}, or is truncated ({error}); create it again with `lra data pack`") from None
    except FileNotFoundError:
        raise DataError(f"{source} does not exist") from None
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}") from None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{problem}: {error}") from None


def _unpack(archive: tarfile.TarFile, source: Path, progress: Progress) -> Prepared:
    first = archive.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > CHUNK:
        raise DataError(f"{source} does not begin with a {MANIFEST}; create it with `lra data pack`")
    manifest = json.loads(_open_member(archive, first).read())
    if problem := manifest_problem(manifest):
        raise DataError(f"{source}: {MANIFEST} {problem}; create it again with `lra data pack`")
    if manifest["task"] not in registry.tasks.names():
        # a name such as package.module:Class would import code chosen by the author of the pack
        raise DataError(f"{source} holds the task {brief(manifest['task'])}, which is not registered")
    try:
        task, protocol = prepared_sets.resolve(manifest["task"], str(manifest["protocol"]["name"]))
    except UserError as error:
        raise DataError(f"{source}: {error}") from None
    current = prepared_sets.identity(task, protocol)
    if differing := [key for key in {"code": None} | current if manifest.get(key) != current.get(key)]:
        raise DataError(
            f"{source} holds another version of {task.name} (different: {', '.join(differing)}); create it again"
        )
    files, folder = manifest["files"], cache_root() / task.name / protocol.name
    total, done = sum(int(facts["bytes"]) for facts in files.values()), 0
    with prepared_sets.lock(folder, progress), prepared_sets.explain_os_errors(folder):
        work = folder.parent / f".{folder.name}.unpacking"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            if total > (free := shutil.disk_usage(work).free):
                raise DataError(f"{source} needs {total:,} bytes in {folder.parent}; {free:,} are free")
            missing = dict(files)
            while (entry := archive.next()) is not None:
                facts = missing.pop(entry.name, None)
                if facts is None or not entry.isreg() or entry.size != facts["bytes"]:
                    raise DataError(f"{source} holds {entry.name!r}, which its manifest does not list")
                progress(f"unpacking {entry.name}", done, total)
                with open(work / entry.name, "wb") as file:
                    shutil.copyfileobj(_open_member(archive, entry), file, CHUNK)
                if hash_file(work / entry.name) != facts["sha256"]:
                    raise DataError(
                        f"{source}: SHA-256 of {entry.name} differs from the manifest; create the pack again"
                    )
                done += entry.size
            if missing:
                raise DataError(f"{source} lacks {', '.join(missing)}; create it again")
            counts, sums = prepared_sets.measure_splits(task, protocol, work, progress)
            problems = prepared_sets.protocol_mismatches(task, protocol, counts, sums)
            if problems or counts != manifest["counts"] or sums != manifest["sha256"]:
                reason = "; ".join(problems) or f"the arrays differ from {MANIFEST}"
                raise DataError(f"{source} does not hold the set it names: {reason}; create it again")
            write_manifest(work, manifest)
            prepared_sets.replace_folder(work, folder)
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(work)
    prepared = prepared_sets.find_prepared(task, protocol)
    assert prepared is not None
    return prepared


def _open_member(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(entry)
    assert file is not None
    return file
