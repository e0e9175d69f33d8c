"""The figures of best-of-N show the rows: rewards of the best of n, what the proxies believe, and who wins."""

from __future__ import annotations

import json
import math
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from warmerge.errors import UsageError
from warmerge.report import best_of_n_figure, canvas
from warmerge.report.best_of_n import draw_rewards, draw_wins
from warmerge.report.canvas import BLUE, GREEN, GREY, PURPLE, VERMILLION
from warmerge.report.results import BON, redraw, write_results

Row = dict[str, Any]
NINE = (
    ("runs/1", "rm"), ("runs/2", "rm"), ("runs/3", "rm"), ("mean", "ensemble"), ("min", "ensemble"), ("warm", "warm"),
    ("length", "baseline"), ("random", "baseline"), ("oracle", "baseline"),
)  # fmt: skip
GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PROMPTS = 60


@cache
def world() -> dict[str, Any]:
    """Gold, control and proxy rewards (PROMPTS, 64). Each reward model has exploits of its own: gold peaks, then falls.

    An ensemble halves what an exploit pays, the average of weights shares hardly any.
    """
    draw = np.random.default_rng(7)
    gold = draw.normal(size=(PROMPTS, 64))
    hacks = [draw.random(gold.shape) < 0.05 for _ in range(3)]
    gold = gold - 1.5 * sum(hack.astype(float) for hack in hacks)
    singles = [gold + 0.8 * draw.normal(size=gold.shape) + 5 * hack for hack in hacks]
    mean = sum(singles) / 3
    found = {f"runs/{k + 1}": single for k, single in enumerate(singles)}
    found |= {"mean": mean, "min": np.minimum.reduce(singles), "warm": mean - 1.2 * sum(hacks)}
    found |= {"length": 0.2 * gold + draw.normal(size=gold.shape), "random": draw.normal(size=gold.shape)}
    found |= {"oracle": gold, "gold": gold, "control": 2 + 0.7 * gold + 0.4 * draw.normal(size=gold.shape)}
    return found


