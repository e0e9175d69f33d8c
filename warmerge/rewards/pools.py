"""Candidate pools: prompts with several answers each, to choose the best of. Every row is checked."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from warmerge.errors import Finding, RefusedError, UsageError, plain, some
from warmerge.rewards.layouts import BadRow, Row, Text, answer_to, canonical
from warmerge.rewards.pairs import distinct
from warmerge.rewards.rows import read_rows, refused_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[numpy.float64]
    Integers = NDArray[numpy.int64]

# Columns that a pool may have: then every row must.
_OPTIONAL = ("finished", "gold", "prompt_id")


@dataclass(frozen=True)
class Candidates:
    """One row: a prompt and N answers to it.

    `gold` (N,) is what the pool says they are worth, if it does. `unfinished` counts answers that were cut where they
    were sampled. `cluster` is what counts as one prompt when resampling; `row` counts from 1.
    """

    prompt: Text
    answers: tuple[Text, ...]
    gold: Array | None
    cluster: str
    row: int
    unfinished: int = 0


@dataclass(frozen=True)
class Pool:
    """Rows of one source. `texts` holds every (prompt, answer) once; `at[p]` (N_p,) are row p's answers among them.

    `fingerprint` is the sha256 of the texts, in order. `skipped` counts bad rows that were left out on request, `short`
    those with fewer answers than was asked for.
    """

    source: str
    rows: tuple[Candidates, ...]
    texts: tuple[tuple[Text, Text], ...]
    at: tuple[Integers, ...]
    fingerprint: str
    skipped: int = 0
    short: int = 0

    @property
    def sizes(self) -> list[int]:
        """How many answers each row has."""
        return [len(row.answers) for row in self.rows]

    @property
    def clusters(self) -> tuple[str, ...]:
        """The prompt of each row, as resampling counts prompts."""
        return tuple(row.cluster for row in self.rows)

    @property
    def gold(self) -> tuple[Array, ...] | None:
        """(N_p,) of each row; None where the pool has none."""
        gold = [row.gold for row in self.rows if row.gold is not None]
        return tuple(gold) if gold else None

    def by_row(self, rewards: Array) -> tuple[Array, ...]:
        """Rewards (texts,) as (N_p,) of each row."""
        return tuple(rewards[at] for at in self.at)


def read_pool(
    source: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
    min_candidates: int = 1,
) -> Pool:
    """The pool in a file with `prompt`, `candidates` and perhaps `gold`, a number for each candidate.

    Other columns are ignored, but `prompt_id` (what counts as one prompt) and `finished` (whether each candidate ended
    by itself), which sampled pools have.

    Args:
        source: as for `rows.read_rows`.
        limit: a random sample of so many rows, the same for the same seed, in their order.
        skip_bad_rows: leave out and count the rows that do not fit, where they would be refused.
        min_candidates: leave out and count the rows that have fewer.

    Raises:
        UsageError, RemoteError: as `rows.read_rows`; a limit or minimum below 1.
        RefusedError: bad rows (all are looked at, ten are named): no candidate, a gold that is NaN or missing in some
            rows, or of another length, conversations that share no prompt; no row at all.
    """
    for flag, value in (("--limit", limit), ("--min-candidates", min_candidates)):
        if value is not None and value < 1:
            raise UsageError(f"{flag}: expected 1 or more, found {value}")
    label, found = str(source), read_rows(str(source))
    if not found:
        raise RefusedError([Finding(label, "is empty: there is no row in it")])
    good = [row for _, _, row in found if not isinstance(row, Finding)]
    expected = frozenset(name for name in _OPTIONAL if any(row.get(name) is not None for row in good))
    rows: list[Candidates] = []
    bad: list[Finding] = []
    for file, number, row in found:
        if isinstance(row, Finding):
            bad.append(row)
            continue
        try:
            rows.append(_candidates(row, number, expected))
        except BadRow as error:
            bad.append(Finding(f"{file}:{number}", str(error)))
    if bad and not (skip_bad_rows and rows):
        raise refused_rows(bad, label, rest_is_good=bool(rows))
    kept = [row for row in rows if len(row.answers) >= min_candidates]
    if not kept:
        largest = max(len(row.answers) for row in rows)
        raise UsageError(f"--min-candidates {min_candidates}: no prompt of {plain(label)} has more than {largest}")
    short = len(rows) - len(kept)
    if limit is not None and limit < len(kept):
        kept = [kept[i] for i in sorted(random.Random(seed).sample(range(len(kept)), limit))]
    return _pool(label, kept, len(bad), short)


def _pool(source: str, rows: Sequence[Candidates], skipped: int, short: int) -> Pool:
    texts, numbers = distinct((row.prompt, answer) for row in rows for answer in row.answers)
    bounds = numpy.cumsum([len(row.answers) for row in rows])[:-1]
    digest = hashlib.sha256()
    for text in texts:
        digest.update(canonical(text).encode() + b"\n")
    at = tuple(numpy.split(numpy.array(numbers, dtype=numpy.int64), bounds))
    return Pool(source, tuple(rows), texts, at, digest.hexdigest(), skipped, short)


def _candidates(row: Row, number: int, expected: frozenset[str]) -> Candidates:
    """A row, which must have the columns `expected`: those that any row has."""
    if "candidates" not in row or "prompt" not in row:
        raise BadRow(f"has the columns {some(row)}; expected prompt and candidates")
    prompt, candidates = row["prompt"], row["candidates"]
    if not isinstance(candidates, list) or not candidates:
        raise BadRow("'candidates' is not a list of one text or more")
    texts = [answer_to(prompt, answer, f"candidates[{i}]", number) for i, answer in enumerate(candidates)]
    asked = texts[0][0]
    other = next((i for i, (prompt, _) in enumerate(texts) if _asked(prompt) != _asked(asked)), None)
    if other is not None:  # found where answers repeat the conversation: it would be replaced by the first one's
        what = f"'candidates[{other}]' continues another conversation than 'candidates[0]' does"
        raise BadRow(f"{what}: give the prompt as messages, and answers without it")
    for name in sorted(expected):
        if row.get(name) is None:
            raise BadRow(f"has no {name!r}, which other rows have")
    cluster = _identity(row["prompt_id"]) if "prompt_id" in expected else said(asked)
    gold = _gold(row["gold"], len(candidates)) if "gold" in expected else None
    unfinished = _unfinished(row["finished"], len(candidates)) if "finished" in expected else 0
    return Candidates(asked, tuple(answer for _, answer in texts), gold, cluster, number, unfinished)


def said(prompt: Text) -> str:
    """A prompt as text: what tells prompts apart. One message of the user says the same as its text alone.

    >>> said(({"role": "user", "content": "Why?"},))
    'Why?'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return canonical(prompt)


