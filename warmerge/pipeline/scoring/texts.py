"""Windows of texts as files that every machine of a run can read, each by a name that says what is in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.errors import Finding, RefusedError
from warmerge.pipeline.scoring.asked import Texts
from warmerge.rewards.scoring import windows

if TYPE_CHECKING:
    from warmerge.rewards.layouts import Text


@dataclass(frozen=True)
class Window:
    """Texts that are scored together: the digest (hex) of what they are, how many, and how many precede them in their
    list, for messages."""

    digest: str
    count: int
    first: int = 0

    @property
    def range(self) -> range:
        return range(self.first, self.first + self.count)


def write_windows(folder: Path, texts: Texts) -> list[Window]:
    """A list of texts as files in the folder, one for each window; those that are there are left alone.

    Raises:
        RefusedError: a message holds what JSON cannot: it would be another text on the other side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for window, data in _cut(texts):
        found.append(window)
        path = _path(folder, window.digest)
        if not path.exists():
            partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
            partial.write_bytes(data)
            os.replace(partial, path)
    return found


def windows_of(texts: Texts) -> list[Window]:
    """The windows of a list of texts. Raises as `write_windows`."""
    return [window for window, _ in _cut(texts)]


def remove_windows(folder: Path, digests: Iterable[str]) -> None:
    """Removes the files of windows that nobody is to score any more."""
    for digest in digests:
        _path(folder, digest).unlink(missing_ok=True)


def read_window(folder: Path, window: Window) -> list[tuple[Text, Text]]:
    """What `write_windows` wrote.

    Raises:
        RefusedError: the file holds something else, or is not there.
    """
    path = _path(folder, window.digest)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        what = "is not there: another command removed it, or this machine does not share the folder"
        raise RefusedError([Finding(str(path), f"{what}; give the same command again")]) from None
    if hashlib.sha256(data).hexdigest() != window.digest:
        raise RefusedError([Finding(str(path), "does not hold the texts that it is named after; delete it")])
    rows = (json.loads(line) for line in data.splitlines())
    return [(_text(prompt), _text(answer)) for prompt, answer in rows]


def _cut(texts: Texts) -> Iterator[tuple[Window, bytes]]:
    for window in windows(len(texts)):
        data = "".join(_line(texts[i], i) for i in window).encode()
        yield Window(hashlib.sha256(data).hexdigest(), len(window), window.start), data


def _path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.jsonl"


def _line(text: tuple[Text, Text], number: int) -> str:
    """ASCII: also half a character, which a file in UTF-8 cannot hold, survives."""
    try:
        line = json.dumps(text)
    except (TypeError, ValueError):
        line = ""
    prompt, answer = json.loads(line) if line else ("", "")
    if not line or (_text(prompt), _text(answer)) != text:
        what = "holds a value that is no JSON, and cannot be sent to another process; --engine inline scores it"
        raise RefusedError([Finding(f"text {number + 1}", what)])
    return line + "\n"


def _text(said: Any) -> Text:
    return said if isinstance(said, str) else tuple(said)
