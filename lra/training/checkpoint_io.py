"""Lightning's interface to the checkpoint files of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from lra.training.checkpoint import read, write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes the trainer's checkpoints with `lra.training.checkpoint`.

    Lightning's own writer copies from the folder for temporary files: a process killed meanwhile leaves half a file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return read(Path(path), map_location)
