"""Raw tables: Parquet files in a user's folder, else a data set on the Hugging Face Hub at a pinned revision.

`read_table` reads a split whole; `stream_texts` reads texts one by one, and of the hub no more than is asked for.
"""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lra.task import DataError


@dataclass(frozen=True)
class Hub:
    """A data set: its id and revision on the hub, the subfolder with its files in a user's source folder, and the
    official form that the task reads too, in words."""

    id: str
    revision: str
    folder: str
    official: str = ""
    splits: tuple[str, ...] = ("train", "test")

    @property
    def files(self) -> str:
        tables = " and ".join(f"{self.folder}/{split}.parquet" for split in self.splits)
        return f"{tables}, or {self.official}," if self.official else tables


@dataclass(frozen=True)
class TextHub:
    """A data set of texts, one in each row of the column `text`: its id and revision on the hub, and for each split the
    pattern of its Parquet files there. folder: where they may stand in a user's source folder."""

    id: str
    revision: str
    folder: str
    files: Mapping[str, str]

    @property
    def raw(self) -> str:
        return f"{' and '.join(self.files.values())} of {self.id}, or the hub"


def read_table(hub: Hub, split: str, columns: Sequence[str], source: Path | None, command: str) -> list[list[Any]]:
    """Read columns of a split, in the order of `columns`. command: the command that prepares the task, for messages.

    Raises DataError if the split cannot be read or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source is None:
        table, origin = _load_from_hub(hub, split, command), f"{hub.id} at {hub.revision[:12]}"
    else:
        path = _find_file(hub, split, source)
        origin = str(path)
        try:
            table = pq.read_table(path)
            # names are decoded on access
            table.column_names  # noqa: B018
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"{path} is not a complete Parquet file ({reason}); fetch it again") from None
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise DataError(f"{origin} has columns {', '.join(table.column_names)}; {', '.join(missing)} is missing")
    try:
        return [table.column(column).to_pylist() for column in columns]
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{origin} holds values that cannot be read ({error}); fetch it again") from None


def _find_file(hub: Hub, split: str, source: Path) -> Path:
    shard = f"plain_text/{split}-00000-of-00001.parquet"
    for name in (f"{hub.folder}/{split}.parquet", f"{hub.folder}/{shard}", f"{split}.parquet", shard):
        if (source / name).is_file():
            return source / name
    raise DataError(
        f"no {hub.folder}/{split}.parquet in {source}; put {hub.files} there, "
        "or leave out --from and unset LRA_DATA to fetch them from the hub"
    )


def find_texts(hub: TextHub, split: str, source: Path) -> list[Path]:
    """The files of a split in a user's folder, in the order of their names."""
    for folder in (source / hub.folder, source):
        if files := sorted(folder.glob(hub.files[split])):
            return files
    return []


def stream_texts(hub: TextHub, split: str, source: Path | None, command: str) -> Iterator[str]:
    """The texts of a split in their order, fetched while they are asked for. command: as of `read_table`.

    Raises DataError if the files are missing or damaged, or the hub does not answer.
    """
    advice = f"with {' and '.join(hub.files.values())} of {hub.id} in a folder DIR, run `{command} --from DIR`"
    advice += "; the task imdb_lm runs without them"
    if source is not None:
        files: str | list[str] = [str(path) for path in find_texts(hub, split, source)]
        origin = f"{split} in {source}"
        if not files:
            raise DataError(f"no {hub.folder}/{hub.files[split]} in {source}; {advice}")
    else:
        origin = f"{hub.id} at {hub.revision[:12]}"
        files = f"hf://datasets/{hub.id}@{hub.revision}/{hub.files[split]}"
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise DataError(f"the package datasets, which reads {hub.id}, is not installed") from None
    if source is None and not _reachable(constants.ENDPOINT):
        raise DataError(f"{hub.id} cannot be fetched: the hub does not answer; offline, {advice}")
    for name in ("huggingface_hub", "datasets"):
        # the error below says what they log
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        table = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, columns=["text"])
        for row in table:
            if not isinstance(row["text"], str):
                raise ValueError("a row without a text")
            yield row["text"]
    except Exception as error:  # noqa: BLE001  (the clients of the hub raise many types of exceptions)
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise DataError(
            f"{origin} cannot be read ({type(error).__name__}: {reason}); fetch it again, or {advice}"
        ) from None


def _load_from_hub(hub: Hub, split: str, command: str) -> Any:
    advice = f"with {hub.files} in a folder DIR, run `{command} --from DIR`"
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise DataError(f"the package datasets, which fetches {hub.id}, is not installed; {advice}") from None
    # the client logs every retry; the error below says enough
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not _reachable(constants.ENDPOINT):
        # offline, the client fails at once unless the data are in its cache; otherwise it retries for half a minute
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        # the Arrow format leaves images encoded, as the bytes of their files
        return datasets.load_dataset(hub.id, revision=hub.revision, split=split).with_format("arrow")[:]
    except Exception as error:  # noqa: BLE001  (the clients of the hub raise many types of exceptions)
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise DataError(f"{hub.id} cannot be fetched ({type(error).__name__}: {reason}); offline, {advice}") from None


def _reachable(endpoint: str) -> bool:
    """Whether a server answers within 10 seconds. Uses the proxies of the environment."""
    try:
        urllib.request.urlopen(endpoint, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
