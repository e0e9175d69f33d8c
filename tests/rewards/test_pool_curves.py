"""Curves over a pool: against all subsets by hand, against laws whose truth is known, and what must not matter."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from warmerge.errors import RefusedError, UsageError
from warmerge.rewards import metrics
from warmerge.rewards.best_of_n import grid, kl_bound, rank_weights
from warmerge.rewards.pool_curves import Chooser, PoolCurves, pool_curves, tie_orders

Array = NDArray[np.float64]
Ragged = list[Array]
Row = Mapping[str, Any]
INF = math.inf


def names(count: int) -> list[str]:
    return [f"p{i:04d}" for i in range(count)]


def normal(generator: np.random.Generator, sizes: Sequence[int]) -> Ragged:
    return [generator.normal(size=size) for size in sizes]


def rm(name: str, rewards: Ragged) -> Chooser:
    return Chooser(name, "rm", rewards)


def oracle(gold: Ragged) -> Chooser:
    return Chooser("oracle", "baseline", gold)


def at_random(sizes: Sequence[int]) -> Chooser:
    return Chooser("random", "baseline", [np.zeros(size) for size in sizes], believes=False)


def curve(found: PoolCurves, proxy: str, column: str) -> list[Any]:
    """A column of a proxy's rows, from n = 1 up."""
    return [row[column] for row in found.rows if row["proxy"] == proxy]


def only(rows: Sequence[Row], **wanted: Any) -> Row:
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def interval(row: Row, name: str = "") -> tuple[float, float]:
    prefix = f"{name}_" if name else ""
    return row[f"{prefix}low"], row[f"{prefix}high"]


def alike(rows: Sequence[Row], others: Sequence[Row], tolerance: float = 1e-12) -> None:
    """Equal, but for rounding."""
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            assert value == (other[key] if isinstance(value, str) else pytest.approx(other[key], abs=tolerance)), key


def without_random(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "random" not in (row["a"], row["b"])]


def all_alike(found: PoolCurves, expected: PoolCurves) -> None:
    """The same tables. Ties are broken by where prompts and candidates stand, so random's wins are left out."""
    for table in ("rows", "differences", "peaks", "fits"):
        alike(getattr(found, table), getattr(expected, table))
    alike(without_random(found.wins), without_random(expected.wins))


# --- by hand ----------------------------------------------------------------------------------------------------------


def slowly(rewards: Array, values: Array, n: int) -> float:
    """What the choice among n is worth, over all subsets; of tied candidates, on average."""
    found = []
    for subset in itertools.combinations(range(len(rewards)), n):
        best = max(rewards[i] for i in subset)
        found.append(np.mean([values[i] for i in subset if rewards[i] == best]))
    return float(np.mean(found))


def beaten(values: Array) -> Array:
    """For each candidate, how often it beats one at random: itself is a tie, which is half a win."""
    return np.array([np.mean([(x > y) + 0.5 * (x == y) for y in values]) for x in values])


def wins_slowly(a: Array, b: Array, values: Array, order: Sequence[int], n: int) -> float:
    found = []
    for subset in itertools.combinations(range(len(a)), n):
        x, y = (values[next(i for i in order if i in subset and r[i] == max(r[j] for j in subset))] for r in (a, b))
        found.append((x > y) + 0.5 * (x == y))
    return float(np.mean(found))


@pytest.fixture(scope="module")
def small() -> tuple[list[Chooser], dict[str, Ragged], list[str], PoolCurves]:
    """Five rows of four prompts with 4 to 6 candidates, ties everywhere, up to n = 4."""
    generator = np.random.default_rng(1)
    sizes = [4, 6, 5, 4, 6]
    few = [generator.integers(0, 3, size).astype(float) for size in sizes]
    gold = [generator.integers(-2, 3, size).astype(float) for size in sizes]
    targets = {"gold": gold, "control": normal(generator, sizes)}
    choosers = [rm("a", few), Chooser("b", "warm", normal(generator, sizes)), at_random(sizes), oracle(gold)]
    clusters = ["one", "two", "three", "two", "four"]
    return choosers, targets, clusters, pool_curves(choosers, targets, clusters, 4, resamples=50, seed=3)


