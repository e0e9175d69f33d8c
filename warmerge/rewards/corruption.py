"""Label noise: which training pairs had their labels swapped, and what models made of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from warmerge.errors import Finding, RefusedError, UsageError, plain
from warmerge.rewards.bench import Subset
from warmerge.rewards.pairs import UniqueTexts
from warmerge.weights.foreign_json import parse, text_of


@dataclass(frozen=True)
class Corruption:
    """The comparisons (counted from 0) of one set whose labels were swapped for training.

    `fingerprint` and `n` are those of the set with its labels as they were before.
    """

    fingerprint: str
    n: int
    swapped: tuple[int, ...]


def corrupt(fingerprint: str, n: int, share: float, seed: int) -> Corruption:
    """Swaps exactly round(share * n) labels of a set, drawn at random.

    Raises:
        UsageError: a share that is not from 0 to below 1, or so small that no label is swapped.

    >>> corrupt("f", 8, 0.25, seed=0).swapped
    (6, 7)
    >>> corrupt("f", 8, 0.0, seed=0).swapped
    ()
    """
    if not 0 <= share < 1:
        raise UsageError(f"--corrupt: expected a share from 0 to below 1, found {share:g}")
    count = round(share * n)
    if share and not count:
        raise UsageError(f"--corrupt {share:g} of {n} comparisons swaps none; choose a larger share, or leave it away")
    return Corruption(fingerprint, n, tuple(sorted(random.Random(seed).sample(range(n), count))))


def read_corruption(path: Path) -> Corruption:
    """A corruption.json: {"fingerprint": of the clean set, "n": its comparisons, "swapped": [numbers from 0]}.

    Raises:
        UsageError: a file that cannot be read.
        RefusedError: a file that does not say that.
    """
    try:
        content = parse(text_of(path))
        fingerprint, n, swapped = content["fingerprint"], content["n"], content["swapped"]
        known = isinstance(fingerprint, str) and type(n) is int and isinstance(swapped, list)
    except OSError as error:
        raise UsageError(f"--mask: cannot read {plain(str(path))}: {error.strerror}") from None
    except ValueError as error:
        raise RefusedError([Finding(str(path), f"cannot be read: {error}")]) from None
    except (KeyError, TypeError):
        known = False
    if not known:
        what = 'expected {"fingerprint": "...", "n": 4096, "swapped": [3, 17, ...]}'
    elif not all(type(i) is int and 0 <= i < n for i in swapped):
        what = f"swapped: expected numbers from 0 to {n} - 1"
    elif len(set(swapped)) != len(swapped):
        what = "swapped: a comparison is named twice"
    else:
        return Corruption(fingerprint, n, tuple(sorted(swapped)))
    raise RefusedError([Finding(str(path), what)])


def split_by_corruption(sets: Sequence[Subset], corruption: Corruption) -> list[Subset]:
    """The sets, the corrupted one replaced by its two parts, NAME[swapped] and NAME[clean].

    In the swapped part chosen and rejected are exchanged, as the members were trained: accuracy there is the agreement
    with the *wrong* label. WARM, Figure 4: the lower, the less was memorised.

    Raises:
        UsageError: none of the sets is the one that was corrupted; a part of fewer than two prompts; a part whose name
            another set has.
    """
    parts: list[Subset] = []
    for subset in sets:
        preferences = subset.preferences
        found = (preferences.fingerprint, len(preferences.comparisons)) == (corruption.fingerprint, corruption.n)
        parts += [_part(subset, corruption, name) for name in ("swapped", "clean")] if found else [subset]
    if not any(subset.part for subset in parts):
        shown = ", ".join(f"{plain(subset.name)} ({subset.n} comparisons)" for subset in sets)
        raise UsageError(
            f"--mask is of a set of {corruption.n} comparisons that is not among --data: {shown}; give the set as it "
            "was before its labels were swapped, without --limit and --skip-bad-rows"
        )
    names = [subset.name for subset in parts]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--mask makes a set named {plain(name)}, and --data has one: name that one otherwise")
    return parts


def memorised(sets: Sequence[Subset], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note on whether WARM's Observation 3 can be seen: did members memorise the swapped labels? None without such.

    A model that learned nothing from them agrees with a swapped label as often as it is wrong elsewhere.

    Args:
        rows: of `eval`: the accuracy of each model on each set.
    """
    parts = {subset.name: subset.part for subset in sets}
    members = [row for row in rows if row["kind"] == "member"]
    swapped = [row["accuracy"] for row in members if parts[row["set"]] == "swapped"]
    held_out = [row["accuracy"] for row in members if not parts[row["set"]]]
    if not swapped:
        return []
    if not held_out:
        return [
            "whether members memorised the swapped labels cannot be told without a set that they were not trained on"
        ]
    memorised, wrong = sum(swapped) / len(swapped), 1 - sum(held_out) / len(held_out)
    numbers = (
        f"members agree with {memorised:.3f} of the swapped labels, and are wrong on {wrong:.3f} of the other sets"
    )
    if memorised > wrong + 0.1:
        return [f"{numbers}: they memorised label noise, so what averaging does to it can be read off [swapped]"]
    return [f"{numbers}: they did not memorise label noise, so its removal by averaging cannot be tested here"]


def _part(subset: Subset, corruption: Corruption, part: str) -> Subset:
    """One part of a set. `texts.texts` stays whole, so that both parts are scored as one."""
    name, texts, swapped = f"{subset.name}[{part}]", subset.texts, set(corruption.swapped)
    rows = [i for i in range(subset.n) if (i in swapped) == (part == "swapped")]
    chosen, rejected = (tuple(side[i] for i in rows) for side in (texts.chosen, texts.rejected))
    clusters = tuple(texts.clusters[i] for i in rows)
    if len(set(clusters)) < 2:
        raise UsageError(f"--mask leaves fewer than two prompts in {plain(name)}")
    if part == "swapped":
        chosen, rejected = rejected, chosen
    return replace(subset, name=name, texts=UniqueTexts(texts.texts, chosen, rejected, clusters), part=part)
