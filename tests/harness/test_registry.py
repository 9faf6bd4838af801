"""Names to things: files, variants, plug-ins, classes by path, and what a wrong name is answered with."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from lra import registry
from lra.encoder import FAMILIES, Card, Encoder
from lra.errors import UserError
from lra.registry import PLUGIN, Registry, architectures, tasks

ROOT = Path(__file__).parents[2]
ENCODER = """
from lra.architectures._stack import Stack
from lra.architectures.recurrent.gru import GRUMixer
from lra.encoder import Card


class {name}(Stack):
    card = Card(title="t", year=2000, url="u", scaling="L", causal=True,
                variants={{"wide": {{"width": 2}}}}, exempt={{"step": "none"}})

    def __init__(self, *, d_model, n_layers, length, dropout=0.0, width=1):
        if width > 8:
            raise ValueError(f"width is {{width}}; at most 8")
        super().__init__(lambda _: GRUMixer(d_model, length), d_model=d_model, n_layers=n_layers, length=length)
        self.width = width
"""


BASED = """
import lra.architectures.recurrent.gru as gru
from lra.architectures._attention_stack import AttentionStack
from lra.architectures.recurrent.gru import GRU


class Own(AttentionStack):
    def __init__(self, *, n_heads=2, **attention):
        super().__init__(None, n_heads=n_heads, **attention)