def _asked(prompt: Text) -> Text:
    """Text as the message that it stands for; no text stands for none."""
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) and prompt else prompt


def _gold(value: Any, count: int) -> Array:
    if not isinstance(value, list) or len(value) != count:
        found = f"{len(value)} of them" if isinstance(value, list) else canonical(value)[:40]
        raise BadRow(f"'gold' is not a list of {count} numbers, one for each candidate: found {found}")
    largest = sys.float_info.max  # beyond it lie NaN, infinities, and whole numbers that no float holds
    for i, number in enumerate(value):
        if isinstance(number, bool) or not (isinstance(number, int | float) and -largest <= number <= largest):
            raise BadRow(f"'gold[{i}]' is {canonical(number)[:40]}, expected a finite number")
    return numpy.array(value, dtype=numpy.float64)


def _unfinished(value: Any, count: int) -> int:
    if not isinstance(value, list) or len(value) != count or not all(isinstance(ended, bool) for ended in value):
        raise BadRow(f"'finished' is not a list of {count} times true or false, one for each candidate")
    return value.count(False)


def _identity(value: Any) -> str:
    if not isinstance(value, str | int | float) or value != value:
        raise BadRow(f"'prompt_id' is {canonical(value)[:40]}, expected text or a number")
    return str(value)