def best_of(rewards: Any, values: Any, n: int) -> Any:
    """The value of the best of each n candidates in a row, (PROMPTS, 64 // n)."""
    shape = (PROMPTS, 64 // n, n)
    blocks, chosen = values[:, : 64 // n * n].reshape(shape), rewards[:, : 64 // n * n].reshape(shape).argmax(2)
    return np.take_along_axis(blocks, chosen[..., None], 2)[..., 0]


def measured(key: str, values: Any) -> Row:
    """A mean over the prompts with its 95 % interval."""
    by_prompt = values.mean(1)
    mean, error = float(by_prompt.mean()), float(1.96 * by_prompt.std() / math.sqrt(PROMPTS))
    return {key: mean, f"{key}_low": mean - error, f"{key}_high": mean + error}


@cache
def tables(
    proxies: tuple[tuple[str, str], ...] = NINE,
    targets: tuple[str, ...] = ("gold", "control"),
    grid: tuple[int, ...] = GRID,
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """`rows` and `wins` as in bon.json. Copy a row to change it."""
    own, rows, wins = world(), [], []
    for name, kind in proxies:
        for n in grid:
            scores = own.get(name, own["runs/1"])
            row = {"proxy": name, "kind": kind, "n": n, "kl_bound": math.log(n) - (n - 1) / n, "prompts": PROMPTS}
            gain = (best_of(scores, scores, n) - scores.mean()) / scores.std()
            row |= measured("reward", best_of(scores, scores, n)) | measured("gain", gain)
            for target in targets:
                row |= measured(target, best_of(scores, own[target], n))
            if targets:
                ranks = own[targets[0]].argsort(1).argsort(1) / 64 + 1 / 128
                row |= measured("win", best_of(scores, ranks, n))
            rows.append(row)
    for (a, _), (b, _) in combinations(proxies, 2):
        for n in grid:
            for target in targets[:1]:
                one, other = (best_of(own.get(name, own["runs/1"]), own[target], n) for name in (a, b))
                win = measured("win", (one > other) + 0.5 * (one == other))
                wins.append({"a": a, "b": b, "n": n, "target": target, "win": win["win"], "low": win["win_low"],
                             "high": win["win_high"]})  # fmt: skip
    return tuple(rows), tuple(wins)


def changed(rows: tuple[Row, ...], **more: Any) -> list[Row]:
    return [{**row, **more} for row in rows]


def of(rows: tuple[Row, ...], proxy: str) -> list[Row]:
    return [row for row in rows if row["proxy"] == proxy]


def lines(panel: Any) -> list[Any]:
    """The lines of a panel, without the rings."""
    return [line for line in panel.lines if line.get_markersize() != 9]


def rings(panel: Any) -> list[tuple[float, float]]:
    return [tuple(line.get_xydata()[0]) for line in panel.lines if line.get_markersize() == 9]


def points(line: Any) -> list[tuple[float, float]]:
    return [(x, y) for x, y in line.get_xydata().tolist()]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bars(figure: Figure) -> list[tuple[float, float]]:
    """Middle and length of each bar."""
    return [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in figure.axes[0].patches]


def wins_figure(rows: Any, wins: Any) -> Figure:
    figure = draw_wins(rows, wins)
    assert figure is not None
    return figure


# ---- rewards against n


def test_each_target_has_its_panel_and_each_proxy_its_line() -> None:
    rows, _ = tables()
    figure = draw_rewards(rows)
    assert [panel.get_title() for panel in figure.axes] == [
        "gold reward of the proxy's choice\n60 prompts",
        "control reward of the proxy's choice\n60 prompts",
        "what the proxy believes: its own reward,\nin std above the pool's mean",
    ]
    assert [panel.get_ylabel() for panel in figure.axes] == [
        "mean gold reward", "mean control reward", "gain (std of the proxy's reward)"
    ]  # fmt: skip
    for panel, key in zip(figure.axes, ("gold", "control", "gain"), strict=True):
        assert [points(line) for line in lines(panel)] == [
            [(row["n"], row[key]) for row in of(rows, name)] for name, _ in NINE
        ]
        for band, (name, _) in zip(panel.collections, NINE, strict=True):
            box = band.get_paths()[0].get_extents()
            own = of(rows, name)
            assert (box.y0, box.y1) == (min(r[f"{key}_low"] for r in own), max(r[f"{key}_high"] for r in own))
        assert panel.get_xscale() == "log"


def test_a_ring_where_a_target_line_is_highest_and_baselines_in_the_background() -> None:
    rows, _ = tables()
    gold, _, gain = draw_rewards(rows).axes
    tops = [max(of(rows, name), key=lambda row: row["gold"]) for name, kind in NINE if kind != "baseline"]
    assert rings(gold) == [(row["n"], row["gold"]) for row in tops]
    assert {row["n"] for row in tops[:3]} == {6}  # the toy is over-optimised
    assert rings(gain) == []
    bands = {name: band.get_alpha() for (name, _), band in zip(NINE, gold.collections, strict=True)}
    assert bands["oracle"] == bands["random"] == bands["warm"] / 2 == bands["runs/1"] / 2


def test_n_below_and_the_bound_on_the_kl_above() -> None:
    rows, _ = tables(NINE[:1], ("gold",))
    figure = draw_rewards(rows)
    panel = figure.axes[0]
    assert list(panel.get_xticks()) == list(GRID)
    shown = [label.get_text() for label in panel.get_xticklabels()]
    assert shown == ["1", "2", "", "4", "", "8", "", "16", "", "32", "", "64"]
    assert panel.get_xlabel() == "n candidates to choose from"
    (above,) = panel.child_axes
    assert above.get_xlabel() == "upper bound on KL to the policy: log n - (n-1)/n (nats)"
    figure.draw_without_rendering()
    at = dict(zip(above.get_xticks(), (label.get_text() for label in above.get_xticklabels()), strict=True))
    assert at == {64: "3.2", 32: "2.5", 16: "1.8", 8: "1.2", 4: "0.6", 2: "0.2", 1: "0.0"}
    assert above.xaxis.get_scale() != "linear"
    assert above.get_xlim() == panel.get_xlim()


@pytest.mark.parametrize(
    ("grid", "numbers"),
    [
        ((*(2**k for k in range(10)), 768, 1000), ["1", "4", "16", "64", "256", "1000"]),
        ((1, 2, 4, 8, 16, 32, 64, 65), ["1", "2", "4", "8", "16", "32", "65"]),
        ((1, 2, 4, 8, 16, 32, 64, 96), ["1", "2", "4", "8", "16", "32", "64", "96"]),
    ],
)
def test_numbers_of_many_n_do_not_run_into_each_other(grid: tuple[int, ...], numbers: list[str]) -> None:
    (row,) = tables(NINE[:1], ("gold",), (1,))[0]
    rows = [{**row, "n": n, "kl_bound": math.log(n) - (n - 1) / n} for n in grid]
    figure = draw_rewards(rows)
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert [label.get_text() for label in labels] == numbers
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.x1 + 5 < b.x0 for a, b in pairwise(boxes))


def test_kinds_and_baselines_have_their_looks() -> None:
    rows, _ = tables()
    figure = draw_rewards(rows)
    by_name = dict(zip((name for name, _ in NINE), lines(figure.axes[0]), strict=True))
    colors = {name: line.get_color() for name, line in by_name.items()}
    assert colors["warm"] == BLUE
    assert colors["mean"] == VERMILLION
    assert (colors["length"], colors["random"], colors["oracle"]) == (PURPLE, GREY, GREEN)
    assert by_name["warm"].get_linestyle() == "-"
    assert by_name["warm"].get_linewidth() == max(line.get_linewidth() for line in by_name.values())
    assert by_name["mean"].get_linestyle() == "--"
    assert by_name["random"].get_linestyle() == ":"
    assert legend(figure) == [
        "runs/1 (one reward model)", "runs/2 (one reward model)", "runs/3 (one reward model)", "mean (ensemble)",
        "min (ensemble)", "warm (weights averaged)", "length (baseline)", "random (baseline)", "oracle (baseline)",
        "95 % interval", "largest value of a line",
    ]  # fmt: skip


def test_a_name_that_says_its_kind_does_not_say_it_twice() -> None:
    rows, _ = tables((("ensemble (mean)", "ensemble"), ("x", "ensemble")), (), (1, 2))
    assert legend(draw_rewards(rows))[:2] == ["ensemble (mean)", "x (ensemble)"]


def test_a_model_called_oracle_is_drawn_as_a_model() -> None:
    rows, _ = tables((("oracle", "rm"),), ("gold",), (1, 2))
    assert lines(draw_rewards(rows).axes[0])[0].get_color() == GREY


@pytest.mark.parametrize(
    ("kind", "count"), [("rm", 21), ("ensemble", 30), ("warm", 30), ("baseline", 6), ("something new", 6)]
)
def test_many_of_a_kind_stay_distinguishable(kind: str, count: int) -> None:
    rows, _ = tables(tuple((f"p{k}", kind) for k in range(count)), (), (1, 2))
    found = lines(draw_rewards(rows).axes[0])
    assert len({(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in found}) == count


def test_what_was_not_measured_is_not_drawn() -> None:
    rows, _ = tables(NINE[:2], ("gold",))
    table = changed(rows, control=None)
    table[1] |= {"gold": None, "gold_low": None, "gold_high": None}
    table[2] |= {"gold_low": math.nan}
    table[len(GRID) :] = [{**row, "gain": None, "gain_low": None, "gain_high": None} for row in table[len(GRID) :]]
    gold, gain = draw_rewards(table).axes  # no panel for a control reward that no row has
    assert [n for n, _ in points(lines(gold)[0])] == [1, *GRID[2:]]
    assert len(lines(gain)) == len(gain.collections) == 1
    nothing = draw_rewards(changed(rows, gain=None)).axes[1]
    assert [text.get_text() for text in nothing.texts] == ["not measured"]


def test_one_n_alone_is_seen() -> None:
    rows, wins = tables(NINE, ("gold",), (1,))
    figure = draw_rewards(rows)
    for panel in figure.axes:
        assert [line.get_marker() == "" for line in lines(panel)] == [False] * 9
        assert panel.get_xlim()[0] < 1 < panel.get_xlim()[1]
    segments = [tuple(part.get_segments()[0][:, 1]) for part in figure.axes[0].collections]
    assert segments == [(row["gold_low"], row["gold_high"]) for row in rows]
    figure.draw_without_rendering()
    assert wins_figure(rows, wins).get_suptitle() == "best of 1, 60 prompts"


# ---- win rates


def test_a_bar_for_each_proxy_at_the_largest_n() -> None:
    rows, wins = tables()
    figure = wins_figure(rows, wins)
    panel = figure.axes[0]
    last = [row for row in rows if row["n"] == 64]
    assert figure.get_suptitle() == "best of 64, 60 prompts"
    assert panel.get_title() == "against one random candidate\njudged by gold"
    assert bars(figure) == [(pytest.approx(y), row["win"]) for y, row in enumerate(last)]
    assert [label.get_text() for label in panel.get_yticklabels()] == [name for name, _ in NINE]
    assert panel.get_ylim() == (8.5, -0.5)  # the first row is the topmost
    assert [part.get_segments()[0].tolist() for part in panel.collections] == [
        [[row["win_low"], y], [row["win_high"], y]] for y, row in enumerate(last)
    ]
    assert [text.get_text() for text in panel.texts] == [f"{100 * row['win']:.1f}" for row in last]
    assert [list(line.get_xdata()) for line in panel.lines] == [[0.5, 0.5]]
    assert to_hex(panel.patches[5].get_facecolor()).upper() == BLUE


def test_the_matrix_says_how_often_the_row_beats_the_column() -> None:
    rows, wins = tables(NINE[:3])
    last = {(win["a"], win["b"]): win for win in wins if win["n"] == 64}
    chosen = {("runs/1", "runs/2"): (0.3, 0.2, 0.4), ("runs/1", "runs/3"): (0.55, 0.45, 0.65)}
    for pair, (win, low, high) in chosen.items():
        last[pair] = {**last[pair], "win": win, "low": low, "high": high}
    last["runs/2", "runs/3"] = {**last["runs/2", "runs/3"], "win": None, "low": None, "high": None}
    others = [win for win in wins if win["n"] != 64]
    panel = wins_figure(rows, [*others, *last.values()]).axes[1]
    assert panel.get_title() == "against one another\njudged by gold"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["runs/1", "runs/2", "runs/3"]
    cells = {text.get_position()[::-1]: (text.get_text(), text.get_weight()) for text in panel.texts}
    assert cells == {
        (0, 1): ("30.0", "bold"), (1, 0): ("70.0", "bold"), (0, 2): ("55.0", "normal"), (2, 0): ("45.0", "normal")
    }  # fmt: skip
    (image,) = panel.images
    assert image.get_array()[0, 1] == 0.3
    assert image.get_clim() == (pytest.approx(0.3), pytest.approx(0.7))  # as far below a half as above
    assert image.get_array().mask.sum() == 5  # the diagonal, and the pair that was not measured


def test_without_wins_there_are_bars_alone() -> None:
    rows, wins = tables(NINE[:3], ("control",))
    assert len(wins_figure(rows, []).axes) == 1
    assert len(wins_figure(rows, [win for win in wins if win["n"] < 64]).axes) == 1
    assert len(wins_figure(changed(rows, win=None, win_low=None, win_high=None), wins).axes) == 2
    partly = wins_figure([row for row in rows if row["proxy"] != "runs/2" or row["n"] < 64], [])
    assert [round(y) for y, _ in bars(partly)] == [0, 2]  # never a bar of another n


def test_no_judge_is_claimed_where_the_tables_do_not_name_one() -> None:
    rows, wins = tables(NINE[:2])
    assert [panel.get_title() for panel in wins_figure(rows, changed(wins, target="control")).axes] == [
        "against one random candidate\njudged by control", "against one another\njudged by control"
    ]  # fmt: skip
    (bar,) = wins_figure(rows, []).axes
    assert bar.get_title() == "against one random candidate"
    (bar,) = wins_figure(changed(rows, gold=None), []).axes
    assert bar.get_title() == "against one random candidate\njudged by control"


# ---- files


def test_the_same_rows_give_the_same_files(tmp_path: Path) -> None:
    rows, wins = tables(NINE[3:6], ("gold",), (1, 2, 3))
    first = best_of_n_figure(rows, wins, tmp_path / "bon")
    assert [path.name for path in first] == ["bon.png", "bon.svg", "bon-wins.png", "bon-wins.svg"]
    second = best_of_n_figure(json.loads(json.dumps(rows)), wins, tmp_path / "again")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first[::2])
    assert "<!-- mean gold reward -->" in first[1].read_text(encoding="utf-8")


def test_results_are_drawn_again_and_no_stale_figure_stays(tmp_path: Path) -> None:
    rows, wins = tables(NINE[5:6] + NINE[:1], ("gold",), (1, 2))
    content = {"rows": rows, "wins": wins, "differences": [{"x": 1}], "proxies": [{"x": 1}], "fits": [{"x": 1}]}
    written = write_results(tmp_path, BON, content)
    tables_written = ["bon.csv", "bon-differences.csv", "bon-fits.csv", "bon-proxies.csv", "bon-wins.csv"]
    assert sorted(path.name for path in written[1:6]) == sorted(tables_written)
    assert [path.name for path in written[6:]] == ["bon.png", "bon.svg", "bon-wins.png", "bon-wins.svg"]
    before = [path.read_bytes() for path in written]
    for path in written[6:]:
        path.unlink()
    assert redraw(tmp_path) == written[6:]
    assert [path.read_bytes() for path in written] == before
    aimless, _ = tables(NINE[5:6], (), (1, 2))
    assert [path.name for path in write_results(tmp_path, BON, {"rows": aimless, "wins": []})] == [
        "bon.json", "bon.csv", "bon.png", "bon.svg"
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bon.csv", "bon.json", "bon.png", "bon.svg"]


def test_without_targets_there_is_what_the_proxies_believe() -> None:
    rows, wins = tables(NINE, ())
    assert wins == ()
    figure = draw_rewards(rows)
    assert [panel.get_ylabel() for panel in figure.axes] == ["gain (std of the proxy's reward)"]
    assert legend(figure)[-1] == "95 % interval"
    assert draw_wins(rows, wins) is None


@pytest.mark.parametrize(("count", "targets"), [(1, ()), (9, ()), (2, ("gold",)), (9, ("gold", "control"))])
def test_nothing_is_cut_off_and_the_legend_covers_no_data(count: int, targets: tuple[str, ...]) -> None:
    rows, wins = tables(NINE[:count], targets, (1, 2, 4))
    for figure in (draw_rewards(rows), draw_wins(rows, wins)):
        if figure is None:
            continue
        with canvas.style():
            figure.draw_without_rendering()
        boxes = [panel.get_tightbbox() for panel in figure.axes]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
        assert all(a.x1 <= b.x0 for a, b in pairwise(boxes))
        lowest = min(box.y0 for box in boxes)
        assert all(below.get_window_extent().y1 <= lowest for below in figure.legends)
        assert lowest >= 0


# ---- names and values from files


def test_odd_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    odd = ["$x_1$ and $y$", "_hidden", "模型 😀", "a\x1b[31m\nb", "-->", "<b>&amp;", "x" * 300 + "1", "x" * 300 + "2"]
    rows, wins = tables(tuple((name, "rm") for name in odd), ("gold",), (1, 2))
    for figure in (draw_rewards(rows), wins_figure(rows, changed(wins, target="gold\x1b"))):
        ElementTree.parse(canvas.save(figure, tmp_path / "bon.svg"))
    names = legend(draw_rewards(rows))[:8]
    assert names[0] == "$x_1$ and $y$ (one reward model)"
    assert names[1] == "_hidden (one reward model)"
    assert names[3] == r"'a\x1b[31m\nb' (one reward model)"
    assert len(set(names)) == 8
    assert max(map(len, names)) < 50
    bar, matrix = wins_figure(rows, wins).axes
    for labels in (bar.get_yticklabels(), matrix.get_xticklabels()):
        assert len({label.get_text() for label in labels}) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proxy": None}, "expected 'proxy' in each row, found none"),
        ({"kind": ""}, "expected 'kind' in each row, found none"),
        ({"n": None}, "expected a number for 'n' in each row"),
        ({"kl_bound": None}, "expected a number for 'kl_bound' in each row"),
        ({"n": 0}, "expected a whole n >= 1 for the proxy 'runs/1', found 0"),
        ({"n": 1.5}, "expected a whole n >= 1 for the proxy 'runs/1', found 1.5"),
        ({"n": 2}, "expected one row for each 'n', found "),
        ({"kind": "warm"}, "expected one kind for the proxy 'runs/1', found 'warm' and 'rm'"),
        ({"gold": "n/a"}, "expected a number for 'gold', found 'n/a'"),
        ({"gain_low": 9}, "expected gain_low <= gain_high, found 9 > "),
        ({"n": 64, "win": 97.0}, "expected a fraction from 0 to 1 for 'win', found 97"),
    ],
)
def test_rows_that_cannot_be_right_are_refused(change: Row, message: str, tmp_path: Path) -> None:
    rows, wins = tables(NINE[:2], ("gold",), (1, 2))
    with pytest.raises(UsageError) as caught:
        best_of_n_figure([{**rows[0], **change}, *rows[1:]], wins, tmp_path / "bon")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "other"}, "expected only proxies of the rows in the wins, found 'other'"),
        ({"b": None}, "expected 'b' in each row, found none"),
        ({"n": None}, "expected a number for 'n' in each row"),
        ({"target": None}, "expected 'target' in each row, found none"),
        ({"a": "runs/2", "b": "runs/1"}, "expected each pair of two proxies once in the wins, found 'runs/1' and"),
        ({"a": "runs/2"}, "expected each pair of two proxies once in the wins, found 'runs/2' and 'runs/2'"),
        ({"target": "control"}, "expected one target in the wins, found 'control' and 'gold'"),
        ({"win": 60}, "expected a fraction from 0 to 1 for 'win', found 60"),
    ],
)
def test_wins_that_cannot_be_right_are_refused(change: Row, message: str, tmp_path: Path) -> None:
    rows, wins = tables(NINE[:2], ("gold",), (2,))
    with pytest.raises(UsageError) as caught:
        best_of_n_figure(rows, [{**wins[0], **change}, *wins], tmp_path / "bon")
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_refused() -> None:
    with pytest.raises(UsageError, match="expected rows to draw, found none"):
        draw_rewards([])
