"""Whether a path between models holds: the largest fall of accuracy on it, how sure that is, and what to make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from warmerge.errors import UsageError, plain
from warmerge.rewards.metrics import FEW, NO_SPREAD, Estimate, finite, unseen

Array = NDArray[numpy.float64]

# Nobody collects more comparisons than these to split hairs about a tolerance.
_MOST = 1_000_000
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


def barrier(
    gaps: Array,
    replicates: Array,
    alpha: float = 0.05,
    clusters: int | None = None,
    differing: Sequence[int] | Array | None = None,
) -> Estimate:
    """max_l gap_l, with simultaneous 1 - alpha bounds for max_l of the true gaps.

    gap_l = (1 - l) Acc(phi_1) + l Acc(phi_2) - Acc((1 - l) phi_1 + l phi_2), as fractions: positive where WARM's
    Observation 1 (arXiv 2401.12187) fails; or the gap to another accuracy that the average is held against. Of several
    noisy gaps the largest is too large, and its naive bootstrap is larger still, so that it finds barriers where there
    are none. Bounds that hold at all points at once do not:

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
    varies = se > NO_SPREAD
    half = numpy.zeros_like(gaps)
    if varies.any():
        deviations = numpy.abs(replicates[:, varies] - gaps[varies]) / se[varies]
        half[varies] = numpy.quantile(deviations.max(axis=1), 1 - alpha) * se[varies]
    if clusters is not None:
        few = numpy.ones_like(varies) if differing is None else numpy.asarray(differing) < FEW
        half[few] = numpy.maximum(half[few], unseen(clusters, alpha / 2))
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
