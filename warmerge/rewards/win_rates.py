"""Win rates: how often one policy's answer is judged better than another's, prompt by prompt. Never asks a judge.

An outcome is 1 where the first policy's answer wins, 0 where the second one's does, 1/2 where they tie, and NaN where
nothing is known, which is left out and never taken for a tie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy

from warmerge.errors import UsageError
from warmerge.rewards import metrics
from warmerge.rewards.metrics import Array


def outcomes(first: Array, second: Array) -> Array:
    """(n,): who wins by two rows of numbers (n,), such as rewards or lengths: the larger one, and equal ones tie.

    Raises:
        RefusedError: numbers that are NaN or infinite. UsageError: rows of different lengths.

    >>> outcomes(numpy.array([2.0, 1.0, 1.0]), numpy.array([1.0, 1.0, 2.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    first, second = metrics.finite(first, "first"), metrics.finite(second, "second")
    if first.shape != second.shape:
        raise UsageError(f"expected two rows of the same length, found {first.shape} and {second.shape}")
    found: Array = (first > second) + 0.5 * (first == second)
    return found


def both_orders(straight: Array, swapped: Array) -> Array:
    """(n,): outcomes of a judge that was asked twice, with the answers in either order: where the two agree, what both
    say; where they do not, a tie; NaN where one of them is not known.

    Args:
        straight, swapped: (n,), both from the view of the first policy.

    >>> both_orders(numpy.array([1, 1, 0.5, 1]), numpy.array([1, 0, 0.0, numpy.nan])).tolist()
    [1.0, 0.5, 0.5, nan]
    """
    agreed = numpy.where(straight == swapped, straight, 0.5)
    found: Array = numpy.where(numpy.isnan(straight) | numpy.isnan(swapped), math.nan, agreed)
    return found


def win_rate(found: Array, clusters: Sequence[str], resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """`win`, (wins + ties / 2) / n, with the ends `low` and `high` of its 95 % interval over prompts; the counts `n`,
    `wins`, `ties` and `losses`.

    Where nothing is known, n is 0 and the rest NaN.

    Args:
        found: (N,) outcomes; those that are NaN are left out.
        clusters: the prompt of each of the N.

    >>> rate = win_rate(numpy.array([1, 1, 0.5, 0, math.nan]), list("abcde"))
    >>> rate["win"], rate["n"], rate["wins"], rate["ties"], rate["losses"]
    (0.625, 4, 2, 1, 1)
    """
    known = ~numpy.isnan(found)
    values, prompts = found[known], [name for name, here in zip(clusters, known, strict=True) if here]
    wins, ties = (int(numpy.count_nonzero(values == value)) for value in (1.0, 0.5))
    counts = {"n": len(values), "wins": wins, "ties": ties, "losses": len(values) - wins - ties}
    if not prompts:
        return {"win": math.nan, "low": math.nan, "high": math.nan, **counts}
    rate = with_interval(values, metrics.replicates(values[None], prompts, resamples, seed)[:, 0], prompts)
    return {"win": rate.value, "low": rate.low, "high": rate.high, **counts}


def with_interval(values: Array, drawn: Array, clusters: Sequence[str]) -> metrics.Estimate:
    """The mean of outcomes (n,), with the interval that its replicates (B,) over resampled prompts say.

    Where fewer than ten prompts differ from the others, it also reaches as far as the exact bound for what was never
    seen (see `metrics.interval`).
    """
    few = metrics.differing(values - numpy.median(values), clusters) < metrics.FEW
    mean = min(1.0, max(0.0, float(values.mean())))
    return metrics.interval(mean, drawn, len(set(clusters)), (0.0, 1.0) if few else None)
