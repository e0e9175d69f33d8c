"""The figure of optimised policies shows the rows: curves against steps and KL, a KL sweep, win rates."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from policy_runs import hacked, rising, wins

from warmerge.errors import UsageError
from warmerge.report.canvas import BLUE, GREEN, VERMILLION
from warmerge.report.optimisation import draw_optimisation, optimisation_figure
from warmerge.report.results import RL, redraw, write_results
from warmerge.rewards.over_optimisation import Optimisation, Run, optimisation

GAIN = "gain (std of the start's answers)"


def tables(names: tuple[str, ...] = ("rm-0", "warm"), seeds: int = 2, steps: int = 40, smooth: int = 3) -> Optimisation:
    groups = {
        name: [Run(f"{name}-{s}", name, 0.1, hacked(steps, seed=10 * k + s, top=12 + 3 * k)) for s in range(seeds)]
        for k, name in enumerate(names)
    }
    return optimisation(groups, smooth, 0.5)


def sweep(coefficients: tuple[float, ...] = (0.0, 0.01, 0.2), proxies: tuple[str, ...] = ("warm",)) -> Optimisation:
    groups = {
        f"{proxy}, KL {kl:g}": [
            Run(f"{proxy}-{kl}-{s}", proxy, kl, hacked(40, seed=s, top=12 + 20 * kl, height=1 + k)) for s in range(2)
        ]
        for k, proxy in enumerate(proxies)
        for kl in coefficients
    }
    return optimisation(groups, 3, 0.5)


def draw(found: Optimisation, own: Any = ()) -> Figure:
    return draw_optimisation(found.rows, found.peaks, own)


def of(rows: Any, group: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["group"] == group and row["run"] is None]


def curves(panel: Any) -> list[list[tuple[float, float]]]:
    """The lines of a panel, without the zero line and the marks."""
    return [[tuple(point) for point in line.get_xydata().tolist()] for line in panel.lines if len(line.get_xdata()) > 2]


def marks(panel: Any, marker: str) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0].tolist()) for line in panel.lines if line.get_marker() == marker]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def titles(figure: Figure) -> list[str]:
    return [panel.get_title() for panel in figure.axes]


@pytest.mark.parametrize(("index", "key"), [(0, "step"), (1, "kl")])
def test_each_group_has_a_control_and_a_proxy_line_in_its_colour(index: int, key: str) -> None:
    found = tables()
    panel = draw(found).axes[index]
    expected = [
        [(row[key], row[gain]) for row in of(found.rows, name)]
        for name in ("rm-0", "warm")
        for gain in ("control_gain", "proxy_gain")
    ]
    assert curves(panel) == expected
    lines = [line for line in panel.lines if len(line.get_xdata()) > 2]
    assert [line.get_color() for line in lines] == [BLUE, BLUE, VERMILLION, VERMILLION]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    bands = [to_hex(band.get_facecolor()[0]) for band in panel.collections]
    assert bands == [colour.lower() for colour in (BLUE, BLUE, VERMILLION, VERMILLION)]
    box = panel.collections[0].get_paths()[0].get_extents()
    own = of(found.rows, "rm-0")
    assert (box.y0, box.y1) == (min(r["control_gain_low"] for r in own), max(r["control_gain_high"] for r in own))
    assert panel.get_ylabel() == GAIN


def test_each_runs_own_peak_and_collapse_are_marked() -> None:
    found = tables()
    figure = draw(found)
    own = [row for row in found.peaks if row["run"] is not None]
    assert all(row["collapse_step"] is not None for row in own)
    for panel, key in zip(figure.axes, ("step", "kl"), strict=True):
        assert marks(panel, "o") == [(row[key], row["control_gain"]) for row in own]
        assert marks(panel, "X") == [(row[f"collapse_{key}"], row["collapse_control_gain"]) for row in own]


def test_the_legend_says_what_there_is_and_nothing_else() -> None:
    assert legend(draw(tables())) == [
        "rm-0 (2 runs)", "warm (2 runs)", "control reward (means of 3 steps)", "proxy reward",
        "lowest to highest run; line: mean", "highest control of a run", "collapse of a run",
    ]  # fmt: skip
    kept = optimisation({"warm": [Run("a", "warm", 0.1, rising(30))]}, 1, 0.5)
    figure = draw(kept)
    assert legend(figure) == ["warm (1 run)", "control reward", "proxy reward", "highest control of a run"]
    assert [len(panel.collections) for panel in figure.axes] == [0, 0]
    falling = [{**row, "control": -row["step"]} for row in hacked(9)]
    fell = optimisation({"warm": [Run("a", "warm", 0.1, falling)]}, 1, 0.5)
    assert legend(draw(fell)) == ["warm (1 run)", "control reward", "proxy reward"]


def test_there_are_only_the_panels_that_have_something() -> None:
    assert titles(draw(tables())) == ["against steps", "against KL"]
    with_wins = draw(tables(), wins()["rows"])
    assert titles(with_wins) == ["against steps", "against KL", "win rate against sft (n = 192)"]
    assert titles(draw(sweep())) == ["against steps", "against KL", "largest control gain"]
    assert len(draw(sweep(), wins()["rows"]).axes) == 4


def test_a_sweep_has_the_groups_peaks_by_coefficient_zero_included() -> None:
    found = sweep()
    figure = draw(found)
    panel = figure.axes[2]
    peaks = [row for row in found.peaks if row["run"] is None]
    assert curves(panel) == [[(row["kl_coef"], row["control_gain"]) for row in peaks]]
    points = [(line.get_color(), line.get_ydata()[0]) for line in panel.lines if len(line.get_xdata()) == 1]
    assert points == [(c, r["control_gain"]) for c, r in zip((BLUE, VERMILLION, GREEN), peaks, strict=True)]
    bars = [bar.get_segments()[0].tolist() for bar in panel.collections]
    assert bars == [
        [[row["kl_coef"], row["control_gain_low"]], [row["kl_coef"], row["control_gain_high"]]] for row in peaks
    ]
    figure.draw_without_rendering()
    labels = panel.get_xticklabels()
    assert [label.get_text() for label in labels] == ["0", "0.01", "0.2"]
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    assert "warm by KL coefficient" not in legend(figure)
    both = draw(sweep((0.05, 0.1), ("rm", "warm")))
    assert legend(both)[-2:] == ["rm by KL coefficient", "warm by KL coefficient"]


def test_win_rates_by_step_are_in_the_colours_of_their_groups() -> None:
    rows = wins((20, 60, 100), ("warm", "rm-0", "other"))["rows"]
    figure = draw(tables(), rows)
    panel = figure.axes[2]
    assert curves(panel) == [
        [(row["step"], row["win"]) for row in rows if row["proxy"] == name] for name in ("warm", "rm-0", "other")
    ]
    lines = [line for line in panel.lines if len(line.get_xdata()) > 2]
    assert [line.get_color() for line in lines] == [VERMILLION, BLUE, GREEN]
    bars = [bar.get_segments()[0].tolist() for bar in panel.collections]
    assert bars == [[[row["step"], row["low"]], [row["step"], row["high"]]] for row in rows]
    (half,) = [line for line in panel.lines if list(line.get_ydata()) == [0.5, 0.5]]
    assert half.get_linestyle() == "--"
    low, high = panel.get_ylim()
    assert low < min(0.5, *(row["low"] for row in rows))
    assert high > max(row["high"] for row in rows)
    left, right = panel.get_xlim()
    assert left < 20 < 100 < right
    assert legend(figure)[-1] == "other: wins"
    assert "warm: wins" not in legend(figure)


def test_win_rates_of_several_seeds_have_a_line_through_their_means() -> None:
    rows = wins((20, 60, 100), ("warm",))["rows"]
    again = [{**row, "win": row["win"] - 0.02, "low": row["low"] - 0.02, "file": "b"} for row in rows]
    panel = draw(tables(), rows + again).axes[2]
    ((*found,),) = curves(panel)
    assert found == [(row["step"], pytest.approx(row["win"] - 0.01)) for row in rows]
    assert len(marks(panel, "o")) == 6


def test_win_rates_against_several_have_a_line_style_each() -> None:
    rows = wins((20, 60, 100), ("warm",))["rows"]
    figure = draw(tables(), rows + [{**row, "against": "best"} for row in rows])
    assert titles(figure)[2] == "win rate (n = 192)"
    lines = [line.get_linestyle() for line in figure.axes[2].lines if len(line.get_xdata()) > 2]
    assert lines == ["-", "--"]
    assert legend(figure)[-2:] == ["wins against sft", "wins against best"]


def test_win_rates_without_a_step_stand_below_one_another() -> None:
    rows = [{**row, "step": None} for row in wins((20,), ("a", "b"))["rows"]]
    rows.append({**rows[0], "policy": "unjudged", "win": None, "low": None, "high": None, "n": 0})
    panel = draw(tables(), rows).axes[2]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a/step-20", "b/step-20", "unjudged"]
    points = [line.get_xydata()[0].tolist() for line in panel.lines if line.get_marker() == "o"]
    assert points[:2] == [[rows[0]["win"], 0], [rows[1]["win"], 1]]
    assert panel.get_title() == "win rate against sft (n = 0 to 192)"


def test_many_groups_have_different_colours() -> None:
    figure = draw(tables(tuple(f"m{i}" for i in range(12)), seeds=1, steps=9, smooth=1))
    colours = [
        line.get_color() for line in figure.axes[0].lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 2
    ]
    assert len(set(colours)) == 12


def test_long_names_stay_different_and_nothing_is_cut_off() -> None:
    names = tuple(f"{'a-very-long-name/' * 6}run-{i}/$final_1$" for i in range(3))
    figure = draw(tables(names, seeds=1, steps=9, smooth=1), wins((3, 9), names)["rows"])
    assert legend(figure)[:3] == [f"...name/a-very-long-name/run-{i}/$final_1$ (1 run)" for i in range(3)]
    figure.draw_without_rendering()
    box, edges = figure.legends[0].get_window_extent(), figure.bbox
    assert box.x0 >= 0
    assert box.x1 <= edges.x1
    below = min(panel.get_tightbbox().y0 for panel in figure.axes)
    assert box.y1 <= below


def test_a_figure_is_drawn_again_to_the_byte(tmp_path: Path) -> None:
    found = tables()
    content = {"rows": found.rows, "peaks": found.peaks, "ends": found.ends, "equal_kl": found.equal_kl}
    written = write_results(tmp_path, RL, {**content, "wins": wins()["rows"]})
    assert [path.name for path in written] == [
        "rl-report.json", "rl-report.csv", "rl-report-peaks.csv", "rl-report-equal_kl.csv", "rl-report-ends.csv",
        "rl-report-wins.csv", "rl-report.png", "rl-report.svg",
    ]  # fmt: skip
    pictures = [tmp_path / "rl-report.png", tmp_path / "rl-report.svg"]
    before = [path.read_bytes() for path in pictures]
    for path in pictures:
        path.unlink()
    assert redraw(tmp_path) == pictures
    assert [path.read_bytes() for path in pictures] == before
    rows = json.loads((tmp_path / "rl-report.json").read_text())["rows"]
    assert len(rows) == len(found.rows)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("rows", {"step": None}, "expected a number for 'step' in each row"),
        ("rows", {"group": ""}, "expected 'group' in each row"),
        ("rows", {"control_gain": "much"}, "expected a number for 'control_gain', found 'much'"),
        ("rows", {"control_gain_low": 99.0}, "expected control_gain_low <= control_gain_high"),
        ("peaks", {"kl_coef": None}, "expected a number for 'kl_coef' in each row"),
        ("wins", {"win": 60}, "expected a fraction from 0 to 1 for 'win'"),
    ],
)
def test_rows_that_cannot_be_right_are_refused(
    tmp_path: Path, table: str, change: dict[str, Any], message: str
) -> None:
    found = tables(seeds=2, steps=9, smooth=1)
    own = {"rows": list(found.rows), "peaks": list(found.peaks), "wins": wins()["rows"]}
    own[table] = [{**row, **change} if not row.get("run") else row for row in own[table]]
    with pytest.raises(UsageError) as caught:
        optimisation_figure(own["rows"], own["peaks"], own["wins"], tmp_path / "x")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected rows to draw, found none"):
        optimisation_figure([], [], [], tmp_path / "x")
