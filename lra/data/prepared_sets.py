"""The cache of prepared sets: `<cache>/<task>/<protocol>/`, one folder of arrays with a manifest.

A set is prepared in a sibling folder, under a lock that makes other processes wait. Its arrays are compared with the
constants of the protocol, the manifest is written, and the folder is renamed into place, so an unfinished set is never
used. Before a set is used, its files are compared with the checksums in the manifest. It is prepared again if the
source of a user's task has changed, or its raw files where the protocol has no frozen checksums.
`LRA_CACHE` names the cache, by default `~/.cache/lra`. Raw files are read from `source`, else from `LRA_DATA`.
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
from lra.data import raw_files
from lra.data.checks import check_split
from lra.errors import unknown
from lra.files import atomic, cache_root, safe_name, seal
from lra.results.environment import cpus
from lra.source import source_files
from lra.task import SPLITS, DataError, Progress, Protocol, Split, Task, silent

MANIFEST = "manifest.json"
KEYS = ("format", "task", "version", "protocol", "source", "lra", "counts", "sha256", "files")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a prepared set. Raises DataError if it is missing, damaged or changed."""
    path = folder / MANIFEST
    advice = f"remove {folder} and prepare it again"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {advice}") from None
    if problem := manifest_problem(manifest):
        raise DataError(f"{path} {problem}; {advice}")
    stored = manifest.pop("seal", None)
    # manifests of early versions have exactly these keys and no seal
    if (set(manifest) != set(KEYS) and stored is None) or (stored is not None and stored != seal(manifest)):
        raise DataError(f"{path} was changed after it was written; {advice}")
    return manifest


def manifest_problem(manifest: Any) -> str:
    """The first error in the layout of a manifest; empty if it is valid."""
    if missing := [key for key in KEYS if not isinstance(manifest, dict) or key not in manifest]:
        return f"lacks {', '.join(missing)}"
    valid = (
        all(isinstance(manifest[key], dict) for key in ("counts", "sha256", "files"))
        and all(split in manifest[key] for key in ("counts", "sha256") for split in SPLITS)
        and all(safe_name(name) == name and isinstance(f, dict) and {"bytes", "sha256"} <= set(f)
                for name, f in manifest["files"].items())
    )  # fmt: skip
    return "" if valid else "does not have the layout of a manifest"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Seal a manifest and write it atomically."""
    with atomic(folder / MANIFEST) as temporary:
        sealed = manifest | {"seal": seal(manifest)}
        temporary.write_text(json.dumps(sealed, indent=2) + "\n", encoding="utf-8")


def hash_file(path: Path, sync: bool = False) -> str:
    """SHA-256 of a file. sync: first flush the file to disk, so that it survives a power cut."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def example_hashes(split: Split) -> list[bytes]:
    """The SHA-256 of each example's documents, concatenated in order."""
    numbers = np.unique(split.index)
    hashes = {int(number): hashlib.sha256(split.document(int(number)).tobytes()).digest() for number in numbers}
    return [b"".join(hashes[int(number)] for number in row) for row in np.asarray(split.index)]


def count_shared(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    """Number of entries of `second` that also occur in `first`."""
    known = set(first)
    return sum(entry in known for entry in second)


FORMAT = 1
MAX_OVERLAP = 0.05
"""Largest share of a split that may occur in an earlier one; released sets do contain a few texts twice."""
MIN_COMPARED = 1000
"""Smallest split whose overlap is checked: in smaller splits the share is not informative."""
_verified: set[tuple[Any, ...]] = set()
"""Sets whose checksums were verified in this process, with the state of their files."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A verified prepared set. manifest: format, task, version, protocol, source, lra, counts, sha256, files, and of a
    user's task its source code, of a set without frozen checksums its raw files.

    replaced: why an earlier set was prepared again for this call; empty if it was not.
    """

    task: Task
    protocol: Protocol
    folder: Path
    manifest: dict[str, Any]
    replaced: str = ""

    def split(self, name: str) -> Split:
        """One split, memory-mapped. Raises DataError if its arrays are missing or corrupt."""
        return self.task.load(self.folder, name)

    @property
    def checksum(self) -> str:
        """SHA-256 of the splits' checksums; identifies the data of a result."""
        return hashlib.sha256("".join(self.manifest["sha256"][s] for s in self.protocol.splits).encode()).hexdigest()

    @property
    def notes(self) -> dict[str, Any]:
        """Notes that preparation wrote, such as near-duplicates across splits; {} without any."""
        path = self.folder / "notes.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path} cannot be read ({error}); {_remedy(self.task, self.protocol, self.folder)}"
            ) from None


