"""What the server of the drills imports before it forks."""

from __future__ import annotations

import fault_drills
import fault_ranks
import lightning
import records
import tiny_task
import torch

from lra.architectures.recurrent import gru
from lra.cli import app
from lra.data import prepared_sets
from lra.reports import leaderboard
from lra.results import collection
from lra.sweeps import local
from lra.training import checkpoint, run

__all__ = [
    "app", "checkpoint", "collection", "fault_drills", "fault_ranks", "gru", "leaderboard", "lightning", "local",
    "prepared_sets", "records", "run", "tiny_task", "torch",
]  # fmt: skip
