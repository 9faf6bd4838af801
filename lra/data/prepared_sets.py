"""The cache of prepared sets: `<cache>/<task>/<protocol>/`, one folder of arrays with a manifest.

A set is prepared in a sibling folder under a lock, checked against the constants of its protocol, given its manifest
last and renamed into place, so a half-finished preparation is never used and two processes wait for each other. Before
a set is used, its files are compared with the checksums of the manifest. The cache is `LRA_CACHE`, by default
`~/.cache/lra`. Raw files are looked for in `source`, else in `LRA_DATA`.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lra import __version__, registry
from lra.errors import unknown
from lra.files import atomic, safe, seal
from lra.results.environment import cpus
from lra.task import SPLITS, DataError, Progress, Protocol, Split, Task, silent

MANIFEST = "manifest.json"
KEYS = ("format", "task", "version", "protocol", "source", "lra", "counts", "sha256", "files")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared set. Raises DataError where it is missing, damaged or was changed."""
    path = folder / MANIFEST
    advice = f"remove {folder} and prepare it again"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {advice}") from None
    if problem := misfit(manifest):
        raise DataError(f"{path} {problem}; {advice}")
    given = manifest.pop("seal", None)
    # sets prepared before manifests were sealed carry no seal and no other key either
    if (set(manifest) != set(KEYS) and given is None) or (given is not None and given != seal(manifest)):
        raise DataError(f"{path} was changed after it was written; {advice}")
    return manifest


def misfit(manifest: Any) -> str:
    """What keeps this from being a manifest; empty when nothing does."""
    if missing := [key for key in KEYS if not isinstance(manifest, dict) or key not in manifest]:
        return f"lacks {', '.join(missing)}"
    sound = (
        all(isinstance(manifest[key], dict) for key in ("counts", "sha256", "files"))
        and all(split in manifest[key] for key in ("counts", "sha256") for split in SPLITS)
        and all(safe(name) == name and isinstance(f, dict) and {"bytes", "sha256"} <= set(f)
                for name, f in manifest["files"].items())
    )  # fmt: skip
    return "" if sound else "is not laid out as a manifest"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with atomic(folder / MANIFEST) as temporary:
        sealed = manifest | {"seal": seal(manifest)}
        temporary.write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")


