"""Rows of data files, of folders of them and of data sets on the Hub; each is read, or it is said why not."""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, RemoteError, UsageError, plain, quoted, some
from warmerge.rewards.layouts import Row
from warmerge.weights import foreign_json

_SUFFIXES = (".jsonl.gz", ".json.gz", ".jsonl", ".json", ".parquet")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<split>[\w.-]+))?")
_SHOWN = 10
# All rows are held in memory, where a row of three bytes takes three hundred.
_MOST_BYTES, _MOST_ROWS, _MOST_UNREADABLE = 10_000_000_000, 10_000_000, 100_000
# What is packed may say more than it is large, but a few bytes that unpack to gigabytes are no texts.
_UNPACKED, _PACKING = 100_000_000, 100
# Values, or the marks before them, that a row may have on average; and what in JSON is text.
_VALUES_OF_A_ROW = 20
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_MARK = b"\xef\xbb\xbf"
Place = tuple[str, int]


def parse_named(spec: str) -> tuple[str, str]:
    """Name and source of `NAME=SOURCE`, or of a source alone, which is named after its file.

    Raises:
        UsageError: nothing stands before or after the `=`.

    >>> parse_named("val=runs/pairs.jsonl"), parse_named("data/val.jsonl.gz"), parse_named("org/name:test")
    (('val', 'runs/pairs.jsonl'), ('val', 'data/val.jsonl.gz'), ('name:test', 'org/name:test'))
    """
    name, equals, source = spec.partition("=")
    # An = further inside belongs to the path, as in runs/lr=1e-5/pairs.jsonl.
    if equals and "/" not in name and not Path(spec).exists():
        if not (name and source):
            raise UsageError(f"{quoted(spec)}: expected NAME=PATH, or PATH")
        return name, source
    file = Path(spec).name or Path(spec).resolve().name
    suffix = next((suffix for suffix in _SUFFIXES if file.lower().endswith(suffix)), "")
    return file[: len(file) - len(suffix)] or file, spec


def read_rows(source: str) -> list[tuple[str, int, Row | Finding]]:
    """(file, row number from 1, row) of every row in a source; in place of an unreadable row, why it is.

    Args:
        source: a .jsonl, .json (an array, or lines) or .parquet file, the first two also with .gz; a folder of such
            files, read in the order of their names; or `org/name` or `org/name:split` on the Hub. A path wins.

    Raises:
        UsageError: there is no such thing, or a library is missing that reads it.
        RefusedError: a file is damaged as a whole.
        RemoteError: the Hub did not give the data set.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _readable(file) and not file.name.startswith("."))
        if not files:
            raise UsageError(f"no data file in {plain(source)}; expected some of {', '.join(_SUFFIXES)}")
        return [row for file in files for row in _file_rows(file, str(file))]
    if path.exists():
        if not _readable(path):
            raise UsageError(f"{plain(source)} is not a data file; expected one of {', '.join(_SUFFIXES)}")
        return _file_rows(path, source)
    found = _HUB_ID.fullmatch(source)
    if found is None or source.lower().endswith(_SUFFIXES):
        raise UsageError(f"no file or folder {quoted(source)}, and not a data-set id like org/name")
    return _hub_rows(source, found["id"], found["split"])


def refused_rows(bad: Sequence[Finding], source: str, rest_is_good: bool) -> RefusedError:
    """The refusal of a source with bad rows: the first of them, and what to do about all."""
    more = len(bad) - _SHOWN
    if not rest_is_good:
        what = f"... and {more} more bad rows; no good row is left" if more > 0 else "no good row is left"
    elif more > 0:
        what = f"... and {more} more bad rows; --skip-bad-rows leaves them out and counts them"
    else:
        what = "--skip-bad-rows leaves bad rows out and counts them"
    return RefusedError([*bad[:_SHOWN], Finding(source, what)])


def _readable(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(_SUFFIXES)


def _file_rows(path: Path, label: str) -> list[tuple[str, int, Row | Finding]]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        rows = enumerate(_parquet(path, label), 1)
        return [(label, number, _checked(row, (label, number))) for number, row in rows]
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise RefusedError([_too_much(label, f"has {size:,} bytes", f"{_MOST_BYTES:,}")])
        data = (_unpacked(path, size, label) if name.endswith(".gz") else path.read_bytes()).removeprefix(_MARK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RefusedError([Finding(label, f"is cut off or damaged ({error}); fetch it again")]) from error
    except OSError as error:
        raise UsageError(f"cannot read {plain(label)}: {error.strerror}") from error
    _refuse_many_values(data, label)
    if name.removesuffix(".gz").endswith(".json") and data.lstrip().startswith(b"["):
        array = _parsed(data, (label, 1))
        if isinstance(array, Finding):
            raise RefusedError([Finding(label, array.what)])
        if len(array) > _MOST_ROWS:
            raise RefusedError([_too_much(label, f"has {len(array):,} rows", f"{_MOST_ROWS:,}")])
        return _readable_rows(label, ((number, row) for number, row in enumerate(array, 1)))
    if (count := data.count(b"\n")) > _MOST_ROWS:
        raise RefusedError([_too_much(label, f"has {count:,} lines", f"{_MOST_ROWS:,}")])
    # Lines end in \n alone: a \r or U+2028 may stand inside of a row.
    lines = ((number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip())
    return _readable_rows(label, ((number, _parsed(line, (label, number))) for number, line in lines))


def _refuse_many_values(data: bytes, label: str) -> None:
    """Short values take up to thirty times their length in memory; counted before there are any."""
    marks = (b"{", b"[", b",")
    if sum(map(data.count, marks)) > _VALUES_OF_A_ROW * _MOST_ROWS:
        count = sum(map(_STRINGS.sub(b"", data).count, marks))  # those inside of texts are none
        if count > _VALUES_OF_A_ROW * _MOST_ROWS:
            raise RefusedError([_too_much(label, f"has {count:,} values", f"{_VALUES_OF_A_ROW * _MOST_ROWS:,}")])


def _readable_rows(label: str, rows: Iterable[tuple[int, Any]]) -> list[tuple[str, int, Row | Finding]]:
    """The rows with their places. A file in which row after row is no object is refused: it is no data."""
    found, unreadable = [], 0
    for number, row in rows:
        checked = _checked(row, (label, number))
        unreadable += isinstance(checked, Finding)
        if isinstance(checked, Finding) and unreadable > _MOST_UNREADABLE:
            what = f"is the last of {unreadable:,} rows that cannot be read ({checked.what}); is it a data file?"
            raise RefusedError([Finding(checked.where, what)])
        found.append((label, number, checked))
    return found


def _unpacked(path: Path, size: int, label: str) -> bytes:
    """What a .gz holds, as long as that is no more than texts can be packed."""
    limit, parts, total = max(_UNPACKED, _PACKING * size), [], 0
    with gzip.open(path) as file:
        while part := file.read(1 << 24):
            parts.append(part)
            total += len(part)
            if total > limit:
                raise RefusedError([_too_much(label, f"has {size:,} bytes, which unpack to more", f"{limit:,} bytes")])
    return b"".join(parts)


def _too_much(label: str, found: str, limit: str) -> Finding:
    return Finding(label, f"{found}, expected {limit} at most; unpack it where you trust it, or cut it into files")


def _parsed(data: bytes, place: Place) -> Any:
    """What JSON says, or a Finding why it cannot be read."""
    where = f"{place[0]}:{place[1]}"
    try:
        return foreign_json.parse(data, object_pairs_hook=_once_each)
    except UnicodeDecodeError as error:
        return Finding(where, f"is not UTF-8 (byte {error.start})")
    except ValueError as error:
        return Finding(where, f"is not JSON ({error})")


def _once_each(pairs: list[tuple[str, Any]]) -> Row:
    """A hook for JSON objects: of two values under one key Python would take the last, and others refuse them."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object in it has {_twice(key for key, _ in pairs)} twice")
    return found


