"""A small report with a hostile name, for the tests of its text and of its use in a browser."""

from __future__ import annotations

import json
from pathlib import Path

from records import diagnostic, filled, profile_content, record, write

from lra.reports import report
from lra.results.collection import Collection

HOSTILE = "</script><script>alert(1)</script>&\"'"
LITERATURE = (
    "architecture,name,protocol,listops,text,retrieval,image,pathfinder,pathx,printed_average,not_comparable,source,note\n"
    "S4D-X,s4d,strict,60.5,,,,86,FAIL,,,A paper Table 1,\n"
)


def fill(tmp_path: Path) -> Path:
    """Results, literature and profile of a small report; one record has a hostile name."""
    (tmp_path / "reported.csv").write_text(LITERATURE)
    filled(tmp_path)
    curve = [{"step": s, "validation_accuracy": s / 400, "loss": 1 / s} for s in (50, 100, 200)]
    write(tmp_path, record(HOSTILE, 0, 0.4, command=f"lra run {HOSTILE}", curve=curve, regime=HOSTILE))
    cells = [("transformer", n, 1e-6 * n**2) for n in (256, 1024, 4096)] + [
        ("s4d", n, 4e-4 * n) for n in (256, 1024, 4096)
    ]
    for name, length, seconds in cells:
        made = profile_content(name, length, seconds)
        place = tmp_path / "profile" / "cpu" / f"{name}-{length}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(made))
    diagnose(tmp_path)
    return tmp_path


def diagnose(folder: Path) -> None:
    """Two architectures on two diagnostic tasks, one of which has further test lengths."""
    longer = {"length-64": {"accuracy": 0.0, "n": 9, "positions": 0.95, "length": 64},
              "length-256": {"accuracy": 0.0, "n": 9, "positions": 0.55, "length": 256}}  # fmt: skip
    for seed in (0, 1):
        write(folder, diagnostic("gru", 1008 / 1024, 0.999, seed, tests=longer), "diagnostics")
    write(folder, diagnostic("transformer", 0.0, 0.51, collapsed="at chance"), "diagnostics")
    write(folder, diagnostic("transformer", 0.5, 0.8, task="mqar", chance=0.1), "diagnostics")


def built(folder: Path) -> str:
    """The page of `fill(folder)`."""
    fill(folder)
    return report.build(Collection.read(folder), folder)
