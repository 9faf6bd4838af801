"""The folder of a run: recipe, log, checkpoints, and where its record is.

recipe.json holds the resolved recipe; run.json {"seed", "command", "checkpoints", "source", "record"}, where
"checkpoints" is the folder with best.ckpt, "source" the SHA-256 of the source of a user's class, and "record" the path
of the result, empty until there is one.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lra import files
from lra.config.recipe import Recipe
from lra.errors import UserError
from lra.results import result
from lra.training import interruption
from lra.training.request import Request, checkpoint_folder

RECIPE, RUN, BEST = "recipe.json", "run.json", "best.ckpt"


@contextmanager
def opened(request: Request, recipe: Recipe, folder: Path, leads: bool, source: str = "") -> Iterator[None]:
    """Create the folder of a run, or open it again to resume, and hold its lock. leads: whether this is the first
    process of the run; the others leave the folder alone. source: SHA-256 of the source of a user's class; a run of
    another source is not resumed. Raises UserError."""
    if not leads:
        yield
        return
    checkpoints = checkpoint_folder(request, folder)
    # a run that was killed before its first checkpoint is resumed from its first step
    if request.resume and not (folder / RECIPE).is_file() and not checkpoints.is_dir():
        raise UserError(f"nothing to resume in {folder}; run it without --resume")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is doing this run ({folder}); wait for it or change the seed") from None
        if not request.resume:
            for place in (checkpoints, folder / "log"):
                shutil.rmtree(place, ignore_errors=True)
        elif read(folder).get("source", source) != source:
            raise UserError(
                f"{request.architecture_name} or a file that it imports was changed since this run began; run it "
                "without --resume, or undo the changes"
            )
        _write(folder / RECIPE, recipe.as_dict())
        about = {"seed": request.seed, "command": request.command(), "checkpoints": str(checkpoints.resolve())}
        _write(folder / RUN, about | {"source": source, "record": ""})
        interruption.mark_resumable()
        yield


def best_checkpoint(folder: Path, checkpoints: Path | None = None) -> Path | None:
    """The best checkpoint of a run's folder; None without one. checkpoints: where they are, if they were moved."""
    places = [folder / "checkpoints", Path(read(folder).get("checkpoints") or folder)]
    if checkpoints is not None:
        places = [checkpoints, checkpoints / folder.name]
    return next((place / BEST for place in places if (place / BEST).is_file()), None)


def finish(folder: Path, record: Path) -> None:
    """Note that the run is finished and where its record is."""
    _write(folder / RUN, read(folder) | {"record": str(record.resolve())})


def read(folder: Path) -> dict[str, Any]:
    """The content of run.json; empty if there is none, as in folders of earlier versions."""
    try:
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RUN} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def finished_record(folder: Path, missing_ok: bool = False) -> Path | None:
    """The record of a finished run; None where the run is not finished. Raises UserError where the record is gone,
    unless `missing_ok`."""
    path = read(folder).get("record")
    if not path:
        return None
    # a results folder may have been moved
    for candidate in (Path(path), result.folder() / Path(*Path(path).parts[-4:])):
        if candidate.is_file():
            return candidate
    if missing_ok:
        return None
    raise UserError(f"this run is finished, and its result {path} is gone; run it without --resume to do it again")


def _write(path: Path, content: dict[str, Any]) -> None:
    with files.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
