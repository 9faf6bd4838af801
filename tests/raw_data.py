"""Where tests find raw data that cannot be part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def raw_data(*needed: str) -> Path:
    """The folder LRA_DATA names, or `shared/data` beside the checkout; skips the test where a needed file is absent."""
    folder = Path(os.environ.get("LRA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    absent = [name for name in needed if not (folder / name).is_file()]
    if absent:
        pytest.skip(f"needs {', '.join(absent)} below LRA_DATA")
    return folder
