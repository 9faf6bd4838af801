"""The released Pathfinder images: folders of PNG files, with one line of metadata per file.

    curv_contour_length_14/metadata/<k>.npy   plain text despite the name: folder, file, number, label, settings
    curv_contour_length_14/imgs/<k>/sample_<i>.png

A set written by the original generator has arrays of strings under the same names, which are read too. Pickled arrays
are rejected, because unpickling can run code.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from lra.task import SPLITS, DataError, Progress, Protocol
from lra.tasks.storage import DocumentWriter, write_examples, write_notes

LEVEL = "curv_contour_length_14"
CHUNK = 1000


def write_released(
    folder: Path, protocol: Protocol, size: int, source: Path | None, workers: int, progress: Progress
) -> None:
    """Prepare the released set in `source`. Empty files are skipped and noted, as in published code.

    Protocols `s4` and `s4-centred` split like torch's random_split with seed 42; the others take 80, 10 and 10 % in the
    order of the metadata files. Raises DataError for missing and damaged files.
    """
    root = _find_release(source, size)
    samples, empty = _samples(root)
    parts = _split(len(samples), at_random=protocol.name.startswith("s4"))
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        for split, rows in parts.items():
            with DocumentWriter(folder, split) as writer:
                for start in range(0, len(rows), CHUNK):
                    chunk = rows[start : start + CHUNK]
                    images = list(pool.map(partial(_pixels, size=size), [samples[row][0] for row in chunk]))
                    writer.append(np.concatenate(images), np.full(len(images), size * size))
                    done += len(chunk)
                    progress(f"reading {root}", done, len(samples))
            write_examples(folder, split, np.array([samples[row][1] for row in rows]))
    write_notes(folder, {"files without bytes, left out": empty})


def _find_release(source: Path | None, size: int) -> Path:
    """The folder of the released images. Raises DataError if there is none."""
    needed = f"the folder pathfinder{size} of the LRA release with {LEVEL}/metadata and {LEVEL}/imgs"
    if source is None:
        raise DataError(f"this protocol reads {needed}; name its parent folder with --from DIR or LRA_DATA")
    places = ("lra_release/lra_release", "lra_release", ".")
    roots = [source / place / f"pathfinder{size}" / LEVEL for place in places]
    if source.name == LEVEL:
        roots.append(source)
    elif source.name == f"pathfinder{size}":
        roots.append(source / LEVEL)
    for root in roots:
        if (root / "metadata").is_dir():
            return root
    raise DataError(f"no pathfinder{size}/{LEVEL}/metadata in {source}; this protocol reads {needed}")


def released_files(source: Path, size: int) -> Iterator[Path]:
    """The metadata and images of the released set in a user's folder; none where there is no such set."""
    try:
        root = _find_release(source, size)
    except DataError:
        return
    yield from (root / "metadata").glob("*.npy")
    yield from (root / "imgs").glob("*/*.png")


def _samples(root: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """Paths and labels of the images in the order of the metadata, and the names of empty files."""
    files = sorted((p for p in (root / "metadata").glob("*.npy") if p.stem.isdecimal()), key=lambda p: int(p.stem))
    if not files:
        raise DataError(f"{root / 'metadata'} holds no numbered .npy files; unpack the archive again")
    samples, empty = [], []
    for file in files:
        for number, fields in enumerate(_rows(file), start=1):
            name = PurePosixPath(fields[0], fields[1]) if len(fields) > 3 else None
            if name is None or fields[3] not in ("0", "1") or name.is_absolute() or ".." in name.parts:
                raise DataError(f"{file} row {number} is not a folder, a file, a number and a label 0 or 1: {fields}")
            path = root / name
            # unlike Path.is_file, os.path.isfile returns False for a name the file system does not allow
            if not os.path.isfile(path):
                raise DataError(
                    f"{file} row {number} names {str(path)[:500]}, which is missing; unpack the archive again"
                )
            if path.stat().st_size:
                samples.append((path, int(fields[3])))
            else:
                empty.append(str(name))
    return samples, empty


def _rows(file: Path) -> Iterator[list[str]]:
    """The fields of each line of a metadata file."""
    content = file.read_bytes()
    if content.startswith(b"\x93NUMPY"):
        try:
            table = np.load(file, allow_pickle=False)
            if table.dtype.kind == "U":
                # numpy does not check that the 32 bits of a character are valid
                if table.size and table.view(np.dtype(np.uint32).newbyteorder(table.dtype.byteorder)).max() > 127:
                    raise ValueError("its strings are not ASCII")
            elif table.dtype.kind != "S":
                raise ValueError(f"it holds {table.dtype}")
            rows = np.atleast_2d(table).astype(str).tolist()
        except Exception as error:  # noqa: BLE001  (numpy parses the header as Python and raises whatever that raises)
            raise DataError(
                f"{file} is not a plain array of strings ({error}); pickled files are rejected; save it as text"
            ) from None
        yield from rows
        return
    try:
        lines = content.removeprefix(codecs.BOM_UTF8).decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{file} is neither text nor an array of strings; unpack the archive again") from None
    yield from (line.split() for line in lines)


def _pixels(path: Path, size: int) -> np.ndarray:
    """The grey levels of an image, row by row: (size * size,) uint8."""
    from PIL import Image

    try:
        # the size is in the header, so an image that would fill the memory is not decoded
        with Image.open(path, formats=("PNG",)) as image:
            if image.size != (size, size):
                raise DataError(f"{path} is {image.size[0]} x {image.size[1]} pixels, not {size} x {size}")
            return np.asarray(image.convert("L")).ravel()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path} is not a complete PNG image ({error}); unpack the archive again") from None


def _split(count: int, at_random: bool) -> dict[str, np.ndarray]:
    """Split -> rows of `count` images."""
    if not at_random:
        return dict(zip(SPLITS, np.split(np.arange(count), [count * 8 // 10, count * 9 // 10]), strict=True))
    import torch

    order = torch.randperm(count, generator=torch.Generator().manual_seed(42)).numpy()
    tenth = count // 10
    return dict(zip(SPLITS, np.split(order, [count - 2 * tenth, count - tenth]), strict=True))
