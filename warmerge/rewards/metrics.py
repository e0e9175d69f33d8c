"""Numbers from rewards: who is right, how sure that is, and whether a path between models holds. Never loads a model.

Prompts are the unit of resampling: comparisons about one prompt are not independent, so whole prompts are drawn. All
models are resampled with the same draws, so that what they share cancels in a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from warmerge.errors import Finding, RefusedError, UsageError, plain

Array = NDArray[numpy.float64]

# Accuracies are fractions: a spread below this is the rounding of float64, not a difference between resamples.
_NO_SPREAD = 1e-12
# With fewer prompts than these on which anything differs, a bootstrap sees too little to be trusted.
FEW = 10
# Nobody collects more comparisons than these to split hairs about a tolerance.
_MOST = 1_000_000


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
    if bounds is not None and not bounds[0] - _NO_SPREAD <= value <= bounds[1] + _NO_SPREAD:
        raise UsageError(f"expected a value from {bounds[0]} to {bounds[1]}, found {value}")
    if clusters < 2:
        return Estimate(value, *(bounds or (-math.inf, math.inf)))
    replicates = finite(replicates, "replicates")
    low, high = map(float, numpy.quantile(replicates, (0.025, 0.975)))
    if bounds is not None:
        unseen = _unseen(clusters, 0.025)
        low = min(low, value - unseen * (value - bounds[0]))
        high = max(high, value + unseen * (bounds[1] - value))
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
    counts: Array = (numpy.abs(sums) > _NO_SPREAD).sum(axis=-1).reshape(values.shape[:-1])
    return counts


def difference(values: Array, replicates: Array, clusters: Sequence[str]) -> Estimate:
    """The mean of paired differences (n,), each from -1 to 1, with the percentile interval of its replicates (B,).

    Where fewer than ten prompts differ the interval also reaches as far as the exact bound for what was never seen
    (see `interval`); where many do, the bootstrap sees how much they vary, and that bound would only blur it.
    """
    few = differing(values, clusters) < FEW
    bounds = (-1.0, 1.0) if few else None
    return interval(float(values.mean()), replicates, len(set(clusters)), bounds)


# --- a path between models ------------------------------------------------------------------------------------------


def barrier(
    gaps: Array,
    replicates: Array,
    alpha: float = 0.05,
    clusters: int | None = None,
    differing: Sequence[int] | Array | None = None,
) -> Estimate:
    """max_l gap_l, with simultaneous 1 - alpha bounds for max_l of the true gaps.

    gap_l = (1 - l) Acc(phi_1) + l Acc(phi_2) - Acc((1 - l) phi_1 + l phi_2), as fractions: positive where WARM's
    Observation 1 (arXiv 2401.12187) fails. Of several noisy gaps the largest is too large, and its naive bootstrap is
    larger still, so that it finds barriers where there are none. Bounds that hold at all points at once do not:

        q = (1 - alpha) quantile over b of max_l |rep[b, l] - gap_l| / se_l,  se_l = sd over b of rep[b, l]
        low = max_l (gap_l - q se_l),  high = max_l (gap_l + q se_l)

    Args:
        gaps: (L,), at the inner points of the path.
        replicates: (B, L), the same in each resample.
        clusters: the number of prompts. Where the models disagree about no prompt, or about a few, se_l is 0 or too
            small, and few prompts would pass for certainty. Given this number no half-width is below
            1 - (alpha/2)^(1/clusters), the share of prompts that may differ though none was seen to (see `interval`).
            Without it a point with se_l = 0 counts as exact.
        differing: (L,), on how many prompts the gap was seen not to be zero: from ten on se_l is trusted.

    Raises:
        UsageError: no gap, or replicates of another shape.
        RefusedError: NaN or infinite numbers.
    """
    gaps, replicates = finite(gaps, "gaps"), finite(replicates, "replicates")
    if gaps.ndim != 1 or not gaps.size or replicates.ndim != 2 or replicates.shape[1:] != gaps.shape:
        raise UsageError(f"expected (L,) gaps and (B, L) replicates, found {gaps.shape} and {replicates.shape}")
    se = replicates.std(axis=0)
    varies = se > _NO_SPREAD
    half = numpy.zeros_like(gaps)
    if varies.any():
        deviations = numpy.abs(replicates[:, varies] - gaps[varies]) / se[varies]
        half[varies] = numpy.quantile(deviations.max(axis=1), 1 - alpha) * se[varies]
    if clusters is not None:
        few = numpy.ones_like(varies) if differing is None else numpy.asarray(differing) < FEW
        half[few] = numpy.maximum(half[few], _unseen(clusters, alpha / 2))
    return Estimate(float(gaps.max()), float((gaps - half).max()), float((gaps + half).max()))


def verdict(barrier: Estimate, tolerance: float) -> str:
    """ "holds" if the whole interval is within the tolerance, "does not hold" if it is beyond, else "cannot tell".

    The tolerance is what counts as a barrier, as a fraction: a fall that is surely there but smaller, holds.

    >>> [verdict(Estimate(0.003, 0.001, high), tolerance=0.01) for high in (0.005, 0.02)]
    ['holds', 'cannot tell']

    Raises:
        UsageError: a tolerance that is not a number from 0 to 1.
    """
    if not 0 <= tolerance <= 1:
        raise UsageError(f"expected a tolerance from 0 to 1 (0.01 is one point of accuracy), found {tolerance}")
    if barrier.high <= tolerance:
        return "holds"
    return "does not hold" if barrier.low > tolerance else "cannot tell"


# What the accuracy of the average is held against, and what it means to fall below it.
AGAINST = {
    "line": (
        "the straight line between their accuracies",
        "A model merged on this path can be worse than its parts are on average",
    ),
    "ensemble": (
        "the ensemble of the same models, which is the test here because one end is no better than chance",
        "Averaging their weights loses what averaging their rewards keeps",
    ),
}


def verdict_words(path: str, name: str, barrier: Estimate, tolerance: float, n: int, against: str = "line") -> str:
    """The verdict and what it means, for a reader who has not seen one before.

    Args:
        path: its two ends, such as "runs/1 to runs/2".
        name: of the set of comparisons.
        n: the number of comparisons.
        against: what the barrier is a fall below, "line" or "ensemble".

    >>> print(verdict_words("a to b", "val", Estimate(0.004, 0.001, 0.008), 0.01, 1314))
    holds on val: on the way from a to b the average is never more than 0.4 points below the straight line between \
