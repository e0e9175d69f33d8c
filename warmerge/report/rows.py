"""What figures read out of rows: dicts as they stand in a JSON file, or in a CSV file where all values are text.

A value that is missing, None, empty or NaN has not been measured, and nothing is drawn for it. A value that cannot be
what its column says is refused: a figure of it would be believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from warmerge.errors import UsageError, counted, plain, quoted

Row = Mapping[str, Any]
# More than these are no picture any more, and take minutes to draw. Sets, paths and scenarios have a panel each.
_MOST = {"set": 50, "path": 50, "scenario": 50, "model": 200, "policy": 200, "proxy": 200, "member": 200, "group": 200}
_MOST_ROWS = 100_000
# Of kinds that draw each row by itself.
_MOST_MARKS = {"eval": 1_000, "winrate": 200}


def groups(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    """The rows by a name that each must have, in the order of first appearance; no rows at all are refused.

    >>> groups([{"set": "val", "n": 1}, {"set": "ood", "n": 2}, {"set": "val", "n": 3}], "set")["val"]
    [{'set': 'val', 'n': 1}, {'set': 'val', 'n': 3}]
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(text(row, key), []).append(row)
    if not found:
        raise UsageError("figure: expected rows to draw, found none")
    return found


def too_many(kind: str, content: Mapping[str, Any]) -> str:
    """What a result has more of than can be read in a picture, with its number; "" if it has not.

    >>> too_many("eval", {"rows": [{"model": f"{i}", "set": "val"} for i in range(201)]})
    '201 models'
    """
    rows = content.get("rows") or []
    for key, most in _MOST.items():
        found = len({str(row.get(key)) for row in rows})
        if found > most:
            return counted(found, key) if key != "policy" else f"{found:,} policies"
    return counted(len(rows), "row") if len(rows) > _MOST_MARKS.get(kind, _MOST_ROWS) else ""


def text(row: Row, key: str) -> str:
    """A name that the row must have."""
    value = row.get(key)
    if value is None or value == "":
        raise UsageError(f"figure: expected {key!r} in each row, found none in {_shown(row)}")
    return str(value)


def number(row: Row, key: str) -> float:
    """A number, or NaN where there is none."""
    value = row.get(key)
    if value is None or value == "":
        return math.nan
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.inf
    if math.isinf(found):
        raise UsageError(f"figure: expected a number for {key!r}, found {quoted(str(value))} in {_shown(row)}")
    return found


def place(row: Row, key: str) -> float:
    """A number that the row must have, because it says where the row is drawn."""
    found = number(row, key)
    if math.isnan(found):
        raise UsageError(f"figure: expected a number for {key!r} in each row, found none in {_shown(row)}")
    return found


def accuracy(row: Row, key: str) -> float:
    """A fraction from 0 to 1, or NaN where there is none. Percents are refused: they would be taken for fractions."""
    found = number(row, key)
    if found < 0 or found > 1:
        raise UsageError(f"figure: expected a fraction from 0 to 1 for {key!r}, found {found:g} in {_shown(row)}")
    return found


def interval(row: Row, prefix: str = "") -> tuple[float, float]:
    """The ends of an interval, `<prefix>low` and `<prefix>high`; two NaN where one of them is missing.

    They may lie beyond 0..1: an interval of plus and minus two standard errors does so near the ends.
    """
    low, high = number(row, f"{prefix}low"), number(row, f"{prefix}high")
    if math.isnan(low) or math.isnan(high):
        return math.nan, math.nan
    if low > high:
        raise UsageError(f"figure: expected {prefix}low <= {prefix}high, found {low:g} > {high:g} in {_shown(row)}")
    return low, high


def flag(row: Row, key: str) -> bool:
    """True or False; the text "False" of a CSV file is False."""
    value = row.get(key)
    known = {"true": True, "1": True, "false": False, "0": False, "": False, "none": False}
    word = str(value).strip().lower()
    if word not in known:
        raise UsageError(f"figure: expected true or false for {key!r}, found {quoted(str(value))} in {_shown(row)}")
    return known[word]


def sizes(rows: Sequence[Row]) -> str:
    """On how much the rows of one panel were measured.

    >>> sizes([{"n": 1314, "prompts": 400}, {"n": 1314, "prompts": 400}])
    'n = 1314, 400 prompts'
    >>> sizes([{"n": 1314}, {"n": 1310}])
    'n = 1310 to 1314'
    """
    parts = []
    for key in ("n", "prompts"):
        found = {number(row, key) for row in rows}
        counts = [f"{count:.0f}" for count in sorted(count for count in found if not math.isnan(count))]
        if counts:
            span = counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            parts.append(f"n = {span}" if key == "n" else f"{span} prompt" + "s" * (counts != ["1"]))
    return ", ".join(parts)


def in_order(rows: Sequence[Row], key: str) -> list[Row]:
    """The rows by their place along an axis. Two different rows at one place are refused: which of them is right?"""
    found: dict[float, Row] = {}
    for row in rows:
        other = found.setdefault(place(row, key), row)
        if other != row:
            raise UsageError(f"figure: expected one row for each {key!r}, found {_shown(other)} and {_shown(row)}")
    return [found[at] for at in sorted(found)]


def two_ended(path: str) -> bool:
    """Whether a path is "a -> b", and it is clear which part is a."""
    return len(parts := path.split(" -> ")) == 2 and all(parts)


def ends(path: str) -> tuple[str, str]:
    """The two models of a path "a -> b".

    >>> ends("runs/1 -> runs/2"), ends("first line")
    (('runs/1', 'runs/2'), ('the first model', 'the second model'))
    """
    if not two_ended(path):
        return "the first model", "the second model"
    first, second = path.split(" -> ")
    return first, second


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Names of at most about `width` characters. Names that differ still differ: else one would stand for another.

    >>> short_names(["runs/2024/seed-1/final", "runs/2024/seed-2/final"], 12)
    ['...1/final', '...2/final']
    """
    for share in (0.0, 0.35, 0.65, 1.0):
        short = {name: shortened(name, width, share) for name in names}
        if len(set(short.values())) == len(short):
            break
    else:
        short = {name: f"{shortened(name, width - 5)} ({i})" for i, name in enumerate(dict.fromkeys(names), start=1)}
    return [short[name] for name in names]


def shortened(name: str, width: int, share: float = 0.35) -> str:
    """`name` with "..." in place of what does not fit; `share` of what is kept comes from its start.

    >>> shortened("models/seed-1", 10, share=0.0), shortened("models/seed-1", 10, share=1.0), shortened("a", 10)
    ('.../seed-1', 'models/...', 'a')
    """
    if len(name) <= width:
        return name
    kept = max(2, width - 3)
    head = round(share * kept)
    return name[:head] + "..." + name[len(name) - (kept - head) :]


def _shown(row: Row) -> str:
    inside = ", ".join(f"{plain(str(key))}: {plain(str(value))}" for key, value in list(row.items())[:6])
    return "{" + inside + (", ..." if len(row) > 6 else "") + "}"