def test_every_value_of_the_rows_is_that_over_all_subsets(small: Any) -> None:
    choosers, targets, _, found = small
    assert [(row["proxy"], row["n"]) for row in found.rows] == [(c.name, n) for c in choosers for n in (1, 2, 3, 4)]
    gold = targets["gold"]
    for chooser in choosers:
        spread = np.concatenate(chooser.rewards).std()
        own = [np.mean([slowly(r, r, n) for r in chooser.rewards]) for n in (1, 2, 3, 4)]
        for n in (1, 2, 3, 4):
            row = only(found.rows, proxy=chooser.name, n=n)
            for target, worth in targets.items():
                expected = np.mean([slowly(r, v, n) for r, v in zip(chooser.rewards, worth, strict=True)])
                assert row[target] == pytest.approx(expected, abs=1e-12)
            won = np.mean([slowly(r, beaten(v), n) for r, v in zip(chooser.rewards, gold, strict=True)])
            assert row["win"] == pytest.approx(won, abs=1e-12)
            best = np.mean([slowly(v, v, n) for v in gold])
            assert row["regret"] == pytest.approx(best - row["gold"], abs=1e-12)
            assert (row["prompts"], row["kind"], row["kl_bound"]) == (4, chooser.kind, kl_bound(n))
            if chooser.believes:
                assert row["reward"] == pytest.approx(own[n - 1], abs=1e-12)
                assert row["gain"] == pytest.approx((own[n - 1] - own[0]) / spread, abs=1e-12)
            else:
                assert not {"reward", "gain"} & row.keys()


def test_every_win_rate_is_that_over_all_subsets_and_each_pair_stands_once(small: Any) -> None:
    choosers, targets, _, found = small
    orders = tie_orders([len(row) for row in targets["gold"]], 3)
    pairs = list(itertools.combinations(choosers, 2))
    assert [(row["a"], row["b"], row["n"]) for row in found.wins] == [
        (a.name, b.name, n) for a, b in pairs for n in (1, 2, 3, 4)
    ]
    for a, b in pairs:
        for n in (1, 2, 3, 4):
            parts = zip(a.rewards, b.rewards, targets["gold"], orders, strict=True)
            expected = np.mean([wins_slowly(*part[:3], part[3].tolist(), n) for part in parts])
            row = only(found.wins, a=a.name, b=b.name, n=n)
            assert row["win"] == pytest.approx(expected, abs=1e-12)
            assert row["target"] == "gold"
            assert 0 <= row["low"] <= row["win"] <= row["high"] <= 1


def test_every_difference_is_that_of_the_rows_to_the_first_proxy(small: Any) -> None:
    *_, found = small
    assert len(found.differences) == 3 * 2 * 4
    for row in found.differences:
        (own, first) = (only(found.rows, proxy=name, n=row["n"]) for name in (row["proxy"], "a"))
        assert row["difference"] == pytest.approx(own[row["target"]] - first[row["target"]], abs=1e-14)
        assert row["to"] == "a"
    assert {row["proxy"] for row in found.differences} == {"b", "random", "oracle"}


def test_the_curve_starts_at_the_pools_mean_and_ends_at_the_choice_among_all() -> None:
    generator = np.random.default_rng(2)
    gold, own = (normal(generator, [6] * 8) for _ in range(2))
    found = pool_curves([rm("a", own), oracle(gold)], {"gold": gold}, names(8), 6, resamples=20)
    assert curve(found, "a", "gold")[0] == pytest.approx(np.mean([row.mean() for row in gold]), abs=1e-14)
    chosen = [g[o.argmax()] for g, o in zip(gold, own, strict=True)]
    assert curve(found, "a", "gold")[-1] == pytest.approx(np.mean(chosen), abs=1e-14)
    assert curve(found, "a", "reward")[-1] == pytest.approx(np.mean([row.max() for row in own]), abs=1e-14)
    won = [beaten(g)[o.argmax()] for g, o in zip(gold, own, strict=True)]
    assert curve(found, "a", "win")[-1] == pytest.approx(np.mean(won), abs=1e-14)


# --- proxies that are told apart only by what they choose -------------------------------------------------------------


