"""What best-of-n is worth, for every n at once, from one pool of N scored candidates of a prompt. Never loads a model.

A proxy reward chooses the candidate; the value of the choice may be any other number of it: a control reward, a gold
score, the proxy itself. Any n of N independent samples of a policy are n independent samples, so the average over all
n-subsets of the pool is an unbiased estimate for best-of-n. All of them are counted here, none is drawn. As n nears N
it rests on fewer and fewer separate choices (at n = N on one), so it is the number of prompts that makes it sure.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from warmerge.errors import UsageError
from warmerge.rewards.metrics import Array, finite

Integers = NDArray[numpy.int64]

# The curve of Gao et al. has two parameters; with fewer points than these its bend is mostly noise.
FEWEST = 5
# So many pairs of candidates are held at once: a whole table of 10,000 candidates would take a gigabyte.
BLOCK = 1 << 15


# --- the axis -------------------------------------------------------------------------------------------------------


def grid(largest: int) -> tuple[int, ...]:
    """The n to show: 2^k and 3 * 2^k below `largest`, then `largest` itself, whatever it is.

    Raises:
        UsageError: `largest` is below 1.

    >>> grid(16), grid(10), grid(1)
    ((1, 2, 3, 4, 6, 8, 12, 16), (1, 2, 3, 4, 6, 8, 10), (1,))
    """
    if largest < 1:
        raise UsageError(f"best-of-n needs an n of at least 1, found {largest}")
    steps = {factor << k for k in range(largest.bit_length()) for factor in (1, 3)}
    return (*sorted(n for n in steps if n < largest), largest)


def kl_bound(n: int) -> float:
    """log n - (n - 1)/n nats: an UPPER BOUND of KL(best-of-n || policy), Beirami et al. (arXiv 2401.01879).

    The bound is close where the policy rarely says the same twice. Where few answers are likely it can be far above the
    true KL, which cannot pass -log of the probability of the best answer, however large n is.

    Raises:
        UsageError: n is below 1.

    >>> kl_bound(1), round(kl_bound(8), 4)
    (0.0, 1.2044)
    """
    if n < 1:
        raise UsageError(f"best-of-n needs an n of at least 1, found {n}")
    return math.log(n) - (n - 1) / n


# --- one proxy ------------------------------------------------------------------------------------------------------


def rank_weights(count: int, ns: Sequence[int]) -> Array:
    """(G, N): the share of the n-subsets of N candidates of which the i-th smallest is the largest.

    That is C(i - 1, n - 1) / C(N, n): exactly 0 for the n - 1 smallest; each row sums to 1.

    Args:
        count: N, the number of candidates.
        ns: the G sizes, each from 1 to N.

    Raises:
        UsageError: no candidates, or an n below 1 or above N.

    >>> (6 * rank_weights(4, [1, 2, 4])).tolist()
    [[1.5, 1.5, 1.5, 1.5], [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 6.0]]
    """
    n = _sizes(ns, count)
    return _binomials(n - 1, n / count, count)


def expected(rewards: Array, values: Array, ns: Sequence[int]) -> Array:
    """(K, G): the expected value of the candidate with the largest reward among n drawn without replacement.

    The unbiased estimator of Coste et al. (arXiv 2310.02743). Where rewards tie, each of the tied candidates is as
    likely to be chosen as the others, exactly: a constant reward gives the mean of the pool at every n.

    Args:
        rewards: (N,), of the proxy that chooses.
        values: (K, N), what the candidates are worth by each of K measures.
        ns: the G sizes, each from 1 to N.

    Raises:
        UsageError: shapes that do not fit, no candidates, or an n below 1 or above N.
        RefusedError: rewards or values that are NaN or infinite.

    >>> expected([0.0, 3.0, 1.0], [[0.0, 30.0, 60.0]], [1, 2, 3]).round(9).tolist()
    [[30.0, 40.0, 30.0]]
    """
    rewards, values = finite(rewards), finite(values, "values")
    if rewards.ndim != 1 or values.ndim != 2 or len(rewards) != values.shape[1]:
        raise UsageError(f"expected rewards (N,) and values (K, N), found {rewards.shape} and {values.shape}")
    count = len(rewards)
    weights = rank_weights(count, ns)
    ascending = numpy.argsort(rewards, kind="stable")
    ranked = rewards[ascending]
    starts = numpy.flatnonzero(numpy.append(True, ranked[1:] != ranked[:-1]))
    sizes = numpy.diff(starts, append=count)
    # Tied candidates share the weights of the ranks that they hold together.
    shares = numpy.add.reduceat(weights, starts, axis=1) / sizes
    found: Array = values[:, ascending] @ numpy.repeat(shares, sizes, axis=1).T
    return found


def choose(rewards: Array, order: NDArray[numpy.integer]) -> Integers:
    """(...): the candidate with the largest reward; of tied ones, the one that comes first in `order`.

    The order of a file must not decide: on a pool sorted by quality a constant reward would look like an oracle.

    Args:
        rewards: (..., N).
        order: (N,), a random permutation of the candidates, the same for all proxies.

    Raises:
        UsageError: no candidates, or an order that is no permutation of them.
        RefusedError: rewards that are NaN or infinite.

    >>> choose([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]], [2, 0, 1]).tolist()
    [2, 2]
    """
    rewards = finite(rewards)
    order = _permutation(order, rewards.shape[-1] if rewards.ndim else 0)
    chosen: Integers = numpy.asarray(order[rewards[..., order].argmax(axis=-1)])
    return chosen


# --- win rates ------------------------------------------------------------------------------------------------------


def beats(values: Array) -> Array:
    """(N,): for each candidate, the share of all N that it beats, itself included; a tie counts half. The mean is 1/2.

    `expected(rewards, [beats(values)], ns)` is the win rate of best-of-n against one random candidate of the same pool,
    which may be one of the n, or the choice itself. In expectation that differs from the win rate against a fresh
    sample by at most (n - 1) / (n + 1) / (2 N), and is that much above it for a proxy that is always right: up to 5
    points with N = 8, 0.8 with N = 64.

    Args:
        values: (N,).

    Raises:
        UsageError: not one row of values.
        RefusedError: values that are NaN or infinite.

    >>> beats([10.0, 30.0, 10.0, 20.0]).tolist()
    [0.25, 0.875, 0.25, 0.625]
    """
    values = finite(values, "values")
    if values.ndim != 1:
        raise UsageError(f"expected values (N,), found {values.shape}")
    ranked = numpy.sort(values)
    less, up_to = (numpy.searchsorted(ranked, values, side) for side in ("left", "right"))
    share: Array = (less + up_to) / (2 * max(len(values), 1))
    return share


def win_rates(a: Array, b: Array, values: Array, order: NDArray[numpy.integer], ns: Sequence[int]) -> Array:
    """(G,): how often, of the same n random candidates, a's choice has the larger value than b's; a tie counts half.

    Exact, over all n-subsets: as `choose` does, a and b break ties between rewards by `order`. The same choice is a tie
    too, so n = 1 gives exactly 1/2. Time grows with N^2, memory with N.

    Args:
        a, b: (N,), the rewards of two proxies.
        values: (N,), what the candidates are worth.
        order: (N,), a random permutation of the candidates.
        ns: the G sizes, each from 1 to N.

    Raises:
        UsageError: shapes that do not fit, an order that is no permutation, or an n below 1 or above N.
        RefusedError: rewards or values that are NaN or infinite.

    >>> win_rates([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 1.0, 1.0], [0, 1, 2], [1, 2, 3]).round(9).tolist()
    [0.5, 0.833333333, 1.0]
    """
    a, b, values = finite(a, "a"), finite(b, "b"), finite(values, "values")
    if a.ndim != 1 or not a.shape == b.shape == values.shape:
        raise UsageError(f"expected a, b and values of one shape (N,), found {a.shape}, {b.shape} and {values.shape}")
    count = len(a)
    order = _permutation(order, count)
    n = _sizes(ns, count)
    # Subsets in which a chooses i and b another, j, that have c candidates below both: C(c, n - 2) of C(N, n).
    weights = _binomials(n - 2, n * (n - 1) / (count * (count - n + 1)), count)
    lead = weights @ _leads(_ascending(a, order), _ascending(b, order), values)
    # Wins less losses, halved, above 1/2: ties need no counting. Rounding alone could pass the ends.
    rates: Array = numpy.clip((1 + lead) / 2, 0.0, 1.0)
    return rates


def _leads(by_a: Integers, by_b: Integers, values: Array) -> Array:
    """(N,): a's wins less b's over all pairs of different choices that have c = 0 ... N - 1 candidates below both.

    i can be a's choice and j b's, of the same subset, only if a puts j below i and b puts i below j. Any other k of the
    subset must lie below i for a and below j for b: c counts these.

    Args:
        by_a, by_b: (N,), the candidates from the smallest to the largest, for a and for b.
    """
    count = len(values)
    ranks = numpy.arange(count)
    rank_a, rank_b = numpy.empty_like(by_a), numpy.empty_like(by_b)
    rank_a[by_a], rank_b[by_b] = ranks, ranks
    level = numpy.unique(values, return_inverse=True)[1]  # integers: a difference of values could overflow
    leads = numpy.zeros(count)
    lower = numpy.zeros(count, dtype=numpy.int64)  # for each j in b's order: those below j for b, of the rows done
    rows = max(1, BLOCK // count)
    for start in range(0, count, rows):
        i = by_a[start : start + rows, None]
        below = rank_b[i] < ranks
        done = lower + numpy.cumsum(below, axis=0)
        lower = done[-1]
        possible = below & (rank_a[by_b] < rank_a[i])
        sign = numpy.sign(level[i] - level[by_b])
        # At a possible pair i itself is below j for b, but not below i for a: it was counted once too often.
        leads += numpy.bincount(done[possible] - 1, sign[possible], count)
    return leads


# --- overoptimisation -----------------------------------------------------------------------------------------------


def fit_overoptimisation(n_grid: Sequence[int], gains: Array) -> Array:
    """(..., 2): alpha and beta of gold(n) - gold(1) = d (alpha - beta d), by least squares over the n above 1.

    The best-of-n law of Gao et al. (arXiv 2210.10760), with d = sqrt(KL). KL stands here for its UPPER BOUND,
    `kl_bound(n)`, as in their paper: compare alpha and beta only with others that were fitted so. With beta > 0 the
    curve peaks at d = alpha / (2 beta), which may lie far beyond the largest n.

    Args:
        n_grid: the G sizes.
        gains: (..., G), gold(n) - gold(1), in the unit of the gold; each row is fitted by itself. Where n = 1 is on the
            grid its column is subtracted from the others: it is 0 for gains, and gold(n) itself serves as well.

    Raises:
        UsageError: fewer than 5 different n above 1, an n below 1, or not one gain for each n.
        RefusedError: gains that are NaN or infinite.

    >>> n = grid(16)
    >>> d = numpy.sqrt([kl_bound(i) for i in n])
    >>> fit_overoptimisation(n, d * (2.0 - 0.5 * d)).round(9).tolist()
    [2.0, 0.5]
    """
    gains = finite(gains, "gains")
    if gains.shape[-1:] != (len(n_grid),):
        raise UsageError(f"expected gains (..., {len(n_grid)}), one for each n, found {gains.shape}")
    d = numpy.sqrt([kl_bound(n) for n in n_grid])
    different = len({*n_grid} - {1})
    if different < FEWEST:
        raise UsageError(f"a fit of two parameters needs at least {FEWEST} different n above 1, found {different}")
    if 1 in n_grid:
        gains = gains - gains[..., [list(n_grid).index(1)]]
    # d = 0 at n = 1 adds nothing to the sums of least squares, and what is there is 0.
    fitted: Array = gains @ numpy.linalg.pinv(numpy.stack([d, -d * d], axis=1)).T
    return fitted


# --- small tools ----------------------------------------------------------------------------------------------------


def _binomials(below: Integers, top: Array, count: int) -> Array:
    """(G, N): top * C(c, m) / C(N - 1, m) for c = 0 ... N - 1, where m = `below` (G,) and top (G,) is the last column.

    By C(c - 1, m) = C(c, m) (c - m) / c from the top downwards: no large number is ever formed, what is too small
    becomes 0, and the error is that of at most N products, not that of a difference of logarithms of size N log N.
    """
    c = numpy.arange(count - 1, 0, -1)
    ratios = numpy.maximum(c - below[:, None], 0) / c
    falling = numpy.cumprod(numpy.concatenate([top[:, None], ratios], axis=1), axis=1)
    return falling[:, ::-1]


def _ascending(rewards: Array, order: Integers) -> Integers:
    """The candidates from the smallest reward to the largest; of tied ones, the first in `order` is the largest."""
    last_first = order[::-1]
    ascending: Integers = last_first[numpy.argsort(rewards[last_first], kind="stable")]
    return ascending


def _sizes(ns: Sequence[int], count: int) -> Integers:
    if count < 1:
        raise UsageError("there are no candidates to choose from")
    wrong = [n for n in ns if not 1 <= n <= count]
    if wrong:
        found = ", ".join(map(str, wrong))
        raise UsageError(f"expected every n to be from 1 to {count}, the number of candidates, found {found}")
    return numpy.array([operator.index(n) for n in ns], dtype=numpy.int64)  # a TypeError for 2.5, which is no size


def _permutation(order: NDArray[numpy.integer], count: int) -> Integers:
    if count < 1:
        raise UsageError("there are no candidates to choose from")
    order = numpy.asarray(order)
    if order.shape != (count,) or order.dtype.kind not in "iu" or numpy.any(numpy.sort(order) != numpy.arange(count)):
        shown = numpy.array2string(order, threshold=10, separator=", ")
        raise UsageError(f"expected an order that names each of {count} candidates once, found {shown}")
    return order.astype(numpy.int64)
