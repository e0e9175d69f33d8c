"""The figure of win rates shows the rows: bars against one policy, a matrix of all against all."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from warmerge.errors import UsageError
from warmerge.report.results import WINRATE, redraw, write_results
from warmerge.report.win_rates import draw_win_rates, win_rate_figure

Row = dict[str, Any]


def row(policy: str, against: str, win: float | None = 0.6, **more: Any) -> Row:
    ends = {"low": None, "high": None} if win is None else {"low": win - 0.05, "high": win + 0.04}
    return {
        "policy": policy, "against": against, "judge": "judge-1", "n": 80, "win": win, **ends, "length_win": 0.45,
        "wins": 40, "ties": 5, "losses": 35, "tokens": 20.0, "tokens_against": None, "step": None, "proxy": None,
        **more,
    }  # fmt: skip


def ladder(count: int = 8) -> list[Row]:
    return [row(f"warm step {500 * i}", "sft", 0.3 + 0.05 * i) for i in range(1, count + 1)]


def pairs(names: list[str]) -> list[Row]:
    return [row(a, b, 0.3 + 0.02 * (i % 20)) for i, (a, b) in enumerate(itertools.combinations(names, 2))]


def words(figure: Figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


def test_bars_against_one_policy() -> None:
    rows = ladder()
    figure = draw_win_rates(rows)
    (panel,) = figure.axes
    assert [bar.get_width() for bar in panel.patches] == pytest.approx([r["win"] for r in rows])
    assert [label.get_text() for label in panel.get_yticklabels()] == [r["policy"] for r in rows]
    lines = [collection.get_segments()[0][:, 0].tolist() for collection in panel.collections]
    assert lines == [pytest.approx([r["low"], r["high"]]) for r in rows]
    half, *length = sorted(panel.lines, key=lambda line: line.get_marker() == "^")
    assert list(half.get_xdata()) == [0.5, 0.5]
    assert [line.get_xdata()[0] for line in length] == [0.45] * 8
    shown = words(figure)
    assert "win rate against sft\njudged by judge-1, n = 80" in shown
    assert {"35.0", "70.0", "95 % interval", "if the longer answer won"} <= set(shown)
    top, bottom = panel.get_ylim()[1], panel.get_ylim()[0]
    assert top < 0 < 7 < bottom  # the first row is at the top


def test_few_pairs_are_bars_that_name_both() -> None:
    rows = pairs(["a", "b", "c", "d"])
    (panel,) = draw_win_rates(rows).axes
    assert [label.get_text() for label in panel.get_yticklabels()][:2] == ["a\nagainst b", "a\nagainst c"]
    assert len(panel.patches) == 6


def test_many_pairs_are_a_matrix() -> None:
    names = [f"p{i}" for i in range(6)]
    rows = pairs(names)
    figure = draw_win_rates(rows)
    (panel,) = figure.axes
    values = panel.images[0].get_array()
    for r in rows:
        a, b = names.index(r["policy"]), names.index(r["against"])
        assert (values[a, b], values[b, a]) == pytest.approx((r["win"], 1 - r["win"]))
    cells = {tuple(map(int, text.get_position()[::-1])): text for text in panel.texts}
    assert len(cells) == 30
    first = rows[0]
    assert cells[0, 1].get_text() == f"{100 * first['win']:.1f}"
    for (a, b), text in cells.items():
        r = next(r for r in rows if {r["policy"], r["against"]} == {names[a], names[b]})
        assert text.get_weight() == ("bold" if r["low"] > 0.5 or r["high"] < 0.5 else "normal")
    assert {text.get_weight() for text in cells.values()} == {"bold", "normal"}


def test_what_was_not_judged_is_said() -> None:
    rows = [row("a", "sft"), row("b", "sft", None, n=0, length_win=None)]
    figure = draw_win_rates(rows)
    assert "nothing judged" in words(figure)
    assert len(figure.axes[0].patches) == 1
    missing = pairs([f"p{i}" for i in range(6)])
    missing[0] |= {"win": None, "low": None, "high": None}
    assert len(draw_win_rates(missing).axes[0].texts) == 28


@pytest.mark.parametrize("count", [2, 8, 12])
@pytest.mark.parametrize("kind", ["ladder", "pairs"])
def test_all_of_it_lies_within_the_figure(count: int, kind: str) -> None:
    """Also with long names, which stay distinct."""
    names = [f"runs/policies-optimised-against-weight-averaged-reward-models/seed-{i}/step-3500" for i in range(count)]
    rows = pairs(names) if kind == "pairs" else [row(name, f"org/{'start-' * 12}model") for name in names]
    figure = draw_win_rates([r | {"judge": f"org/{'judge-' * 12}instruct"} for r in rows])
    figure.canvas.draw()
    box = figure.bbox
    (panel,) = figure.axes
    texts = [*panel.get_yticklabels(), *panel.texts, panel.xaxis.label, figure._suptitle]  # type: ignore[attr-defined]
    texts += panel.get_xticklabels()
    for text in texts:
        extent = text.get_window_extent()
        assert box.x0 <= extent.x0 <= extent.x1 <= box.x1, text.get_text()
        assert box.y0 <= extent.y0 <= extent.y1 <= box.y1, text.get_text()
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert len(set(labels)) == len(labels)
    extents = [label.get_window_extent() for label in panel.get_yticklabels()]
    assert all(below.y1 <= above.y0 + 1 for above, below in itertools.pairwise(extents))


def test_names_are_shown_as_they_are_typed() -> None:
    figure = draw_win_rates([row("a$b$\x1b[0m", "s_{t}")])
    assert {"'a$b$\\x1b[0m'", "win rate against s_{t}\njudged by judge-1, n = 80"} <= set(words(figure))


def test_files_and_drawing_again(tmp_path: Path) -> None:
    written = write_results(tmp_path, WINRATE, {"rows": ladder(3), "pairs": [], "policies": []})
    assert [path.name for path in written] == ["winrate.json", "winrate.csv", "winrate.png", "winrate.svg"]
    assert ElementTree.parse(tmp_path / "winrate.svg").getroot().tag.endswith("svg")
    before = {path: path.read_bytes() for path in written}
    assert redraw(tmp_path) == written[2:]
    assert {path: path.read_bytes() for path in written} == before
    assert (tmp_path / "winrate.csv").read_text().splitlines()[0].split(",") == list(ladder(1)[0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected rows to draw, found none"),
        ([row("a", "b"), row("a", "b")], "expected each pair of two policies once, found 'a' and 'b'"),
        ([row("a", "b"), row("b", "a")], "expected each pair of two policies once, found 'b' and 'a'"),
        ([row("a", "a")], "expected each pair of two policies once, found 'a' and 'a'"),
        ([row("a", "b", win=60.0)], "expected a fraction from 0 to 1 for 'win', found 60"),
        ([row("a", "b") | {"low": 0.9, "high": 0.8}], "expected low <= high, found 0.9 > 0.8"),
        ([row("", "b")], "expected 'policy' in each row"),
        ([row("a", "b", judge=None)], "expected 'judge' in each row"),
    ],
)
def test_rows_that_cannot_be_drawn(rows: list[Row], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        win_rate_figure(rows, tmp_path / "winrate")
    assert str(raised.value).startswith(f"figure: {message}")
    assert list(tmp_path.iterdir()) == []