def test_identical_proxies_differ_by_exactly_nothing_also_in_their_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products round equal rows differently, which ones depends on the machine; here all do. Without care an
    interval of 1e-16 would lie beside a 0."""
    exact = metrics.replicates

    def rounded(values: Array, *rest: Any) -> Array:
        return exact(values, *rest) * (1 + 1e-16 * np.arange(len(values)))

    monkeypatch.setattr(metrics, "replicates", rounded)
    generator = np.random.default_rng(3)
    sizes = [6] * 100
    gold = normal(generator, sizes)
    own = [g + noise for g, noise in zip(gold, normal(generator, sizes), strict=True)]
    twins = [rm(f"twin {i}", [row.copy() for row in own]) for i in range(4)]
    same = [oracle(gold), rm("gold again", [row.copy() for row in gold])]
    found = pool_curves([*twins, *same], {"gold": gold, "control": own}, names(100), 6, resamples=100)
    for row in found.differences:
        if row["proxy"].startswith("twin"):
            assert (row["difference"], *interval(row)) == (0.0, 0.0, 0.0)
    for row in found.rows:
        if row["proxy"] in ("oracle", "gold again"):
            assert (row["regret"], *interval(row, "regret")) == (0.0, 0.0, 0.0)
    for row in found.wins:
        if row["a"][:4] == row["b"][:4]:
            assert row["win"] == 0.5
            assert row["low"] <= 0.5 <= row["high"] + 1e-12


def test_one_candidate_leaves_no_choice_so_that_all_proxies_are_exactly_alike() -> None:
    generator = np.random.default_rng(4)
    sizes = [5, 7, 9, 11] * 10
    targets = {"gold": normal(generator, sizes), "control": normal(generator, sizes)}
    choosers = [rm(f"{i}", normal(generator, sizes)) for i in range(4)] + [oracle(targets["gold"])]
    found = pool_curves(choosers, targets, names(40), 5, resamples=100)
    for row in (row for row in found.differences if row["n"] == 1):
        assert (row["difference"], *interval(row)) == (0.0, 0.0, 0.0)
    for row in (row for row in found.rows if row["n"] == 1):
        assert (row["win"], *interval(row, "win")) == (0.5, 0.5, 0.5)
        assert (row["regret"], *interval(row, "regret")) == (0.0, 0.0, 0.0)
        assert (row["gain"], *interval(row, "gain")) == (0.0, 0.0, 0.0)
    assert all((row["win"], *interval(row)) == (0.5, 0.5, 0.5) for row in found.wins if row["n"] == 1)


def test_differences_are_paired_so_that_hard_prompts_do_not_blur_them() -> None:
    generator = np.random.default_rng(5)
    sizes = [6] * 60
    within = normal(generator, sizes)
    gold = [row + 100 * generator.normal() for row in within]
    choosers = [rm("poor", normal(generator, sizes)), rm("good", within)]
    found = pool_curves(choosers, {"gold": gold}, names(60), 6, resamples=400)
    row, own = only(found.differences, proxy="good", n=6), only(found.rows, proxy="good", n=6)
    low, high = interval(row)
    assert 0.5 < low < row["difference"] < high < 2.5  # the better one is above the first
    assert own["gold_high"] - own["gold_low"] > 30 * (high - low)


def test_win_rates_of_the_two_sides_are_complementary_with_their_intervals() -> None:
    generator = np.random.default_rng(6)
    sizes = [5, 6, 8] * 10
    gold = normal(generator, sizes)
    a, b = (rm(name, normal(generator, sizes)) for name in "ab")
    ours = pool_curves([a, b], {"gold": gold}, names(30), 5, resamples=100, seed=1).wins
    theirs = pool_curves([b, a], {"gold": gold}, names(30), 5, resamples=100, seed=1).wins
    assert [(row["a"], row["b"]) for row in theirs] == [("b", "a")] * 5
    for row, other in zip(ours, theirs, strict=True):
        assert row["win"] == pytest.approx(1 - other["win"], abs=1e-14)
        assert interval(row) == pytest.approx((1 - other["high"], 1 - other["low"]), abs=1e-12)
    assert any(row["low"] < row["high"] for row in ours)


def test_the_first_target_judges_who_wins() -> None:
    generator = np.random.default_rng(7)
    sizes = [5] * 20
    gold = normal(generator, sizes)
    choosers = [rm("a", gold), rm("b", [-row for row in gold])]
    targets = {"control": [-row for row in gold], "gold": gold}
    found = pool_curves(choosers, targets, names(20), 5, resamples=50)
    assert {row["target"] for row in found.wins} == {"control"}
    assert only(found.wins, n=5)["win"] == 0.0
    assert curve(found, "a", "win")[-1] == pytest.approx(0.1)
    swapped = pool_curves(choosers, dict(reversed(targets.items())), names(20), 5, resamples=50)
    assert only(swapped.wins, n=5)["win"] == 1.0
    assert curve(swapped, "a", "win")[-1] == pytest.approx(0.9)


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, -7e5])
def test_a_constant_reward_is_a_random_choice_and_a_flat_line(value: float) -> None:
    """A constant's standard deviation may come out as 1e-17, its curve with ripples of 1e-17: neither is a finding."""
    generator = np.random.default_rng(8)
    sizes = [7] * 30
    gold = normal(generator, sizes)
    flat = rm("flat", [np.full(7, value) for _ in sizes])
    found = pool_curves([at_random(sizes), flat, oracle(gold)], {"gold": gold}, names(30), 7, resamples=100)
    for one, other in zip(*([r for r in found.rows if r["proxy"] == name] for name in ("random", "flat")), strict=True):
        assert [one[key] for key in ("gold", "gold_low", "gold_high", "win")] == [
            other[key] for key in ("gold", "gold_low", "gold_high", "win")
        ]
        assert (one["win"], one["win_low"], one["win_high"]) == (0.5, 0.5, 0.5)
        assert other["win_low"] <= 0.5 <= other["win_high"]
        assert one["gold"] == pytest.approx(np.mean(gold), abs=1e-12)
        assert "gain" not in other
        assert other["reward"] == pytest.approx(value)
    for row in (row for row in found.differences if row["proxy"] == "flat"):
        assert (row["difference"], *interval(row)) == (0.0, 0.0, 0.0)
    assert {row["proxy"] for row in found.peaks} == {row["proxy"] for row in found.fits} == {"flat", "oracle"}
    peak = only(found.peaks, proxy="flat")
    assert (peak["peak_n"], peak["peak_low"], peak["peak_high"]) == (1, 1, 1)
    assert (peak["fall"], *interval(peak, "fall")) == pytest.approx((0, 0, 0), abs=1e-12)


