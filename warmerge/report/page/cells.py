"""Cells of a page's tables: numbers with their intervals, as people write them, and what a column is sorted by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from warmerge.report.rows import Row, accuracy, interval, number, sizes, text

_KINDS = {
    "member": "member", "average": "average of weights", "merged": "merged earlier", "ensemble": "ensemble",
    "halfway": "half-way to the start", "start": "start", "baseline": "baseline", "rm": "one model",
    "warm": "average of weights", "function": "function",
}  # fmt: skip
# No command writes rows of more columns than these.
_MOST_COLUMNS = 100


@dataclass(frozen=True)
class Cell:
    """What a cell says; `aside` is said in a lower voice. Columns are sorted by `value`, or by the words."""

    words: str
    aside: str = ""
    value: float | None = None
    verdict: bool = False


@dataclass(frozen=True)
class Table:
    """`head`: a name and a lower voice for each column. `marked`: places of the rows that stand out."""

    title: str
    head: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    marked: frozenset[int] = frozenset()
    below: str = ""


def rows_table(title: str, rows: Sequence[Row], most: int) -> Table:
    """The first rows with all their columns, as they stand in the file; of very many columns the first."""
    every, empty = dict.fromkeys(key for row in rows for key in row), raw(None)
    columns = list(every)[:_MOST_COLUMNS]
    cells = tuple(tuple(raw(row[key]) if key in row else empty for key in columns) for row in rows[:most])
    more = f"{len(every) - len(columns):,} more columns are in the file." if len(every) > len(columns) else ""
    return Table(title, tuple((str(key), "") for key in columns), cells, below=more)


def set_column(name: str, rows: Iterable[Row]) -> tuple[str, str]:
    """The head of a set's column: its name, and on how much it was measured."""
    return name, sizes(list(rows))


def named(row: Row, key: str) -> Cell:
    """A model's name, and its kind where the name does not say it."""
    name, kind = text(row, key), str(row.get("kind") or "")
    words = _KINDS.get(kind, kind)
    return Cell(name, "" if words.split(" ")[0] in name else words)


def share(row: Row, key: str = "accuracy", prefix: str = "") -> Cell:
    """A fraction from 0 to 1; what is none is refused."""
    accuracy(row, key)
    return measured(row, key, prefix)


def measured(row: Row, key: str, prefix: str = "", form: str = ".3f", sign: str = "") -> Cell:
    """A number with the interval that its row has."""
    value, (low, high) = number(row, key), interval(row, prefix)
    if math.isnan(value):
        return Cell("")
    aside = "" if math.isnan(low) else f"[{shown(low, form, sign)}, {shown(high, form, sign)}]"
    return Cell(shown(value, form, sign), aside, value)


def points(row: Row, key: str, prefix: str = "") -> Cell:
    """A fraction with its interval, in points."""
    value, ends = number(row, key), interval(row, prefix)
    return measured(
        {"x": 100 * value, "low": 100 * ends[0], "high": 100 * ends[1]}, "x", form=".1f"
    )  # fmt: skip


def span(row: Row, key: str, form: str, sign: str = "") -> Cell:
    """A mean with the lowest and the highest run, where there are several."""
    several = number(row, "runs") > 1
    cell = measured(row, key, f"{key}_", form, sign)
    return cell if several else Cell(cell.words, "", cell.value)


def numeral(row: Row, key: str, form: str) -> Cell:
    """A number without an interval."""
    value = number(row, key)
    return Cell("") if math.isnan(value) else Cell(shown(value, form), value=value)


def count(row: Row, key: str) -> Cell:
    """A whole number."""
    return numeral(row, key, ",.0f")


def raw(value: Any) -> Cell:
    """A value of a row as it stands in the file, with as many digits as a reader can use."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return Cell("" if value is None else str(value).lower() if isinstance(value, bool) else value)
    if isinstance(value, int | float):
        return Cell(shown(value, ".6g") if isinstance(value, float) else str(value), value=float(value))
    return Cell(str(value))


def shown(value: float, form: str, sign: str = "") -> str:
    """A number with a real minus; what rounds to zero has no minus."""
    words = format(value, sign + form)
    if words.lstrip("+-").strip("0.") == "" and words.startswith("-"):
        words = sign + words[1:]
    return words.replace("-", "\N{MINUS SIGN}")
