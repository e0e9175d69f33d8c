"""The figure of the theory shows the rows: exact lines, simulated points with their bars."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy
import pytest
from matplotlib.figure import Figure

from warmerge.errors import UsageError
from warmerge.report.theory import draw_theory, theory_figure

Row = dict[str, Any]
SIZES = (2, 6, 10, None)


def coefficients(sizes: tuple[int | None, ...] = SIZES) -> list[Row]:
    rows = []
    for m, p in itertools.product(sizes, (0.0, 0.25, 0.5, 0.75, 1.0)):
        wa = p**2 if m is None else p / m + (1 - 1 / m) * p**2
        drawn = {"ens": p + 0.01, "ens_se": 0.02, "wa": wa + 0.02, "wa_se": 0.01} if m and p == 0.5 else {}
        rows.append({"p": p, "m": m, "ens_law": p, "wa_law": wa, "ens": None, "ens_se": None, "wa": None} | drawn)
    return rows


def accuracies(*names: str, sizes: tuple[int, ...] = (1, 2, 6, 10)) -> list[Row]:
    rows = []
    for name, data in itertools.product(names, ("in distribution", "out of distribution")):
        base = 0.9 if data == "in distribution" else 0.6
        for m in [*range(1, max(sizes) + 1), None]:
            laws = {"ens_law": base - 0.1 / (m or 1e9), "wa_law": base + 0.05 - 0.15 / (m or 1e9)}
            drawn = {"ens": laws["ens_law"] + 0.01, "ens_se": 0.004, "wa": laws["wa_law"] - 0.01, "wa_se": 0.003}
            drawn = drawn if m in sizes else dict.fromkeys(drawn)
            rows.append({"scenario": name, "data": data, "m": m, **laws, **drawn})
    return rows


def features(*names: str) -> list[Row]:
    return [
        {"scenario": name, "features": kind, "count": count, "p": p, "norm": 1.0, "sign": sign}
        for name in names
        for kind, count, p, sign in (("core", 6, 0.8, 1), ("few", 20, 0.2, -1), ("gone", 2, 1.0, 0))
    ]


def drawn(*names: str) -> Figure:
    return draw_theory(accuracies(*names), coefficients(), features(*names))


def lines(panel: Any, points: int) -> list[tuple[list[float], list[float], str]]:
    """What has so many points, with its colour."""
    return [
        (list(line.get_xdata()), list(line.get_ydata()), line.get_color())
        for line in panel.lines
        if len(line.get_xdata()) == points and line.get_linestyle() != "None"
    ]


def bars(panel: Any) -> list[tuple[float, float, float]]:
    segments = [collection.get_segments()[0] for collection in panel.collections]
    return [(float(s[0, 0]), float(s[0, 1]), float(s[1, 1])) for s in segments]


def test_coefficients_are_lines_with_points_on_them() -> None:
    panel = drawn("s").axes[0]
    found = lines(panel, 5)
    assert len(found) == 5
    assert found[0][1] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for (_, ys, _), m in zip(found[1:], SIZES, strict=True):
        assert ys == [row["wa_law"] for row in coefficients() if row["m"] == m]
    assert len({colour for *_, colour in found}) == 5
    at = [(row["wa"] - 0.0196, row["wa"] + 0.0196) for row in coefficients() if row.get("wa") is not None]
    assert bars(panel) == [(0.5, *map(pytest.approx, ends)) for ends in [*at, (0.51 - 0.0392, 0.51 + 0.0392)]]
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["ENS, any M", "WA, M = 2", "WA, M = 6", "WA, M = 10", "WA, M → ∞"]


def test_of_many_sizes_the_ends_are_shown() -> None:
    figure = draw_theory(accuracies("s"), coefficients((1, 2, 3, 5, 10, 30, 100, None)), features("s"))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["ENS, any M", "WA, M = 1", "WA, M = 3", "WA, M = 10", "WA, M = 100", "WA, M → ∞"]


def test_a_panel_for_each_scenario_out_of_distribution() -> None:
    figure = drawn("first", "second")
    assert [panel.get_title() for panel in figure.axes[1:]] == [
        f"{name}\n6 of p 0.8, 20 of p 0.2 (flip), ..." for name in ("first", "second")
    ]
    panel = figure.axes[1]
    rows = [row for row in accuracies("first") if row["data"] == "out of distribution"]
    ens, wa = lines(panel, 10)
    assert (ens[0], ens[1]) == (list(range(1, 11)), [row["ens_law"] for row in rows[:-1]])
    assert wa[1] == [row["wa_law"] for row in rows[:-1]]
    level = [line.get_ydata()[0] for line in panel.lines if list(line.get_xdata()) == [0, 1]]
    assert level == [rows[-1]["ens_law"], rows[-1]["wa_law"], 0.5]
    points = [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_marker())
        for line in panel.lines
        if len(line.get_xdata()) == 1
    ]
    simulated = {row["m"]: row for row in rows if row["ens"] is not None}
    assert points == [
        *((m, simulated[m]["ens"], "s") for m in (2, 6, 10)),
        *((m, simulated[m]["wa"], "o") for m in (2, 6, 10)),
        (1, simulated[1]["ens"], "X"),
    ]
    assert bars(panel)[0] == (2, *(pytest.approx(simulated[2]["ens"] + k * 0.004) for k in (-1.96, 1.96)))
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1", "2", "6", "10"]


@pytest.mark.parametrize("count", [1, 3, 5])
def test_all_of_it_lies_within_the_figure(count: int) -> None:
    names = [f"$scenario_{i}$ of a very long name {'that goes on ' * 5}" for i in range(count)]
    figure = drawn(*names)
    figure.canvas.draw()
    assert len(figure.axes) == 1 + count
    boxes = []
    for panel in figure.axes:
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticklabels() if low <= tick.get_position()[0] <= high]
        assert len(ticks) >= 4
        for text in (panel.title, panel.xaxis.label, panel.yaxis.label, *ticks):
            extent = text.get_window_extent()
            assert figure.bbox.x0 - 1 <= extent.x0 <= extent.x1 <= figure.bbox.x1 + 1, text.get_text()
            assert figure.bbox.y0 <= extent.y0 <= extent.y1 <= figure.bbox.y1, text.get_text()
        boxes.append(panel.title.get_window_extent())
    for a, b in itertools.combinations(boxes, 2):
        assert a.x1 <= b.x0 or a.y0 >= b.y1, "titles lie on each other"


def test_many_members_are_on_a_logarithmic_axis() -> None:
    figure = draw_theory(accuracies("s", sizes=(1, 2, 100)), coefficients(), features("s"))
    assert figure.axes[1].get_xscale() == "log"
    assert drawn("s").axes[1].get_xscale() == "linear"


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    given = accuracies("s"), coefficients(), features("s")
    first = theory_figure(*given, tmp_path / "a.b")
    assert [path.name for path in first] == ["a.b.png", "a.b.svg"]
    again = theory_figure(*given, tmp_path / "c")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert ElementTree.parse(first[1]).getroot().tag.endswith("svg")
    assert numpy.ptp(numpy.frombuffer(first[0].read_bytes(), dtype=numpy.uint8)) > 0


@pytest.mark.parametrize(
    ("table", "changed", "message"),
    [
        (0, {"ens_law": 60.0}, "expected a fraction from 0 to 1 for 'ens_law', found 60"),
        (0, {"scenario": ""}, "expected 'scenario' in each row"),
        (0, {"data": None}, "expected 'data' in each row"),
        (1, {"p": None}, "expected a number for 'p' in each row"),
        (1, {"wa_law": -0.1}, "expected a fraction from 0 to 1 for 'wa_law', found -0.1"),
        (2, {"scenario": None}, "expected 'scenario' in each row"),
    ],
)
def test_rows_that_cannot_be_drawn(table: int, changed: Row, message: str, tmp_path: Path) -> None:
    tables = [accuracies("s")[11:], coefficients(), features("s")]
    tables[table][0] |= changed
    with pytest.raises(UsageError) as raised:
        theory_figure(*tables, tmp_path / "theory")
    assert str(raised.value).startswith(f"figure: {message}")
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="figure: expected rows to draw, found none"):
        theory_figure([], coefficients(), features("s"), tmp_path / "theory")
