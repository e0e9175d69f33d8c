"""Peaks, collapses and gains at equal KL against values by hand."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy
import pytest
from policy_runs import hacked, straight

from warmerge.rewards.over_optimisation import (
    Curve,
    Run,
    at_kl,
    common_kls,
    default_window,
    moving_mean,
    optimisation,
    peak,
    smoothed,
    with_group,
)


def curve(control: list[float], proxy: list[float] | None = None, kl: list[float] | None = None, **more: Any) -> Curve:
    count = len(control)
    proxy, kl = proxy or [float(i) for i in range(count)], kl or [float(i) for i in range(count)]
    arrays = (numpy.asarray(values, numpy.float64) for values in (control, proxy, kl))
    return Curve(tuple(range(1, count + 1)), *arrays, **{"control_error": 0.0, "proxy_error": 0.0, "raw": ()} | more)


# --- smoothing ---


def test_gains_count_from_the_start_in_its_standard_deviations() -> None:
    found = smoothed(straight((2, 10, 0), (3, 12, 1), (1, 18, 3), std=2.0), 1)
    assert found.steps == (1, 2, 3)
    assert found.control.tolist() == [0, 0.5, -0.5]
    assert found.proxy.tolist() == [0, 1, 4]
    assert found.kl.tolist() == [0, 1, 3]


def test_each_mean_is_whole_and_stands_at_its_middle_step() -> None:
    """Three points in a mean: the first and the last step have none of their own, and the first mean is the start."""
    rows = straight((0, 0, 0), (3, 3, 3), (0, 0, 6), (6, 6, 9), (9, 9, 12), std=2.0)
    found = smoothed(rows, 3)
    assert found.steps == (2, 3, 4)
    assert found.control.tolist() == [0, 1, 2]  # means 1, 3, 5
    assert found.kl.tolist() == [3, 6, 9]
    assert [row["control"] for row in found.raw] == [3, 0, 6]


def test_steps_without_a_control_reward_are_left_out_everywhere() -> None:
    rows = hacked(50, every=10, noise=0.0)
    run = Run("a", "a", 0.1, rows)
    assert [row["step"] for row in run.points] == [1, 10, 20, 30, 40, 50]
    found = smoothed(run.points, 3)
    assert found.steps == (10, 20, 30, 40)
    proxies = [rows[step - 1]["proxy"] for step in (1, 10, 20, 30, 40, 50)]
    expected = [(statistics.mean(proxies[i : i + 3]) - statistics.mean(proxies[:3])) / 4 for i in range(4)]
    assert found.proxy.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_moving_mean_of_everything_is_the_mean() -> None:
    assert moving_mean([1, 2, 6], 3).tolist() == [3]
    assert moving_mean([1, 2, 6], 1).tolist() == [1, 2, 6]


@pytest.mark.parametrize("points", range(2, 200))
def test_the_default_window_is_odd_and_shorter_than_the_run(points: int) -> None:
    window = default_window(points)
    assert window % 2 == 1
    assert window < points


def test_the_error_of_a_gain_is_that_of_the_noise_and_blind_to_a_slope() -> None:
    draw = numpy.random.default_rng(0)
    noise = draw.normal(size=4000)
    rows = [{**straight((0, 0, 0))[0], "step": i + 1, "control": x + 0.01 * i, "control_std": 1.0, "proxy": 0.5 * i}
            for i, x in enumerate(noise)]  # fmt: skip
    found = smoothed(rows, 5)
    assert found.control_error == pytest.approx(math.sqrt(2 / 5), rel=0.05)
    assert found.proxy_error == 0
    assert math.isnan(smoothed(rows[:19], 1).control_error)
    assert 0.7 < smoothed(rows[:20], 1).control_error < 2.8


# --- peak and collapse ---


def test_the_collapse_is_the_first_point_that_lost_more_than_the_margin() -> None:
    found = peak(curve([0, 1, 2, 1.5, 1.0, 0.9, 3 - 2]), 0.5)
    assert (found["step"], found["kl"], found["control_gain"], found["proxy_gain"]) == (3, 2, 2, 2)
    # At step 5 half is lost, which is not more than half.
    assert (found["collapse_step"], found["collapse_control_gain"], found["collapse_kl"]) == (6, 0.9, 5)
    assert found["collapse_proxy_gain"] == 5
    assert found["outcome"] == "over-optimised"


@pytest.mark.parametrize(("margin", "step"), [(0.2, 4), (0.9, 6), (1.0, 7), (1.6, None)])
def test_the_margin_is_a_share_of_the_gain(margin: float, step: int | None) -> None:
    assert peak(curve([0, 1, 2, 1.5, 1.0, 0.1, -1]), margin)["collapse_step"] == step


@pytest.mark.parametrize(
    ("after", "lasting"),
    [([0.9], 4), ([0.9, 0.5], 4), ([0.9, 1.5, 0.9, 0.8], 6), ([0.9, 1.5], None), ([0.9, 1.0], None)],
)
def test_a_loss_lasts_from_where_it_stays_to_the_end(after: list[float], lasting: int | None) -> None:
    found = peak(curve([0, 2, 1.5, *after]), 0.5)
    assert (found["collapse_step"], found["collapse_lasting_step"]) == (4, lasting)


def test_a_gain_that_stays_is_kept() -> None:
    found = peak(curve([0, 1, 2, 2]), 0.5)
    assert (found["outcome"], found["step"], found["collapse_step"], found["collapse_kl"]) == ("kept", 3, None, None)


@pytest.mark.parametrize("control", [[0, -1, -2], [0, 0, 0]])
def test_a_run_that_never_rose_has_no_collapse(control: list[float]) -> None:
    found = peak(curve(control), 0.5)
    assert (found["outcome"], found["step"], found["control_gain"]) == ("never rose", 1, 0)
    assert found["collapse_step"] is None


def test_a_rise_within_three_standard_errors_is_no_rise() -> None:
    control = [0, 0.3, -1]
    assert peak(curve(control, control_error=0.1), 0.5)["outcome"] == "within noise"
    assert peak(curve(control, control_error=0.1), 0.5)["collapse_step"] is None
    assert peak(curve(control, control_error=0.09), 0.5)["collapse_step"] == 3
    assert peak(curve(control, control_error=math.nan), 0.5)["collapse_step"] == 3


def test_without_a_proxy_that_rises_a_collapse_is_no_over_optimisation() -> None:
    control = [0, 2, 0.5, 0.2]
    assert peak(curve(control, [0, 1, 1, 0.9]), 0.5)["outcome"] == "collapsed"
    assert peak(curve(control, [0, 1, 1, 1.3], proxy_error=0.1), 0.5)["outcome"] == "collapsed"
    assert peak(curve(control, [0, 1, 1, 1.4], proxy_error=0.1), 0.5)["outcome"] == "over-optimised"


def test_less_than_the_margin_lost_for_more_proxy_is_declining() -> None:
    assert peak(curve([0, 2, 1.5], [0, 1, 2]), 0.5)["outcome"] == "declining"
    assert peak(curve([0, 2, 1.5], [0, 1, 0.5]), 0.5)["outcome"] == "kept"
    assert peak(curve([0, 2, 1.5], [0, 1, 2], control_error=0.2), 0.5)["outcome"] == "kept"


# --- equal KL ---


def test_at_a_kl_values_are_on_the_line_at_its_first_crossing() -> None:
    own = curve([0, 4, 6, 0], [0, 1, 2, 3], [0, 2, 1, 5])
    assert at_kl(own, 1) == {"step": 1.5, "control_gain": 2, "proxy_gain": 0.5}
    assert at_kl(own, 2) == {"step": 2, "control_gain": 4, "proxy_gain": 1}
    assert at_kl(own, 3) == {"step": 3.5, "control_gain": 3, "proxy_gain": 2.5}


@pytest.mark.parametrize(
    ("reached", "expected"),
    [
        ([4.6, 9.0], [1, 2, 3, 4]),
        ([0.29, 0.5], [0.05, 0.1, 0.15, 0.2, 0.25]),
        ([3.0], [1, 2, 3]),
        ([90.0], [25, 50, 75]),
        ([-0.01, 5.0], []),
    ],
)
def test_kls_are_round_and_within_what_all_reached(reached: list[float], expected: list[float]) -> None:
    curves = [curve([0, 1], kl=[min(0.0, end), end]) for end in reached]
    assert common_kls(curves) == tuple(expected)


def test_kls_below_the_first_mean_of_a_run_are_not_crossed() -> None:
    assert common_kls([curve([0, 1], kl=[0, 4.6]), curve([0, 1], kl=[2.5, 9])]) == (3, 4)
    assert common_kls([curve([0, 1], kl=[0, 2]), curve([0, 1], kl=[3, 9])]) == ()


# --- tables ---


def by_hand() -> dict[str, list[Run]]:
    one = straight((0, 0, 0), (2, 2, 1), (4, 4, 2), (0, 8, 4))
    two = straight((0, 0, 0), (4, 2, 2), (6, 4, 4), (4, 6, 6))
    return {"warm": [Run("a", "warm", 0.1, one), Run("b", "warm", 0.1, two)]}


def test_a_group_is_the_mean_of_its_runs_at_equal_steps_in_both_coordinates() -> None:
    found = optimisation(by_hand(), 1, 0.5)
    rows = [row for row in found.rows if row["run"] is None]
    assert [(row["step"], row["kl"], row["control_gain"]) for row in rows] == [
        (1, 0, 0),
        (2, 1.5, 1.5),
        (3, 3, 2.5),
        (4, 5, 1),
    ]
    assert (rows[2]["control_gain_low"], rows[2]["control_gain_high"], rows[2]["runs"]) == (2, 3, 2)
    raw = [(row["control_raw"], row["proxy_raw"], row["kl_raw"]) for row in found.rows if row["run"] == "a"]
    assert raw == [(0, 0, 0), (2, 2, 1), (4, 4, 2), (0, 8, 4)]


def test_a_group_says_of_how_many_runs_its_collapse_is() -> None:
    group = optimisation(by_hand(), 1, 0.5).peaks[-1]
    assert (group["run"], group["runs"], group["outcome"]) == (None, 2, "1 over-optimised, 1 declining")
    assert (group["step"], group["step_low"], group["step_high"]) == (3, 3, 3)
    assert (group["control_gain"], group["control_gain_sd"]) == (2.5, pytest.approx(math.sqrt(0.5)))
    assert (group["collapse_step"], group["collapse_step_runs"], group["collapse_step_sd"]) == (4, 1, None)
    assert (group["proxy"], group["kl_coef"]) == ("warm", 0.1)


def test_equal_kl_has_every_run_and_the_group() -> None:
    found = [row for row in optimisation(by_hand(), 1, 0.5).equal_kl if row["at_kl"] == 3]
    assert [(row["run"], row["control_gain"], row["step"]) for row in found] == [
        ("a", 1, 3.5),
        ("b", 2.5, 2.5),
        (None, 1.75, 3),
    ]
    assert found[-1]["control_gain_sd"] == pytest.approx(1.5 / math.sqrt(2))


def test_ends_are_the_last_means_beside_the_first() -> None:
    rows = hacked(9, noise=0.0)
    own = optimisation({"warm": [Run("a", "warm", 0.1, rows)]}, 3, 0.5).ends[0]
    assert own["step"] == 9
    assert own["length"] == pytest.approx(rows[7]["length"])
    assert own["length_start"] == pytest.approx(rows[1]["length"])
    mean = statistics.mean(row["control"] for row in rows[6:]) - statistics.mean(row["control"] for row in rows[:3])
    assert own["control_gain"] == pytest.approx(mean / 2)


def test_runs_of_different_lengths_share_the_steps_that_both_have() -> None:
    long, short = hacked(20, every=5), hacked(12, every=5, seed=1)
    runs = [Run("a", "x", 0.1, long), Run("b", "x", 0.1, short)]
    rows = optimisation({"x": runs}, 1, 0.5).rows
    assert [row["step"] for row in rows if row["run"] == "b"] == [1, 5, 10, 12]
    assert [row["step"] for row in rows if row["run"] is None] == [1, 5, 10]


def test_one_run_has_no_spread() -> None:
    (_, group) = with_group([{"group": "g", "run": "a", "runs": 1, "gain": 2.0}])
    assert group == {
        "group": "g", "run": None, "runs": 1, "gain": 2.0, "gain_low": 2.0, "gain_high": 2.0, "gain_sd": None
    }  # fmt: skip


def test_the_peak_of_a_noisy_run_is_found_near_the_true_one() -> None:
    runs = [Run(str(seed), "x", 0.1, hacked(seed=seed, top=60)) for seed in range(8)]
    (*own, group) = optimisation({"x": runs}, default_window(140), 0.5).peaks
    assert abs(group["step"] - 60) < 10
    assert {row["outcome"] for row in own} == {"over-optimised"}
    # Half of the gain is lost where t (2 - t) is half of its largest: a step of about 60 (1 + 1 / sqrt(2)).
    assert abs(group["collapse_step"] - 60 * (1 + math.sqrt(0.5))) < 5