def test_regret_is_measured_only_where_there_is_an_oracle() -> None:
    generator = np.random.default_rng(9)
    values = normal(generator, [4] * 5)
    own = rm("a", normal(generator, [4] * 5))
    without = pool_curves([own], {"gold": values}, names(5), 4, resamples=20)
    assert not any("regret" in row for row in without.rows)
    no_gold = pool_curves([own, oracle(values)], {"control": values}, names(5), 4, resamples=20)
    assert curve(no_gold, "oracle", "regret") == [0.0] * 4
    assert curve(no_gold, "a", "regret")[-1] > 0
    both = pool_curves([own, oracle(values)], {"control": own.rewards, "gold": values}, names(5), 4, resamples=20)
    assert curve(both, "oracle", "regret") == [0.0] * 4
    # By gold, also where another target is the first.
    assert curve(both, "a", "regret")[-1] == pytest.approx(
        np.mean([v.max() - v[o.argmax()] for v, o in zip(values, own.rewards, strict=True)]), abs=1e-14
    )


def test_without_targets_only_what_proxies_believe_is_known() -> None:
    generator = np.random.default_rng(10)
    own = normal(generator, [8] * 6)
    found = pool_curves([rm("a", own), Chooser("b", "ensemble", own), at_random([8] * 6)], {}, names(6), 8, 50)
    told = {"proxy", "kind", "n", "kl_bound", "prompts"}
    measured = {f"{name}{end}" for name in ("reward", "gain") for end in ("", "_low", "_high")}
    for row in found.rows:
        assert set(row) == (told if row["proxy"] == "random" else told | measured)
    assert found.differences == found.wins == found.peaks == found.fits == ()


