"""`python -m tests.stopped_run STEP ARGUMENTS...`: the command `lra` with these arguments, a run of which stops with a
checkpoint after a step."""

from __future__ import annotations

import sys
from typing import Any

from lra.cli.app import app
from lra.training.callbacks import Stop

if __name__ == "__main__":
    # the processes that Lightning starts repeat sys.argv
    step, plain = int(sys.argv[1]), Stop.on_train_batch_end

    def stopping(self: Stop, trainer: Any, *rest: Any) -> None:
        self.reason = "the test" if trainer.global_step == step else ""
        plain(self, trainer, *rest)

    setattr(Stop, "on_train_batch_end", stopping)  # noqa: B010
    app(args=sys.argv[2:], prog_name="lra")
