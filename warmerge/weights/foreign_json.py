"""JSON that anybody may have written, read so that nothing which is done with it later can fail on it.

Python reads whole numbers that no float holds, and lists nested so deeply that the next function which walks them runs
out of stack. Both are refused here, once.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from warmerge.weights.folder import WHOLE_LIMIT

# The deepest file that is written by anybody, a tokenizer.json, has ten levels.
LEVELS = 100
# A float holds whole numbers of up to 308.
DIGITS = 300


def parse(text: bytes | str, **hooks: Callable[[Any], Any]) -> Any:
    """What a JSON text says. `hooks` are those of `json.loads`; without one NaN and Infinity are read, as configs have.

    Raises:
        ValueError: it is not JSON, not UTF-8, has more than 100 levels, or a whole number of more than 300 digits.

    >>> parse(b'{"a": [1, 2.5, NaN]}')
    {'a': [1, 2.5, nan]}
    >>> parse("[" * 200 + "]" * 200)
    Traceback (most recent call last):
    ValueError: lists and objects in it are nested more than 100 levels deep
    """
    words = text if isinstance(text, str) else text.decode()
    try:
        chosen: dict[str, Any] = {"parse_int": _whole, **hooks}
        value = json.loads(words, **chosen)
        deep = words.count("[") + words.count("{") > LEVELS and _levels(value) > LEVELS
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"lists and objects in it are nested more than {LEVELS} levels deep") from None
    return value


def finite(number: str) -> float:
    """A hook for `parse` (parse_float and parse_constant): a number of JSON, which 1e999, NaN and Infinity are not."""
    found = float(number)
    if found - found != 0:
        raise ValueError(f"{number[:20]} is no number of JSON")
    return found


def text_of(path: Path) -> str:
    """The text in a file of at most 100 MB. What is no regular file is not opened: a pipe would never end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, too large, or not UTF-8.
    """
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is no regular file")
    if state.st_size > WHOLE_LIMIT:
        raise ValueError(f"it has {state.st_size:,} bytes, expected {WHOLE_LIMIT:,} at most")
    return path.read_text(encoding="utf-8")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number in it has {len(digits)} digits")
    return int(digits)


def _levels(value: Any) -> int:
    """How deep lists and objects lie in each other; no deeper than is needed to know that it is too deep."""
    level, found = _containers([value]), 0
    while level and found <= LEVELS:
        level = _containers(
            inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
        )
        found += 1
    return found


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]
