"""Files from strangers: read as what they claim to be, or refused by name; never unpickled, never written elsewhere."""

from __future__ import annotations

import ast
import gzip
import io
import pickle
import re
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_fuzz import CASES, damaged, texts
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lra.errors import UserError
from lra.task import DataError, silent
from lra.tasks import _archive, _imdb, _pathfinder_release
from lra.tasks._retrieval import _identifiers
from lra.tasks._source import Hub, read_table
from lra.tasks.lra import image, listops, retrieval
from lra.training import checkpoint

ROOT = Path(__file__).parents[2]
EXPRESSION = b"( ( ( [MAX 2 ) 9 ) ] )\t9\n"
PAIR = b"1.0\tP1\tP2\tb'a \\xc3\\xa9 paper'\tb\"another's\"\n"
PROTOCOL = retrieval.Retrieval.protocols["strict"]

symbols = st.sampled_from([*listops.IDS, "(", ")", " ", "\t", "11", "[MEAN", "\r", "\x00", "9\t9"])
expressions = st.lists(symbols | texts, max_size=30).map(" ".join)


def refused(error: Exception, *names: object) -> None:
    assert any(str(name) in str(error) for name in names)
    assert len(str(error)) < 5000


@given(st.lists(st.one_of(expressions, st.just(EXPRESSION.decode()), texts), max_size=4).map("\n".join))
@CASES
def test_listops_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / listops.FILES["train"]
    path.write_bytes(b"Source\tTarget\n" + text.encode(errors="surrogatepass"))
    try:
        for tokens in listops.released(tmp_path, "train", "x"):
            assert 0 <= listops.evaluate(tokens) <= 9
    except DataError as error:
        refused(error, path)


@given(damaged(b"Source\tTarget\n" + EXPRESSION * 3))
@CASES
def test_damaged_listops_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / listops.FILES["train"]
    path.write_bytes(content)
    try:
        list(listops.released(tmp_path, "train", "x"))
    except DataError as error:
        refused(error, path)


literals = st.sampled_from([
    b"b'", b"b'a' b'b'", b"b'a', 3", b"b'a' + 1", b"b'" + b"\\d" + b"'", b"b'" + b"(" * 5000, b"b''" + b"+b''" * 5000,
    b"b'a'.x", b"b'\\x0'", b"b'a' if 1 else 2", b"b'a'\n", b"b\"\"", b"b''" + b")" * 99,
])  # fmt: skip
columns = st.one_of(st.binary(max_size=40), literals, st.sampled_from([b"0", b"1.0", b"2", b""]))


@given(st.lists(st.one_of(st.lists(columns, max_size=6).map(b"\t".join), damaged(PAIR)), max_size=4))
@CASES
def test_retrieval_pairs(lines: list[bytes]) -> None:
    for name in ("strict", "s4"):
        documents: dict[Any, np.ndarray] = {}
        try:
            rows = list(retrieval._rows(lines, "pairs.tsv", retrieval.Retrieval.protocols[name], documents))
        except DataError as error:
            refused(error, "pairs.tsv line")
            continue
        assert all(label in (0, 1) and one in documents and two in documents for label, one, two in rows)
        assert all(0 < len(d) <= PROTOCOL.length and d.dtype == np.uint8 for d in documents.values())


@given(damaged(gzip.compress(b"1\ta\tb\n0\ta\ta\n" * 3)))
@CASES
def test_pairs_by_id(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pairs.tsv.gz"
    path.write_bytes(content)
    try:
        for label, one, two in _identifiers(path, {"a": "", "b": ""}):
            assert label in (0, 1)
            assert {one, two} <= {"a", "b"}
    except DataError as error:
        refused(error, path)


def released_pathfinder(folder: Path, rows: bytes) -> Path:
    root = folder / "pathfinder32" / _pathfinder_release.LEVEL
    (root / "metadata").mkdir(parents=True, exist_ok=True)
    (root / "imgs" / "0").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(root / "imgs/0/sample_0.png")
    (root / "metadata" / "0.npy").write_bytes(rows)
    return root


ROW = b"imgs/0 sample_0.png 0 1 2 3\n"
TABLE = io.BytesIO()
np.save(TABLE, np.array([["imgs/0", "sample_0.png", "0", "1"]]))


@given(
    st.one_of(
        damaged(ROW * 3), damaged(TABLE.getvalue()), st.binary(max_size=200),
        st.lists(texts, min_size=3, max_size=6).map(lambda parts: " ".join(parts).encode(errors="surrogatepass")),
        st.lists(texts, min_size=3, max_size=6).map(lambda p: f"{p[0]} {p[1]} {p[2]} 1".encode(errors="replace")),
    )
)  # fmt: skip
@CASES
def test_pathfinder_metadata(tmp_path: Path, rows: bytes) -> None:
    root = released_pathfinder(tmp_path, rows)
    try:
        samples, _ = _pathfinder_release._samples(root)
    except DataError as error:
        refused(error, root)
    else:
        for path, label in samples:
            assert label in (0, 1)
            assert path.resolve().is_relative_to(root.resolve())


PNG = io.BytesIO()
Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32)).save(PNG, "PNG")


