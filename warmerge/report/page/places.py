"""Names of folders as a page may show them: from the folder that was given, never where it lies on a machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Parts of paths that are tried, one more each time, before the whole paths are taken.
_PARTS = 30

# An absolute path within words: not an address (http://...), not a fraction or "and/or", up to a colon or bracket.
_ABSOLUTE = re.compile(r"(?<![\w./~…])/(?![/\s])(?:[^\s/\"'<>|,;()\[\]{}=]+/)*[^\s/\"'<>|,;:()\[\]{}=]*")


def without_places(content: Any, roots: Mapping[str, str]) -> Any:
    """The same JSON value in which no text names a place on a machine.

    What lies below a folder of `roots` is named from there, after the root's own name if that is not empty. Of other
    absolute paths the last parts are kept: as few as keep different paths different, 30 or all.

    >>> without_places({"a": "/data/me/runs/1", "b": ["see /x/gold.py:gold"]}, {"/data/me": ""})
    {'a': 'runs/1', 'b': ['see …/gold.py:gold']}
    >>> without_places(["/a/x/01", "/b/x/01", "and/or http://a/b 1/2"], {})
    ['…/a/x/01', '…/b/x/01', 'and/or http://a/b 1/2']
    """
    own = sorted(((root.rstrip("/"), name) for root, name in roots.items() if root.rstrip("/")), reverse=True)
    content = _mapped(content, lambda words: _relative(words, own))
    paths = sorted({found for words in _texts(content) for found in _ABSOLUTE.findall(words)})
    parts = {path: path.strip("/").split("/") for path in paths}
    short: dict[str, str] = {}
    longest = max(map(len, parts.values()), default=0)
    for kept in (*range(1, min(longest, _PARTS) + 1), longest):
        short = {path: "…/" + "/".join(names[-kept:]) for path, names in parts.items()}
        if len(set(short.values())) == len({tuple(names) for names in parts.values()}):
            break
    return _mapped(content, lambda words: _ABSOLUTE.sub(lambda found: short[found[0]], words))


def _relative(words: str, roots: Sequence[tuple[str, str]]) -> str:
    for root, name in roots:
        if words == root:
            return name or root.rsplit("/", 1)[-1]
        ahead = f"{name}/" if name else ""
        words = re.sub(rf"(?<![\w./~-]){re.escape(root)}/+(?=\S)", lambda _, ahead=ahead: ahead, words)  # type: ignore[misc]
    return words


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
