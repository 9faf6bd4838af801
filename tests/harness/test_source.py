"""The source of a user's class: what it is made of, and that runs of two sources are not taken for one model."""

from __future__ import annotations

import linecache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_task import Tiny

from lra import api
from lra.errors import Interrupted, UserError
from lra.registry import architectures
from lra.reports.comparison import compare
from lra.reports.ranking import Leaderboard
from lra.results import result
from lra.results.collection import Collection
from lra.source import digest, files_of, source_files
from lra.sweeps.local import is_finished
from lra.sweeps.plans import Cell
from lra.training.request import Request, resolve, setting_texts
from lra.training.run import run

NET = """
import json
import torch
from torch import nn
from lra.encoder import Card
from helper import scale
from parts.one import One
from parts import two


class Net(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.map = nn.Linear(d_model, d_model)

    def forward(self, x):
        return scale() * self.map(x)
"""
FILES = {
    "net.py": NET, "helper.py": "from deep import factor\n\n\ndef scale():\n    return factor\n",
    "deep.py": "factor = 1.0\n", "parts/__init__.py": "", "parts/one.py": "from .three import x as One\n",
    "parts/two.py": "", "parts/three.py": "from . import absent_is_fine\n", "parts/absent_is_fine.py": "import torch\n",
    "unrelated.py": "x = 1\n", "json.py.txt": "", "parts/four.py": "",
}  # fmt: skip
IMPORTED = set(FILES) - {"unrelated.py", "json.py.txt", "parts/four.py"}
TINY = f"{Path(__file__).parents[1] / 'tiny_task.py'}:Tiny"
SETTINGS = {
    "train.steps": 2, "train.evaluate_every": 1, "model.d_model": 8, "data.batch_size": 8, "model.n_layers": 1,
}  # fmt: skip


def write(folder: Path, **changes: str) -> Path:
    for name, text in (FILES | {key.replace("__", "/") + ".py": text for key, text in changes.items()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    three = folder / "parts" / "three.py"
    three.write_text(three.read_text() + "x = 1\n")
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write(tmp_path / "mine"))
    for name in ("LRA_CACHE", "LRA_RESULTS", "LRA_RUNS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return tmp_path / "mine"


def test_the_source_is_the_file_and_what_it_imports_from_its_own_folder(own: Path) -> None:
    files = files_of(own / "net.py")
    assert set(files) == IMPORTED
    for name in FILES:
        before = digest(files)
        (own / name).write_text((own / name).read_text() + "# edited\n")
        files = files_of(own / "net.py")
        assert (digest(files) != before) == (name in IMPORTED), name


def test_a_module_of_a_package_is_identified_with_the_package(own: Path) -> None:
    package = own / "pack"
    (package / "inner").mkdir(parents=True)
    for name, text in (("__init__", ""), ("inner/__init__", ""), ("base", ""), ("inner/more", "")):
        (package / f"{name}.py").write_text(text)
    (package / "inner" / "net.py").write_text("from ..base import x\nfrom pack.inner import more\nimport deep\n")
    names = {"pack/__init__.py", "pack/base.py", "pack/inner/__init__.py", "pack/inner/more.py", "pack/inner/net.py"}
    assert set(files_of(package / "inner" / "net.py")) == names | {"deep.py"}


def test_classes_of_this_project_have_a_commit_and_others_their_text() -> None:
    assert source_files(architectures.get("gru").cls) is None
    assert architectures.get("gru/coupled").source is None
    assert set(source_files(Tiny) or {}) == {"tiny_task.py"}
    digests = []
    for number, value in enumerate((1, 1, 2)):
        name, text = f"<cell {number}>", f"class InNotebook:\n    def forward(self):\n        return {value}\n"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        known: dict[str, type] = {}
        exec(compile(text, name, "exec"), {"__name__": "notebook"}, known)
        files = source_files(known["InNotebook"])
        assert set(files or {}) == {"InNotebook"}
        digests.append(digest(files))
        del linecache.cache[name]
        assert source_files(known["InNotebook"]) == {}
    assert digests[0] == digests[1] != digests[2]


def test_an_edited_file_is_imported_again_with_what_it_imports(own: Path) -> None:
    first = architectures.get("net.py:Net")
    assert set(first.source or {}) == IMPORTED
    assert architectures.get("net.py:Net").source == first.source
    (own / "deep.py").write_text("factor = 0.0\n")
    second = architectures.get("net.py:Net")
    assert {name for name in IMPORTED if (first.source or {})[name] != (second.source or {})[name]} == {"deep.py"}
    # a folder of the same names has its own modules
    other = write(own / "other", deep="factor = 2.0\n")
    x = torch.ones(1, 4, 8)
    outputs = []
    for constructor in (first, second, architectures.get(f"{other}/net.py:Net")):
        torch.manual_seed(0)
        outputs.append(constructor(d_model=8, n_layers=1, length=4).blocks[0].mixer.inner(x))
    assert outputs[0].abs().sum() > 0
    assert outputs[1].abs().sum() == 0
    assert torch.equal(outputs[2], 2 * outputs[0])


def train(seed: int, **more: object) -> Path:
    settings = setting_texts(SETTINGS)
    request = Request(TINY, "net.py:Net", "quick", seed, settings=settings, **more)  # type: ignore[arg-type]
    return run(request, Console(quiet=True))


def test_runs_of_two_sources_are_two_models(own: Path) -> None:
    """From the class to the record, the table, the comparison, the sweep and the resumed run."""
    first, cell = train(0, threads=1), Cell(TINY, "net.py:Net", 0, "quick", SETTINGS)
    record = result.read(first)
    assert record.source
    assert (record.source.files, record.source.sha256) == (files_of(own / "net.py"), digest(files_of(own / "net.py")))
    assert is_finished(cell, result.folder())
    with pytest.raises(Interrupted):
        train(1, time_limit=0.0)
    (own / "deep.py").write_text("factor = 0.5\n")
    assert not is_finished(cell, result.folder())
    with pytest.raises(UserError, match=r"net.py:Net or a file that it imports was changed since this run began"):
        train(1, time_limit=0.0, resume=True)
    second = train(1)
    collection = Collection.read(result.folder(), "smoke")
    rows = [entry.row for entry in Leaderboard.of(collection).modified]
    assert [row.seeds for row in rows] == [1, 1]
    assert all(" source " in row.label for row in rows)
    assert "another source: deep.py" in str(compare(first, second))
    assert api.results(smoke=True)["source"].nunique() == 2


def test_the_recorded_command_repeats_the_row(own: Path) -> None:
    """Recipe, protocol and threads are stated as they were resolved, and lead to the same recipe and folder."""
    threads = torch.get_num_threads()
    record = result.read(train(0, threads=2))
    words = record.command.split()
    stated = {word: words[words.index(word) + 1] for word in ("--threads", "--protocol", "--recipe")}
    assert stated == {"--threads": "2", "--protocol": "strict", "--recipe": "quick"}
    assert record.environment.threads == 2
    assert torch.get_num_threads() == threads
    texts = setting_texts(SETTINGS)
    recipe, _ = resolve(Request(TINY, "net.py:Net", stated["--recipe"], 0, stated["--protocol"], settings=texts))
    assert recipe.hash == record.recipe_hash
    with pytest.raises(UserError, match="threads is -1; a whole number up to 1024"):
        train(0, threads=-1)
