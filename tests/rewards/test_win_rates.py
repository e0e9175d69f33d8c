"""Win rates: outcomes, two orders of one judge, and intervals, against values by hand and by other ways."""

from __future__ import annotations

import math
import random

import numpy
import pytest

from warmerge.errors import RefusedError, UsageError
from warmerge.rewards import metrics
from warmerge.rewards.win_rates import both_orders, outcomes, win_rate

NAN = math.nan


def test_the_larger_one_wins_and_equal_ones_tie() -> None:
    first = numpy.array([1.0, -1.0, 0.0, -0.0, 1e308, 2.0])
    second = numpy.array([0.5, -0.5, 0.0, 0.0, -1e308, 2.0 + 1e-15])
    assert outcomes(first, second).tolist() == [1, 0, 0.5, 0.5, 1, 0]
    assert (outcomes(first, second) + outcomes(second, first)).tolist() == [1] * 6


def test_numbers_that_cannot_be_compared() -> None:
    with pytest.raises(RefusedError, match="second: 1 of 2 are not finite; the first is nan at index 1"):
        outcomes(numpy.array([1.0, 2.0]), numpy.array([1.0, NAN]))
    with pytest.raises(UsageError, match=r"expected two rows of the same length, found \(2,\) and \(1,\)"):
        outcomes(numpy.array([1.0, 2.0]), numpy.array([1.0]))


@pytest.mark.parametrize(
    ("straight", "swapped", "found"),
    [(1, 1, 1), (0, 0, 0), (1, 0, 0.5), (0, 1, 0.5), (0.5, 0.5, 0.5), (1, 0.5, 0.5), (0.5, 0, 0.5)],
)
def test_two_orders_must_agree(straight: float, swapped: float, found: float) -> None:
    assert both_orders(numpy.array([straight]), numpy.array([swapped])).tolist() == [found]


@pytest.mark.parametrize(("straight", "swapped"), [(NAN, 1), (0, NAN), (NAN, NAN), (0.5, NAN)])
def test_what_is_not_known_is_no_tie(straight: float, swapped: float) -> None:
    assert numpy.isnan(both_orders(numpy.array([straight]), numpy.array([swapped]))).all()


def test_a_judge_of_places_alone_says_nothing() -> None:
    """Who always prefers the first place gives 1 in one order and 0 in the other: ties."""
    found = both_orders(numpy.ones(40), numpy.zeros(40))
    rate = win_rate(found, [str(i) for i in range(40)], 200)
    assert (rate["win"], rate["ties"], rate["wins"], rate["losses"]) == (0.5, 40, 0, 0)
    # All alike: as far as the exact bound for what was never seen, on both sides.
    reach = (1 - 0.025 ** (1 / 40)) / 2
    assert (rate["low"], rate["high"]) == pytest.approx((0.5 - reach, 0.5 + reach))


def test_counts_and_the_rate() -> None:
    values = numpy.array([1, 1, 1, 0.5, 0.5, 0, NAN, NAN])
    rate = win_rate(values, list("abcdefgh"), 200)
    assert {name: rate[name] for name in ("n", "wins", "ties", "losses")} == {"n": 6, "wins": 3, "ties": 2, "losses": 1}
    assert rate["win"] == pytest.approx((3 + 2 / 2) / 6)
    assert 0 <= rate["low"] < rate["win"] < rate["high"] <= 1
    known = win_rate(values[:6], list("abcdef"), 200)
    assert known == rate


def test_the_interval_is_the_bootstrap_over_prompts() -> None:
    source = random.Random(0)
    values = numpy.array([source.choice([0, 0, 0.5, 1, 1, 1]) for _ in range(200)])
    clusters = [f"p{i}" for i in range(200)]
    rate = win_rate(values, clusters, 500, seed=4)
    drawn = metrics.replicates(values[None], clusters, 500, 4)[:, 0]
    assert (rate["low"], rate["high"]) == pytest.approx(tuple(numpy.quantile(drawn, (0.025, 0.975))))
    # Near the formula for a mean of independent values.
    half = 1.96 * values.std() / math.sqrt(200)
    assert (rate["win"] - rate["low"], rate["high"] - rate["win"]) == pytest.approx((half, half), rel=0.15)


def test_intervals_hold_what_they_promise() -> None:
    """Of intervals for a policy that wins 60 % about 95 % hold 0.6."""
    random = numpy.random.default_rng(1)
    clusters = [str(i) for i in range(60)]
    held = 0
    for seed in range(150):
        rate = win_rate((random.random(60) < 0.6).astype(float), clusters, 200, seed)
        held += rate["low"] <= 0.6 <= rate["high"]
    assert 0.89 <= held / 150 <= 1.0


def test_a_policy_that_always_wins_may_lose_some_time() -> None:
    rate = win_rate(numpy.ones(20), [str(i) for i in range(20)], 200)
    assert (rate["win"], rate["high"]) == (1.0, 1.0)
    assert rate["low"] == pytest.approx(0.025 ** (1 / 20))


def test_one_prompt_and_none() -> None:
    assert win_rate(numpy.ones(1), ["a"], 200) == {
        "win": 1.0, "low": 0.0, "high": 1.0, "n": 1, "wins": 1, "ties": 0, "losses": 0
    }  # fmt: skip
    nothing = win_rate(numpy.array([NAN, NAN]), ["a", "b"], 200)
    assert nothing["n"] == nothing["wins"] == nothing["ties"] == nothing["losses"] == 0
    assert all(math.isnan(nothing[name]) for name in ("win", "low", "high"))