def _twice(names: Iterable[str]) -> str:
    return some(name for name, count in Counter(names).items() if count > 1)


def _checked(row: Any, place: Place) -> Row | Finding:
    if isinstance(row, dict | Finding):
        return row
    found = "an array (a file that is one array is named .json)" if isinstance(row, list) else "a bare value"
    return Finding(f"{place[0]}:{place[1]}", f"is {found}, expected an object with one row's columns")


def _parquet(path: Path, label: str) -> list[Any]:
    arrow, parquet = _library("pyarrow"), _library("pyarrow.parquet")
    rows: list[Any] = []
    limit, unpacked = max(_UNPACKED, _PACKING * path.stat().st_size), 0
    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > _MOST_ROWS:
                raise RefusedError([_too_much(label, f"has {file.metadata.num_rows:,} rows", f"{_MOST_ROWS:,}")])
            if twice := _twice(file.schema_arrow.names):
                raise RefusedError([Finding(label, f"has {twice} twice among its columns; expected each once")])
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            if sum(group.total_byte_size for group in groups) > limit:
                raise RefusedError([_too_much(label, "has values that unpack to more", f"{limit:,} bytes")])
            for batch in file.iter_batches(batch_size=64):
                # A value that is kept once for many rows is not counted by arrow, and copied for each by Python.
                shared = "dictionary" in str(batch.schema)
                for part in (batch.slice(i, 1) for i in range(batch.num_rows)) if shared else (batch,):
                    found = part.to_pylist() if part.nbytes <= limit else []
                    unpacked += len(str(found)) if shared else part.nbytes
                    if unpacked > limit:
                        raise RefusedError([_too_much(label, "has values that unpack to more", f"{limit:,} bytes")])
                    rows += found
    except (OSError, ValueError, OverflowError, arrow.ArrowException) as error:
        raise RefusedError([Finding(label, f"cannot be read as Parquet ({error})")]) from error
    return rows


def _hub_rows(label: str, identity: str, split: str | None) -> list[tuple[str, int, Row | Finding]]:
    datasets = _library("datasets")
    try:
        splits = list(datasets.get_dataset_split_names(identity))
        if split is None and len(splits) == 1:
            split = splits[0]
        rows = datasets.load_dataset(identity, split=split).to_list() if split in splits else None
    except Exception as error:  # requests, huggingface_hub and datasets each have their own
        what = f"no file or folder {quoted(label)}, and as a data set it could not be read from the Hub"
        raise RemoteError(f"{what}: {type(error).__name__}: {error}") from error
    if rows is None:
        asked = "has several splits" if split is None else f"has no split {quoted(split)}"
        raise UsageError(f"{identity} {asked}; name one of {some(splits, 20)}, as in {identity}:{sorted(splits)[0]}")
    return [(label, number, _checked(row, (label, number))) for number, row in enumerate(rows, 1)]


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UsageError(f"reading this needs {package}: pip install 'warmerge[data]'") from error
