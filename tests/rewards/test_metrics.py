"""Each number against a slow or hand-computed one, each interval against simulated data of which the truth is known."""

from __future__ import annotations

import math
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from warmerge.errors import Finding, RefusedError, UsageError
from warmerge.rewards.ensembles import AGGREGATES, aggregate
from warmerge.rewards.metrics import (
    FEW,
    Estimate,
    accuracy,
    correlation,
    difference,
    differing,
    finite,
    interval,
    margins,
    replicates,
    right,
    spread,
    ties,
)

Array = NDArray[np.float64]
NAN, INF = math.nan, math.inf
# Halves and quarters: sums and differences of them are exact.
numbers = st.integers(-400, 400).map(lambda i: i / 4)


def refusal(call: Callable[[], Any]) -> tuple[Finding, ...]:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.findings


def names(index: Any) -> list[str]:
    return [f"prompt {i}" for i in index]


# --- comparisons ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_margins_are_the_worst_chosen_less_the_best_rejected(data: st.DataObject) -> None:
    rewards = data.draw(st.lists(st.lists(numbers, min_size=5, max_size=5), min_size=1, max_size=3))
    group = st.lists(st.integers(0, 4), min_size=1, max_size=3)
    pairs = data.draw(st.lists(st.tuples(group, group), max_size=6))
    found = margins(np.array(rewards), [c for c, _ in pairs], [r for _, r in pairs])
    expected = [[min(row[i] for i in c) - max(row[i] for i in r) for c, r in pairs] for row in rewards]
    assert found.shape == (len(rewards), len(pairs))
    assert found.tolist() == expected
    # One model alone, and a table of more dimensions.
    assert margins(np.array(rewards)[0], [c for c, _ in pairs], [r for _, r in pairs]).tolist() == expected[0]
    assert margins(np.array([rewards]), [c for c, _ in pairs], [r for _, r in pairs]).tolist() == [expected]


