"""The cache of prepared sets: atomic, checked, locked, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from lra.data import prepared_sets
from lra.data.prepared_sets import write_manifest
from lra.errors import UserError
from lra.task import SPLITS, DataError, Progress, Protocol, Split, Task
from lra.tasks.storage import open_split, write_documents, write_examples, write_notes

COUNTS = {"train": 5, "validation": 2, "test": 3}


class Digits(Task):
    """Documents of one to five digits, written as a task would; counts how often it is asked to."""

    name = "digits"
    title = "digits"
    classes = 2
    protocols: ClassVar[Mapping[str, Protocol]] = {
        "strict": Protocol("strict", length=5, vocabulary=10, counts=COUNTS),
        "files": Protocol("files", length=5, vocabulary=10, counts=COUNTS, raw="digits.txt"),
    }

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.failure: BaseException | None = None

    def prepare(
        self, folder: Path, protocol: Protocol, *, source: Path | None, workers: int, progress: Progress
    ) -> None:
        self.calls.append(sorted(p.name for p in folder.iterdir()))
        for split in SPLITS:
            count = protocol.counts[split]
            write_documents(folder, split, [self.document(split, i) for i in range(count)])
            if self.failure is not None:
                raise self.failure
            write_examples(folder, split, np.arange(count) % 2)
        write_notes(folder, {"seen": "nothing"})

    @staticmethod
    def document(split: str, i: int) -> np.ndarray:
        """One to five digits, that of the split first."""
        return np.append(np.uint8(SPLITS.index(split)), np.arange(i % 5, dtype=np.uint8))

    def load(self, folder: Path, split: str) -> Split:
        return open_split(folder, split)

    def describe(self, split: Split, example: int) -> str:
        return str(split.document(example))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LRA_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def task(cache: Path) -> Digits:
    return Digits()


def left_over(cache: Path) -> list[str]:
    return [p.name for p in (cache / "digits").iterdir() if not p.name.endswith(".lock")]


def protocol_with(**changes: object) -> Protocol:
    return dataclasses.replace(Digits.protocols["strict"], **changes)  # type: ignore[arg-type]


def test_a_set_is_prepared_once_and_described_by_its_manifest(task: Digits, cache: Path) -> None:
    first, second = prepared_sets.load_prepared(task), prepared_sets.load_prepared(task)
    assert len(task.calls) == 1
    assert first.folder == cache / "digits" / "strict"
    assert left_over(cache) == ["strict"]
    written = json.loads((first.folder / "manifest.json").read_text())
    assert first.manifest == second.manifest == {k: v for k, v in written.items() if k != "seal"}
    assert first.manifest["counts"] == COUNTS
    assert first.manifest["source"] == "generated"
    assert first.checksum == second.checksum
    assert first.notes == {"seen": "nothing"}
    assert {s: len(first.split(s)) for s in SPLITS} == COUNTS
    assert [len(first.split("test").document(i)) for i in range(3)] == [1, 2, 3]
    assert prepared_sets.verify(task) == []


@pytest.mark.parametrize("failure", [RuntimeError("bug"), KeyboardInterrupt(), DataError("bad row")])
def test_a_preparation_that_fails_leaves_nothing(task: Digits, cache: Path, failure: BaseException) -> None:
    task.failure = failure
    with pytest.raises(type(failure)):
        prepared_sets.load_prepared(task)
    assert left_over(cache) == []
    assert prepared_sets.find_prepared(task) is None
    task.failure = None
    assert len(prepared_sets.load_prepared(task).split("train")) == 5


def test_a_resumable_preparation_finds_its_folder_again(
    task: Digits, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "resumable", True)
    task.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        prepared_sets.load_prepared(task)
    assert prepared_sets.find_prepared(task) is None
    task.failure = None
    prepared_sets.load_prepared(task)
    assert task.calls == [[], ["train.offsets.npy", "train.values.npy"]]
    assert left_over(cache) == ["strict"]


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), OSError("96001 requested and 53744 written")],
    ids=["write", "numpy"],
)
def test_a_full_disk_is_one_clear_line(task: Digits, cache: Path, failure: OSError) -> None:
    task.failure = failure
    with pytest.raises(DataError, match=r"(?i)no space left.*; free some space or point LRA_CACHE at another disk"):
        prepared_sets.load_prepared(task)
    assert left_over(cache) == []


def test_a_raw_file_that_cannot_be_opened_is_named(task: Digits, cache: Path) -> None:
    task.failure = PermissionError(errno.EACCES, "Permission denied", "/data/imdb/train.parquet")
    with pytest.raises(DataError, match=r"cannot open /data/imdb/train.parquet: Permission denied"):
        prepared_sets.load_prepared(task)


def test_an_unwritable_cache_is_one_clear_line(task: Digits, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"cannot write .*point LRA_CACHE at a folder you can write to"):
        prepared_sets.load_prepared(task)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": COUNTS | {"test": 4}, "sha256": {}}, "test has 3 examples, not 4"),
        ({"sha256": {"train": "", "test": "0" * 64}}, "test has SHA-256 .*, not 0000000000000000"),
    ],
)
def test_data_that_depart_from_the_protocol_are_refused(
    task: Digits, cache: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    real = Digits.prepare
    frozen = Digits.protocols["strict"]
    # the task writes what it always writes; the constants ask for something else
    monkeypatch.setattr(Digits, "prepare", lambda self, folder, protocol, **k: real(self, folder, frozen, **k))
    with pytest.raises(DataError, match=message):
        prepared_sets.load_prepared(task, protocol_with(**changes))
    assert left_over(cache) == []


def test_constants_that_match_are_accepted(task: Digits) -> None:
    sums = prepared_sets.load_prepared(task).manifest["sha256"]
    assert prepared_sets.load_prepared(task, protocol_with(name="frozen", sha256=sums)).manifest["sha256"] == sums


def test_a_truncated_file_is_noticed_on_opening(task: Digits) -> None:
    path = prepared_sets.load_prepared(task).folder / "train.values.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train.values.npy has .* bytes instead of .*; remove .* and run `lra data"):
        prepared_sets.load_prepared(task)
    assert "train.values.npy" in prepared_sets.verify(task)[0]


def test_a_missing_file_is_noticed_on_opening(task: Digits) -> None:
    (prepared_sets.load_prepared(task).folder / "test.labels.npy").unlink()
    command = r"`lra data prepare .*test_store.py:Digits`"
    with pytest.raises(DataError, match=rf"test.labels.npy is missing; remove .* and run {command}"):
        prepared_sets.find_prepared(task)


def test_a_flipped_byte_is_found_by_verify(task: Digits) -> None:
    path = prepared_sets.load_prepared(task).folder / "train.values.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    problems = prepared_sets.verify(task)
    assert len(problems) == 1
    assert "train.values.npy: SHA-256 differs from the manifest" in problems[0]


def edit_manifest(folder: Path, resealed: bool, **changes: Any) -> None:
    path = folder / "manifest.json"
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "seal" or not resealed} | changes
    if resealed:
        write_manifest(folder, content)
    else:
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("key", ["counts", "sha256"])
def test_a_forged_manifest_is_found_by_verify(task: Digits, key: str) -> None:
    found = prepared_sets.load_prepared(task)
    edit_manifest(found.folder, True, **{key: found.manifest[key] | {"test": "0" * 64 if key == "sha256" else 4}})
    assert [problem.split(":")[1].split(";")[0] for problem in prepared_sets.verify(task)] == [
        f" {key} of test does not match the arrays"
    ]


@pytest.mark.parametrize(
    ("changes", "resealed"),
    [
        ({"counts": COUNTS | {"test": 4}}, False), ({"source": "elsewhere"}, False), ({"more": 1}, False),
        ({"files": {"../../x": {"bytes": 1, "sha256": ""}}}, True), ({"files": {"x": {"bytes": 1}}}, True),
        ({"files": []}, True), ({"counts": {"train": 5}}, True), ({"sha256": "x"}, True),
    ],
)  # fmt: skip
def test_a_changed_manifest_is_refused(task: Digits, changes: dict[str, Any], resealed: bool) -> None:
    edit_manifest(prepared_sets.load_prepared(task).folder, resealed, **changes)
    with pytest.raises(
        DataError, match=r"manifest.json (was changed after|does not have the layout).*; remove .*prepare it"
    ):
        prepared_sets.load_prepared(task)


def test_a_manifest_of_before_the_seal_is_read(task: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    # such a manifest is of a task of this project
    monkeypatch.setattr(prepared_sets, "source_files", lambda cls: {})
    folder = prepared_sets.load_prepared(task).folder
    content = json.loads((folder / "manifest.json").read_text())
    del content["seal"]
    (folder / "manifest.json").write_text(json.dumps(content))
    assert prepared_sets.load_prepared(task).manifest == content
    (folder / "manifest.json").write_text(json.dumps(content | {"seel": "x"}))
    with pytest.raises(DataError, match="was changed after it was written"):
        prepared_sets.load_prepared(task)


def test_a_changed_file_is_never_used(task: Digits) -> None:
    path = prepared_sets.load_prepared(task).folder / "train.values.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train.values.npy changed since it was written; remove .* and run `lra data"):
        prepared_sets.load_prepared(task)


def test_an_interrupted_preparation_that_had_its_manifest_is_finished(
    task: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "resumable", True)
    real, kills = prepared_sets.replace_folder, iter([KeyboardInterrupt])

    def swap(work: Path, folder: Path) -> None:
        for kill in kills:
            (work / ".manifest.json.x.partial").write_text("half")
            raise kill
        real(work, folder)

    monkeypatch.setattr(prepared_sets, "replace_folder", swap)
    with pytest.raises(KeyboardInterrupt):
        prepared_sets.load_prepared(task)
    found = prepared_sets.load_prepared(task)
    assert [name for name in task.calls[1] if name.startswith((".", "manifest"))] == []
    assert prepared_sets.verify(task) == []
    assert not [name for name in found.manifest["files"] if name.startswith((".", "manifest"))]


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "", "x" * 300])
def test_no_task_or_protocol_leaves_the_cache(task: Digits, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(DataError, match="is not a folder name"):
        prepared_sets.load_prepared(task, protocol_with(name=name))
    monkeypatch.setattr(Digits, "name", name)
    with pytest.raises(DataError, match="is not a folder name"):
        prepared_sets.load_prepared(task)


def test_splits_that_overlap_are_refused(task: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_sets, "MIN_COMPARED", 2)
    monkeypatch.setattr(Digits, "document", staticmethod(lambda split, i: np.full(1 + i % 5, 7, np.uint8)))
    with pytest.raises(DataError, match="2 of the 2 examples of validation also occur in train"):
        prepared_sets.load_prepared(task)
    # the published text protocols select on the test split itself
    monkeypatch.setattr(
        Digits, "document",
        staticmethod(lambda split, i: np.array([i + 1, 0 if split == "train" else 1], np.uint8)),
    )  # fmt: skip
    assert prepared_sets.load_prepared(task, protocol_with(name="published", selection="test")).folder.is_dir()
    with pytest.raises(DataError, match="2 of the 3 examples of test also occur in validation"):
        prepared_sets.load_prepared(task, protocol_with(name="own"))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("{}", "lacks format, task"), ("[]", "lacks")]
)
def test_a_damaged_manifest_is_one_clear_line(task: Digits, content: str, message: str) -> None:
    (prepared_sets.load_prepared(task).folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        prepared_sets.load_prepared(task)


def test_verify_says_what_is_not_prepared(task: Digits) -> None:
    file = Path(__file__).relative_to(Path.cwd())
    assert prepared_sets.verify(task, "files") == [
        f"digits under 'files' is not prepared: run `lra data prepare {file}:Digits --protocol files`"
    ]


def test_a_newer_version_or_other_constants_prepare_anew(task: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_sets.load_prepared(task)
    monkeypatch.setattr(Digits, "version", 2)
    assert prepared_sets.find_prepared(task) is None
    assert prepared_sets.load_prepared(task).manifest["version"] == 2
    prepared_sets.load_prepared(task, protocol_with(note="worded differently"))
    assert len(task.calls) == 2
    assert len(prepared_sets.load_prepared(task, protocol_with(counts=COUNTS | {"train": 6})).split("train")) == 6
    assert len(task.calls) == 3


def test_another_process_at_work_is_waited_for(task: Digits, cache: Path) -> None:
    (cache / "digits").mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    lock = str(cache / "digits" / ".strict.lock")
    child = subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.readline()
    said = []

    def report(what: str, done: int, total: int) -> None:
        said.append(what)
        if what.startswith("waiting"):
            child.communicate(b"\n", timeout=30)

    assert len(prepared_sets.load_prepared(task, progress=report).split("train")) == 5
    assert said[0] == "waiting for another process that is preparing this set"


def test_a_set_that_appears_while_waiting_is_used(task: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    real, answers = prepared_sets.find_prepared, iter([None])
    prepared_sets.load_prepared(task)
    monkeypatch.setattr(prepared_sets, "find_prepared", lambda *a: next(answers, "again") and real(*a))
    assert len(prepared_sets.load_prepared(task).split("train")) == 5
    assert len(task.calls) == 1


def test_source_is_the_option_then_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRA_DATA", raising=False)
    assert prepared_sets.source_folder() is None
    monkeypatch.setenv("LRA_DATA", str(tmp_path))
    assert prepared_sets.source_folder() == tmp_path
    (tmp_path / "mine").mkdir()
    assert prepared_sets.source_folder(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"LRA_DATA is .*absent, which is not a folder"):
        prepared_sets.source_folder()
    with pytest.raises(DataError, match="--from is nowhere, which is not a folder"):
        prepared_sets.source_folder("nowhere")


def test_a_generated_task_refuses_a_source(task: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="is generated and reads no files; leave out --from"):
        prepared_sets.load_prepared(task, source=tmp_path)
    monkeypatch.setenv("LRA_DATA", str(tmp_path / "absent"))
    assert len(prepared_sets.load_prepared(task).split("train")) == 5


def test_unfrozen_data_from_another_folder_are_not_passed_off(task: Digits, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert prepared_sets.load_prepared(task, "files", source=one).manifest["source"] == str(one)
    assert len(prepared_sets.load_prepared(task, "files", source=one).split("test")) == 3
    with pytest.raises(DataError, match=r"was prepared from .*one; to prepare it from .*two, remove"):
        prepared_sets.load_prepared(task, "files", source=two)


def test_an_unknown_protocol_is_answered_with_the_nearest(task: Digits) -> None:
    with pytest.raises(UserError, match="unknown protocol of digits 'strickt'; did you mean 'strict'"):
        prepared_sets.load_prepared(task, "strickt")


def test_the_checksum_covers_every_array() -> None:
    split = Split(
        np.array([1, 2, 3], np.uint8), np.array([0, 1, 3]), np.array([[0], [1]], np.int32), np.array([0, 1], np.uint8)
    )

    def variants() -> Iterator[Split]:
        yield split
        yield dataclasses.replace(split, values=np.array([1, 2, 4], np.uint8))
        yield dataclasses.replace(split, values=split.values.astype(np.uint16))
        yield dataclasses.replace(split, offsets=np.array([0, 2, 3]))
        yield dataclasses.replace(split, index=np.array([[1], [0]], np.int32))
        yield dataclasses.replace(split, labels=np.array([1, 1], np.uint8))

    assert len({prepared_sets.split_checksum(v) for v in variants()}) == 6
    assert prepared_sets.split_checksum(split) == prepared_sets.split_checksum(
        dataclasses.replace(split, offsets=split.offsets.astype(">i8"))
    )
