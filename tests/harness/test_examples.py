"""The examples run as they are, with the overrides that they state."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
from documents import ROOT

OUTPUT = {
    "custom_task": "'test': 256",
    "own_layer": "'majority class'",
    "compare_two": "(McNemar)",
    "fine_tune": "warm start",
    "figure": "mingru",
    "copy_with_memory": "dnc: 0.",
    "length_generalisation": "256",
    "sweep_ray": "mingru",
}
"""What each script prints, among other things."""
WRITES = {"figure": {"accuracy.svg"}, "length_generalisation": {"lengths.svg"}}
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SLOW = {"copy_with_memory", "length_generalisation"}
"""They train until something is learned, which takes a minute and more."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    "script", [pytest.param(s, id=s.stem, marks=[pytest.mark.slow] * (s.stem in SLOW)) for s in SCRIPTS]
)
def test_example(
    script: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if script.stem == "sweep_ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    monkeypatch.setenv("LRA_CACHE", str(cache))
    for name in ("LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(script.parent)
    runpy.run_path(str(script), run_name="__main__")
    assert OUTPUT[script.stem] in capfd.readouterr().out
    assert {path.name for path in tmp_path.glob("*.svg")} == WRITES.get(script.stem, set())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_explains_itself(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert text.startswith("# %% [markdown]\n# # ")
    assert len(text.splitlines()) <= 60