def test_rewards_that_are_no_numbers_are_refused_with_every_row_named() -> None:
    rewards = np.array([[1.0, NAN, INF], [1.0, 2.0, 3.0], [-INF, 2.0, 3.0]])
    assert refusal(lambda: margins(rewards, [[0]], [[1]])) == (
        Finding("rewards[0]", "2 of 3 are not finite; the first is nan at index 1"),
        Finding("rewards[2]", "1 of 3 are not finite; the first is -inf at index 0"),
    )
    # Also where no comparison uses it.
    (one,) = refusal(lambda: margins(np.array([1.0, 0.0, NAN]), [[0]], [[1]]))
    assert str(one) == "rewards: 1 of 3 are not finite; the first is nan at index 2"


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        ([[0], []], [[1], [0]], "comparison 1 has no chosen answer"),
        ([[0]], [[]], "comparison 0 has no rejected answer"),
        ([[0], [0]], [[1], [-1]], "comparison 1: expected rejected indices from 0 to 2, found [-1]"),
        ([[0, 3]], [[1]], "comparison 0: expected chosen indices from 0 to 2, found [0, 3]"),
        ([[0]], [[1], [2]], "1 comparisons have chosen answers, but 2 have rejected ones"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(chosen: Any, rejected: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        margins(np.zeros(3), chosen, rejected)
    assert str(caught.value) == words


def test_a_tie_counts_as_right_and_is_counted() -> None:
    found = np.array([[-1.0, -0.0, 0.0], [5e-324, -5e-324, 2.0]])
    assert right(found).tolist() == [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    assert right(found).dtype == np.float64
    assert ties(found) == 2


@pytest.mark.parametrize("function", [right, ties])
def test_a_margin_that_is_no_number_is_not_called_wrong(function: Callable[[Array], Any]) -> None:
    (one,) = refusal(lambda: function(np.array([1.0, NAN])))
    assert one.where == "margins"


# --- resampling -----------------------------------------------------------------------------------------------------


def slow_replicates(values: Array, clusters: list[str], resamples: int, seed: int) -> list[list[float]]:
    """Prompts drawn by number, in the order of their names; their comparisons put one after the other."""
    order, generator, out = sorted(set(clusters)), np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = [order[i] for i in generator.integers(len(order), size=len(order))]
        places = [j for name in drawn for j, own in enumerate(clusters) if own == name]
        out.append([math.fsum(row[j] for j in places) / len(places) for row in values])
    return out


def test_replicates_are_those_of_an_explicit_loop() -> None:
    generator = np.random.default_rng(3)
    clusters = names(generator.integers(7, size=23))
    values = generator.normal(size=(3, 23))
    found = replicates(values, clusters, resamples=50, seed=5)
    assert found.shape == (50, 3)
    np.testing.assert_allclose(found, slow_replicates(values, clusters, 50, seed=5), rtol=1e-12, atol=1e-14)
    assert not np.array_equal(found, replicates(values, clusters, resamples=50, seed=6))


def test_replicates_do_not_depend_on_how_many_are_drawn_or_on_the_order_of_comparisons() -> None:
    generator = np.random.default_rng(3)
    clusters = names(generator.integers(40, size=100))
    values = generator.integers(0, 2, size=(4, 100)).astype(np.float64)
    found = replicates(values, clusters, resamples=300)
    assert np.array_equal(replicates(values, clusters, resamples=37), found[:37])
    order = generator.permutation(100)
    assert np.array_equal(replicates(values[:, order], [clusters[i] for i in order], resamples=300), found)


def test_two_prompts_that_differ_by_a_trailing_nul_are_two() -> None:
    assert replicates(np.array([[0.0, 1.0]]), ["a", "a\0"], resamples=100).std() > 0.1


def test_repeating_every_comparison_of_a_prompt_does_not_make_it_surer() -> None:
    values = np.random.default_rng(0).integers(0, 2, size=(1, 50)).astype(np.float64)
    once = replicates(values, names(range(50)))
    four_times = replicates(np.repeat(values, 4, axis=1), names(np.repeat(range(50), 4)))
    np.testing.assert_array_equal(once, four_times)
    # As if they were independent, the interval would be half as wide.
    wrong = replicates(np.repeat(values, 4, axis=1), names(range(200)))
    assert 0.4 < wrong.std() / once.std() < 0.6


def test_a_prompt_with_more_comparisons_weighs_more() -> None:
    clusters = ["a"] * 9 + ["b"]
    found = replicates(np.array([[1.0] * 9 + [0.0]]), clusters, resamples=400)
    assert set(found[:, 0].tolist()) == {0.0, 0.9, 1.0}


def test_pairing_makes_the_interval_of_a_difference_narrower() -> None:
    generator = np.random.default_rng(1)
    a = generator.integers(0, 2, size=300).astype(np.float64)
    b = np.where(generator.random(300) < 0.1, 1 - a, a)
    clusters = names(range(300))
    paired = replicates(np.stack([a, b]), clusters)
    apart = replicates(a[None], clusters, seed=1)[:, 0] - replicates(b[None], clusters, seed=2)[:, 0]
    assert (paired[:, 0] - paired[:, 1]).std() < 0.5 * apart.std()


def test_a_thousand_prompts_take_a_moment() -> None:
    values, clusters = np.random.default_rng(0).random((12, 2600)), names(i % 1300 for i in range(2600))
    start = time.perf_counter()
    replicates(values, clusters)
    assert time.perf_counter() - start < 1  # 0.12 s were measured


def test_memory_is_that_of_one_resample() -> None:
    values, clusters = np.ones((1, 100_000)), names(range(100_000))
    replicates(values[:, :2], clusters[:2], resamples=1)
    peaks = []
    for resamples in (1, 40):
        tracemalloc.start()
        replicates(values, clusters, resamples=resamples)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000  # a table of all resamples would add 31 MB


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to resample: 0 comparisons, 2000 resamples"):
        replicates(np.empty((1, 0)), [])
    with pytest.raises(UsageError, match="nothing to resample: 1 comparisons, 0 resamples"):
        replicates(np.ones((1, 1)), ["a"], resamples=0)
    with pytest.raises(UsageError, match=r"expected values \(rows, comparisons\) for 3 prompts, found \(1, 2\)"):
        replicates(np.ones((1, 2)), ["a", "b", "c"])
    with pytest.raises(UsageError, match=r"found \(2,\)"):
        replicates(np.ones(2), ["a", "b"])
    (one,) = refusal(lambda: replicates(np.array([[1.0, 2.0], [1.0, NAN]]), ["a", "b"]))
    assert one.where == "values[1]"


# --- intervals ------------------------------------------------------------------------------------------------------


def test_an_interval_is_the_middle_95_percent() -> None:
    drawn = np.linspace(0, 1000, 1001)
    assert interval(480.0, drawn, clusters=50) == Estimate(480.0, 25.0, 975.0)


@pytest.mark.parametrize("clusters", [2, 20, 1314])
def test_all_right_is_not_certainty(clusters: int) -> None:
    always = interval(1.0, np.ones(9), clusters, bounds=(0, 1))
    assert (always.value, always.high) == (1.0, 1.0)
    assert math.isclose(always.low, 0.025 ** (1 / clusters))
    # The exact bound: were this the truth, all would be right in 2.5 % of data sets.
    assert math.isclose(always.low**clusters, 0.025)
    never = interval(0.0, np.zeros(9), clusters, bounds=(0, 1))
    assert (never.low, never.high) == (0.0, 1 - always.low)
    # Of a difference, all prompts agreeing on none: either side may be ahead elsewhere.
    same = interval(0.0, np.zeros(9), clusters, bounds=(-1, 1))
    assert (same.low, same.high) == (-never.high, never.high)


def test_one_wrong_of_many_is_not_surer_than_none() -> None:
    def low(wrong: int) -> float:
        values = np.array([-1.0] * wrong + [1.0] * (80 - wrong))
        return accuracy(values, names(range(80))).low

    assert low(0) > low(1) > low(2) > low(3)


def test_without_bounds_no_spread_is_the_value_alone() -> None:
    assert interval(3.0, np.full(9, 3.0), clusters=20) == Estimate(3.0, 3.0, 3.0)


@pytest.mark.parametrize("clusters", [0, 1])
def test_one_prompt_says_nothing_about_others(clusters: int) -> None:
    assert interval(0.5, np.full(9, 0.5), clusters, bounds=(0, 1)) == Estimate(0.5, 0, 1)
    assert interval(0.5, np.full(9, 0.5), clusters) == Estimate(0.5, -INF, INF)


def test_a_value_outside_of_its_bounds_is_refused() -> None:
    for value in (1.5, -0.5, NAN):
        with pytest.raises(UsageError, match=f"expected a value from 0 to 1, found {value}"):
            interval(value, np.zeros(9), 20, bounds=(0, 1))


def test_accuracy_counts_prompts_not_comparisons() -> None:
    found = accuracy(np.ones(60), names(np.repeat(range(20), 3)))
    assert (found.value, found.high) == (1.0, 1.0)
    assert math.isclose(found.low, 0.025 ** (1 / 20))
    assert accuracy(np.array([1.0, 0.0, -1.0, -2.0]), ["a"] * 4) == Estimate(0.5, 0.0, 1.0)


def test_an_interval_of_accuracy_covers_the_truth_and_one_that_ignores_prompts_does_not() -> None:
    covered, ignoring, runs, truth = 0, 0, 400, 0.7
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        prompt = np.repeat(range(80), 1 + generator.poisson(2, 80))
        # Prompts differ in how hard they are: their comparisons go right or wrong together.
        probability = generator.beta(4 * truth, 4 * (1 - truth), 80)[prompt]
        found = np.where(generator.random(prompt.size) < probability, 1.0, -1.0)
        clustered = accuracy(found, names(prompt), resamples=200, seed=seed)
        covered += clustered.low <= truth <= clustered.high
        if seed < 100:
            single = accuracy(found, names(range(prompt.size)), resamples=200, seed=seed)
            ignoring += single.low <= truth <= single.high
    assert 0.92 <= covered / runs <= 0.98
    assert ignoring / 100 < 0.91


# --- paired differences ---------------------------------------------------------------------------------------------


def test_prompts_that_differ_are_counted_by_their_sums() -> None:
    values = np.array([[1.0, -1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert differing(values, ["a", "a", "b", "c", "c"]).tolist() == [1, 0]
    assert differing(values[0], ["a", "b", "c", "d", "e"]) == 3


def test_a_difference_that_many_prompts_show_is_as_sharp_as_the_bootstrap() -> None:
    values = np.where(np.random.default_rng(0).random(90) < 0.5, 0.12, -0.08)
    clusters = names(range(90))
    drawn = replicates(values[None], clusters)[:, 0]
    found = difference(values, drawn, clusters)
    assert found == interval(float(values.mean()), drawn, 90)
    # The exact bound for what was never seen would reach further than the data do.
    assert interval(float(values.mean()), drawn, 90, bounds=(-1, 1)).high > found.high


def test_a_difference_that_few_prompts_show_is_not_called_certain() -> None:
    values, clusters = np.zeros(90), names(range(90))
    for few in (0, 1, FEW - 1):
        values[:few] = 1.0
        drawn = replicates(values[None], clusters)[:, 0]
        assert difference(values, drawn, clusters) == interval(float(values.mean()), drawn, 90, bounds=(-1, 1))
    assert difference(np.zeros(90), np.zeros(9), clusters).high == pytest.approx(1 - 0.025 ** (1 / 90))


# --- several rewards into one ---------------------------------------------------------------------------------------

# Members: (0, 3, 6) and so on for each of two texts.
BY_HAND = np.array([[0.0, 1.0], [3.0, 1.0], [6.0, 4.0]])
EXPECTED = {"mean": [3.0, 2.0], "min": [0.0, 1.0], "uwo": [3.0 - 0.5 * 6.0, 2.0 - 0.5 * 2.0], "median": [3.0, 1.0]}
tables = st.integers(1, 4).flatmap(
    lambda count: st.lists(st.lists(numbers, min_size=count, max_size=count), min_size=1, max_size=5)
)


@pytest.mark.parametrize("how", AGGREGATES)
def test_an_aggregate_by_hand(how: str) -> None:
    assert aggregate(BY_HAND, how).tolist() == EXPECTED[how]


def test_the_price_of_disagreement() -> None:
    assert aggregate(BY_HAND, "uwo", k=0).tolist() == EXPECTED["mean"]
    assert aggregate(BY_HAND, "uwo", k=2).tolist() == [3.0 - 2 * 6.0, 2.0 - 2 * 2.0]


@pytest.mark.parametrize("how", AGGREGATES)
@settings(max_examples=40)
@given(table=tables, data=st.data())
def test_every_aggregate_keeps_its_contract(how: str, table: list[list[float]], data: st.DataObject) -> None:
    rewards = np.array(table)
    before = rewards.copy()
    found = aggregate(rewards, how)
    assert found.shape == (rewards.shape[1],)
    np.testing.assert_array_equal(rewards, before)
    order = data.draw(st.permutations(range(len(table))))
    np.testing.assert_allclose(aggregate(rewards[order], how), found, atol=1e-9)
    # Members that agree are not changed; no aggregate is above the best member.
    np.testing.assert_allclose(aggregate(np.repeat(rewards[:1], 3, axis=0), how), rewards[0], atol=1e-9)
    assert (found <= rewards.max(axis=0) + 1e-9).all()


@pytest.mark.parametrize("how", ["mean", "min", "median"])
@settings(max_examples=40)
@given(table=tables, scale=st.integers(1, 8), shift=numbers)
def test_a_new_unit_of_reward_changes_nothing_else(how: str, table: Any, scale: int, shift: float) -> None:
    rewards = np.array(table)
    np.testing.assert_allclose(
        aggregate(scale * rewards + shift, how), scale * aggregate(rewards, how) + shift, atol=1e-9
    )


def test_standardised_members_have_the_same_say() -> None:
    small = np.array([0.0, 1.0, 2.0])
    large = np.array([500.0, 300.0, 400.0])
    rewards = np.stack([small, large])
    # (r - mean) / population standard deviation, by hand: (-1, 0, 1) and (1, -1, 0) times sqrt(3/2).
    unit = math.sqrt(1.5)
    np.testing.assert_allclose(aggregate(rewards, "mean", standardize=True), [0.0, -unit / 2, unit / 2], atol=1e-12)
    np.testing.assert_allclose(aggregate(rewards, "min", standardize=True), [-unit, -unit, 0.0], atol=1e-12)
    assert aggregate(rewards, "mean")[0] == 250.0


def test_a_member_without_spread_cannot_be_standardised() -> None:
    # The standard deviation of three times 0.1 comes out as 1e-17, not as 0.
    rewards = np.array([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1], [5.0, 5.0, 5.0]])
    text = "3 rewards are the same for every text, so that there is no spread to divide by"
    assert refusal(lambda: aggregate(rewards, "mean", standardize=True)) == (
        Finding("rewards[1]", text),
        Finding("rewards[2]", text),
    )
    assert aggregate(rewards, "median").tolist() == [1.0, 2.0, 3.0]


def test_aggregates_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(UsageError, match="no aggregate is called 'max'; there are mean, min, uwo, median"):
        aggregate(BY_HAND, "max")
    for k in (-0.1, NAN, INF):
        with pytest.raises(UsageError, match="expected k, the price of disagreement, from 0 up"):
            aggregate(BY_HAND, "uwo", k=k)
    for rewards in (np.empty((0, 3)), np.zeros(3)):
        with pytest.raises(UsageError, match=r"expected rewards \(members, texts\) of at least one member"):
            aggregate(rewards, "mean")
    (one,) = refusal(lambda: aggregate(np.array([[0.0, 1.0], [INF, 0.0]]), "min"))
    assert one.where == "rewards[1]"


def test_every_row_of_the_table_says_where_it_comes_from() -> None:
    for name, row in AGGREGATES.items():
        assert row.name == name
        assert row.formula
        assert row.source
    assert set(AGGREGATES) == set(EXPECTED)


# --- spread and correlation -----------------------------------------------------------------------------------------


def test_spread_is_the_population_standard_deviation() -> None:
    assert spread(np.array([[1.0, 3.0], [0.0, 10.0]])).tolist() == [1.0, 5.0]
    assert float(spread(np.array([1.0, 3.0]))) == 1.0


@settings(max_examples=50)
@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=12))
def test_correlation_is_pearsons(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    found = correlation(np.array(a), np.array(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(statistics.correlation(a, b), abs=1e-9)


def test_correlation_at_its_ends() -> None:
    a = np.array([0.1, 0.2, 0.3, 0.7])
    assert correlation(a, 3 * a + 1) == pytest.approx(1)
    assert correlation(a, -1e200 * a) == pytest.approx(-1)
    assert correlation(a, 1e-200 * a) == pytest.approx(1)
    assert math.isnan(correlation(a, np.full(4, 0.1)))
    assert math.isnan(correlation(np.empty(0), np.empty(0)))
    with pytest.raises(UsageError, match="expected two rows of the same length"):
        correlation(a, a[:3])
    assert refusal(lambda: correlation(a, np.array([0.0, NAN, 0.0, 0.0])))[0].where == "second"


def test_what_is_finite_comes_back_as_float64() -> None:
    found = finite(np.array([1, 2], dtype=np.int32))
    assert (found.dtype, found.tolist()) == (np.float64, [1.0, 2.0])
