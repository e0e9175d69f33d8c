"""Each estimate against all subsets, one by one, and against distributions of which the truth is known."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from warmerge.errors import RefusedError, UsageError
from warmerge.rewards import best_of_n
from warmerge.rewards.best_of_n import (
    beats,
    choose,
    expected,
    fit_overoptimisation,
    grid,
    kl_bound,
    rank_weights,
    win_rates,
)

Array = NDArray[np.float64]
NAN, INF = math.nan, math.inf
# Few different numbers: ties are common.
few = st.integers(0, 3).map(float)


# Three rows of the same 1 to 7 candidates.
pools = st.integers(1, 7).flatmap(lambda n: st.lists(st.lists(few, min_size=n, max_size=n), min_size=3, max_size=3))


def subsets(count: int, n: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(count), n))


def mean(values: Sequence[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def expected_slowly(rewards: Sequence[float], values: Sequence[float], n: int) -> float:
    """All subsets; where several candidates of one have the largest reward, the mean of theirs."""
    found = []
    for subset in subsets(len(rewards), n):
        best = max(rewards[i] for i in subset)
        found.append(mean([Fraction(values[i]) for i in subset if rewards[i] == best]))
    return float(mean(found))


def chosen_slowly(rewards: Sequence[float], order: Sequence[int], subset: Sequence[int]) -> int:
    best = max(rewards[i] for i in subset)
    return next(i for i in order if i in subset and rewards[i] == best)


def won(x: float, y: float) -> Fraction:
    return Fraction(int(x > y) - int(x < y) + 1, 2)


def usage(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        call()


# --- the axis -------------------------------------------------------------------------------------------------------


def test_the_grid_is_two_steps_to_each_doubling_and_ends_where_asked() -> None:
    assert grid(64) == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    assert grid(1000)[-4:] == (384, 512, 768, 1000)
    for largest in range(1, 200):
        found = grid(largest)
        assert found[0] == 1
        assert found[-1] == largest
        assert list(found) == sorted(set(found))
    usage(lambda: grid(0), "best-of-n needs an n of at least 1, found 0")


def test_the_bound_of_kl_starts_at_zero_rises_and_bounds_the_exact_kl() -> None:
    bounds = [kl_bound(n) for n in range(1, 500)]
    assert bounds[0] == 0
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert kl_bound(1000) == pytest.approx(math.log(1000) - 0.999)
    usage(lambda: kl_bound(0), "best-of-n needs an n of at least 1, found 0")
    # A policy over m answers, all as likely: the exact KL of best-of-n is near the bound for n << m, far below for m.
    for m, n in ((2, 8), (10, 4), (10_000, 8)):
        share = np.diff((np.arange(m + 1) / m) ** n)
        exact = float((share * np.log(share * m)).sum())
        assert 0 < exact <= kl_bound(n)
        assert (kl_bound(n) - exact < 1e-3) is (m == 10_000)


# --- one proxy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_the_weights_are_the_shares_of_subsets_with_that_maximum(count: int) -> None:
    ns = range(1, count + 1)
    exact = [[math.comb(i - 1, n - 1) / math.comb(count, n) for i in ns] for n in ns]
    found = rank_weights(count, ns)
    np.testing.assert_allclose(found, exact, rtol=1e-13, atol=0)
    assert (found == 0).tolist() == [[i < n for i in ns] for n in ns]


def test_the_weights_of_a_hundred_thousand_candidates_are_finite_and_sum_to_one() -> None:
    ns = [1, 2, 10, 1000, 50_000, 99_999, 100_000]
    found = rank_weights(100_000, ns)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    # The largest of n evenly spread numbers 1 ... N is n (N + 1) / (n + 1) on average.
    n = np.array(ns)
    np.testing.assert_allclose(found @ np.arange(1, 100_001), n * 100_001 / (n + 1), rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(pools)
def test_expected_is_the_mean_over_all_subsets_and_all_orders_of_the_tied(drawn: list[list[float]]) -> None:
    rewards, *values = drawn
    ns = range(1, len(rewards) + 1)
    slow = [[expected_slowly(rewards, row, n) for n in ns] for row in values]
    np.testing.assert_allclose(expected(np.array(rewards), np.array(values), ns), slow, rtol=0, atol=1e-12)


def test_expected_without_ties_at_the_ends_of_the_grid() -> None:
    generator = np.random.default_rng(0)
    for count in (1, 2, 5, 50):
        rewards, *values = generator.normal(size=(4, count))
        found = expected(rewards, np.array(values), [1, count])
        np.testing.assert_allclose(found[:, 0], np.mean(values, axis=1), atol=1e-12)
        assert found[:, 1].tolist() == [row[rewards.argmax()] for row in values]


def test_a_constant_reward_gives_the_mean_of_the_pool_at_every_n_also_of_a_sorted_one() -> None:
    values = np.array([np.arange(100.0), -np.arange(100.0)])
    found = expected(np.full(100, 0.1), values, grid(100))
    np.testing.assert_allclose(found, [[49.5] * len(grid(100)), [-49.5] * len(grid(100))], rtol=1e-12)


def test_no_proxy_beats_the_gold_itself_and_its_opposite_is_the_worst() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        count = int(generator.integers(1, 20))
        gold = generator.integers(0, 6, count).astype(float)
        ns = range(1, count + 1)
        best, worst = (expected(proxy, gold[None], ns)[0] for proxy in (gold, -gold))
        some = expected(generator.normal(size=count), gold[None], ns)[0]
        assert (some <= best + 1e-12).all()
        assert (some >= worst - 1e-12).all()
        assert (np.diff(best) >= -1e-12).all()


def test_the_order_of_the_candidates_does_not_matter_nor_does_a_rising_map_of_the_rewards() -> None:
    generator = np.random.default_rng(2)
    rewards = generator.integers(-5, 6, 40).astype(float)
    values = generator.normal(size=(3, 40))
    found = expected(rewards, values, grid(40))
    mixed = generator.permutation(40)
    np.testing.assert_allclose(expected(rewards[mixed], values[:, mixed], grid(40)), found, atol=1e-12)
    assert expected(np.exp(rewards) - 7, values, grid(40)).tolist() == found.tolist()
    # Negative zero is zero: a tie.
    assert expected([0.0, -0.0], [[1.0, 3.0]], [2]).tolist() == [[2.0]]


def test_the_estimate_is_unbiased_where_the_truth_is_known() -> None:
    """The maximum of n uniform numbers is n / (n + 1) on average; a proxy with noise, by drawing best-of-n afresh."""
    generator = np.random.default_rng(3)
    size, count, ns = 4000, 12, [1, 2, 3, 6, 12]
    gold = generator.uniform(size=(size, count))
    found = np.array([expected(row, row[None], ns)[0] for row in gold])
    error = found.std(axis=0) / math.sqrt(size)
    assert (np.abs(found.mean(axis=0) - [n / (n + 1) for n in ns]) < 4 * error).all()
    assert (error < 0.005).all()
    # The average over all subsets is surer than the first n of each pool.
    assert (found[:, 1].std() / gold[:, :2].max(axis=1).std()) < 0.7
    proxy = gold + generator.normal(size=gold.shape)
    fresh_gold = generator.uniform(size=(200_000, 3))
    fresh = (fresh_gold + generator.normal(size=fresh_gold.shape)).argmax(axis=1)
    truth = fresh_gold[np.arange(200_000), fresh].mean()
    drawn = np.array([expected(p, g[None], [3])[0, 0] for p, g in zip(proxy, gold, strict=True)])
    assert abs(drawn.mean() - truth) < 4 * math.hypot(drawn.std() / math.sqrt(size), 0.29 / math.sqrt(200_000))


@settings(deadline=None, max_examples=60)
@given(pools, st.randoms(use_true_random=False))
def test_choose_takes_the_first_of_the_tied_in_the_given_order(drawn: list[list[float]], random: Any) -> None:
    count = len(drawn[0])
    order = random.sample(range(count), count)
    slow = [chosen_slowly(row, order, range(count)) for row in drawn]
    assert choose(np.array(drawn), np.array(order)).tolist() == slow
    assert choose(np.array([drawn]), np.array(order)).tolist() == [slow]
    assert choose(np.array(drawn[0]), np.array(order)).tolist() == slow[0]


def test_a_constant_reward_chooses_as_the_order_does_wherever_the_best_stands_in_the_file() -> None:
    generator = np.random.default_rng(4)
    chosen = [int(choose(np.zeros(4), generator.permutation(4))) for _ in range(4000)]
    # Each a quarter, within five standard errors.
    assert np.abs(np.bincount(chosen, minlength=4) / 4000 - 0.25).max() < 5 * math.sqrt(0.1875 / 4000)


# --- win rates ------------------------------------------------------------------------------------------------------


@given(st.lists(few, min_size=1, max_size=9))
def test_beats_is_the_share_of_the_pool_with_ties_as_half(values: list[float]) -> None:
    slow = [float(mean([won(x, y) for y in values])) for x in values]
    found = beats(np.array(values))
    assert found.tolist() == pytest.approx(slow, abs=1e-15)
    assert found.mean() == pytest.approx(0.5, abs=1e-15)


@settings(deadline=None, max_examples=60)
@given(pools)
def test_expected_of_beats_is_the_win_rate_against_one_random_candidate(drawn: list[list[float]]) -> None:
    rewards, gold, _ = drawn
    ns = range(1, len(rewards) + 1)
    slow = [mean([Fraction(expected_slowly(rewards, [won(x, y) for x in gold], n)) for y in gold]) for n in ns]
    found = expected(np.array(rewards), beats(np.array(gold))[None], ns)[0]
    np.testing.assert_allclose(found, [float(rate) for rate in slow], rtol=0, atol=1e-12)
    assert found[0] == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("noise", [0.0, 0.3, INF])
def test_the_win_rate_within_the_pool_is_as_near_that_against_a_fresh_sample_as_it_says(noise: float) -> None:
    """The bound is exact for the gold itself; here the mean over pools is compared with opponents from outside."""
    generator = np.random.default_rng(5)
    size, count, ns = 10_000, 4, np.array([1, 2, 3, 4])
    gold = generator.uniform(size=(size, count))
    proxy = generator.normal(size=gold.shape) if noise == INF else gold + noise * generator.normal(size=gold.shape)
    # A fresh uniform number loses to a value v with probability v.
    pairs = zip(proxy, gold, strict=True)
    found = np.array([expected(p, np.array([beats(g), g]), ns.tolist()) for p, g in pairs])
    gap = found[:, 0] - found[:, 1]
    error = gap.std(axis=0) / math.sqrt(size)
    bound = (ns - 1) / (ns + 1) / (2 * count)
    assert (np.abs(gap.mean(axis=0)) < bound + 4 * error).all()
    if noise == 0:
        assert (np.abs(gap.mean(axis=0) - bound) < 4 * error).all()
        assert bound[-1] > 10 * error[-1]


@settings(deadline=None, max_examples=60)
@given(pools, st.randoms(use_true_random=False), st.sampled_from([1, 10, 1 << 15]))
def test_win_rates_are_those_over_all_subsets(drawn: list[list[float]], random: Any, block: int) -> None:
    a, b, values = drawn
    count = len(a)
    order = random.sample(range(count), count)
    slow = []
    for n in range(1, count + 1):
        found = []
        for subset in subsets(count, n):
            x, y = (values[chosen_slowly(proxy, order, subset)] for proxy in (a, b))
            found.append(won(x, y))
        slow.append(float(mean(found)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(best_of_n, "BLOCK", block)  # one row at a time, a few, and all at once
        fast = win_rates(np.array(a), np.array(b), np.array(values), np.array(order), range(1, count + 1))
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-13)
    assert fast[0] == 0.5


def test_win_rates_of_the_two_sides_sum_to_one_and_end_at_the_two_choices() -> None:
    generator = np.random.default_rng(6)
    ends = set()
    for _ in range(60):
        count = int(generator.integers(2, 300))
        a, b, values = generator.integers(0, 50, (3, count)).astype(float)
        order = generator.permutation(count)
        ns = grid(count)
        ours, theirs = win_rates(a, b, values, order, ns), win_rates(b, a, values, order, ns)
        np.testing.assert_allclose(ours + theirs, 1, rtol=0, atol=1e-15)
        assert ours[0] == 0.5
        x, y = values[choose(np.array([a, b]), order)]
        end = float(won(x, y))
        ends.add(end)
        assert ours[-1] == pytest.approx(end, abs=1e-12)
        assert win_rates(a, a, values, order, ns).tolist() == [0.5] * len(ns)
        assert win_rates(a, b, np.zeros(count), order, ns).tolist() == [0.5] * len(ns)
    assert ends == {0.0, 0.5, 1.0}


def test_win_rates_of_the_gold_against_its_opposite_stay_within_zero_and_one_at_any_scale() -> None:
    generator = np.random.default_rng(7)
    gold = generator.normal(size=2000)
    order = generator.permutation(2000)
    # Differences of such values would overflow.
    values = np.where(gold > 0, 1e308, -1e308) * (1 + np.abs(gold) / 100)
    ns = [1, 2, 3, 1000, 1999, 2000]
    found = win_rates(gold, -gold, values, order, ns)
    assert found[0] == 0.5
    np.testing.assert_allclose(found[1:], 1, rtol=0, atol=1e-12)
    assert found.max() <= 1
    assert (win_rates(-gold, gold, values, order, ns)[1:] >= 0).all()


def test_win_rates_agree_with_drawing_subsets_of_a_larger_pool() -> None:
    generator = np.random.default_rng(8)
    gold = generator.normal(size=500)
    a, b = gold + generator.normal(size=500), gold + 2 * generator.normal(size=500)
    order = np.arange(500)
    found = win_rates(a, b, gold, order, [8, 100])
    for rate, n in zip(found, (8, 100), strict=True):
        drawn = np.array([generator.choice(500, n, replace=False) for _ in range(4000)])
        x, y = (gold[drawn[np.arange(4000), proxy[drawn].argmax(axis=1)]] for proxy in (a, b))
        wins = (np.sign(x - y) + 1) / 2
        assert abs(wins.mean() - rate) < 4 * wins.std() / math.sqrt(4000)
        assert rate > 0.55


# --- overoptimisation -----------------------------------------------------------------------------------------------


def test_the_fit_finds_what_made_noiseless_gains_whatever_the_shape() -> None:
    ns = grid(64)
    d = np.sqrt([kl_bound(n) for n in ns])
    truth = np.array([[[2.0, 0.5], [0.0, 0.0]], [[-1.0, 3.0], [1e-3, 1e3]]])
    gains = d * (truth[..., :1] - truth[..., 1:] * d)
    found = fit_overoptimisation(ns, gains)
    assert found.shape == (2, 2, 2)
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-9)
    # Golds instead of gains, and gains without n = 1.
    np.testing.assert_allclose(fit_overoptimisation(ns, gains + 5.0), truth, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fit_overoptimisation(ns[1:], gains[..., 1:]), truth, rtol=1e-9, atol=1e-9)


def test_the_fit_is_least_squares() -> None:
    ns = grid(32)[1:]
    gains = np.random.default_rng(9).normal(size=len(ns))
    d = np.sqrt([kl_bound(n) for n in ns])

    def loss(parameters: Array) -> float:
        return float(((gains - d * (parameters[0] - parameters[1] * d)) ** 2).sum())

    found = fit_overoptimisation(ns, gains)
    for step in itertools.product((-1e-3, 0, 1e-3), repeat=2):
        assert loss(found) <= loss(found + step)


# --- what cannot be estimated ---------------------------------------------------------------------------------------


def test_an_n_that_the_pool_does_not_hold_is_refused_everywhere() -> None:
    three, order = np.arange(3.0), np.arange(3)
    text = "expected every n to be from 1 to 3, the number of candidates, found 0, 4"
    usage(lambda: rank_weights(3, [0, 1, 4]), text)
    usage(lambda: expected(three, three[None], [0, 3, 4]), text)
    usage(lambda: win_rates(three, three, three, order, [0, 2, 4]), text)
    with pytest.raises(TypeError, match="integer"):
        expected(three, three[None], [2.5])  # type: ignore[list-item]


def test_shapes_that_do_not_fit_are_refused() -> None:
    three, order = np.arange(3.0), np.arange(3)
    text = "expected rewards (N,) and values (K, N), found "
    usage(lambda: expected(three, three, [1]), text + "(3,) and (3,)")
    usage(lambda: expected(three, np.zeros((2, 4)), [1]), text + "(3,) and (2, 4)")
    usage(lambda: expected(three[None], three[None], [1]), text + "(1, 3) and (1, 3)")
    usage(lambda: beats(three[None]), "expected values (N,), found (1, 3)")
    text = "expected a, b and values of one shape (N,), found "
    usage(lambda: win_rates(three, three[:2], three, order, [1]), text + "(3,), (2,) and (3,)")
    usage(lambda: win_rates(three[None], three[None], three[None], order, [1]), text + "(1, 3), (1, 3) and (1, 3)")


def test_an_empty_pool_is_refused() -> None:
    none, order = np.zeros(0), np.zeros(0, dtype=int)
    text = "there are no candidates to choose from"
    for call in (
        lambda: expected(none, none[None], [1]),
        lambda: win_rates(none, none, none, order, [1]),
        lambda: choose(none, order),
        lambda: rank_weights(0, []),
    ):
        usage(call, text)


def test_an_order_that_is_no_permutation_is_refused() -> None:
    three = np.arange(3.0)
    for order, shown in (
        ([0, 1, 1], "[0, 1, 1]"),
        ([0, 1], "[0, 1]"),
        ([1, 2, 3], "[1, 2, 3]"),
        ([-1, 0, 1], "[-1,  0,  1]"),
        ([0.0, 1.0, 2.0], "[0., 1., 2.]"),
        ([[0, 1, 2]], "[[0, 1, 2]]"),
    ):
        text = f"expected an order that names each of 3 candidates once, found {shown}"
        usage(lambda order=order: choose(three, order), text)
        usage(lambda order=order: win_rates(three, three, three, order, [1]), text)
    # A long one is not shown in full.
    with pytest.raises(UsageError, match=r"each of 5000 candidates once, found \[0, 0, 0, \.\.\., 0, 0, 0\]$"):
        choose(np.zeros(5000), np.zeros(5000, dtype=int))


def test_numbers_that_are_none_are_refused_and_named() -> None:
    three, bad, order = np.arange(3.0), np.array([0.0, NAN, INF]), np.arange(3)
    what = "2 of 3 are not finite; the first is nan at index 1"
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("rewards", lambda: expected(bad, three[None], [1])),
        ("values[1]", lambda: expected(three, np.array([three, bad]), [1])),
        ("rewards[1]", lambda: choose(np.array([three, bad]), order)),
        ("values", lambda: beats(bad)),
        ("a", lambda: win_rates(bad, three, three, order, [1])),
        ("b", lambda: win_rates(three, bad, three, order, [1])),
        ("values", lambda: win_rates(three, three, bad, order, [1])),
        ("gains", lambda: fit_overoptimisation([1, 2, 3], bad)),
    ]
    for name, call in calls:
        with pytest.raises(RefusedError, match=f"^{re.escape(f'refused: {name}: {what}')}$"):
            call()


def test_a_fit_of_too_few_sizes_is_refused() -> None:
    text = "a fit of two parameters needs at least 5 different n above 1, found 4"
    usage(lambda: fit_overoptimisation([1, 2, 3, 4, 6], np.zeros(5)), text)
    usage(lambda: fit_overoptimisation([2, 2, 3, 3, 4, 6], np.zeros(6)), text)
    assert fit_overoptimisation([1, 2, 3, 4, 6, 8], np.zeros(6)).tolist() == [0.0, 0.0]
    usage(lambda: fit_overoptimisation([0, 2, 3, 4, 6, 8], np.zeros(6)), "best-of-n needs an n of at least 1, found 0")
    text = "expected gains (..., 6), one for each n, found (6, 2)"
    usage(lambda: fit_overoptimisation(grid(8), np.zeros((6, 2))), text)
