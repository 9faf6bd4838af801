"""Texts of the hub: its layout in a folder, the budget, streaming, and what is said without network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lra.conformance import tasks as conformance
from lra.data import prepared_sets
from lra.registry import tasks
from lra.task import DataError, Protocol, Split
from lra.tasks import _source
from lra.tasks._language import HubTask

STORIES = [f"story {n} of a caf\u00e9. " + "The end. " * (n % 3) for n in range(40)]
TESTED = ["once", *(f"another story {n}. " for n in range(6))]
STORIES[7], STORIES[20], STORIES[21] = STORIES[2], "once", "with\0zero"
NAMES = ("tinystories", "fineweb_edu")


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string()), "score": [1.0] * len(texts)})
    pq.write_table(table, path, row_group_size=5)


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both data sets in the layout of the hub: three files of training texts, the last of which is torn."""
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRA_DATA", raising=False)
    folder = tmp_path / "raw"
    layouts = {"tinystories": "data/train-0000{}-of-00003-1f.parquet", "fineweb_edu": "sample/10BT/00{}_00000.parquet"}
    for name, first in layouts.items():
        write(folder / name / first.format(0), STORIES[:25])
        write(folder / name / first.format(1), STORIES[25:])
        (folder / name / first.format(2)).write_bytes(b"PAR1 torn")
    write(folder / "tinystories" / "data" / "validation-00000-of-00001-2e.parquet", TESTED)
    return folder


def task(name: str) -> HubTask:
    return tasks.get(name)()


def small(name: str, **budget: int) -> Protocol:
    given = {"validation": 4, "test": 3, "tokens": 600, "bytes": 2000, **budget}
    chunks = task(name).protocols["chunks"]
    return replace(chunks, length=16, counts={"validation": 4, "test": 3}, budget=given)


def texts(split: Split) -> list[str]:
    """The documents that the chunks of a split begin or make."""
    joined: list[bytes] = []
    for number in split.index[:, 0]:
        chunk = bytes(split.document(int(number)))
        if chunk[0] == 0:
            joined.append(chunk[1:])
        else:
            joined[-1] += chunk[1:]
    return [content.decode(errors="ignore") for content in joined]


def distinct(found: list[str]) -> list[str]:
    return list(dict.fromkeys(text.replace("\0", "") for text in found))


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_the_first_texts_in_the_order_of_the_hub(raw: Path, name: str) -> None:
    prepared = prepared_sets.load_prepared(task(name), small(name), source=raw)
    known = distinct(STORIES)
    tested = TESTED[:3] if name == "tinystories" else known[4:7]
    for split, expected in (("validation", known[:4]), ("test", tested)):
        assert texts(prepared.split(split)) == [
            text.encode()[:15].decode(errors="ignore") for text in expected
        ], split  # fmt: skip
    train = texts(prepared.split("train"))
    follow = [text for text in known[4:] if text not in tested]
    assert train == follow[: len(train)]
    sizes = [len(text.encode()) + 1 for text in follow]
    assert sum(sizes[: len(train)]) <= 600 < sum(sizes[: len(train) + 1])
    assert "once" not in train or name == "fineweb_edu"
    assert "withzero" in train


@pytest.mark.parametrize("name", NAMES)
def test_no_more_than_the_budget_is_read(raw: Path, name: str) -> None:
    # the torn file lies behind the budget, and is never opened
    with pytest.raises(DataError, match=r"train in .* cannot be read .*; fetch it again, or with "):
        prepared_sets.load_prepared(task(name), small(name, tokens=10**6, bytes=10**6), source=raw)
    few = prepared_sets.load_prepared(task(name), small(name, tokens=10**6, bytes=500), source=raw)
    seen = [text for split in ("validation", "train") for text in texts(few.split(split))]
    assert 300 < sum(len(text.encode()) for text in seen) <= 500


@pytest.mark.parametrize("name", NAMES)
def test_they_pass_the_checks_of_a_task(raw: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(task(name)), "protocols", {"chunks": small(name)})
    failed = [finding for finding in conformance.check(task(name), source=raw) if finding.failed]
    assert not failed, "\n".join(f"{finding.check}: {finding.message}" for finding in failed)


def test_a_changed_file_prepares_the_set_again(raw: Path) -> None:
    first = prepared_sets.load_prepared(task("tinystories"), small("tinystories"), source=raw)
    (raw / "unrelated").write_text("x")
    assert not prepared_sets.load_prepared(task("tinystories"), small("tinystories")).replaced
    write(raw / "tinystories" / "data" / "validation-00000-of-00001-2e.parquet", TESTED[1:])
    again = prepared_sets.load_prepared(task("tinystories"), small("tinystories"))
    assert "raw files" in again.replaced
    assert again.checksum != first.checksum


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_is_streamed_at_a_pinned_revision(raw: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[str] = []

    def load(kind: str, *, data_files: str, split: str, streaming: bool, columns: list[str]) -> Iterator[Any]:
        assert (kind, split, streaming, columns) == ("parquet", "train", True, ["text"])
        asked.append(data_files)
        return ({"text": text} for text in (TESTED if "validation" in data_files else STORIES))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(_source, "_reachable", lambda _: True)
    from_hub = prepared_sets.load_prepared(task(name), small(name))
    hub = task(name).hub
    assert len(hub.revision) == 40
    assert sorted(asked) == sorted(f"hf://datasets/{hub.id}@{hub.revision}/{pattern}" for pattern in hub.files.values())
    monkeypatch.undo()
    monkeypatch.setenv("LRA_CACHE", str(raw / "other"))
    assert prepared_sets.load_prepared(task(name), small(name), source=raw).checksum == from_hub.checksum


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("tinystories", "data/train-*.parquet and data/validation-*.parquet of roneneldan/TinyStories"),
        ("fineweb_edu", "sample/10BT/*.parquet of HuggingFaceFW/fineweb-edu"),
    ],
)
def test_without_network_one_line_says_what_is_missing_and_what_runs_instead(
    raw: Path, name: str, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    # a port of this machine on which nothing listens
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError) as caught:
        prepared_sets.load_prepared(name)
    assert str(caught.value) == (
        f"{task(name).hub.id} cannot be fetched: the hub does not answer; offline, with {files} in a folder DIR, run "
        f"`lra data prepare {name} --from DIR`; the task imdb_lm runs without them"
    )


def test_files_that_do_not_fit_are_one_line(raw: Path, capfd: pytest.CaptureFixture[str]) -> None:
    only = raw / "tinystories" / "data" / "validation-00000-of-00001-2e.parquet"
    for table, message in (
        (pa.table({"story": TESTED}), "No match for FieldRef.Name.text."),
        (pa.table({"text": pa.array([None, "a"], pa.string())}), "a row without a text"),
    ):
        pq.write_table(table, only)
        with pytest.raises(DataError, match=rf"validation in .*raw cannot be read \(\w+: .*{message}"):
            prepared_sets.load_prepared(task("tinystories"), small("tinystories"), source=raw)
    only.unlink()
    with pytest.raises(DataError, match=r"no tinystories/data/validation-\*.parquet in .*raw; with data/train-"):
        prepared_sets.load_prepared(task("tinystories"), small("tinystories"), source=raw)
    assert capfd.readouterr().err == ""
