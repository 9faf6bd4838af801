"""The LRA release archive: downloaded with resume, and read member by member without unpacking it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lra.task import DataError, Progress

URL = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
NAMES = ("lra_release.gz", "lra_release.tar.gz")
SPARE = 1 << 30
BLOCK = 1 << 20
LONGEST_LINE = 1 << 26
LONGEST_HEADER = 1 << 20
MOST = 1 << 37
"""Bytes that may come out of an archive; the release is 33 GB."""


class _Member(tarfile.TarInfo):
    """A member whose extended header, which tarfile reads into memory, is refused when it is no header's size, as is
    a sparse one, whose map has no size at all."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
                    tarfile.SOLARIS_XHDTYPE)  # fmt: skip
        if self.type in extended and self.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc]

    def _proc_sparse(self, *_: object) -> tarfile.TarInfo:
        raise tarfile.ReadError("a sparse member")

    _proc_gnusparse_10 = _proc_sparse


def members(archive: Path, wanted: dict[str, str]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Each wanted member as it comes by: its key and its lines. wanted: file name -> key.

    Reading stops after the last one. Nothing is unpacked. Raises DataError when the archive is damaged or lacks one,
    or is none that its makers packed: absolute names, names with "..", links for the wanted files, bombs.
    """
    left = dict(wanted)
    # not tarfile's own gzip: it takes the end of a truncated archive for the end of the archive
    with _intact(archive), _unzipped(archive) as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as tar:
        total = 0
        for member in tar:
            total += member.size
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or total > MOST:
                why = f"{total:,} bytes" if total > MOST else f"a member called {member.name[:100]!r}"
                raise DataError(f"{archive} holds {why}; that is not the LRA release")
            if name.name not in left or member.isdir():
                continue
            contents = tar.extractfile(member) if member.isfile() else None
            if contents is None:
                raise DataError(f"{archive}: {member.name} is no plain file; that is not the LRA release")
            yield left.pop(name.name), _lines(contents, archive)
            if not left:
                return
    raise DataError(f"{archive} does not hold {', '.join(left)}; is it the LRA release?")


def _lines(contents: IO[bytes], archive: Path) -> Iterator[bytes]:
    with _intact(archive):
        while line := contents.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                raise DataError(
                    f"{archive} holds a line of more than {LONGEST_LINE:,} bytes; that is not the LRA release"
                )
            yield line


@contextmanager
def _intact(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError, zlib.error, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{archive} is truncated or damaged ({error}); remove it and fetch it again") from None


def _unzipped(archive: Path) -> IO[bytes]:
    with archive.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(archive)) if zipped else archive.open("rb")


def download(path: Path, advice: str, progress: Progress) -> None:
    """Fetch the release into `path`; what an earlier call left there is continued.

    The byte count and the disk it needs are reported before the first byte. Raises DataError when the server cannot be
    reached, the disk is too small, the transfer breaks off (what came is kept) or the server's MD5 is not met.
    """
    have = path.stat().st_size if path.exists() else 0
    try:
        with urlopen(Request(URL, headers={"Range": f"bytes={have}-"}), timeout=60) as reply:
            if reply.status != 206:
                have = 0
            total = have + int(reply.headers.get("Content-Length") or 0)
            _room(path.parent, total - have)
            what = f"downloading {NAMES[0]}, {total / 1e9:.1f} GB, to {path.parent}"
            with path.open("ab" if have else "wb") as file:
                progress(what, have, total)
                while block := reply.read(BLOCK):
                    file.write(block)
                    have += len(block)
                    progress(what, have, total)
            headers = reply.headers
    except HTTPError as error:
        if error.code != 416:
            raise DataError(f"{URL} is refused ({error.code} {error.reason}); {advice}") from None
        # nothing is left to fetch: an earlier call was interrupted after the last byte
        total, headers = have, error.headers
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        kept = f"; {have:,} bytes are kept and continued by the next call" if have else ""
        reason = getattr(error, "reason", error)
        raise DataError(f"{URL} cannot be fetched ({reason}){kept}; offline, {advice}") from None
    if have < total:
        raise DataError(f"the download broke off at {have:,} of {total:,} bytes; run the same command to continue it")
    _check(path, headers, progress)


def _room(folder: Path, more: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < more + SPARE:
        raise DataError(
            f"{folder} has {free / 1e9:.1f} GB free and the download needs {(more + SPARE) / 1e9:.1f} GB; "
            "point LRA_CACHE at a larger disk"
        )


def _check(path: Path, headers: Message, progress: Progress) -> None:
    """Compare with the MD5 the server states for the whole object, where it states one."""
    stated = re.search(r"md5=([A-Za-z0-9+/=]+)", ",".join(headers.get_all("x-goog-hash") or []))
    if stated is None:
        return
    progress("checking the download", 0, 0)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").digest()
    if found != base64.b64decode(stated[1]):
        path.unlink()
        raise DataError(f"the download from {URL} is damaged (wrong MD5) and was removed; run the same command again")