def test_names_and_kinds_are_kept_whatever_they_are() -> None:
    generator = np.random.default_rng(11)
    gold = normal(generator, [8] * 6)
    choosers = [
        Chooser(name, kind, normal(generator, [8] * 6))
        for name, kind in (("length", "rm"), ("reward", "warm"), ("win", "ensemble"), ("", "x"))
    ]
    found = pool_curves([*choosers, oracle(gold)], {"gold": gold}, names(6), 8, resamples=20)
    expected = [("length", "rm"), ("reward", "warm"), ("win", "ensemble"), ("", "x"), ("oracle", "baseline")]
    for table in (found.rows, found.peaks, found.fits):
        assert list(dict.fromkeys((row["proxy"], row["kind"]) for row in table)) == expected
    assert {row["to"] for row in found.differences} == {"length"}


def test_the_gain_is_in_standard_deviations_whatever_the_scale_of_the_reward() -> None:
    generator = np.random.default_rng(12)
    own = normal(generator, [6] * 9)
    choosers = [rm("a", own), rm("b", [1e6 * row - 5e7 for row in own]), rm("c", [1e-9 * row for row in own])]
    found = pool_curves(choosers, {}, names(9), 6, resamples=50)
    for other in ("b", "c"):
        for column in ("gain", "gain_low", "gain_high"):
            assert curve(found, other, column) == pytest.approx(curve(found, "a", column), rel=1e-6, abs=1e-6)
    expected = np.mean([row.max() - row.mean() for row in own]) / np.concatenate(own).std()
    assert curve(found, "a", "gain")[-1] == pytest.approx(expected)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Gold is normal, a proxy is gold and as much noise: E gold(2) = m / sqrt 2, where m = 1 / sqrt pi is the mean of
    the larger of two normals. Two such proxies are equal in truth, and each wins half of the time.

    The bootstrap of 30 prompts covers a little less than 95 %; 200 data sets show that with an error of 1.7 points.
    """
    generator = np.random.default_rng(13)
    hits = dict.fromkeys(("gold", "difference", "win"), 0)
    sets, sizes = 200, [3] * 30
    for seed in range(sets):
        gold = normal(generator, sizes)
        noisy = [[g + noise for g, noise in zip(gold, normal(generator, sizes), strict=True)] for _ in "ab"]
        found = pool_curves([rm("a", noisy[0]), rm("b", noisy[1])], {"gold": gold}, names(30), 2, 100, seed)
        for name, (low, high), true in (
            ("gold", interval(only(found.rows, proxy="a", n=2), "gold"), 1 / math.sqrt(2 * math.pi)),
            ("difference", interval(only(found.differences, n=2)), 0.0),
            ("win", interval(only(found.wins, n=2)), 0.5),
        ):
            hits[name] += low <= true <= high
    for name, count in hits.items():
        assert 0.87 <= count / sets <= 0.985, (name, count)


def test_rows_of_one_prompt_are_drawn_together() -> None:
    generator = np.random.default_rng(14)
    sizes = [6] * 40
    gold, own = (normal(generator, sizes) for _ in range(2))
    once = pool_curves([rm("a", own), at_random(sizes)], {"gold": gold}, names(40), 6, resamples=300)
    choosers, targets = [rm("a", own * 2), at_random(sizes * 2)], {"gold": gold * 2}
    together = pool_curves(choosers, targets, names(40) * 2, 6, resamples=300)
    apart = pool_curves(choosers, targets, names(80), 6, resamples=300)
    # Saying everything twice adds nothing...
    all_alike(together, once)
    assert {row["prompts"] for row in together.rows} == {40}
    # ... but would seem to, were it taken for news.
    for table, column in (("rows", "gold"), ("rows", "win"), ("differences", "")):
        rows = (only(getattr(found, table), proxy="random" if not column else "a", n=6) for found in (together, apart))
        wide, narrow = (high - low for low, high in (interval(row, column) for row in rows))
        assert 1.2 < wide / narrow < 1.65  # sqrt 2


def test_one_prompt_says_nothing_about_others() -> None:
    generator = np.random.default_rng(15)
    gold = normal(generator, [16, 16])
    choosers = [rm("a", normal(generator, [16, 16])), oracle(gold)]
    found = pool_curves(choosers, {"gold": gold}, ["same", "same"], 16, resamples=50)
    assert {row["prompts"] for row in found.rows} == {1}
    for row in found.rows:
        for column in ("reward", "gain", "gold", "regret"):
            assert interval(row, column) == (-INF, INF)
        assert interval(row, "win") == ((0.5, 0.5) if row["n"] == 1 else (0.0, 1.0))
    assert all(interval(row) == (-INF, INF) for row in found.differences)
    assert all(interval(row) == ((0.5, 0.5) if row["n"] == 1 else (0.0, 1.0)) for row in found.wins)
    for row in found.peaks:
        assert interval(row, "peak") == (1, 16)  # anywhere
        assert interval(row, "fall") == (-INF, INF)
    assert all(interval(row, name) == (-INF, INF) for row in found.fits for name in ("alpha", "beta"))
    assert len(found.fits) == 2


def test_a_win_on_every_one_of_few_prompts_is_not_a_win_on_every_prompt() -> None:
    gold = normal(np.random.default_rng(16), [4] * 5)
    choosers = [rm("right", gold), rm("wrong", [-row for row in gold])]
    row = only(pool_curves(choosers, {"gold": gold}, names(5), 4, resamples=100).wins, n=4)
    assert (row["win"], row["high"]) == (1.0, 1.0)
    assert row["low"] == pytest.approx(0.025 ** (1 / 5))


def test_where_many_prompts_differ_the_bootstrap_alone_says_how_sure_a_win_is() -> None:
    generator = np.random.default_rng(30)
    gold = normal(generator, [12] * 200)
    choosers = [rm("right", gold), rm("blind", normal(generator, [12] * 200))]
    found = pool_curves(choosers, {"gold": gold}, names(200), 2, resamples=200)
    for row, column in ((only(found.wins, n=2), ""), (only(found.rows, proxy="blind", n=2), "win")):
        low, high = interval(row, column)
        assert low <= row["win"] <= high
        # The bound for what was never seen would reach down by 1.8 % of the value.
        assert row["win"] - low < 0.015 * row["win"]


# --- peaks ------------------------------------------------------------------------------------------------------------


def made(generator: np.random.Generator, by_rank: Array, prompts: int, noise: float) -> tuple[Ragged, Ragged]:
    """A proxy's rewards, and gold that depends on their rank, from the smallest, and noise."""
    proxy = normal(generator, [len(by_rank)] * prompts)
    gold = [by_rank[row.argsort().argsort()] + noise * generator.normal(size=len(by_rank)) for row in proxy]
    return proxy, gold


