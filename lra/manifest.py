"""The manifest of a prepared set: what its files are, sealed with a checksum of its own."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lra.result import atomic, safe, seal
from lra.task import SPLITS, DataError

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
