"""A signal to both processes of a run ends them within ten seconds, in every phase, with one message."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from fault_drills import FULL, _context
from fault_ranks import free_port, ranks

from lra.training import interruption

pytestmark = pytest.mark.xdist_group("drills")
TIMES = 20 if FULL else 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def until(paths: list[Path], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, [path.name for path in paths if not path.exists()]
        time.sleep(0.05)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
@pytest.mark.parametrize("phase", ["start", "join", "train", "wait", "validate", "checkpoint", "score"])
def test_a_signal_to_the_group_ends_both_processes(phase: str, tmp_path: Path) -> None:
    draw = random.Random(phase)
    for turn in range(TIMES):
        number = SIGNALS[turn % 3] if FULL else draw.choice(SIGNALS)
        folder = tmp_path / str(turn)
        folder.mkdir()
        process = _context().Process(target=ranks, args=(str(folder), phase, free_port()))
        process.start()
        try:
            until([folder / name for name in ("group", "reached-0", "reached-1")])
            time.sleep(draw.uniform(0, 0.3))
            os.killpg(int((folder / "group").read_text()), number)
            process.join(10)
            assert not process.is_alive(), f"{phase}, {number.name}: still there after ten seconds"
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
        said = [(folder / f"said-{rank}").read_text() for rank in (0, 1)]
        assert json.loads((folder / "codes").read_text()) == [interruption.EXIT_CODE, 0], said
        assert said[0].count("stopped") == 1, said
        assert f"by {number.name}" in said[0]
        assert "stopped" not in said[1]
        assert not any("Traceback" in text for text in said), said
        assert ("resume with: lra run" if phase not in ("start",) else "run it again with: lra run") in said[0]