def test_a_proxy_that_is_followed_too_far_peaks_where_gold_turns() -> None:
    # Gold grows with the proxy up to its twelfth of sixteen candidates, then falls.
    by_rank = np.minimum(np.arange(16.0), 22 - np.arange(16.0))
    weights = [[math.comb(i, n - 1) / math.comb(16, n) for i in range(16)] for n in grid(16)]
    exact = np.array(weights) @ by_rank
    assert grid(16)[exact.argmax()] == 4
    proxy, gold = made(np.random.default_rng(17), by_rank, 60, noise=1.0)
    choosers = [rm("followed", proxy), at_random([16] * 60), oracle(gold)]
    found = pool_curves(choosers, {"gold": gold}, names(60), 16, resamples=300)
    assert [row["proxy"] for row in found.peaks] == ["followed", "oracle"]
    row = only(found.peaks, proxy="followed")
    assert row["peak_n"] == 4
    assert 3 <= row["peak_low"] <= 4 <= row["peak_high"] <= 6
    worth = dict(zip(grid(16), curve(found, "followed", "gold"), strict=True))
    assert row["at_peak"] == worth[4] == max(worth.values())
    assert row["fall"] == pytest.approx(worth[4] - worth[16], abs=1e-14)
    assert 0 < row["fall_low"] < exact.max() - exact[-1] < row["fall_high"]
    assert (row["target"], row["kind"]) == ("gold", "rm")
    # What it believes of itself only rises.
    assert np.all(np.diff(curve(found, "followed", "reward")) > 0)


