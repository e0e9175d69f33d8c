"""Words that may stand in a model card: escaped for Markdown, and without the names of local folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from warmerge.errors import plain, quoted

_MARKS = str.maketrans(
    {mark: f"\\{mark}" for mark in "\\*_[]~$!#"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;"}
)

# Names that are looked for in warnings and notes; a sweep has some hundreds.
MOST_NAMES = 1000


def clean(name: object) -> str:
    r"""`name` on one line of printable characters, the others as escapes.

    >>> print(clean("a\nb\u202e"))
    a\nb\u202e
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(name))


def escaped(name: object) -> str:
    r"""`name`, which may come from anybody's file, as plain text in Markdown: in a table, a list or a sentence.

    >>> print(escaped("a|b_c <i>"), escaped("1. x"), escaped("0.1.0"))
    a&#124;b\_c &lt;i&gt; 1\. x 0.1.0
    """
    line = clean(name).strip().translate(_MARKS)
    return re.sub(r"^(\d*)([-+=]|[.)](?= |$))", r"\1\\\2", line) or "(no name)"


def code(words: object) -> str:
    """`words` as code where no character of them would end it, else as plain text."""
    shown = clean(words)
    return escaped(shown) if set(shown) & set("`|\\") or not shown.strip() else f"`{shown}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table of cells that are Markdown already."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def without_paths(sentence: str) -> str | None:
    """The sentence, or None where it may name a local file."""
    return None if "/" in sentence or "\\" in sentence else sentence


def left_out(count: int, what: str, source: str) -> str:
    """That the card does not show everything."""
    return f"- {count} {what}{'s' * (count != 1)} of the {source} left out here, which may name local files."


def inputs_of(manifest: Mapping[str, Any] | None, role: str) -> list[Mapping[str, Any]]:
    """The entries of warmerge.json with this role; none where there is no manifest."""
    return [] if manifest is None else [entry for entry in manifest["inputs"] if entry["role"] == role]


def public_warnings(manifest: Mapping[str, Any] | None) -> list[str | None]:
    """What a merge warned of, under public names; None for each one in which a path or a private name would remain, and
    for all where there are more names than are looked for."""
    names, sentences = _labels(manifest), (manifest or {}).get("warnings") or []
    if len(names) > MOST_NAMES:
        return [None] * len(sentences)
    spellings = {word: public for name, public in names.items() for word in (name, plain(name), quoted(name))}
    lasts = (re.split(r"[/\\]", name)[-1] for name in names)
    private = [word for word in (*spellings, *lasts) if len(word) > 3 and not word.isdecimal()]
    # Only where findings name checkpoints: a folder may be called "1", and numbers are to stay.
    before, after = r"(?:^|(?<=with )|(?<=from )|(?<=than )|(?<=, ))", r"(?=: |'s|, | has | by |;|$)"
    named = re.compile(rf"{before}({_any_of(spellings)})(?:/([\w.-]+))?{after}")
    hidden = re.compile(rf"(?<![\w-])(?:{_any_of(private)})(?![\w-])")
    return [_with_public_names(str(sentence), spellings, named, hidden) for sentence in sentences]


def _labels(manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """What the user called the inputs, which may be a path -> their public names."""
    names: dict[str, str] = {}
    for role in ("member", "base"):
        for i, entry in enumerate(inputs_of(manifest, role), start=1):
            name = f"member {i}" if role == "member" else "the base"
            for key, public in (("checkpoint", name), ("adapter", name), ("base", "the base of an adapter")):
                if isinstance(entry.get(key), str) and entry[key]:
                    names.setdefault(entry[key], public)
    return names


def _any_of(words: Iterable[str]) -> str:
    """A pattern that is any of the words, the longest first; of no words one that is nowhere."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or "(?!)"


def _with_public_names(
    sentence: str, spellings: Mapping[str, str], named: re.Pattern[str], hidden: re.Pattern[str]
) -> str | None:
    """A warning with public names where it names checkpoints; None where a path or a private name would remain."""
    rest = named.sub("", sentence)
    if hidden.search(rest) or without_paths(rest) is None:
        return None
    return named.sub(lambda at: spellings[at[1]] + (f"'s {at[2]}" if at[2] else ""), sentence)
