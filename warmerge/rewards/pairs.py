"""Preference pairs: read from files or the Hub, in any layout of `layouts`, every row checked."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from warmerge.errors import Finding, RefusedError, UsageError, plain, quoted, some
from warmerge.rewards.layouts import LAYOUTS, BadRow, Comparison, Message, Row, Text, canonical, recognise
from warmerge.rewards.rows import parse_named, read_rows, refused_rows

__all__ = [
    "Comparison", "Message", "PreferenceSet", "Text", "UniqueTexts",
    "distinct", "read_all", "read_preferences", "unique_texts",
]  # fmt: skip


@dataclass(frozen=True)
class PreferenceSet:
    """The comparisons of one source.

    `skipped` counts bad rows left out on request. `fingerprint` is the sha256 of the comparisons, in order: it does not
    depend on names, files or compression.
    """

    name: str
    source: str
    layout: str
    comparisons: tuple[Comparison, ...]
    skipped: int
    fingerprint: str


@dataclass(frozen=True)
class UniqueTexts:
    """What must be scored: every (prompt, answer) once, and where each comparison's answers are among them.

    Equal prompts are one object, so that `is` tells them apart.
    """

    texts: tuple[tuple[Text, Text], ...]
    chosen: tuple[tuple[int, ...], ...]
    rejected: tuple[tuple[int, ...], ...]
    clusters: tuple[str, ...]


def read_preferences(
    spec: str, *, skip_bad_rows: bool = False, limit: int | None = None, seed: int = 0
) -> PreferenceSet:
    """The comparisons of `NAME=SOURCE` or `SOURCE`, in their order; see `read_rows` for sources, `layouts` for rows.

    Args:
        skip_bad_rows: leave out and count the rows that do not fit, where they would be refused.
        limit: a random sample of whole clusters, the same for the same seed, of at least that many comparisons.

    Raises:
        UsageError, RemoteError: as `read_rows`; a limit below 1.
        RefusedError: bad rows (all are looked at, ten are named), no row at all, or columns of no known layout.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: expected 1 or more, found {limit}")
    name, source = parse_named(spec)
    rows = read_rows(source)
    if not rows:
        raise RefusedError([Finding(source, "is empty: there is no row in it")])
    good = [row for _, _, row in rows if not isinstance(row, Finding)]
    known = recognise(good)
    if good and known is None:
        raise RefusedError([_unknown_layout(source, good[0])])

    comparisons: list[Comparison] = []
    bad: list[Finding] = []
    for file, number, row in rows:
        if isinstance(row, Finding):
            bad.append(row)
        elif known is not None:
            layout, optional = known
            try:
                comparisons += layout.parse(row, number, optional)
            except BadRow as error:
                bad.append(Finding(f"{file}:{number}", str(error)))
    if bad and not (skip_bad_rows and comparisons):
        raise refused_rows(bad, source, rest_is_good=bool(comparisons))
    assert known is not None, "no good row, no layout: refused above"
    kept = tuple(comparisons if limit is None else _sample(comparisons, limit, seed))
    return PreferenceSet(name, source, known[0].name, kept, len(bad), _fingerprint(kept))


def read_all(
    specs: Sequence[str], *, skip_bad_rows: bool = False, limit: int | None = None, seed: int = 0
) -> list[PreferenceSet]:
    """`read_preferences` of each spec; two of one name are a UsageError before anything is read."""
    first: dict[str, str] = {}
    for spec in specs:
        name, source = parse_named(spec)
        if name in first:
            what = f"{plain(first[name])} and {plain(source)} are both named {quoted(name)}"
            raise UsageError(f"{what}; name one of them, as in other={plain(source)}")
        first[name] = source
    return [read_preferences(spec, skip_bad_rows=skip_bad_rows, limit=limit, seed=seed) for spec in specs]


def unique_texts(preferences: PreferenceSet) -> UniqueTexts:
    """Every (prompt, answer) of a set once, as first seen."""
    comparisons = preferences.comparisons
    texts, numbers = distinct((c.prompt, answer) for c in comparisons for answer in (*c.chosen, *c.rejected))
    number = iter(numbers)
    chosen, rejected = [], []
    for comparison in comparisons:
        chosen.append(tuple(next(number) for _ in comparison.chosen))
        rejected.append(tuple(next(number) for _ in comparison.rejected))
    clusters = tuple(comparison.cluster for comparison in comparisons)
    return UniqueTexts(texts, tuple(chosen), tuple(rejected), clusters)


def distinct(answers: Iterable[tuple[Text, Text]]) -> tuple[tuple[tuple[Text, Text], ...], list[int]]:
    """Every (prompt, answer) once, as first seen, and which of them each one is.

    Equal prompts are one object. A plain text never equals a message with the same words.

    >>> distinct([("hi", "a"), ("hi", "b"), ("hi", "a")])
    ((('hi', 'a'), ('hi', 'b')), [0, 1, 0])
    """
    prompts: dict[Hashable, Text] = {}
    found: dict[Hashable, int] = {}
    texts: list[tuple[Text, Text]] = []
    numbers = []
    for prompt, answer in answers:
        prompt_key = _hashable(prompt)
        key = (prompt_key, _hashable(answer))
        if key not in found:
            found[key] = len(texts)
            texts.append((prompts.setdefault(prompt_key, prompt), answer))
        numbers.append(found[key])
    return tuple(texts), numbers


def _hashable(text: Text) -> Hashable:
    return text if isinstance(text, str) else (canonical(text),)


def _sample(comparisons: Sequence[Comparison], limit: int, seed: int) -> list[Comparison]:
    sizes = Counter(comparison.cluster for comparison in comparisons)
    clusters = list(sizes)
    random.Random(seed).shuffle(clusters)
    kept: set[str] = set()
    total = 0
    for cluster in clusters:
        if total >= limit:
            break
        kept.add(cluster)
        total += sizes[cluster]
    return [comparison for comparison in comparisons if comparison.cluster in kept]


def _fingerprint(comparisons: Sequence[Comparison]) -> str:
    digest = hashlib.sha256()
    for c in comparisons:
        digest.update(canonical([c.prompt, c.chosen, c.rejected, c.cluster, c.subset]).encode() + b"\n")
    return digest.hexdigest()


def _unknown_layout(source: str, row: Row) -> Finding:
    layouts = "; ".join(f"{layout.name}: {some(layout.needs, 9)}" for layout in LAYOUTS)
    return Finding(source, f"has the columns {some(row, 20)}, which is no known layout. Known are {layouts}")