def test_a_curve_that_only_rises_peaks_at_its_end_and_has_not_fallen() -> None:
    proxy, gold = made(np.random.default_rng(18), np.arange(16.0), 30, noise=0.1)
    found = pool_curves([rm("a", proxy), rm("down", [-r for r in proxy])], {"gold": gold}, names(30), 16, 100)
    row, down = (only(found.peaks, proxy=name) for name in ("a", "down"))
    assert (row["peak_n"], row["peak_low"], row["peak_high"]) == (16, 16, 16)
    assert (row["fall"], row["fall_low"], row["fall_high"]) == (0.0, 0.0, 0.0)
    assert (down["peak_n"], down["peak_low"], down["peak_high"]) == (1, 1, 1)
    assert 5 < down["fall_low"] < down["fall"] < down["fall_high"] < 8


def test_where_prompts_do_not_agree_on_the_peak_its_interval_is_wide() -> None:
    generator = np.random.default_rng(19)
    proxy, gold = (normal(generator, [16] * 12) for _ in range(2))
    (row,) = pool_curves([rm("blind", proxy)], {"gold": gold}, names(12), 16, resamples=300).peaks
    assert (row["peak_low"], row["peak_high"]) == (1, 16)
    # The fall is that from the n that was found: in other draws the curve is no lower at the end.
    assert row["fall_low"] < -0.05 < 0 <= row["fall"]


# --- fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(3.0, 1.2), (1.0, 0.0), (-2.0, -0.5)])
def test_gold_that_follows_the_law_is_fitted_by_it(alpha: float, beta: float) -> None:
    d = np.sqrt([kl_bound(n) for n in grid(16)])
    by_rank = np.linalg.pinv(rank_weights(16, grid(16))) @ (5.0 + d * (alpha - beta * d))
    proxy, gold = made(np.random.default_rng(20), by_rank, 40, noise=0.0)
    choosers = [rm("a", proxy), at_random([16] * 40)]
    (row,) = pool_curves(choosers, {"gold": gold}, names(40), 16, resamples=50).fits
    assert (row["alpha"], row["beta"], row["rms"]) == pytest.approx((alpha, beta, 0), abs=1e-9)
    assert (row["proxy"], row["target"], row["points"]) == ("a", "gold", 7)
    # With noise the interval holds it, and is as wide as the noise makes it.
    proxy, gold = made(np.random.default_rng(21), by_rank, 200, noise=1.0)
    (row,) = pool_curves([rm("a", proxy)], {"gold": gold}, names(200), 16, resamples=300).fits
    for name, true in (("alpha", alpha), ("beta", beta)):
        low, high = interval(row, name)
        assert low < true < high
        assert 0.05 < high - low < 1.5
    assert 0 < row["rms"] < 0.2


def test_the_law_is_fitted_where_five_sizes_or_more_say_how_it_bends() -> None:
    generator = np.random.default_rng(22)
    gold, own = (normal(generator, [8] * 10) for _ in range(2))
    for n, points in ((6, None), (7, 5), (8, 5)):
        fits = pool_curves([rm("a", own)], {"gold": gold, "control": own}, names(10), n, resamples=20).fits
        assert [(row["target"], row["points"]) for row in fits] == (
            [("gold", points), ("control", points)] if points else []
        )


# --- what must not matter ---------------------------------------------------------------------------------------------

Change = Callable[[Ragged], Ragged]


def world(change: Change = lambda rows: rows, clusters: Sequence[str] | None = None, seed: int = 4) -> PoolCurves:
    """Two rms, the oracle and a random choice on 24 prompts, with all arrays changed alike."""
    generator = np.random.default_rng(23)
    sizes = [8, 9, 12] * 8
    gold, control, a, b = (normal(generator, sizes) for _ in range(4))
    choosers = [rm("a", change(a)), rm("b", change(b)), oracle(change(gold))]
    choosers.append(Chooser("random", "baseline", change([np.zeros(size) for size in sizes]), believes=False))
    targets = {"gold": change(gold), "control": change(control)}
    return pool_curves(choosers, targets, clusters or names(24), 8, resamples=100, seed=seed)


def test_the_order_of_prompts_does_not_matter() -> None:
    order = np.random.default_rng(24).permutation(24)
    moved = world(lambda rows: [rows[i] for i in order], [names(24)[i] for i in order])
    all_alike(moved, world())


def test_the_order_of_candidates_does_not_matter() -> None:
    generator = np.random.default_rng(25)
    orders = [generator.permutation(size) for size in [8, 9, 12] * 8]
    all_alike(world(lambda rows: [row[order] for row, order in zip(rows, orders, strict=True)]), world())


