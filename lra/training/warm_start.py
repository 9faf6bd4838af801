"""A warm start: the weights of another run, taken by name and shape. Only `load` imports torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

EXPORTED = "model.safetensors"


def find(source: Path, option: str = "--init-from") -> Path:
    """The file of weights of a run's folder or of an exported folder; for a file, the file itself. Raises UserError."""
    from lra.training import run_folder

    if source.is_file():
        return source
    path = source / EXPORTED if (source / EXPORTED).is_file() else run_folder.best_checkpoint(source)
    if path is None:
        raise UserError(
            f"{option} {source}: no weights there; give a folder below runs/ with a trained model, or one that "
            "`lra export` wrote"
        )
    return path


def digest(source: Path, option: str = "--init-from") -> str:
    """SHA-256 of the file of weights. Raises UserError."""
    path = find(source, option)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{option} {source}: {path} cannot be read: {error.strerror or error}") from None


def load(model: nn.Module, source: Path) -> dict[str, Any]:
    """Load every tensor of `source` whose name and shape the model has, and return a report.

    Returns {"source", "sha256", "loaded", "tensors"} (numbers of the model's tensors), "missing" (those that keep their
    initial values, with the reason) and "unused" (names in the file only). Raises UserError where nothing fits.
    """
    weights, own = _read(find(source)), model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise UserError(f"--init-from {source}: none of its {len(weights)} tensors has the name and shape of one here")
    missing = {}
    for name in own.keys() - fitting.keys():
        there = f"shape {(*own[name].shape,)}, in the file {(*weights[name].shape,)}" if name in weights else ""
        missing[name] = there or "not in the file"
    model.load_state_dict(fitting, strict=False)
    return {
        "source": str(source), "sha256": digest(source), "loaded": len(fitting), "tensors": len(own),
        "missing": missing, "unused": sorted(weights.keys() - own.keys()),
    }  # fmt: skip


def summary(loaded: dict[str, Any]) -> str:
    """One line on what `load` did."""
    parts = [f"initial weights: {loaded['loaded']} of {loaded['tensors']} tensors from {loaded['source']}"]
    if loaded["missing"]:
        parts.append("not loaded: " + ", ".join(f"{name} ({why})" for name, why in loaded["missing"].items()))
    if loaded["unused"]:
        parts.append("not used: " + ", ".join(loaded["unused"]))
    return "; ".join(parts)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        from lra.training import checkpoint

        content = checkpoint.read(path)
        if "state_dict" not in content:
            raise UserError(f"--init-from: {path} is not a checkpoint of training")
        return checkpoint.model_weights(content)
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except Exception as error:  # noqa: BLE001  (safetensors raises an exception type of its own)
        raise UserError(f"--init-from: {path} cannot be read: {error}") from None
    config = path.parent / "config.json"
    shared = json.loads(config.read_text(encoding="utf-8")).get("shared", {}) if config.is_file() else {}
    return weights | {name: weights[stored] for name, stored in shared.items() if stored in weights}