@given(st.one_of(damaged(PNG.getvalue()), st.binary(max_size=100)))
@CASES
def test_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    try:
        assert _pathfinder_release._pixels(path, 32).shape == (1024,)
    except DataError as error:
        refused(error, path)
    decoded = image._decode({"bytes": content})
    assert isinstance(decoded, str) or decoded.shape == (32, 32, 3)


def parquet(**columns: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table(columns or {"text": ["one", "two"], "label": [0, 1]}), out)
    return out.getvalue()


@given(damaged(parquet()))
@CASES
def test_tables(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set").mkdir(exist_ok=True)
    (tmp_path / "set" / "train.parquet").write_bytes(content)
    try:
        found = read_table(Hub("a/b", "c" * 40, "set"), "train", ("text", "label"), tmp_path, "x")
    except DataError as error:
        refused(error, tmp_path)
    else:
        assert len(found) == 2


def test_a_table_of_text_that_is_none_is_refused(tmp_path: Path) -> None:
    content = parquet()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(content.replace(b"one", b"\xff\xfe\xfd"))
    with pytest.raises(DataError, match=r"train.parquet holds values that cannot be read .*utf-8"):
        read_table(Hub("a/b", "c" * 40, "set"), "train", ("text", "label"), tmp_path, "x")


@pytest.mark.parametrize("labels", [[[0], [1]], ["0", "1"], [0, None], [0, 10], [0.5, 1.0], [{"a": 1}, None]])
def test_a_table_of_other_labels_is_refused(tmp_path: Path, labels: list[Any]) -> None:
    pixels = PNG.getvalue()
    for hub, read, column, values in (
        (_imdb.HUB, _imdb.read, "text", ["one", "two"]),
        (image.HUB, partial(image._read, workers=1, progress=silent), "img", [{"bytes": pixels}] * 2),
    ):
        place = tmp_path / hub.folder
        place.mkdir(parents=True)
        (place / "train.parquet").write_bytes(parquet(**{column: values, "label": labels}))
        with pytest.raises(DataError, match=r"not 0 or 1|labels other than 0 to 9"):
            read("train", tmp_path, "x")


WANTED = {"a.tsv": "train", "b.tsv": "test"}


def tape(*members: tuple[tarfile.TarInfo, bytes], zipped: bool = True) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if zipped else "w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members:
            member.size = member.size or len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


def contents(path: Path) -> dict[str, bytes]:
    return {key: b"".join(lines) for key, lines in _archive.members(path, WANTED)}


@given(damaged(tape((member("x/a.tsv"), b"one\ntwo\n"), (member("x/b.tsv"), b"three\n"), zipped=False)), st.booleans())
@CASES
def test_damaged_archives(tmp_path: Path, content: bytes, zipped: bool) -> None:
    path = tmp_path / "lra_release.gz"
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    try:
        found = contents(path)
    except DataError as error:
        refused(error, path)
    else:
        assert set(found) == {"train", "test"}


@pytest.mark.parametrize(
    ("hostile", "says"),
    [
        (member("/etc/a.tsv"), "a member named '/etc/a.tsv'"),
        (member("../../a.tsv"), "a member named"),
        (member("x/../../b"), "a member named"),
        (member("x/a.tsv", tarfile.SYMTYPE, "/etc/passwd"), "is not a plain file"),
        (member("x/a.tsv", tarfile.LNKTYPE, "x/b.tsv"), "is not a plain file"),
        (member("a.tsv", tarfile.FIFOTYPE), "is not a plain file"),
        (member("a.tsv", tarfile.CHRTYPE), "is not a plain file"),
        (member("x/" + "n" * (_archive.MAX_HEADER + 1)), "a header of"),
    ],
    ids=["absolute", "parent", "inner parent", "symlink", "hard link", "fifo", "device", "long name"],
)
def test_hostile_members_are_refused(tmp_path: Path, hostile: tarfile.TarInfo, says: str) -> None:
    path = tmp_path / "lra_release.gz"
    path.write_bytes(tape((hostile, b""), (member("b.tsv"), b"x\n"), (member("a.tsv"), b"y\n")))
    with pytest.raises(DataError, match=re.escape(says)):
        contents(path)
    assert [p.name for p in tmp_path.iterdir()] == ["lra_release.gz"]


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_archive, "MAX_TOTAL", 2**20)
    monkeypatch.setattr(_archive, "MAX_LINE", 2**16)
    path = tmp_path / "lra_release.gz"
    path.write_bytes(tape((member("a.tsv"), bytes(2**17))))
    with pytest.raises(DataError, match=r"holds a line of more than 65,536 bytes"):
        contents(path)
    path.write_bytes(
        tape((member("filler"), b"\n" * 2**19), (member("more"), b"\n" * (2**19 + 1)), (member("a.tsv"), b""))
    )
    with pytest.raises(DataError, match=r"holds 1,048,577 bytes"):
        contents(path)
    for kind, content in (
        (tarfile.GNUTYPE_SPARSE, b""),
        (tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"),
    ):
        path.write_bytes(tape((member("x", kind), content), (member("a.tsv"), b"9\n" * 99), (member("b.tsv"), b"")))
        with pytest.raises(DataError, match="a sparse member"):
            contents(path)


def test_an_image_that_would_fill_the_memory_is_never_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    # 200,000 x 200,000 pixels in the header and nothing behind it
    head = PNG.getvalue()
    path.write_bytes(head[:16] + (200_000).to_bytes(4, "big") * 2 + head[24:])
    with pytest.raises(DataError, match=str(path)):
        _pathfinder_release._pixels(path, 32)
    assert isinstance(image._decode({"bytes": path.read_bytes()}), str)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_nothing_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Trap()))
    assert Path("sprung").exists()
    Path("sprung").unlink()
    root = released_pathfinder(tmp_path, b"")
    np.save(root / "metadata/0.npy", np.array([Trap()]), allow_pickle=True)
    with pytest.raises(DataError, match="pickled files are rejected"):
        _pathfinder_release._samples(root)
    # with a checksum that is right: whoever makes a trap can make that too
    checkpoint.write({"global_step": 1, "state_dict": Trap()}, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"best.ckpt is damaged"):
        checkpoint.read(tmp_path / "best.ckpt")
    with zipfile.ZipFile(tmp_path / "old.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"old.ckpt is damaged"):
        checkpoint.read(tmp_path / "old.ckpt")
    assert not Path("sprung").exists()


FORBIDDEN = {
    "pickle.load": "", "pickle.loads": "", "dill.load": "", "joblib.load": "", "marshal.loads": "", "shelve.open": "",
    "cPickle.load": "", "yaml.load": "", "eval": "", "pd.read_pickle": "", "pandas.read_pickle": "", "os.system": "",
    "torch.load": "weights_only", "np.load": "allow_pickle", "numpy.load": "allow_pickle",
}  # fmt: skip


def unsafe(source: str) -> list[str]:
    """Calls that would run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            wanted = FORBIDDEN.get(name)
            if wanted is None and name.endswith("extractall"):
                found.append(f"{name} at line {node.lineno}")
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            safe = wanted and given.get(wanted) == ("True" if wanted == "weights_only" else "False")
            if wanted is not None and not safe:
                found.append(f"{name} at line {node.lineno}")
            if given.get("shell") == "True":
                found.append(f"shell=True at line {node.lineno}")
    return found


def test_no_source_file_unpickles_evaluates_or_unpacks() -> None:
    files = [p for part in ("lra", "architectures", "kernels", "tasks") for p in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    found = {str(p.relative_to(ROOT)): calls for p in files if (calls := unsafe(p.read_text(encoding="utf-8")))}
    # a check unpickles what it has pickled itself
    (own,) = found.pop("lra/conformance/pytorch.py")
    assert own.startswith("pickle.loads")
    assert found == {}


@pytest.mark.parametrize(
    "source",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "np.load(f, allow_pickle=True)",
     "pickle.loads(x)", "tar.extractall()", "subprocess.run(x, shell=True)", "eval(x)"],
)  # fmt: skip
def test_unsafe_calls_are_seen(source: str) -> None:
    assert unsafe(source)
    assert not unsafe("torch.load(f, weights_only=True); np.load(f, allow_pickle=False); model.eval()")
