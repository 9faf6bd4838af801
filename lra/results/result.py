"""Results on disk: one JSON file for each run, written once and atomically, with the test predictions beside it.

Layout: <results>/runs/<task>/<architecture>/<id>.json and <id>.npz, or below <results>/smoke for a recipe that is a
smoke test, and below <results>/diagnostics or <results>/language for tasks of these families. The id holds recipe,
recipe hash, seed and time.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from lra.config.recipe import OF_FAMILY, Recipe
from lra.errors import UserError
from lra.files import atomic, safe_name, seal, sha256
from lra.registry import tasks
from lra.results import record as records
from lra.results import validation
from lra.results.record import PredictionsFile, ResolvedRecipe, RunRecord

LARGEST = 16 * 2**20
"""Largest size of a record, and of its predictions after decompression, in bytes."""


def folder() -> Path:
    """Folder of results: `LRA_RESULTS`, else `results/` of the checkout, else (an installed package) of the working
    directory. Raises UserError if LRA_RESULTS is a file."""
    if "LRA_RESULTS" in os.environ:
        return _folder_named("LRA_RESULTS")
    checkout = Path(__file__).parents[2]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"


def unfinished() -> Path:
    """Folder of logs and checkpoints: `LRA_RUNS`, or `runs/` of the working directory. Raises UserError if LRA_RUNS is
    a file."""
    return _folder_named("LRA_RUNS") if "LRA_RUNS" in os.environ else Path("runs")


def _folder_named(variable: str) -> Path:
    path = Path(os.environ[variable])
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{variable} is {path}, which is a file; set it to a folder")
    return path


PLACES = ("runs", "smoke", *OF_FAMILY)
"""The parts of the results folder that hold records."""


def place_of(recipe: Recipe | ResolvedRecipe) -> str:
    """The part of the results folder that the records of a recipe go to: smoke tests stay out of the tables, and some
    families have tables of their own."""
    if recipe.smoke:
        return "smoke"
    family = tasks.family(recipe.task) if recipe.task in tasks.names() else ""
    by_recipe = {name: of for of, name in OF_FAMILY.items()}
    return family if family in OF_FAMILY else by_recipe.get(recipe.name, "runs")


def write(record: RunRecord, predictions: dict[str, np.ndarray], root: Path, place: str = "runs") -> Path:
    """Write the predictions, then the record with their checksum. Returns the path of the JSON file.

    Existing files are never replaced: if the id is taken, the record gets the next free one. Raises UserError if the
    files cannot be written, and ValueError for a record that could not be read back.
    """
    folder = root / place / safe_name(record.task) / slug(record.architecture)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **predictions)  # type: ignore[arg-type]
    checksum, first = sha256(buffer.getvalue()), safe_name(record.id, 180)
    try:
        records.to_json(record)
    except ValueError as error:
        raise ValueError(f"refusing to write an invalid result: {error}") from None
    try:
        for identity in (first, *(f"{first}-{n}" for n in range(2, 1000))):
            data, path = folder / f"{identity}.npz", folder / f"{identity}.json"
            if path.exists():
                continue
            try:
                with atomic(data, exclusive=True) as temporary:
                    temporary.write_bytes(buffer.getvalue())
            except FileExistsError:
                continue
            stored = PredictionsFile(file=data.name, sha256=checksum)
            _write_json(path, msgspec.structs.replace(record, id=identity, predictions=stored), data)
            return path
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write the result to {folder}: {reason}; the trained weights are kept: make room or set "
            "LRA_RESULTS, and run the same command with --resume"
        ) from error
    raise UserError(f"{folder} holds a thousand results called {first}; move some away")


def _write_json(path: Path, record: RunRecord, data: Path) -> None:
    content = records.to_json(record)
    text = json.dumps(content | {"seal": seal(content)}, indent=1, sort_keys=True, allow_nan=False)
    try:
        with atomic(path, exclusive=True) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError:
        with suppress(OSError):
            data.unlink()
        raise


def read(path: Path) -> RunRecord:
    """Read and check a record and its predictions. Raises UserError with the path and what is wrong."""
    return read_with_predictions(path)[0]


def read_with_predictions(path: Path) -> tuple[RunRecord, dict[str, np.ndarray]]:
    """A record and the arrays that are stored beside it, both checked. Raises UserError."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it holds more than {LARGEST:,} bytes")
        content = validation.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a result file: {error}") from None
    try:
        record = records.from_json(content)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not record.seal:
        raise UserError(f"{path}: seal is missing")
    if record.seal != seal(content):
        raise UserError(f"{path}: it was changed after it was written")
    name = Path(record.predictions.file).name
    data = path.with_name(name) if name else path
    # unlike Path.is_file it takes an impossible name for a missing file
    if data == path or not os.path.isfile(data):
        raise UserError(f"{path}: its predictions {name[:200]} are missing")
    try:
        stored = data.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: its predictions {name} cannot be read: {error.strerror}") from None
    if sha256(stored) != record.predictions.sha256:
        raise UserError(f"{path}: its predictions {name} do not have the recorded checksum")
    try:
        return record, _arrays(stored)
    except ValueError as error:
        raise UserError(f"{path}: its predictions {name} are not plain arrays: {error}") from None


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. Raises ValueError with the reason if it holds anything else."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > LARGEST:
                raise ValueError(f"they decompress to more than {LARGEST:,} bytes")
            for name in archive.namelist():
                # reads a member to its end, which checks its CRC
                member = io.BytesIO(archive.read(name))
                arrays[name.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
    except Exception as error:  # noqa: BLE001  (damaged bytes make zipfile and numpy raise anything)
        raise ValueError(str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}") from None
    return arrays


def slug(architecture: str) -> str:
    """Folder name of an architecture: `s4d/inv` -> `s4d-inv`, `my/net.py:Net` -> `Net`."""
    return safe_name(architecture.rpartition(":")[2].replace("/", "-"))