def hash_file(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file; sync: after it is on disk, so that it outlives a power cut as the rename after it will."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprints(split: Split) -> list[bytes]:
    """A fingerprint per example, of its documents in order."""
    used = np.unique(split.index)
    of = {int(d): hashlib.sha256(split.document(int(d)).tobytes()).digest() for d in used}
    return [b"".join(of[int(d)] for d in row) for row in np.asarray(split.index)]


def shared(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    """How many of the second are in the first too."""
    known = set(first)
    return sum(mark in known for mark in second)


FORMAT = 1
OVERLAP, COMPARED = 0.05, 1000
"""Largest share of a split that may be in an earlier one (released sets do hold a few texts twice), and the smallest
split of which a share means anything."""
_known_intact: set[tuple[Any, ...]] = set()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A verified prepared set. manifest: format, task, version, protocol, source, lra, counts, sha256, files."""

    task: Task
    protocol: Protocol
    folder: Path
    manifest: dict[str, Any]

    def split(self, name: str) -> Split:
        """One split, memory-mapped. Raises DataError when its arrays are missing or corrupt."""
        return self.task.load(self.folder, name)

    @property
    def checksum(self) -> str:
        """SHA-256 over the checksums of the splits: what identifies the data of a result."""
        return hashlib.sha256("".join(self.manifest["sha256"][s] for s in SPLITS).encode()).hexdigest()

    @property
    def notes(self) -> dict[str, Any]:
        """What preparation found and wrote down, such as near-duplicates across splits."""
        path = self.folder / "notes.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); {_remedy(self.task, self.protocol, self.folder)}"
            ) from None


def cache_root() -> Path:
    return Path(os.environ.get("LRA_CACHE") or Path.home() / ".cache" / "lra").expanduser()


def source_folder(source: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with raw files: `source` (--from), else LRA_DATA, else None. DataError when it does not exist."""
    given, origin = (source, "--from") if source is not None else (os.environ.get("LRA_DATA"), "LRA_DATA")
    if not given:
        return None
    folder = os.path.expanduser(given)
    # unlike Path.is_dir it takes an impossible name for a missing folder
    if not os.path.isdir(folder):
        raise DataError(f"{origin} is {given}, which is not a folder; point it at the folder with the raw files")
    return Path(folder).resolve()


def resolve(task: str | Task, protocol: str | Protocol | None = None) -> tuple[Task, Protocol]:
    """A task and one of its protocols (by default the first). Raises UserError with the nearest right name."""
    resolved: Task = registry.tasks.get(task)() if isinstance(task, str) else task
    if safe(resolved.name) != resolved.name:
        raise DataError(f"the task name {resolved.name!r} is no folder name; use letters, digits and -_. only")
    if isinstance(protocol, Protocol):
        if safe(protocol.name) != protocol.name:
            raise DataError(f"a protocol is called {protocol.name!r}, which is no name for a folder")
        return resolved, protocol
    name = protocol or next(iter(resolved.protocols))
    if name not in resolved.protocols:
        raise unknown(f"protocol of {resolved.name}", name, resolved.protocols)
    return resolved, resolved.protocols[name]


def find(task: str | Task, protocol: str | Protocol | None = None) -> Prepared | None:
    """The prepared set if it is there and current, else None. Raises DataError if it is there but damaged."""
    owner, frozen = resolve(task, protocol)
    folder = cache_root() / owner.name / frozen.name
    if not folder.is_dir():
        return None
    manifest = read_manifest(folder)
    if any(manifest[key] != value for key, value in _identity(owner, frozen).items()):
        return None
    for name, facts in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != facts["bytes"]:
            state = "is missing" if size is None else f"holds {size:,} bytes instead of {facts['bytes']:,}"
            raise DataError(f"{folder / name} {state}; {_remedy(owner, frozen, folder)}")
    return Prepared(owner, frozen, folder, manifest)


def prepared(
    task: str | Task,
    protocol: str | Protocol | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """The prepared set of a task under a protocol (by default its first), made now if it is missing or out of date.

    source: folder with the raw files (else LRA_DATA). workers: at most so many at once, by default one per usable CPU;
    the bytes do not depend on it. Raises DataError, and UserError for an unknown name.
    """
    owner, frozen = resolve(task, protocol)
    if source is not None and not frozen.raw:
        raise DataError(f"{owner.name} under {frozen.name!r} is generated here and reads no files; leave out --from")
    folder, report = cache_root() / owner.name / frozen.name, progress or silent
    if existing := find(owner, frozen):
        return _same_source(_intact(existing, report), source)
    with _locked(folder, report):
        if existing := find(owner, frozen):
            return _same_source(_intact(existing, report), source)
        _prepare(owner, frozen, folder, source_folder(source) if frozen.raw else None, workers or cpus(), report)
    done = find(owner, frozen)
    if done is None:
        raise DataError(f"{folder} changed while it was being opened; try again")
    return done


def verify(task: str | Task, protocol: str | Protocol | None = None, *, progress: Progress | None = None) -> list[str]:
    """What is wrong with a prepared set, one line each, every byte read; empty when nothing is."""
    owner, frozen = resolve(task, protocol)
    report = progress or silent
    try:
        existing = find(owner, frozen)
        if existing is None:
            return [f"{owner.name} under {frozen.name!r} is not prepared: run `{owner.command(frozen)}`"]
        remedy = _remedy(owner, frozen, existing.folder)
        if changed := _changed(existing, report):
            said = "its SHA-256 is not the one in the manifest"
            return [f"{existing.folder / name}: {said}; {remedy}" for name in changed]
        counts, sums = _measure(owner, existing.folder, report)
        wrong = [f"counts of {s}" for s in SPLITS if existing.manifest["counts"].get(s) != counts[s]]
        wrong += [f"sha256 of {s}" for s in SPLITS if existing.manifest["sha256"].get(s) != sums[s]]
        return [f"{existing.folder / MANIFEST}: {what} does not match the arrays; {remedy}" for what in wrong] + [
            f"{problem}; {remedy}" for problem in _departures(owner, frozen, counts, sums)
        ]
    except DataError as error:
        return [str(error)]


def split_checksum(split: Split) -> str:
    """SHA-256 of a split: dtype, shape and little-endian bytes of labels, index, offsets and values, in that order."""
    digest = hashlib.sha256()
    for array in (split.labels, split.index, split.offsets, split.values):
        digest.update(f"{array.dtype.name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8).data)
    return digest.hexdigest()


def _identity(task: Task, protocol: Protocol) -> dict[str, Any]:
    """What a manifest has to say for its set to be current. The wording of notes is no part of it."""
    fields = {k: v for k, v in dataclasses.asdict(protocol).items() if k not in ("note", "raw")}
    return {"format": FORMAT, "task": task.name, "version": task.version, "protocol": json.loads(json.dumps(fields))}


def _remedy(task: Task, protocol: Protocol, folder: Path) -> str:
    return f"remove {folder} and run `{task.command(protocol)}`"


def _intact(prepared_set: Prepared, progress: Progress) -> Prepared:
    """The set, every file compared with its checksum: once per process for as long as no file is touched."""
    states = [(prepared_set.folder / name).stat() for name in prepared_set.manifest["files"]]
    mark = (str(prepared_set.folder), *((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states))
    if mark not in _known_intact:
        if changed := _changed(prepared_set, progress):
            what = f"{', '.join(changed)} changed since {'it was' if len(changed) == 1 else 'they were'} written"
            remedy = _remedy(prepared_set.task, prepared_set.protocol, prepared_set.folder)
            raise DataError(f"{prepared_set.folder}: {what}; {remedy}")
        _known_intact.add(mark)
    return prepared_set


def _changed(prepared_set: Prepared, progress: Progress) -> list[str]:
    """The files that do not have the checksum of the manifest."""
    files, wrong = prepared_set.manifest["files"], []
    for number, (name, facts) in enumerate(files.items()):
        progress("checking files", number, len(files))
        if hash_file(prepared_set.folder / name) != facts["sha256"]:
            wrong.append(name)
    return wrong


def _same_source(prepared_set: Prepared, source: str | os.PathLike[str] | None) -> Prepared:
    frozen, was = all(prepared_set.protocol.sha256.get(s) for s in SPLITS), prepared_set.manifest["source"]
    if source is not None and not frozen and str(source_folder(source)) != was:
        remedy = _remedy(prepared_set.task, prepared_set.protocol, prepared_set.folder)
        raise DataError(f"{prepared_set.folder} was prepared from {was}; to prepare it from {source}, {remedy}")
    return prepared_set


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock beside `folder`; another process that holds it is waited for."""
    path = folder.parent / f".{folder.name}.lock"
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares this set", 0, 0)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what a file system refuses into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(cache_root()):
            raise DataError(f"cannot open {os.fsdecode(error.filename)}: {error.strerror}") from error
        advice = "point LRA_CACHE at a folder you can write to"
        # numpy reports a short write without an error number
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):
            advice = "free some space or point LRA_CACHE at another disk, and run the command again"
        reason = error.strerror or f"no space left ({error})"
        raise DataError(f"cannot write below {folder.parent}: {reason}; {advice}") from error


def _prepare(
    task: Task, protocol: Protocol, folder: Path, source: Path | None, workers: int, progress: Progress
) -> None:
    """Prepare into a sibling folder and rename it into place; the lock is held."""
    identity = _identity(task, protocol)
    key = hashlib.sha256(json.dumps([identity, str(source)], sort_keys=True).encode()).hexdigest()[:12]
    work = folder.parent / f".{protocol.name}.{key}.partial"
    with _explained(folder):
        for left in folder.parent.glob(f".{protocol.name}.*.partial"):
            if left != work or not task.resumable:
                shutil.rmtree(left)
        work.mkdir(exist_ok=True)
        for left in (work / MANIFEST, *work.glob(".*.partial")):
            left.unlink(missing_ok=True)
        try:
            task.prepare(work, protocol, source=source, workers=workers, progress=progress)
            counts, sums = _measure(task, work, progress)
            problems = _departures(task, protocol, counts, sums) or _overlaps(task, protocol, work, progress)
            if problems:
                shutil.rmtree(work, ignore_errors=True)
                where = f"the files in {source} are not" if protocol.raw else "this machine did not generate"
                raise DataError(f"{where} the data this protocol froze: {'; '.join(problems)}")
            files = {
                p.name: {"bytes": p.stat().st_size, "sha256": hash_file(p, sync=True)} for p in sorted(work.iterdir())
            }
            manifest = identity | {
                "source": str(source) if protocol.raw else "generated",
                "lra": __version__,
                "counts": counts,
                "sha256": sums,
                "files": files,
            }
            write_manifest(work, manifest)
            _swap(work, folder)
        except BaseException:
            if not task.resumable:
                shutil.rmtree(work, ignore_errors=True)
            raise


def _swap(work: Path, folder: Path) -> None:
    """Rename `work` to `folder`; an out-of-date set there is moved aside first and then removed."""
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    work.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _measure(task: Task, folder: Path, progress: Progress) -> tuple[dict[str, int], dict[str, str]]:
    counts, sums = {}, {}
    for number, name in enumerate(SPLITS):
        progress("hashing splits", number, len(SPLITS))
        split = task.load(folder, name)
        counts[name], sums[name] = len(split), split_checksum(split)
    progress("hashing splits", len(SPLITS), len(SPLITS))
    return counts, sums


def _departures(task: Task, protocol: Protocol, counts: dict[str, int], sums: dict[str, str]) -> list[str]:
    """Where a measured set departs from the constants of its protocol."""
    what = f"{task.name} under {protocol.name!r}"
    return [
        f"{what}: {split} has {counts[split]:,} examples, not {expected:,}"
        for split, expected in protocol.counts.items()
        if counts[split] != expected
    ] or [
        f"{what}: {split} has SHA-256 {sums[split][:16]}..., not {expected[:16]}..."
        for split, expected in protocol.sha256.items()
        if expected and sums[split] != expected
    ]


def _overlaps(task: Task, protocol: Protocol, folder: Path, progress: Progress) -> list[str]:
    """Pairs of splits that share more than a twentieth of the second, byte for byte: then one was taken for the other.

    Where a protocol selects on the test split, as some published ones do, validation is the test split.
    """
    if all(protocol.sha256.get(split) for split in SPLITS):
        # frozen bytes were looked at when they were frozen
        return []
    progress("comparing splits", 0, 0)
    marks = {split: fingerprints(task.load(folder, split)) for split in SPLITS}
    pairs = [("train", "test")] if protocol.selection == "test" else list(combinations(SPLITS, 2))
    overlaps = [(a, b, shared(marks[a], marks[b]), len(marks[b])) for a, b in pairs]
    return [
        f"{task.name} under {protocol.name!r}: {count:,} of the {total:,} examples of {b} are in {a} too"
        for a, b, count, total in overlaps
        if total >= COMPARED and count > total * OVERLAP
    ]
