"""Numbers from rewards: who is right, and how sure that is. Never loads a model.

Prompts are the unit of resampling: comparisons about one prompt are not independent, so whole prompts are drawn. All
models are resampled with the same draws, so that what they share cancels in a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from warmerge.errors import Finding, RefusedError, UsageError

Array = NDArray[numpy.float64]

# Accuracies are fractions: a spread below this is the rounding of float64, not a difference between resamples.
NO_SPREAD = 1e-12
# With fewer prompts than these on which anything differs, a bootstrap sees too little to be trusted.
FEW = 10


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def finite(values: Array, name: str = "rewards") -> Array:
    """`values` as float64, after a look at every one.

    Raises:
        RefusedError: a finding for every row in which some are NaN or infinite: how many, and the first of them.

    >>> finite([1.0, float("nan")])
    Traceback (most recent call last):
    warmerge.errors.RefusedError: refused: rewards: 1 of 2 are not finite; the first is nan at index 1
    """
    values = numpy.asarray(values, dtype=numpy.float64)
    good = numpy.isfinite(values)
    if good.all():
        return values
    findings = []
    for row in numpy.ndindex(values.shape[:-1]):
        bad = numpy.flatnonzero(~good[row])
        if bad.size:
            where = name + "".join(f"[{i}]" for i in row)
            first = f"the first is {values[row][bad[0]]} at index {bad[0]}"
            findings.append(Finding(where, f"{bad.size} of {good.shape[-1]} are not finite; {first}"))
    raise RefusedError(findings)


# --- comparisons ----------------------------------------------------------------------------------------------------


def margins(rewards: Array, chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]) -> Array:
    """(..., n): by how much the worst chosen answer beats the best rejected one, for each of n comparisons.

    Args:
        rewards: (..., N), one for each distinct text.
        chosen: for each comparison, indices into the N of the answers that should win.
        rejected: likewise, of those that should lose.

    Raises:
        RefusedError: rewards that are NaN or infinite; NaN would count as wrong, and inf - inf is nothing.
        UsageError: a comparison without an answer on one side, or an index outside of the N.

    >>> margins(numpy.array([3.0, 1.0, 2.0]), [[0], [1, 2]], [[1, 2], [0]]).tolist()
    [1.0, -2.0]
    """
    rewards = finite(rewards)
    if len(chosen) != len(rejected):
        raise UsageError(f"{len(chosen)} comparisons have chosen answers, but {len(rejected)} have rejected ones")
    return _fold(numpy.minimum, rewards, chosen, "chosen") - _fold(numpy.maximum, rewards, rejected, "rejected")


def right(margins: Array) -> Array:
    """1.0 where margin >= 0, else 0.0: a tie counts as right. WARM, section 2 (arXiv 2401.12187).

    >>> right(numpy.array([0.5, 0.0, -0.5])).tolist()
    [1.0, 1.0, 0.0]
    """
    return (finite(margins, "margins") >= 0).astype(numpy.float64)


def ties(margins: Array) -> int:
    """How many margins are exactly 0. `right` counts them as right: a model that says the same of all is never wrong.

    >>> ties(numpy.array([0.0, -0.0, 1e-300]))
    2
    """
    return int(numpy.count_nonzero(finite(margins, "margins") == 0))


def accuracy(margins: Array, clusters: Sequence[str], resamples: int = 2000, seed: int = 0) -> Estimate:
    """The share of one model's comparisons that are right, with an interval clustered by prompt.

    Args:
        margins: (n,), as `margins` returns them.
        clusters: the prompt of each comparison.

    >>> found = accuracy(numpy.ones(20), [str(i) for i in range(20)])
    >>> found.value, round(found.low, 3), found.high
    (1.0, 0.832, 1.0)
    """
    values = right(margins)
    drawn = replicates(values[None], clusters, resamples, seed)[:, 0]
    return interval(float(values.mean()), drawn, len(set(clusters)), bounds=(0.0, 1.0))


# --- resampling -----------------------------------------------------------------------------------------------------


def replicates(values: Array, clusters: Sequence[str], resamples: int = 2000, seed: int = 0) -> Array:
    """(B, K): the means of the K rows in each of B resamples of whole prompts, drawn with replacement.

    Every row sees the same draws, so differences of columns are paired. The mean of a resample is the sum of its values
    over the number of its comparisons. The order of the comparisons does not matter. Memory is that of one resample.

    Args:
        values: (K, n), finite.
        clusters: the prompt of each of the n comparisons.

    Raises:
        UsageError: no comparison, or not one prompt for each.
        RefusedError: values that are NaN or infinite.
    """
    values = finite(values, "values")
    if values.ndim != 2 or values.shape[1] != len(clusters):
        raise UsageError(f"expected values (rows, comparisons) for {len(clusters)} prompts, found {values.shape}")
    if not clusters or resamples < 1:
        raise UsageError(f"nothing to resample: {len(clusters)} comparisons, {resamples} resamples")
    # A dict, not numpy.unique: numpy's strings lose trailing NULs, which would join two prompts.
    number = {name: i for i, name in enumerate(sorted(set(clusters)))}
    index, count = [number[name] for name in clusters], len(number)
    # One row of sums per prompt for each row of values; the last row is the number of comparisons.
    sums = numpy.stack([numpy.bincount(index, row, count) for row in (*values, numpy.ones(len(clusters)))])
    generator = numpy.random.default_rng(seed)
    out = numpy.empty((resamples, len(values)))
    for b in range(resamples):
        # How often each prompt was drawn. One resample at a time: a (B, prompts) table would be 1.6 GB for 1e5 prompts.
        times = numpy.bincount(generator.integers(count, size=count), minlength=count).astype(numpy.float64)
        total = sums @ times
        out[b] = total[:-1] / total[-1]
    return out


def interval(value: float, replicates: Array, clusters: int, bounds: tuple[float, float] | None = None) -> Estimate:
    """`value` with the 95 % percentile interval of its replicates (B,).

    Where all prompts agree the bootstrap sees no spread, and where all but one or two do it sees too little: a model
    that is right on all of 20 prompts is not right on every prompt there is. Given `bounds`, the interval therefore
    reaches at least as far as the exact (Clopper-Pearson) bound for what was never seen: if a share p of all prompts
    differed, none of n would show it with probability (1 - p)^n, which is below 2.5 % once p > 1 - 0.025^(1/n), and
    these prompts may lie at the far bound. For a proportion of exactly 1 that is low = 0.025^(1/n).

    Args:
        clusters: the number of prompts. Fewer than 2 say nothing about others: the interval is `bounds`, or -inf, inf.
        bounds: the smallest and largest value there can be, such as (0, 1) for a proportion. Without them, and without
            spread, the interval is the value alone.

    Raises:
        UsageError: the value lies outside of its bounds.
    """
    if bounds is not None and not bounds[0] - NO_SPREAD <= value <= bounds[1] + NO_SPREAD:
        raise UsageError(f"expected a value from {bounds[0]} to {bounds[1]}, found {value}")
    if clusters < 2:
        return Estimate(value, *(bounds or (-math.inf, math.inf)))
    replicates = finite(replicates, "replicates")
    low, high = map(float, numpy.quantile(replicates, (0.025, 0.975)))
    if bounds is not None:
        share = unseen(clusters, 0.025)
        low = min(low, value - share * (value - bounds[0]))
        high = max(high, value + share * (bounds[1] - value))
    return Estimate(value, low, high)


def differing(values: Array, clusters: Sequence[str]) -> Array:
    """(...): on how many prompts the values (..., n) do not sum to zero; for differences, where two models differ.

    >>> differing(numpy.array([[1.0, -1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]), ["a", "a", "b", "c"]).tolist()
    [1, 2]
    """
    values = finite(values, "values")
    number = {name: i for i, name in enumerate(sorted(set(clusters)))}
    index = [number[name] for name in clusters]
    sums = [numpy.bincount(index, row, len(number)) for row in values.reshape(-1, len(index))]
    counts: Array = (numpy.abs(sums) > NO_SPREAD).sum(axis=-1).reshape(values.shape[:-1])
    return counts


def difference(values: Array, replicates: Array, clusters: Sequence[str]) -> Estimate:
    """The mean of paired differences (n,), each from -1 to 1, with the percentile interval of its replicates (B,).

    Where fewer than ten prompts differ the interval also reaches as far as the exact bound for what was never seen
    (see `interval`); where many do, the bootstrap sees how much they vary, and that bound would only blur it.
    """
    few = differing(values, clusters) < FEW
    bounds = (-1.0, 1.0) if few else None
    return interval(float(values.mean()), replicates, len(set(clusters)), bounds)


# --- rewards themselves -----------------------------------------------------------------------------------------------


def spread(rewards: Array) -> Array:
    """(...): the standard deviation (population) of rewards (..., N), to divide by.

    Raises:
        RefusedError: a finding for every row without spread, or with NaN or infinite rewards.
    """
    rewards = finite(rewards)
    # Compared exactly: the standard deviation of equal numbers may come out as 1e-17, and dividing by it gives noise.
    flat = [row for row in numpy.ndindex(rewards.shape[:-1]) if _constant(rewards[row])]
    if flat:
        text = "the same for every text, so that there is no spread to divide by"
        size = rewards.shape[-1]
        raise RefusedError(
            Finding("rewards" + "".join(f"[{i}]" for i in row), f"{size} rewards are {text}") for row in flat
        )
    out: Array = numpy.asarray(rewards.std(axis=-1))
    return out


def correlation(a: Array, b: Array) -> float:
    """Pearson's correlation of two rows of numbers; NaN where one of them is constant.

    >>> correlation(numpy.array([1.0, 2.0, 4.0]), numpy.array([-1.0, -2.0, -4.0]))
    -1.0
    """
    a, b = finite(a, "first"), finite(b, "second")
    if a.ndim != 1 or a.shape != b.shape:
        raise UsageError(f"expected two rows of the same length, found {a.shape} and {b.shape}")
    if _constant(a) or _constant(b):
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    a, b = a / numpy.abs(a).max(), b / numpy.abs(b).max()  # so that no square overflows or vanishes
    r = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, r))


# --- small tools ----------------------------------------------------------------------------------------------------


def _fold(extreme: numpy.ufunc, rewards: Array, groups: Sequence[Sequence[int]], side: str) -> Array:
    """(..., n): the extreme reward of each group."""
    count = rewards.shape[-1]
    for number, group in enumerate(groups):
        if not len(group):
            raise UsageError(f"comparison {number} has no {side} answer")
        # Negative ones too: they would silently count from the end.
        if not all(0 <= i < count for i in group):
            raise UsageError(f"comparison {number}: expected {side} indices from 0 to {count - 1}, found {list(group)}")
    if not groups:
        return numpy.empty((*rewards.shape[:-1], 0))
    sizes = [len(group) for group in groups]
    starts = numpy.cumsum([0, *sizes[:-1]])
    folded: Array = extreme.reduceat(rewards[..., [i for group in groups for i in group]], starts, axis=-1)
    return folded


def unseen(clusters: int, alpha: float) -> float:
    """The largest share of prompts that may differ when none of so many did: (1 - share)^clusters = alpha."""
    return 1 - math.pow(alpha, 1 / max(clusters, 1))


def _constant(values: Array) -> bool:
    return values.size == 0 or bool((values == values.flat[0]).all())
