"""Records: written atomically, checked when read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from records import record

from lra import files
from lra.errors import UserError
from lra.results import environment, result
from lra.results import record as records
from lra.results.collection import Collection

PREDICTIONS = {"prediction": np.zeros(3, np.uint8)}


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = result.write(record(), PREDICTIONS, tmp_path)
    back = result.read(path)
    assert path == tmp_path / "runs" / "listops" / "gru" / f"{back.id}.json"
    assert msgspec.structs.replace(back, predictions=record().predictions, seal="") == record()
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".npz"]
    assert json.loads(path.read_text())["seal"] == back.seal == files.seal(json.loads(path.read_text()))


def _truncate(path: Path) -> None:
    path.write_text(path.read_text()[:-40])


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        edited = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(edited | {"seal": files.seal(edited)}))

    return edit


def _drop(key: str) -> Callable[[Path], None]:
    def drop(path: Path) -> None:
        left = json.loads(path.read_text())
        del left[key]
        path.write_text(json.dumps(left))

    return drop


def _predictions(stored: bytes) -> Callable[[Path], None]:
    """With the checksum that belongs to them: whoever puts in other predictions can compute that too."""

    def replace(path: Path) -> None:
        path.with_suffix(".npz").write_bytes(stored)
        facts = {"file": path.with_suffix(".npz").name, "sha256": hashlib.sha256(stored).hexdigest()}
        _edit(predictions=facts)(path)

    return replace


def _npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def _wrong_crc() -> bytes:
    out = io.BytesIO()
    np.savez(out, prediction=np.zeros(64, np.uint8))
    damaged = bytearray(out.getvalue())
    damaged[damaged.index(bytes(64)) + 8] ^= 1
    return bytes(damaged)


def _zipped(name: str, member: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, member)
    return out.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "not a result file"),
        (_predictions(b"no archive"), "are not plain arrays: BadZipFile"),
        (_predictions(_npz(prediction=np.zeros(result.LARGEST, np.uint8))), "decompress to more than 16,777,216 bytes"),
        (_predictions(_npz(prediction=np.array([{}], object))), "Object arrays cannot be loaded"),
        (_predictions(_wrong_crc()), "are not plain arrays: BadZipFile: Bad CRC-32"),
        (_predictions(_zipped("note.txt", b"text")), "are not plain arrays: EOF: reading magic string"),
        (lambda p: p.write_text("[" * 100_000), "not a result file"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "not a result file"),
        (lambda p: p.write_text("[]"), "not a JSON object"),
        (_edit(schema=99), "schema is 99"),
        (_edit(test={"accuracy": 1.5, "n": 10}), "test.accuracy is 1.5"),
        (_edit(test={"accuracy": 0.5, "n": 0}), "test.n is 0"),
        (_edit(test={"accuracy": float("nan"), "n": 10}), "NaN"),
        (_edit(parameters="many"), "parameters is 'many'; expected int"),
        (_drop("recipe_hash"), "recipe_hash is missing"),
        (_drop("seal"), "seal is missing"),
        (lambda p: p.write_text(p.read_text().replace("12345", "12344")), "changed after it was written"),
        (_edit(predictions={"file": "", "sha256": "0"}), "are missing"),
        (_edit(predictions={"sha256": "0"}), "predictions.file is missing"),
        (
            _edit(speed={"examples": 1, "examples_per_second": True}),
            "speed.examples_per_second is True",
        ),
        (_edit(recipe={"name": 3}), "recipe.name is 3; expected str"),
        (_edit(protocol={"name": "strict", "length": 0}), "protocol.length is 0"),
        (_edit(floors={"majority class": 2}), "floors.majority class is 2"),
        (_edit(flops={"uncounted": [1]}), r"flops.uncounted\[0\] is 1; expected str"),
        (_edit(curve=[{"step": "one"}]), r"curve\[0\].step is 'one'; expected int"),
        (_edit(command="lra \x1b[2J"), "command holds a control character"),
        (_edit(more={"\ud800": 1}), "a key holds a control character"),
        (_edit(more=2**63), "more is a number of more than 63 bits"),
        (_edit(more=[[{"a": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}]]), "nested more than 16 deep"),
        (lambda p: p.write_text(p.read_text().replace("12345", "1e999")), "parameters is inf"),
        (lambda p: p.write_text(" " * 2**24 + "{}"), "holds more than 16,777,216 bytes"),
        (lambda p: p.with_suffix(".npz").unlink(), "are missing"),
        (lambda p: p.with_suffix(".npz").write_bytes(b"other"), "checksum"),
        (_edit(predictions={"file": "../../../../etc/passwd", "sha256": "0"}), "are missing"),
    ],
)
def test_a_damaged_record_is_named_and_left_out(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    good = result.write(record("s4d"), PREDICTIONS, tmp_path)
    bad = result.write(record("gru"), PREDICTIONS, tmp_path)
    damage(bad)
    with pytest.raises(UserError, match=message) as error:
        result.read(bad)
    assert str(bad) in str(error.value)
    collection = Collection.read(tmp_path)
    assert [r.id for r in collection.records] == [result.read(good).id]
    assert len(collection.problems) == 1
    assert "\n" not in collection.problems[0]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "table.md"
    target.write_text("old")

    def fail() -> None:
        with files.atomic(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.md"]


def test_what_is_there_is_replaced_where_nobody_asked_to_keep_it(tmp_path: Path) -> None:
    target = tmp_path / "table.md"
    for content in ("old", "new"):
        with files.atomic(target) as temporary:
            temporary.write_text(content)
    assert target.read_text() == "new"
    with pytest.raises(FileExistsError), files.atomic(target, exclusive=True) as temporary:
        temporary.write_text("newer")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["table.md"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are not listed here")
def test_writing_leaves_no_file_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for number in range(20):
        with files.atomic(tmp_path / f"{number}.md") as temporary:
            temporary.write_text("new")
    assert len(os.listdir("/proc/self/fd")) < len(before) + 20


def _git(folder: Path, *words: str) -> str:
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *own, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_record_knows_its_commit_and_whether_code_differs_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "lra" / "environment.py"
    code.parent.mkdir()
    code.write_text("one\n")
    monkeypatch.setattr(environment, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.commit() == {"hash": "", "dirty": True}
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        _git(tmp_path, *words)
    head = _git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes.txt").write_text("no code")
    assert environment.commit() == {"hash": head, "dirty": False}
    for path in (code, tmp_path / "new.toml"):
        before = path.read_text() if path.exists() else None
        path.write_text("two\n")
        assert environment.commit() == {"hash": head, "dirty": True}
        path.unlink() if before is None else path.write_text(before)


def test_an_environment_says_what_a_number_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = environment.environment()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["versions"]) <= set(environment.PACKAGES)
    assert facts["commit"] == environment.commit()
    assert facts["system"].startswith(platform.system())
    assert facts["cpu"].endswith(f" x{environment.cpus()}")
    assert ("gpu" in facts) == torch.cuda.is_available()

    def unreadable(*_: Any) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", lambda _: "flags: a\nmodel name\t: A: b chip \nmodel name\t: other\n")
    assert environment._cpu.__wrapped__() == f"A: b chip x{environment.cpus()}"
    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert environment._cpu.__wrapped__() == f"unknown x{environment.cpus()}"


def test_an_environment_names_the_gpu_and_its_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a gpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    facts = environment.environment()
    assert (facts["gpu"], facts["cuda"]) == ("a gpu", "13.0")


def test_results_lie_in_the_named_folder_the_checkout_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LRA_RESULTS", raising=False)
    assert result.folder() == Path(__file__).parents[2] / "results"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(result, "__file__", str(tmp_path / "site-packages" / "lra" / "results" / "result.py"))
    assert result.folder() == tmp_path / "results"
    monkeypatch.setenv("LRA_RESULTS", "elsewhere")
    assert result.folder() == Path("elsewhere")


def test_an_id_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    first = result.write(record(), PREDICTIONS, tmp_path)
    before = first.read_bytes()
    # predictions of a run that was killed before its record
    first.with_name(f"{first.stem}-2.npz").write_bytes(b"half")
    third = result.write(record(), PREDICTIONS, tmp_path)
    assert third.stem == f"{first.stem}-3"
    assert result.read(third).predictions.file == third.with_suffix(".npz").name
    assert first.read_bytes() == before
    assert first.with_name(f"{first.stem}-2.npz").read_bytes() == b"half"
    assert oct(first.stat().st_mode)[-3:] == "644"


def test_a_thousand_results_of_one_name_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: True)
    with pytest.raises(UserError, match=r"holds a thousand results called quick-listops-gru-s0"):
        result.write(record(), PREDICTIONS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_nobody_could_read_is_not_written(tmp_path: Path) -> None:
    wrong = msgspec.structs.replace(record(), test=records.Score(accuracy=0.5, n=0))
    with pytest.raises(ValueError, match=r"refusing to write an invalid result: test\.n is 0"):
        result.write(wrong, PREDICTIONS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_takes_its_predictions_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files._publish

    def full(name: str, path: Path) -> None:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        real(name, path)

    monkeypatch.setattr(files, "_publish", full)
    with pytest.raises(UserError, match=r"cannot write the result to .*: No space left on device; .* --resume"):
        result.write(record(), PREDICTIONS, tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_where_there_are_no_hard_links_nothing_is_replaced_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    first, second = (result.write(record(), PREDICTIONS, tmp_path) for _ in range(2))
    assert second.stem == f"{first.stem}-2"
    assert sorted(p.suffix for p in first.parent.iterdir()) == [".json", ".json", ".npz", ".npz"]
    before = first.read_bytes()
    with pytest.raises(FileExistsError), files.atomic(first, exclusive=True) as temporary:
        temporary.write_text("another")
    assert first.read_bytes() == before


def test_a_file_may_be_just_as_large_as_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = result.write(record(), PREDICTIONS, tmp_path)
    monkeypatch.setattr(result, "LARGEST", path.stat().st_size)
    assert result.read(path).task == "listops"
    monkeypatch.setattr(result, "LARGEST", path.stat().st_size - 1)
    with pytest.raises(UserError, match="it holds more than"):
        result.read(path)
    stored = path.with_suffix(".npz").read_bytes()
    with zipfile.ZipFile(io.BytesIO(stored)) as archive:
        size = sum(member.file_size for member in archive.infolist())
    monkeypatch.setattr(result, "LARGEST", size)
    assert list(result._arrays(stored)) == ["prediction"]
    monkeypatch.setattr(result, "LARGEST", size - 1)
    with pytest.raises(ValueError, match="decompress to more than"):
        result._arrays(stored)


@pytest.mark.parametrize("length", [119, 120, 121, 500])
def test_long_names_stay_different_and_short(length: int) -> None:
    one, two = "n" * length, "n" * (length - 1) + "m"
    assert (files.safe_name(one) == one) == (length <= 120)
    assert files.safe_name(one) != files.safe_name(two)
    assert len(files.safe_name("é" * length).encode()) <= 120
    assert len(files.safe_name(one, 180)) <= 180


def test_what_is_written_is_on_disk_before_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, synced = tmp_path / "table.md", []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_ino, target.exists())))
    with files.atomic(target) as temporary:
        temporary.write_text("new")
    assert synced == [(target.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_results_that_cannot_be_written_are_refused_before_the_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="LRA_RESULTS"):
        files.check_writable(file / "runs")
    files.check_writable(tmp_path / "new" / "runs")
    assert list((tmp_path / "new" / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "folder"),
    [("s4d", "s4d"), ("s4d/inv", "s4d-inv"), ("../../x.py:Net", "Net"), ("a.b:..", "_"), ("x:é/..", "é-.."), ("", "_")],
)
def test_an_architecture_never_leaves_its_folder(name: str, folder: str) -> None:
    assert result.slug(name) == folder


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are not confined here")
def test_a_confined_process_counts_the_processors_it_has() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from lra.results import environment; print(environment._cpu(), environment.cpus())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert (said[-2], said[-1]) == ("x1", "1")
