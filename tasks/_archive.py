"""Released files: the LRA archive (download with resume), and reading of members of archives without unpacking.

Text files may be gzipped, whatever their name, and may begin with a byte-order mark.
"""

from __future__ import annotations

import base64
import codecs
import gzip
import hashlib
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar, cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lra.task import DataError, Progress

Key = TypeVar("Key")
URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
NAMES = ("lra_release.gz", "lra_release.tar.gz")
SPARE = 1 << 30
"""Bytes that stay free on the disk after a download."""
BLOCK = 1 << 20
MAX_LINE = 1 << 26
MAX_HEADER = 1 << 20
MAX_TOTAL = 1 << 37
"""Largest total size of the members of an archive, in bytes; the release has 33 GB."""


class _Member(tarfile.TarInfo):
    """A member of the archive. Rejects headers above 1 MiB, which tarfile reads into memory, and sparse members, whose
    size map is unlimited."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
                    tarfile.SOLARIS_XHDTYPE)  # fmt: skip
        if self.type in extended and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_sparse(self, *_: object) -> tarfile.TarInfo:
        raise tarfile.ReadError("a sparse member")

    _proc_gnusparse_10 = _proc_sparse


def members(archive: Path, wanted: dict[str, str]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield the key and the lines of each wanted member, in the order of the archive. wanted: file name -> key.

    Stops after the last wanted member. Nothing is unpacked to disk. Raises DataError if the archive is damaged, lacks a
    member, exceeds MAX_TOTAL, or holds absolute names, names with ".." or a link in place of a wanted file.
    """
    missing = dict(wanted)
    for name, file in _plain_files(archive, lambda path: path.name in missing):
        yield missing.pop(name.name), _lines(file, archive)
        if not missing:
            return
    raise DataError(f"{archive} does not hold {', '.join(missing)}; is it the LRA release?")


def contents(root: Path, wanted: dict[str, Key], largest: int) -> Iterator[tuple[Key, bytes]]:
    """Yield the key and the bytes of each wanted file below `root`, a folder or an archive of it.

    wanted: pattern of paths that begin with the name of the folder -> key. largest: bytes of a file. Raises DataError
    if a pattern matches no file or a file is larger or damaged.
    """
    missing = dict(wanted)
    found = _files_below(root, wanted) if root.is_dir() else _plain_files(
        root, lambda path: any(path.match(pattern) for pattern in wanted)
    )  # fmt: skip
    for name, file in found:
        pattern = next(pattern for pattern in wanted if name.match(pattern))
        missing.pop(pattern, None)
        with _report_damage(root), file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise DataError(f"{root}: {name} has more than {largest:,} bytes; fetch it again")
        yield wanted[pattern], content
    if missing:
        raise DataError(f"{root} does not hold {', '.join(missing)}; fetch it again")


def find_official(source: Path | None, subfolder: str, folder: str, archive: str) -> Path | None:
    """The official folder or its archive in a user's folder or the subfolder of it; None if neither is there. The
    user's folder may be the official one itself."""
    if source is None:
        return None
    candidates = [place / name for place in (source / subfolder, source) for name in (folder, archive)]
    candidates += [source] if source.name == folder else []
    return next((path for path in candidates if path.exists()), None)


