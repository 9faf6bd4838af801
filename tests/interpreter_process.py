"""Triton's interpreter, in a process that all tests of a worker share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

PATIENCE = 600  # seconds for an answer


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Call a function of tests/interpreted_kernel.py by its name."""
    pytest.importorskip("triton")
    tests, errors = Path(__file__).parent, tmp_path_factory.mktemp("interpreter") / "stderr"
    path = os.pathsep.join([str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, str(tests / "interpreted_kernel.py")]
    with (
        errors.open("w") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdin
        assert process.stdout

        def ask(*question: Any) -> Any:
            assert process.stdin
            assert process.stdout
            print(json.dumps(question), file=process.stdin, flush=True)
            alarm = Timer(PATIENCE, process.kill)
            alarm.start()
            line = process.stdout.readline()
            alarm.cancel()
            assert line, errors.read_text()
            answer = json.loads(line)
            assert "error" not in answer, answer["error"]
            return answer["found"]

        yield ask
        process.stdin.close()
