"""The barrier against simulated paths of which the truth is known; the verdict word by word."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from warmerge.errors import RefusedError, UsageError
from warmerge.rewards.barriers import barrier, verdict, verdict_words
from warmerge.rewards.metrics import FEW, Estimate, replicates

Array = NDArray[np.float64]
NAN, INF = math.nan, math.inf


def names(prompts: Any) -> list[str]:
    return [str(prompt) for prompt in prompts]


# --- the barrier ----------------------------------------------------------------------------------------------------


def path_gaps(seed: int, prompts: int, disagreement: float) -> tuple[Array, list[str]]:
    """Diag - WA at 9 inner points, comparison by comparison: 11 equally good models, so that every true gap is 0."""
    generator = np.random.default_rng(seed)
    prompt = np.repeat(range(prompts), 1 + generator.poisson(1, prompts))
    probability = generator.beta(2.8, 1.2, prompts)[prompt]
    shared = generator.random(prompt.size) < probability
    own = generator.random((11, prompt.size)) < probability
    correct = np.where(generator.random((11, prompt.size)) < disagreement, own, shared).astype(np.float64)
    lam = np.linspace(0, 1, 11)[1:-1, None]
    return (1 - lam) * correct[:1] + lam * correct[-1:] - correct[1:-1], names(prompt)


def test_where_there_is_no_barrier_one_is_found_seldom_and_by_the_naive_bootstrap_mostly() -> None:
    found, naive, runs = 0, 0, 250
    for seed in range(runs):
        gaps, clusters = path_gaps(seed, prompts=100, disagreement=0.15)
        drawn = replicates(gaps, clusters, resamples=300, seed=seed)
        found += barrier(gaps.mean(axis=1), drawn, clusters=100).low > 0
        naive += np.quantile(drawn.max(axis=1), 0.025) > 0
    assert found / runs <= 0.07
    # That is why it is not used.
    assert naive / runs > 0.4


def test_a_barrier_that_is_there_lies_within_the_bounds() -> None:
    covered, seen, runs, prompts = 0, 0, 100, 200
    truth = np.array([0.0, 0.1, 0.2, 0.1, 0.0])
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        gaps = (generator.random((5, prompts)) < truth[:, None] + 0.1) * 1.0 - (generator.random((5, prompts)) < 0.1)
        drawn = replicates(gaps, names(range(prompts)), resamples=300, seed=seed)
        found = barrier(gaps.mean(axis=1), drawn, clusters=prompts)
        covered += found.low <= 0.2 <= found.high
        seen += found.low > 0
    assert covered / runs >= 0.95
    assert seen / runs > 0.95


def test_a_rare_fall_that_few_prompts_show_is_not_ruled_out() -> None:
    missed, blind, runs, prompts, truth = 0, 0, 200, 100, 0.02
    for seed in range(runs):
        gaps = np.zeros((3, prompts))
        gaps[1] = np.random.default_rng(seed).random(prompts) < truth
        drawn = replicates(gaps, names(range(prompts)), resamples=100, seed=seed)
        missed += barrier(gaps.mean(axis=1), drawn, clusters=prompts).high < truth
        blind += barrier(gaps.mean(axis=1), drawn).high < truth
    assert missed / runs <= 0.025
    assert blind / runs > 0.08


def test_the_bounds_are_the_formulas() -> None:
    generator = np.random.default_rng(0)
    gaps, drawn = np.array([0.01, 0.03, -0.2]), generator.normal([0.01, 0.03, -0.2], [0.01, 0.02, 0.5], (500, 3))
    # In words of plain Python, point by point.
    se = [statistics.pstdev(drawn[:, i]) for i in range(3)]
    worst = sorted(max(abs(row[i] - gaps[i]) / se[i] for i in range(3)) for row in drawn.tolist())
    for alpha in (0.05, 0.5):
        q = float(np.quantile(worst, 1 - alpha))
        found = barrier(gaps, drawn, alpha=alpha)
        assert found.value == 0.03
        assert math.isclose(found.low, max(g - q * s for g, s in zip(gaps, se, strict=True)), rel_tol=1e-9)
        assert math.isclose(found.high, max(g + q * s for g, s in zip(gaps, se, strict=True)), rel_tol=1e-9)
    # The upper bound comes from the point that is known worst, not from the largest gap.
    assert barrier(gaps, drawn).high > 0.5


def test_points_without_spread_count_as_exact_and_do_not_widen_the_others() -> None:
    generator = np.random.default_rng(0)
    drawn = generator.normal(0.01, 0.02, (500, 1))
    alone = barrier(np.array([0.01]), drawn)
    # Rounding is no spread: standardised it would be as large as any deviation.
    noise = np.where(generator.random(500) < 0.01, np.nextafter(-0.2, 0), -0.2)
    assert barrier(np.array([0.01, -0.2]), np.column_stack([drawn, noise])) == alone
    exact = barrier(np.array([0.01, 0.9]), np.column_stack([drawn, np.full(500, 0.9)]))
    assert exact == Estimate(0.9, 0.9, 0.9)
    assert barrier(np.zeros(2), np.zeros((9, 2))) == Estimate(0.0, 0.0, 0.0)


@pytest.mark.parametrize("prompts", [1, 5, 1000])
def test_prompts_on_which_nothing_differs_do_not_prove_that_nothing_ever_does(prompts: int) -> None:
    found = barrier(np.zeros(2), np.zeros((9, 2)), clusters=prompts)
    half = 1 - 0.025 ** (1 / prompts)
    assert found.value == 0.0
    assert (found.low, found.high) == pytest.approx((-half, half))
    assert verdict(found, 0.01) == ("holds" if prompts == 1000 else "cannot tell")


def test_points_at_which_many_prompts_differ_are_trusted() -> None:
    generator = np.random.default_rng(0)
    gaps, drawn = np.array([0.01, 0.0]), np.column_stack([generator.normal(0.01, 0.001, 500), np.zeros(500)])
    trusted = barrier(gaps[:1], drawn[:, :1], clusters=20, differing=[FEW])
    assert trusted == barrier(gaps[:1], drawn[:, :1])
    half = 1 - 0.025 ** (1 / 20)
    assert barrier(gaps[:1], drawn[:, :1], clusters=20, differing=[FEW - 1]).high == pytest.approx(0.01 + half)
    both = barrier(gaps, drawn, clusters=20, differing=[FEW, 0])
    assert both.high == pytest.approx(half)
    assert both.low == pytest.approx(trusted.low)


def test_a_barrier_of_nothing_is_refused() -> None:
    for gaps, drawn in [(np.empty(0), np.empty((9, 0))), (np.zeros(2), np.zeros((9, 3))), (np.zeros(2), np.zeros(2))]:
        with pytest.raises(UsageError, match=r"expected \(L,\) gaps and \(B, L\) replicates, found"):
            barrier(gaps, drawn)
    with pytest.raises(RefusedError, match="gaps: 1 of 2 are not finite"):
        barrier(np.array([0.0, NAN]), np.zeros((9, 2)))


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.02, 0.005, "holds"),
        (0.003, 0.01, "holds"),  # surely a fall, but none that counts
        (0.003, 0.0101, "cannot tell"),
        (-0.5, 0.5, "cannot tell"),
        (0.01, 0.3, "cannot tell"),
        (0.0101, 0.3, "does not hold"),
        (-INF, INF, "cannot tell"),
        (NAN, NAN, "cannot tell"),
    ],
)
def test_the_verdict(low: float, high: float, expected: str) -> None:
    assert verdict(Estimate(0.004, low, high), 0.01) == expected


@pytest.mark.parametrize("tolerance", [-0.01, 5, NAN])
def test_a_tolerance_is_a_fraction(tolerance: float) -> None:
    words = rf"expected a tolerance from 0 to 1 \(0.01 is one point of accuracy\), found {tolerance}"
    with pytest.raises(UsageError, match=words):
        verdict(Estimate(0, 0, 0), tolerance)
    with pytest.raises(UsageError, match=words):
        verdict_words("a to b", "val", Estimate(0, 0, 0), tolerance, 9)


WORDS = [
    (
        Estimate(0.123, 0.098, 0.149),
        "does not hold on val: on the way from a to b the average falls up to 12.3 points below the straight line"
        " between their accuracies (95 % interval 9.8 to 14.9, n = 1314 comparisons). A model merged on this path can"
        " be worse than its parts are on average: do not merge them.",
    ),
    (
        Estimate(0.004, -0.001, 0.008),
        "holds on val: on the way from a to b the average is never more than 0.4 points below the straight line between"
        " their accuracies (95 % interval -0.1 to 0.8, n = 1314 comparisons), within the tolerance of 1 point.",
    ),
    (
        Estimate(-0.004, -0.012, 0.008),
        "holds on val: on the way from a to b the average is nowhere below the straight line between their accuracies"
        " (largest fall -0.4 points, 95 % interval -1.2 to 0.8, n = 1314 comparisons; less than 0 is a gain),"
        " within the tolerance of 1 point.",
    ),
    (
        # 1314 * ((2.2 - 0.4) / (1 - 0.4))^2 = 11826
        Estimate(0.004, -0.012, 0.022),
        "cannot tell on val: on the way from a to b the average may fall between -1.2 and 2.2 points below the straight"
        " line between their accuracies (measured 0.4, 95 % interval, n = 1314 comparisons), on both sides of the"
        " tolerance of 1 point. More comparisons are needed: if it stays at that, roughly 12000.",
    ),
]


@pytest.mark.parametrize(("found", "words"), WORDS)
def test_the_verdict_in_words(found: Estimate, words: str) -> None:
    assert verdict_words("a to b", "val", found, 0.01, 1314) == words
    assert words.startswith(verdict(found, 0.01))


@pytest.mark.parametrize(
    ("found", "end"),
    [
        # Above the tolerance it is the lower end that has to move: 100 * ((3 - 0) / (3 - 1))^2 = 225
        (Estimate(0.03, 0.0, 0.05), "if it stays at that, roughly 230."),
        (Estimate(0.0099, -0.02, 0.03), "It is so close to the tolerance that more comparisons will hardly decide it."),
        (Estimate(0.0, -0.116, 0.116), "if it stays at that, roughly 14000."),
        (Estimate(0.01, -0.02, 0.03), "It is so close to the tolerance that more comparisons will hardly decide it."),
        (Estimate(0.0, -INF, INF), "More comparisons are needed."),
    ],
)
def test_how_many_comparisons_would_decide(found: Estimate, end: str) -> None:
    assert verdict_words("a to b", "val", found, 0.01, 100).endswith(end)


def test_rounding_does_not_contradict_the_verdict() -> None:
    words = verdict_words("a to b", "val", Estimate(0.004, 0.001, 0.01004), 0.01, 1)
    assert "between 0.100 and 1.004 points" in words
    assert "n = 1 comparison)" in words
    assert "the tolerance of 0.5 points" in verdict_words("a to b", "val", Estimate(0, 0, 0.001), 0.005, 2)
    assert "-0.0" not in verdict_words("a to b", "val", Estimate(-0.00001, -0.00002, 0.001), 0.005, 2)


def test_names_from_outside_cannot_write_to_the_terminal() -> None:
    words = verdict_words("a\x1b[31m to b", "val\n", Estimate(0, 0, 0), 0.01, 9)
    assert words.isprintable()