their accuracies (95 % interval 0.1 to 0.8, n = 1314 comparisons), within the tolerance of 1 point.
    """
    answer = verdict(barrier, tolerance)
    # As few decimals as keep every number on its side of the tolerance.
    numbers = (barrier.value, barrier.low, barrier.high)
    digits = next((d for d in (1, 2, 3) if all(_keeps_side(x, tolerance, d) for x in numbers)), 4)
    value, low, high = (_points(x, digits) for x in numbers)
    count = f"n = {n} comparison{'s' * (n != 1)}"
    interval = f"95 % interval {low} to {high}, {count}"
    limit = f"the tolerance of {100 * tolerance:.6g} point{'s' * (tolerance != 0.01)}"
    start = f"{answer} on {plain(name)}: on the way from {plain(path)}"
    reference, meaning = AGAINST[against]
    line = f"below {reference}"
    if answer == "does not hold":
        return f"{start} the average falls up to {value} points {line} ({interval}). {meaning}: do not merge them."
    if answer == "holds" and barrier.value > 0:
        return f"{start} the average is never more than {value} points {line} ({interval}), within {limit}."
    if answer == "holds":
        largest = f"largest fall {value} points, {interval}; less than 0 is a gain"
        return f"{start} the average is nowhere {line} ({largest}), within {limit}."
    return (
        f"{start} the average may fall between {low} and {high} points {line} (measured {value}, 95 % interval,"
        f" {count}), on both sides of {limit}. {_more(barrier, tolerance, n)}"
    )


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


def _unseen(clusters: int, alpha: float) -> float:
    """The largest share of prompts that may differ when none of so many did: (1 - share)^clusters = alpha."""
    return 1 - math.pow(alpha, 1 / max(clusters, 1))


def _constant(values: Array) -> bool:
    return values.size == 0 or bool((values == values.flat[0]).all())


def _points(fraction: float, digits: int) -> str:
    return f"{round(100 * fraction, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.0"


def _keeps_side(fraction: float, tolerance: float, digits: int) -> bool:
    return (fraction <= tolerance) == (round(100 * fraction, digits) <= 100 * tolerance)


def _more(barrier: Estimate, tolerance: float, n: int) -> str:
    """What would decide it: the interval shrinks with the square root of n while its middle stays where it is."""
    if not all(map(math.isfinite, (barrier.low, barrier.high))):
        return "More comparisons are needed."
    width = barrier.high - barrier.value if barrier.value <= tolerance else barrier.value - barrier.low
    room = abs(tolerance - barrier.value)
    if n * width**2 > _MOST * room**2:
        return "It is so close to the tolerance that more comparisons will hardly decide it."
    needed = math.ceil(n * (width / room) ** 2)
    step = 10 ** max(0, len(str(needed)) - 2)
    return f"More comparisons are needed: if it stays at that, roughly {-(-needed // step) * step}."
