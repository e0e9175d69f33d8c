"""The prompts of a data file, each of them once."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from warmerge.errors import Finding, RefusedError, UsageError, some
from warmerge.rewards.layouts import BadRow, Row, Text, answer_to, canonical
from warmerge.rewards.pools import said
from warmerge.rewards.rows import read_rows, refused_rows


@dataclass(frozen=True)
class Prompts:
    """Different prompts in the order of their first rows, and where each stands (`file:row`).

    `repeats` counts rows whose prompt had been seen; `skipped` counts bad rows left out on request.
    """

    texts: tuple[Text, ...]
    places: tuple[str, ...]
    repeats: int = 0
    skipped: int = 0

    @property
    def digest(self) -> str:
        """Equal for the same prompts in the same order, whatever file they came from."""
        return hashlib.sha256("\n".join(map(canonical, self.texts)).encode()).hexdigest()


def read_prompts(source: str, limit: int | None = None, seed: int = 0, skip_bad_rows: bool = False) -> Prompts:
    """The `prompt` of every row, text or messages; other columns do not matter, so pairs and pools can be given too.

    Args:
        source: as for `rows.read_rows`: a file, a folder, or a data set on the Hub.
        limit: a random sample of so many prompts, the same for the same seed; the order is kept.
        skip_bad_rows: leave out and count the rows that do not fit, where they would be refused.

    Raises:
        UsageError, RemoteError: as `rows.read_rows`; a limit below 1.
        RefusedError: bad rows (all are looked at, ten are named), or no row at all.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: expected 1 or more, found {limit}")
    rows = read_rows(source)
    if not rows:
        raise RefusedError([Finding(source, "is empty: there is no row in it")])
    bad: list[Finding] = []
    first: dict[str, tuple[Text, str]] = {}
    for file, number, row in rows:
        if isinstance(row, Finding):
            bad.append(row)
            continue
        try:
            prompt = _prompt(row, number)
        except BadRow as error:
            bad.append(Finding(f"{file}:{number}", str(error)))
        else:
            first.setdefault(said(prompt), (prompt, f"{file}:{number}"))
    if bad and not (skip_bad_rows and first):
        raise refused_rows(bad, source, rest_is_good=bool(first))
    repeats = len(rows) - len(bad) - len(first)
    found = list(first.values())
    if limit is not None and limit < len(found):
        found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), limit))]
    return Prompts(tuple(text for text, _ in found), tuple(place for _, place in found), repeats, len(bad))


def _prompt(row: Row, number: int) -> Text:
    """A row's prompt as it would be read from a pair, so that scoring finds the same one."""
    value = row.get("prompt")
    if value is None:
        raise BadRow("'prompt' is null" if "prompt" in row else f"has no 'prompt', only {some(row)}")
    if value == "":
        raise BadRow("'prompt' is empty text: there is nothing to answer")
    return answer_to(value, "x", "answer", number)[0]
