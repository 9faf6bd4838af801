"""Runs that stop with a checkpoint after a step.

`python -m tests.stopped_run STEP ARGUMENTS...` is the command `lra` with these arguments, whose run stops so.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from lra.cli.app import app
from lra.training.callbacks import Stop


def stopped_after(step: int) -> AbstractContextManager[Any]:
    """A run inside this context ends with Interrupted, as after a signal, when it has done `step` steps."""
    plain = Stop.on_train_batch_end

    def stopping(self: Stop, trainer: Any, *rest: Any) -> None:
        self.reason = "the test" if trainer.global_step == step else ""
        plain(self, trainer, *rest)

    return mock.patch.object(Stop, "on_train_batch_end", stopping)


if __name__ == "__main__":
    # the processes that Lightning starts repeat sys.argv
    with stopped_after(int(sys.argv[1])):
        app(args=sys.argv[2:], prog_name="lra")