def test_only_the_order_of_a_proxys_rewards_decides_what_its_choices_are_worth() -> None:
    generator = np.random.default_rng(26)
    sizes = [8] * 20
    gold, own = (normal(generator, sizes) for _ in range(2))
    same = ["kind", "n", "prompts", *(f"{name}{end}" for name in ("gold", "win") for end in ("", "_low", "_high"))]
    plain = pool_curves([rm("a", own), oracle(gold)], {"gold": gold}, names(20), 8, resamples=50)
    for mapped in (np.exp, lambda r: 1e9 * r - 3, np.arctan, lambda r: r**3):
        found = pool_curves([rm("a", [mapped(r) for r in own]), oracle(gold)], {"gold": gold}, names(20), 8, 50)
        for row, other in zip(found.rows, plain.rows, strict=True):
            assert {key: row[key] for key in same} == {key: other[key] for key in same}
        assert (found.differences, found.wins, found.peaks, found.fits) == (
            plain.differences, plain.wins, plain.peaks, plain.fits,
        )  # fmt: skip
        assert curve(found, "a", "reward")[3] != curve(plain, "a", "reward")[3]


def test_a_seed_gives_the_same_numbers_and_another_one_moves_intervals_only() -> None:
    first, again, other = world(), world(), world(seed=5)
    assert first == again
    assert first != other
    for row, moved in zip(first.rows, other.rows, strict=True):
        values = [key for key in row if not key.endswith(("_low", "_high"))]
        assert {key: row[key] for key in values} == {key: moved[key] for key in values}
    assert curve(first, "a", "gold_low") != curve(other, "a", "gold_low")


def test_more_proxies_and_targets_do_not_move_the_numbers_of_the_first() -> None:
    generator = np.random.default_rng(27)
    sizes = [6] * 30
    gold, own, more = (normal(generator, sizes) for _ in range(3))
    alone = pool_curves([rm("a", own)], {"gold": gold}, names(30), 6, resamples=100)
    beside = pool_curves([rm("b", more), rm("a", own)], {"gold": gold, "control": more}, names(30), 6, resamples=100)
    for row in alone.rows:
        found = only(beside.rows, proxy="a", n=row["n"])
        assert {key: found[key] for key in row} == pytest.approx(dict(row), abs=1e-14)


def test_ties_are_broken_in_an_order_of_each_prompts_own() -> None:
    orders = tie_orders([50, 50, 3, 1], seed=1)
    assert [sorted(order.tolist()) for order in orders] == [list(range(size)) for size in (50, 50, 3, 1)]
    assert orders[0].tolist() not in (orders[1].tolist(), list(range(50)))
    assert [order.tolist() for order in tie_orders([50, 50], seed=1)] == [order.tolist() for order in orders[:2]]
    assert orders[0].tolist() != tie_orders([50], seed=2)[0].tolist()


# --- what cannot be measured ------------------------------------------------------------------------------------------


def test_an_n_that_a_prompt_has_no_candidates_for_is_refused() -> None:
    rows = normal(np.random.default_rng(28), [8, 5, 8])
    with pytest.raises(
        UsageError, match=re.escape("expected every n to be from 1 to 5, the number of candidates, found 6, 8")
    ):
        pool_curves([rm("a", rows)], {"gold": rows}, names(3), 8)
    assert pool_curves([rm("a", rows)], {"gold": rows}, names(3), 5, resamples=10).rows[-1]["n"] == 5
    with pytest.raises(UsageError, match="best-of-n needs an n of at least 1, found 0"):
        pool_curves([rm("a", rows)], {}, names(3), 0)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_values_that_are_no_numbers_are_refused_not_averaged(bad: float) -> None:
    rows = normal(np.random.default_rng(29), [4, 4])
    broken = [rows[0], np.array([1.0, bad, 2.0, 3.0])]
    for choosers, targets in (([rm("a", broken)], {"gold": rows}), ([rm("a", rows)], {"gold": broken})):
        with pytest.raises(RefusedError, match=f"1 of 4 are not finite; the first is {bad} at index 1"):
            pool_curves(choosers, targets, names(2), 4)