class Net({base}):
    card = None

    def __init__(self, *, width=1, **more):
        super().__init__(**more)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of the user's own."""
    (tmp_path / "net.py").write_text(ENCODER.format(name="Net"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plug(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> Registry:
    found = [EntryPoint(name, value, "lra.architectures") for name, value in points]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    return Registry("architecture", "architectures", "Encoder")


def said(of: Registry, reference: str) -> str:
    with pytest.raises(UserError) as error:
        of.get(reference)
    return str(error.value)


def test_names_are_the_files() -> None:
    for kind in (architectures, tasks):
        files = {p.stem for p in (ROOT / kind.folder).glob("*/*.py") if p.stem[0] != "_"}
        assert files <= set(kind.names())
        assert kind.names() == sorted(kind.names())


@pytest.mark.parametrize("name", architectures.names())
def test_facts_are_those_of_the_imported_card(name: str) -> None:
    """Listing reads a card without importing it: it must read what the class says."""
    facts, constructor = architectures.facts(name), architectures.get(name)
    card = constructor.cls.card
    assert issubclass(constructor.cls, Encoder)
    assert constructor.declared
    assert Card(**{key: facts[key] for key in vars(card) if key in facts}) == card
    assert facts["variants"].keys() == card.variants.keys()
    derived = {"name", "family", "direction", "recurrent"}
    assert all(getattr(constructor.cls, key) == facts[key] for key in facts.keys() - vars(card).keys() - derived)
    assert facts["direction"] in ("causal", "two-way", "either")
    options = {"direction": "causal"} if facts["direction"] == "either" else {}
    encoder = constructor(d_model=16, n_layers=1, length=16, **options)
    try:
        encoder.init_state(1)
        recurrent = True
    except NotImplementedError:
        recurrent = False
    assert facts["recurrent"] == recurrent


@pytest.mark.parametrize("name", tasks.names())
def test_facts_of_tasks(name: str) -> None:
    """A fact may be missing, where a task inherits it; it may not differ."""
    facts, cls = tasks.facts(name), tasks.get(name).cls
    assert facts["title"] == cls.title
    assert all(facts[key] == getattr(cls, key) for key in ("name", "classes", "towers") if key in facts)


def test_nothing_is_imported_until_asked_for() -> None:
    script = (
        "import sys; from lra.registry import architectures, tasks; "
        "[r.facts(n) for r in (architectures, tasks) for n in r.names()]; architectures.names(variants=True); "
        "print([m for m in sys.modules if m in ('torch', 'numba', 'numpy') or m.startswith('lra.architectures.')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_facts_of_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.py").write_text("class Torn(Encoder:\n", encoding="utf-8")
    (tmp_path / "computed.py").write_text("class Computed:\n    card = Card(year=1999 + YEARS)\n", encoding="utf-8")
    monkeypatch.setattr(Registry, "_files", lambda self: {p.stem: p for p in tmp_path.glob("*.py")})
    for name in ("torn", "computed"):
        with pytest.raises(UserError, match=rf"{name}.py cannot be read without importing it"):
            architectures.facts(name)
    with pytest.raises(UserError, match="unknown architecture 'coputed'; did you mean 'computed'"):
        architectures.facts("coputed")


def test_variants() -> None:
    plain, inverse = architectures.get("s4d"), architectures.get("s4d/inv")
    assert "s4d/inv" in architectures.names(variants=True)
    assert "s4d/inv" not in architectures.names()
    assert (plain.options()["init"], inverse.options()["init"]) == ("lin", "inv")
    assert inverse.preset == plain.cls.card.variants["inv"]
    assert said(architectures, "s4d/legz") == "unknown variant of s4d 'legz'; did you mean 'legs'?"


def test_wrong_names_get_the_nearest_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said(architectures, "transfomer") == "unknown architecture 'transfomer'; did you mean 'transformer'?"
    assert said(architectures, "zzz").startswith("unknown architecture 'zzz'; known: ")
    Path("listop2.py").write_text("class First:\n    pass\n\n\nclass Second(First):\n    pass\n")
    assert said(tasks, "listop2") == "unknown task 'listop2'; for the class in listop2.py give listop2.py:Second"
    assert said(tasks, "listop") == "unknown task 'listop'; did you mean 'listops'?"
    # files that start with an underscore are shared parts, not architectures
    assert "unknown architecture" in said(architectures, "_stack")


def test_arguments() -> None:
    constructor = architectures.get("gru")
    shape: dict[str, Any] = {"d_model": 8, "n_layers": 1, "length": 16}
    assert constructor(**shape, horizon=4).d_model == 8
    for arguments, message in (
        ({**shape, "horizn": 4}, "unknown argument 'horizn' in gru; did you mean 'horizon'?"),
        ({**shape, "horizon": 0}, "gru: horizon is 0; at least 1 token"),
        ({"d_model": 8, "n_layers": 1}, "gru needs length"),
    ):
        with pytest.raises(UserError) as error:
            constructor(**arguments)
        assert str(error.value) == message


def test_a_constructor_cannot_be_changed_by_whoever_has_it() -> None:
    constructor = architectures.get("s4d/inv")
    with pytest.raises(dataclasses.FrozenInstanceError):
        constructor.declared = False  # type: ignore[misc]
    constructor.preset["init"] = "lin"  # type: ignore[index]
    assert architectures.get("s4d/inv").preset == {"init": "inv"}


@pytest.mark.usefixtures("own")
def test_a_class_in_a_file() -> None:
    constructor = architectures.get("net.py:Net")
    assert constructor.declared
    assert architectures.get("net.py:Net").cls is constructor.cls
    with pytest.raises(UserError, match=r"net.py:Net: width is 9; at most 8"):
        constructor(d_model=8, n_layers=1, length=16, width=9)


def test_a_class_in_a_file_that_cannot_be_had(own: Path) -> None:
    assert said(architectures, "nett.py:Net") == "architecture nett.py:Net: no file nett.py"
    assert said(architectures, "net.py:Nett") == "unknown class 'Nett' in net.py; did you mean 'Net'?"
    (own / "torn.py").write_text("import no_such_module\n", encoding="utf-8")
    for _ in range(2):
        assert "importing torn.py failed: ModuleNotFoundError: No module" in said(architectures, "torn.py:Net")
    assert "importing no.such failed" in said(architectures, "no.such:Net")
    assert said(tasks, "net.py:Net") == "net.py:Net is not a subclass of lra.task.Task"
    other = own / "elsewhere"
    other.mkdir()
    (other / "net.py").write_text(ENCODER.format(name="Net"), encoding="utf-8")
    assert architectures.get(f"{other}/net.py:Net").cls is not architectures.get("net.py:Net").cls


@pytest.mark.parametrize("base", ["AttentionStack", "Own", "GRU", "gru.GRU", "Unknown"])
def test_options_of_a_base_are_read_from_shared_files(base: str, tmp_path: Path) -> None:
    """Where the base is elsewhere, None: the file is imported."""
    (tmp_path / "net.py").write_text(BASED.format(base=base), encoding="utf-8")
    options = registry._read_signature(tmp_path / "net.py")
    if base not in ("AttentionStack", "Own"):
        assert options is None
        return
    assert options is not None
    of_stack = ["d_model", "n_layers", "length", "dropout", "direction", "block"]
    assert list(options) == [*of_stack, "n_heads", "qkv_dim", "positions", "attention_dropout", "width"]
    assert (options["n_heads"], options["direction"]) == (4 if base == "AttentionStack" else 2, "bidirectional")


@pytest.mark.parametrize("base", ["GRU", "gru.GRU"])
def test_a_class_in_a_file_inherits_the_options_of_a_package(base: str, own: Path) -> None:
    (own / "based.py").write_text(BASED.format(base=base), encoding="utf-8")
    constructor = architectures.get("based.py:Net")
    assert constructor.options() == architectures.get("gru").options() | {"width": 1}
    shape: dict[str, Any] = {"d_model": 8, "n_layers": 1, "length": 16}
    assert constructor(**shape, width=2, coupled=True).d_model == 8
    for wrong, says in (
        ({"coupld": True}, "unknown argument 'coupld' in based.py:Net; did you mean 'coupled'?"),
        ({"horizon": 0}, "based.py:Net: horizon is 0; at least 1 token"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            constructor(**shape, **wrong)
    with pytest.raises(UserError, match=r"based\.py:Net needs length"):
        constructor(d_model=8, n_layers=1)


def test_a_class_in_a_package() -> None:
    assert architectures.get("lra.architectures.recurrent.gru:GRU").cls is architectures.get("gru").cls


def test_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    plugged = plug(monkeypatch, ("outside", "lra.architectures.recurrent.gru:GRU"), ("torn", "no_such_package:Net"))
    assert {"outside", "gru"} <= set(plugged.names(variants=True))
    assert plugged.get("outside").cls is architectures.get("gru").cls
    facts, gru = plugged.facts("outside"), architectures.facts("gru")
    own = {"name": "outside", "family": PLUGIN, "plugin": "lra.architectures.recurrent.gru:GRU"}
    assert {key: facts[key] for key in own} == own
    assert {key: facts[key] for key in gru if key not in own} == {key: gru[key] for key in gru if key not in own}
    assert "no_such_package" in plugged.facts("torn")["problem"]
    assert "loading no_such_package:Net failed: ModuleNotFoundError" in said(plugged, "torn")


def test_two_things_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for points in ([("gru", "some.package:Net")], [("net", "a.package:Net"), ("net", "another.package:Net")]):
        with pytest.raises(UserError, match="two architectures are named"):
            plug(monkeypatch, *points).names()
    # one package seen twice on the path is one package
    assert "net" in plug(monkeypatch, ("net", "a.package:Net"), ("net", "a.package:Net")).names()


def test_two_files_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("recurrent", "attention"):
        (tmp_path / "architectures" / family).mkdir(parents=True)
        (tmp_path / "architectures" / family / "net.py").touch()
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    with pytest.raises(UserError, match=r"two architectures are named 'net': .*attention.*recurrent.*; rename one"):
        Registry("architecture", "architectures", "Encoder").names()


def test_the_family_is_the_folder() -> None:
    assert architectures.family("s4d") == "state_space"
    assert {architectures.family(name) for name in architectures.names()} <= set(FAMILIES)
    with pytest.raises(UserError, match="did you mean 's4d'"):
        architectures.family("s4dd")


def test_a_file_defines_exactly_one_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lra.architectures.recurrent  # type: ignore[import-untyped, unused-ignore]

    family = tmp_path / "recurrent"
    family.mkdir()
    (family / "two_nets.py").write_text(ENCODER.format(name="A") + ENCODER.format(name="B"), encoding="utf-8")
    (family / "no_net.py").write_text(ENCODER.format(name="_Private"), encoding="utf-8")
    monkeypatch.setattr(lra.architectures.recurrent, "__path__", [*lra.architectures.recurrent.__path__, str(family)])
    both = Registry("architecture", "architectures", "Encoder")
    both._files.cache_clear()
    monkeypatch.setattr(Registry, "_files", lambda self: {p.stem: p for p in family.glob("*.py")})
    assert said(both, "two_nets").endswith("defines 2 public Encoder classes; define exactly one")
    assert said(both, "no_net").endswith("defines 0 public Encoder classes; define exactly one")


def test_a_changed_file_is_parsed_again(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("first = 1\n")
    before = registry._parsed(path)
    assert registry._parsed(path) is before
    path.write_text("second = 2\n")
    os.utime(path, ns=(1, 1))
    assert ast.unparse(registry._parsed(path)) == "second = 2"


def test_facts_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    file = tmp_path / "architectures" / "recurrent" / "mine.py"
    file.parent.mkdir(parents=True)
    file.write_text("class Mine:\n    card = Card(title='one', causal=True)\n")
    assert Registry("architecture", "architectures", "Encoder").all_facts()["mine"]["title"] == "one"
    monkeypatch.setattr(registry, "_parsed", lambda _: pytest.fail("read again"))
    kept = Registry("architecture", "architectures", "Encoder").all_facts()
    assert kept["mine"]["title"] == "one"
    monkeypatch.undo()
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    for text in (file.read_text().replace("one", "another"), file.read_text().replace("one", "third one")):
        file.write_text(text)
        fresh = Registry("architecture", "architectures", "Encoder")
        assert fresh.all_facts()["mine"] == fresh.facts("mine")
    (tmp_path / "cache" / "architectures.json").write_text("[")
    assert fresh.all_facts()["mine"]["title"] == "third one"
