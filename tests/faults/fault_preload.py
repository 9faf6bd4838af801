"""What the server of the drills imports before it forks."""

from __future__ import annotations

import fault_drills
import lightning
import records
import tiny_task
import torch

from lra import checkpoint, cli, collection, run, store, sweep, tables
from lra.architectures import gru

__all__ = [
    "checkpoint", "cli", "collection", "fault_drills", "gru", "lightning", "records", "run", "store", "sweep", "tables",
    "tiny_task", "torch",
]  # fmt: skip