def find_file(source: Path, places: Iterable[str], name: str) -> Path | None:
    """The file `name`, or `name.gz`, in one of the places below a user's folder; None if it is in none."""
    paths = (source / place / full for place in places for full in (name, f"{name}.gz"))
    return next((path for path in paths if path.is_file()), None)


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, gzipped or not, without a byte-order mark. Raises DataError if the file is damaged."""
    with _open_archive(path) as file:
        yield from _lines(file, path)


def _plain_files(archive: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """The wanted members of a tar archive, in its order, each to be read before the next."""
    # tarfile's own gzip reader does not notice a truncated archive
    with (
        _report_damage(archive),
        _open_archive(archive) as file,
        tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar,
    ):
        total = 0
        for member in tar:
            total += member.size
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or total > MAX_TOTAL:
                content = f"{total:,} bytes" if total > MAX_TOTAL else f"a member named {member.name[:100]!r}"
                raise DataError(f"{archive} holds {content}; it is not the released archive")
            if member.isdir() or not wanted(name):
                continue
            contents = tar.extractfile(member) if member.isfile() else None
            if contents is None:
                raise DataError(f"{archive}: {member.name} is not a plain file; it is not the released archive")
            yield name, contents


def _files_below(root: Path, patterns: Iterable[str]) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    for pattern in patterns:
        for path in sorted(root.parent.glob(pattern)):
            with _report_damage(root):
                file = path.open("rb")
            yield PurePosixPath(path.relative_to(root.parent)), file


def _lines(file: IO[bytes], archive: Path) -> Iterator[bytes]:
    with _report_damage(archive):
        mark = codecs.BOM_UTF8
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise DataError(f"{archive} holds a line of more than {MAX_LINE:,} bytes; it is not the released file")
            yield line.removeprefix(mark)
            mark = b""


@contextmanager
def _report_damage(archive: Path) -> Iterator[None]:
    """Turn the errors of reading an archive into a DataError."""
    try:
        yield
    except (tarfile.TarError, OSError, zlib.error, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{archive} is truncated or damaged ({error}); remove it and download it again") from None


def _open_archive(archive: Path) -> IO[bytes]:
    """Open an archive, gzipped or not, as the bytes of its tar file."""
    with archive.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(archive)) if is_gzip else archive.open("rb")


def download(path: Path, advice: str, progress: Progress) -> None:
    """Download the release to `path`, resuming an earlier download.

    advice: what to do instead, for messages. Reports the size before the first byte. Raises DataError if the server
    cannot be reached, the disk is too small, the transfer breaks off (the bytes so far are kept) or the MD5 differs
    from the one the server states.
    """
    have = path.stat().st_size if path.exists() else 0
    try:
        with urlopen(Request(URL, headers={"Range": f"bytes={have}-"}), timeout=60) as reply:
            if reply.status != 206:
                have = 0
            total = have + int(reply.headers.get("Content-Length") or 0)
            _check_disk_space(path.parent, total - have)
            phase = f"downloading {NAMES[0]}, {total / 1e9:.1f} GB, to {path.parent}"
            with path.open("ab" if have else "wb") as file:
                progress(phase, have, total)
                while block := reply.read(BLOCK):
                    file.write(block)
                    have += len(block)
                    progress(phase, have, total)
            headers = reply.headers
    except HTTPError as error:
        if error.code != 416:
            raise DataError(f"the server refused {URL} ({error.code} {error.reason}); {advice}") from None
        # an earlier call was interrupted after the last byte
        total, headers = have, error.headers
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        kept = f"; {have:,} bytes are kept, and the next call resumes the download" if have else ""
        reason = getattr(error, "reason", error)
        raise DataError(f"{URL} cannot be downloaded ({reason}){kept}; offline, {advice}") from None
    if have < total:
        raise DataError(f"the download broke off at {have:,} of {total:,} bytes; run the same command to resume it")
    _check_md5(path, headers, progress)


def _check_disk_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free and the download needs {(size + SPARE) / 1e9:.1f} GB; "
            "point LRA_CACHE at a larger disk"
        )


def _check_md5(path: Path, headers: Message, progress: Progress) -> None:
    """Compare a download with the MD5 in the headers of the server, if there is one. Deletes a damaged download."""
    stated = re.search(r"md5=([A-Za-z0-9+/=]+)", ",".join(headers.get_all("x-goog-hash") or []))
    if stated is None:
        return
    progress("checking the download", 0, 0)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").digest()
    if digest != base64.b64decode(stated[1]):
        path.unlink()
        raise DataError(f"the download from {URL} is damaged (wrong MD5) and was removed; run the same command again")