def source_folder(source: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with raw files: `source` (--from), else LRA_DATA, else None. Raises DataError if it does not exist."""
    value, origin = (source, "--from") if source is not None else (os.environ.get("LRA_DATA"), "LRA_DATA")
    if not value:
        return None
    folder = os.path.expanduser(value)
    # unlike Path.is_dir, os.path.isdir returns False for a name the file system does not allow
    if not os.path.isdir(folder):
        raise DataError(f"{origin} is {value}, which is not a folder; point it at the folder with the raw files")
    return Path(folder).resolve()


def resolve(task: str | Task, protocol: str | Protocol | None = None) -> tuple[Task, Protocol]:
    """A task and one of its protocols, by default the first. Raises UserError, with a suggestion, for unknown names."""
    resolved: Task = registry.tasks.get(task)() if isinstance(task, str) else task
    if safe_name(resolved.name) != resolved.name:
        raise DataError(f"the task name {resolved.name!r} is not a folder name; use only letters, digits and -_.")
    if isinstance(protocol, Protocol):
        if safe_name(protocol.name) != protocol.name:
            raise DataError(
                f"the protocol name {protocol.name!r} is not a folder name; use only letters, digits and -_."
            )
        return resolved, protocol
    name = protocol or next(iter(resolved.protocols))
    if name not in resolved.protocols:
        raise unknown(f"protocol of {resolved.name}", name, resolved.protocols)
    return resolved, resolved.protocols[name]


def find_prepared(task: str | Task, protocol: str | Protocol | None = None) -> Prepared | None:
    """The prepared set in the cache; None if there is none or it is out of date. Raises DataError if it is damaged."""
    owner, frozen = resolve(task, protocol)
    folder = cache_root() / owner.name / frozen.name
    if not folder.is_dir():
        return None
    manifest = read_manifest(folder)
    if _outdated(owner, frozen, manifest):
        return None
    for name, facts in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != facts["bytes"]:
            problem = "is missing" if size is None else f"has {size:,} bytes instead of {facts['bytes']:,}"
            raise DataError(f"{folder / name} {problem}; {_remedy(owner, frozen, folder)}")
    return Prepared(owner, frozen, folder, manifest)


def load_prepared(
    task: str | Task,
    protocol: str | Protocol | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """The prepared set of a task under a protocol, by default its first; prepared first if missing or out of date.

    source: folder with the raw files (else LRA_DATA, else the folder that an outdated set was prepared from). workers:
    number of processes or threads, by default one per usable CPU; the prepared bytes do not depend on it. Raises
    DataError, and UserError for an unknown name.
    """
    owner, frozen = resolve(task, protocol)
    if source is not None and not frozen.raw:
        raise DataError(f"{owner.name} under {frozen.name!r} is generated and reads no files; leave out --from")
    folder, progress = cache_root() / owner.name / frozen.name, progress or silent
    if existing := find_prepared(owner, frozen):
        _check_files(existing, progress)
        _check_source(existing, source)
        return existing
    with lock(folder, progress):
        if existing := find_prepared(owner, frozen):
            _check_files(existing, progress)
            _check_source(existing, source)
            return existing
        replaced, raw = "", source_folder(source) if frozen.raw else None
        if folder.is_dir():
            earlier = read_manifest(folder)
            replaced = _outdated(owner, frozen, earlier)
            if "raw" in earlier and raw is None and Path(earlier["source"]).is_dir():
                raw = Path(earlier["source"])
            progress(f"{replaced}; preparing again", 0, 0)
        _prepare(owner, frozen, folder, raw, workers or cpus(), progress)
    prepared = find_prepared(owner, frozen)
    if prepared is None:
        raise DataError(f"{folder} changed while it was being opened; try again")
    return dataclasses.replace(prepared, replaced=replaced)


def _outdated(task: Task, protocol: Protocol, manifest: dict[str, Any]) -> str:
    """The reason why a set is not of the current version, as a clause; empty if it is."""
    current = identity(task, protocol)
    if differing := [key for key in current if key != "code" and manifest[key] != current[key]]:
        return f"the prepared set is of another version of {task.name} (different: {', '.join(differing)})"
    if manifest.get("code") != current.get("code"):
        return f"the source of the task {task.name} changed"
    folder = Path(manifest["source"])
    # a set stays valid without its raw files
    if "raw" in manifest and folder.is_dir() and _raw_files_changed(task, protocol, manifest["raw"], folder):
        return f"the raw files in {folder} changed"
    return ""


def _raw_files_changed(task: Task, protocol: Protocol, stored: dict[str, Any], folder: Path) -> bool:
    files = _raw_files(task, protocol, folder)
    return bool(files) and raw_files.changed(stored, files, folder)


def _raw_files(task: Task, protocol: Protocol, folder: Path) -> list[Path]:
    cache = cache_root().resolve()
    return [path for path in task.raw_files(protocol, folder) if path.is_file() and not path.is_relative_to(cache)]


def verify(task: str | Task, protocol: str | Protocol | None = None, *, progress: Progress | None = None) -> list[str]:
    """Re-read every byte of a prepared set. Returns one line per problem."""
    owner, frozen = resolve(task, protocol)
    progress = progress or silent
    try:
        existing = find_prepared(owner, frozen)
        if existing is None:
            return [f"{owner.name} under {frozen.name!r} is not prepared: run `{owner.command(frozen)}`"]
        remedy = _remedy(owner, frozen, existing.folder)
        if changed := _changed_files(existing, progress):
            return [f"{existing.folder / name}: SHA-256 differs from the manifest; {remedy}" for name in changed]
        counts, sums = measure_splits(owner, frozen, existing.folder, progress)
        wrong = [f"counts of {s}" for s in frozen.splits if existing.manifest["counts"].get(s) != counts[s]]
        wrong += [f"sha256 of {s}" for s in frozen.splits if existing.manifest["sha256"].get(s) != sums[s]]
        problems = [f"{existing.folder / MANIFEST}: {entry} does not match the arrays" for entry in wrong]
        problems += protocol_mismatches(owner, frozen, counts, sums)
        return [f"{problem}; {remedy}" for problem in problems]
    except DataError as error:
        return [str(error)]


def split_checksum(split: Split) -> str:
    """SHA-256 of a split: dtype, shape and little-endian bytes of labels, index, offsets and values, in that order."""
    digest = hashlib.sha256()
    for array in (split.labels, split.index, split.offsets, split.values):
        digest.update(f"{array.dtype.name} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8).data)
    return digest.hexdigest()


def identity(task: Task, protocol: Protocol) -> dict[str, Any]:
    """The manifest entries that a set of the current version has. What does not change its bytes is left out.
    code: the source files of a user's task; a task of this project has a version instead."""
    fields = {k: v for k, v in dataclasses.asdict(protocol).items() if k not in ("note", "raw", "hides_zeros")}
    # younger than sets that stay valid
    fields = {k: v for k, v in fields.items() if v or k not in ("real", "law", "tests", "budget", "packed")}
    code = source_files(type(task)) or {}
    known = {"format": FORMAT, "task": task.name, "version": task.version, "protocol": json.loads(json.dumps(fields))}
    return known | ({"code": code} if code else {})


def _remedy(task: Task, protocol: Protocol, folder: Path) -> str:
    """The advice at the end of a message on a damaged set."""
    return f"remove {folder} and run `{task.command(protocol)}`"


def _check_files(prepared: Prepared, progress: Progress) -> None:
    """Raise DataError if the checksum of a file differs. Unmodified files are hashed once per process."""
    states = [(prepared.folder / name).stat() for name in prepared.manifest["files"]]
    key = (str(prepared.folder), *((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states))
    if key in _verified:
        return
    if changed := _changed_files(prepared, progress):
        problem = f"{', '.join(changed)} changed since {'it was' if len(changed) == 1 else 'they were'} written"
        remedy = _remedy(prepared.task, prepared.protocol, prepared.folder)
        raise DataError(f"{prepared.folder}: {problem}; {remedy}")
    _verified.add(key)


def _changed_files(prepared: Prepared, progress: Progress) -> list[str]:
    """Names of the files whose checksum differs from the manifest."""
    files, changed = prepared.manifest["files"], []
    for number, (name, facts) in enumerate(files.items()):
        progress("checking files", number, len(files))
        if hash_file(prepared.folder / name) != facts["sha256"]:
            changed.append(name)
    return changed


def _check_source(prepared: Prepared, source: str | os.PathLike[str] | None) -> None:
    """Raise DataError if a set without frozen checksums was prepared from another folder than `source`."""
    frozen, earlier = all(prepared.protocol.sha256.get(s) for s in SPLITS), prepared.manifest["source"]
    if source is not None and not frozen and str(source_folder(source)) != earlier:
        remedy = _remedy(prepared.task, prepared.protocol, prepared.folder)
        raise DataError(f"{prepared.folder} was prepared from {earlier}; to prepare it from {source}, {remedy}")


@contextmanager
def lock(folder: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock beside `folder`. Waits while another process holds it."""
    path = folder.parent / f".{folder.name}.lock"
    with explain_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that is preparing this set", 0, 0)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def explain_os_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError into a DataError with advice."""
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
        raise DataError(f"cannot write to {folder.parent}: {reason}; {advice}") from error


def _prepare(
    task: Task, protocol: Protocol, folder: Path, source: Path | None, workers: int, progress: Progress
) -> None:
    """Prepare a set in a sibling folder and rename it into place. The caller holds the lock."""
    entries = identity(task, protocol)
    key = hashlib.sha256(json.dumps([entries, str(source)], sort_keys=True).encode()).hexdigest()[:12]
    work = folder.parent / f".{protocol.name}.{key}.partial"
    with explain_os_errors(folder):
        for leftover in folder.parent.glob(f".{protocol.name}.*.partial"):
            if leftover != work or not task.resumable:
                shutil.rmtree(leftover)
        work.mkdir(exist_ok=True)
        for leftover in (work / MANIFEST, *work.glob(".*.partial")):
            leftover.unlink(missing_ok=True)
        try:
            task.prepare(work, protocol, source=source, workers=workers, progress=progress)
            try:
                counts, sums = measure_splits(task, protocol, work, progress)
            except DataError:
                # a resumable task would go on from these arrays
                shutil.rmtree(work, ignore_errors=True)
                raise
            problems = protocol_mismatches(task, protocol, counts, sums) or _overlaps(task, protocol, work, progress)
            if problems:
                shutil.rmtree(work, ignore_errors=True)
                origin = f"the files in {source} are not" if protocol.raw else "this machine did not generate"
                raise DataError(f"{origin} the data of this protocol: {'; '.join(problems)}")
            files = {
                p.name: {"bytes": p.stat().st_size, "sha256": hash_file(p, sync=True)} for p in sorted(work.iterdir())
            }
            manifest = entries | {
                "source": str(source) if protocol.raw else "generated",
                "lra": __version__,
                "counts": counts,
                "sha256": sums,
                "files": files,
            }
            if source is not None and not all(protocol.sha256.get(split) for split in SPLITS):
                progress("hashing raw files", 0, 0)
                manifest["raw"] = raw_files.facts(_raw_files(task, protocol, source), source)
            write_manifest(work, manifest)
            replace_folder(work, folder)
        except BaseException:
            if not task.resumable:
                shutil.rmtree(work, ignore_errors=True)
            raise


def replace_folder(work: Path, folder: Path) -> None:
    """Rename `work` to `folder`. An existing folder is moved aside first and deleted afterwards."""
    old = folder.parent / f".{folder.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    work.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def measure_splits(
    task: Task, protocol: Protocol, folder: Path, progress: Progress
) -> tuple[dict[str, int], dict[str, str]]:
    """Number of examples and checksum of each split in a folder. Raises DataError for examples that the task or the
    protocol rules out."""
    counts, sums = {}, {}
    for number, name in enumerate(protocol.splits):
        progress("hashing splits", number, len(protocol.splits))
        split = task.load(folder, name)
        check_split(task, protocol, name, split)
        counts[name], sums[name] = len(split), split_checksum(split)
    progress("hashing splits", len(protocol.splits), len(protocol.splits))
    return counts, sums


def protocol_mismatches(task: Task, protocol: Protocol, counts: dict[str, int], sums: dict[str, str]) -> list[str]:
    """One line per split whose count or checksum differs from the protocol."""
    title = f"{task.name} under {protocol.name!r}"
    return [
        f"{title}: {split} has {counts[split]:,} examples, not {expected:,}"
        for split, expected in protocol.counts.items()
        if counts[split] != expected
    ] or [
        f"{title}: {split} has SHA-256 {sums[split][:16]}..., not {expected[:16]}..."
        for split, expected in protocol.sha256.items()
        if expected and sums[split] != expected
    ]


def _overlaps(task: Task, protocol: Protocol, folder: Path, progress: Progress) -> list[str]:
    """One line per pair of splits with too many identical examples: a sign that one file was used for two splits.

    Protocols that select on the test split, as some published ones do, use it as the validation split too.
    """
    if all(protocol.sha256.get(split) for split in SPLITS):
        # splits with frozen checksums were compared when they were frozen
        return []
    progress("comparing splits", 0, 0)
    hashes = {split: example_hashes(task.load(folder, split)) for split in SPLITS}
    pairs = [("train", "test")] if protocol.selection == "test" else list(combinations(SPLITS, 2))
    overlaps = [(a, b, count_shared(hashes[a], hashes[b]), len(hashes[b])) for a, b in pairs]
    return [
        f"{task.name} under {protocol.name!r}: {count:,} of the {total:,} examples of {b} also occur in {a}"
        for a, b, count, total in overlaps
        if total >= MIN_COMPARED and count > total * MAX_OVERLAP
    ]
