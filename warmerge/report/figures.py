"""The figures. Each `*_figure` draws rows as they stand in the JSON and CSV files, and writes a .png and a .svg.

Drawing (`draw_*`, gives a matplotlib Figure) is apart from saving, so that tests can ask a figure what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.errors import UsageError, quoted
from warmerge.report import canvas
from warmerge.report.canvas import BAND, BLACK, BLUE, GREEN, GREY, PURPLE, VERMILLION, printable
from warmerge.report.rows import (
    Row,
    accuracy,
    ends,
    flag,
    groups,
    in_order,
    interval,
    number,
    place,
    short_names,
    shortened,
    sizes,
    text,
    two_ended,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WA = {"color": BLUE, "marker": "o", "linestyle": "-", "zorder": 4}
ENS = {"color": VERMILLION, "marker": "s", "linestyle": "--", "markerfacecolor": "white", "zorder": 3}
SINGLE = {"color": GREY, "marker": ".", "linestyle": "", "zorder": 2}
DIAG = {"color": GREY, "linestyle": ":", "zorder": 2}
# Kind of a model -> colour, marker, words in the legend.
KINDS = {
    "member": (GREY, "D", "member"),
    "average": (BLUE, "o", "average of weights (line: its accuracy)"),
    "merged": (BLUE, "X", "merged earlier"),
    "ensemble": (VERMILLION, "s", "ensemble: rewards averaged"),
    "beside": (BLACK, "*", "measured beside the members"),
    "halfway": (GREEN, "P", "halfway between two models"),
    "start": (BLACK, "v", "start of the training"),
    "baseline": (PURPLE, "^", "baseline"),
}
SHADE = "#EFEFEF"
OTHER_KIND = (BLACK, "x", "other")
BLOCKS = "▁▂▃▄▅▆▇█"
_COLUMNS = 4


def lmc_figure(rows: Sequence[Row], path_stem: Path, title: str = "") -> list[Path]:
    """Accuracy along the straight lines between models: linear mode connectivity. Writes path_stem.png and .svg.

    One row of panels for each path, one column for each set; the rows of a path share their y axis.

    Args:
        rows: `path` ("a -> b"), `set`, `lambda` (also outside 0..1), `n`, `prompts`; accuracies as fractions: `wa` with
            `wa_low` and `wa_high`, `ens`, and `diag`, which may leave 0..1 where it is extrapolated.
    """
    return canvas.save_both(draw_lmc(rows, title), path_stem)


def draw_lmc(rows: Sequence[Row], title: str = "") -> Figure:
    """As `lmc_figure`; the figure has one subfigure for each path."""
    paths, sets = groups(rows, "path"), list(groups(rows, "set"))
    with canvas.style():
        # All ends at once: two paths whose names were shortened to the same would be taken for each other.
        models = [printable(end) for path in paths for end in ends(path)]
        short = short_names(models, 26 if len(sets) == 1 else 36)
        figure = canvas.new_figure(max(4.4, 0.5 + 2.6 * len(sets)), 0.2 + 2.6 * len(paths))
        subfigures = figure.subfigures(len(paths), 1, squeeze=False).flat
        for i, (subfigure, path) in enumerate(zip(subfigures, paths, strict=True)):
            heading = f"{short[2 * i]} → {short[2 * i + 1]}" if two_ended(path) else shortened(printable(path), 60)
            subfigure.suptitle(heading, x=0.01, ha="left")
            _lmc_path(subfigure, paths[path], sets, short[2 * i], short[2 * i + 1])
        if title:
            figure.suptitle(printable(title), fontsize=11)
        entries = [
            (canvas.line(**WA), "WA: one model, weights averaged"),
            (canvas.patch(color=BLUE, **BAND), "95 % interval of WA"),
            (canvas.line(**ENS), "ENS: rewards of two models averaged"),
            (canvas.line(**DIAG), "Diag: straight line between the two accuracies"),
        ]
        if any(not 0 <= place(row, "lambda") <= 1 for row in rows):
            entries.append((canvas.patch(color=SHADE), "extrapolated: beyond one of the models"))
        canvas.legend(figure, entries)
    return figure


def _lmc_path(subfigure: Any, rows: Sequence[Row], sets: Sequence[str], first: str, second: str) -> None:
    """One row of panels, from the model `first` (lambda 0) to the model `second` (lambda 1)."""
    lambdas = [place(row, "lambda") for row in rows]
    low, high = min(0.0, *lambdas), max(1.0, *lambdas)
    margin = 0.03 * (high - low)
    panels = canvas.grid(subfigure, len(sets), len(sets), sharey=True)
    panels[0].set_ylabel("accuracy")
    panels[0].locator_params(axis="y", min_n_ticks=4)
    words = f"lambda: share of {second}\n(0: {first} alone, 1: {second} alone)"
    if len(sets) == 1:
        panels[0].set_xlabel(words)
    else:
        subfigure.supxlabel(words, fontsize="medium")
    by_set = groups(rows, "set")
    for panel, name in zip(panels, sets, strict=True):
        own = in_order(by_set.get(name, []), "lambda")
        titled(panel, name, own)
        panel.set_xlim(low - margin, high + margin)
        if low < 0:
            panel.axvspan(low - margin, 0, color=SHADE, linewidth=0, zorder=0)
        if high > 1:
            panel.axvspan(1, high + margin, color=SHADE, linewidth=0, zorder=0)
        if not own:
            panel.text(0.5, 0.5, "not measured", ha="center", color=GREY, transform=panel.transAxes)
        _band(panel, own, "lambda")
        # The straight line may leave 0..1 where it is extrapolated; an accuracy may not.
        for key, look, read in (("diag", DIAG, number), ("ens", ENS, accuracy), ("wa", WA, accuracy)):
            _series(panel, [(place(row, "lambda"), read(row, key)) for row in own], look)


def vs_m_figure(rows: Sequence[Row], path_stem: Path) -> list[Path]:
    """Accuracy against the number of members, one panel for each set. Writes path_stem.png and .svg.

    Args:
        rows: `set`, `m`, `n`, `selected_on` (members were ranked on this set); accuracies as fractions: `wa` and `ens`,
            each with `_low` and `_high`, and `single`, that of the member `added` at m, alone.
    """
    return canvas.save_both(draw_vs_m(rows), path_stem)


def draw_vs_m(rows: Sequence[Row]) -> Figure:
    """As `vs_m_figure`; the figure has one axes for each set."""
    from matplotlib.ticker import MaxNLocator

    sets = groups(rows, "set")
    columns = min(_COLUMNS, len(sets))
    with canvas.style():
        figure = canvas.new_figure(max(4.4, 0.4 + 3.0 * columns), 0.3 + 2.6 * -(-len(sets) // columns))
        for panel, name in zip(canvas.grid(figure, len(sets), columns), sets, strict=True):
            own = in_order(sets[name], "m")
            size = {"markersize": 4.5 if len(own) <= 20 else 2.5}
            selected = any(flag(row, "selected_on") for row in own)
            titled(panel, name, own, "(members were ranked on this set)" if selected else "")
            panel.set_xlabel("number of members M")
            panel.set_ylabel("accuracy")
            panel.set_xlim(place(own[0], "m") - 0.5, place(own[-1], "m") + 0.5)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            _band(panel, own, "m")
            for row in own:
                panel.vlines(place(row, "m"), *interval(row, "ens_"), color=VERMILLION, linewidth=0.8, zorder=3)
            for key, look in (("single", SINGLE), ("ens", ENS | size), ("wa", WA | size)):
                _series(panel, [(place(row, "m"), accuracy(row, key)) for row in own], look)
        entries = [
            (canvas.line(**WA), "WA: one model, weights averaged"),
            (canvas.patch(color=BLUE, **BAND), "95 % interval of WA"),
            (canvas.line(**ENS), "ENS: rewards of M models averaged (bar: 95 %)"),
            (canvas.line(**SINGLE), "the member added at M, alone"),
        ]
        canvas.legend(figure, entries)
    return figure


def eval_figure(rows: Sequence[Row], path_stem: Path) -> list[Path]:
    """A forest plot: each model's accuracy and its 95 % interval, a panel for each set. Writes path_stem.png and .svg.

    Args:
        rows: `set`, `model`, `kind` (a key of `KINDS`), `n`; `accuracy`, `low` and `high` as fractions. Models stand in
            the order of the rows.
    """
    return canvas.save_both(draw_eval(rows), path_stem)


def draw_eval(rows: Sequence[Row]) -> Figure:
    """As `eval_figure`; the figure has one axes for each set."""
    sets, models, kinds = (groups(rows, key) for key in ("set", "model", "kind"))
    columns = min(_COLUMNS, len(sets))
    blocks = -(-len(sets) // columns)
    with canvas.style():
        names = short_names([printable(model) for model in models], 40)
        width = max(4.6, 0.5 + 0.062 * max(map(len, names)) + 2.3 * columns)
        figure = canvas.new_figure(width, 0.1 + blocks * (0.75 + 0.19 * len(models)))
        for index, (panel, name) in enumerate(zip(canvas.grid(figure, len(sets), columns), sets, strict=True)):
            titled(panel, name, sets[name])
            panel.set_yticks(range(len(models)), names if index % columns == 0 else [""] * len(models))
            panel.set_ylim(len(models) - 0.4, -0.6)
            panel.set_xlabel("accuracy (bar: 95 % interval)")
            forest(panel, sets[name], list(models))
        styles = [KINDS[kind] for kind in KINDS if kind in kinds] + ([OTHER_KIND] if kinds.keys() - KINDS else [])
        canvas.legend(figure, [(canvas.line(color=c, marker=m, linestyle=""), words) for c, m, words in styles])
    return figure


def forest(panel: Any, rows: Sequence[Row], models: Sequence[str]) -> None:
    """Accuracies of one set with their intervals, a line for each of `models`, from the top."""
    seen: list[float] = []
    for model, (row, *more) in groups(rows, "model").items():
        if more:
            raise UsageError(f"figure: expected one row for the model {quoted(model)} in a set, found {1 + len(more)}")
        y, value, (low, high) = models.index(model), accuracy(row, "accuracy"), interval(row)
        kind = text(row, "kind")
        color, marker, _ = KINDS.get(kind, OTHER_KIND)
        panel.hlines(y, low, high, color=color, linewidth=1.2, zorder=3)
        panel.plot([value], [y], color=color, marker=marker, linestyle="", zorder=4)
        if kind == "average" and not math.isnan(value):
            panel.axvline(value, color=BLUE, linewidth=0.7, zorder=2)
        seen += [x for x in (low, value, high) if not math.isnan(x)]
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    margin = max(0.06 * (high - low), 0.005)
    panel.set_xlim(low - margin, high + margin)


def heat_map(
    values: Sequence[Sequence[float]],
    labels: Sequence[str],
    title: str,
    unit: str,
    path: Path,
    limits: tuple[float, float] | None = None,
) -> None:
    """A picture (.png, .svg or .pdf) of a square matrix (M, M), each value written into its cell.

    Args:
        values: NaN leaves its cell empty.
        labels: one for each row and column.
        unit: what the colours measure.
        limits: the values at the ends of the colour scale; 0 and the largest value if not given.
    """
    count, diverging = len(labels), limits is not None
    low, high = limits or (0.0, max((v for row in values for v in row if math.isfinite(v)), default=1.0) or 1.0)
    size = max(3.6, 1.6 + 0.62 * count)
    with canvas.style():
        figure = canvas.new_figure(size + 1.4, size)
        axes = figure.add_subplot()
        image = axes.imshow(values, vmin=low, vmax=high, cmap="RdBu_r" if diverging else "Blues")
        names = short_names([printable(label) for label in labels], 24)
        axes.set_xticks(range(count), names, rotation=40, ha="right")
        axes.set_yticks(range(count), names)
        axes.spines[:].set_visible(False)
        for i in range(count):
            for j in range(count):
                value = values[i][j]
                dark = abs(value) > 0.6 * max(abs(low), abs(high))
                shown = "-" if math.isnan(value) else f"{value:.2f}" if diverging else f"{value:.3g}"
                axes.text(j, i, shown, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axes.set_title(printable(title), fontsize=10)
        figure.colorbar(image, ax=axes, label=unit, shrink=0.85)
    canvas.save(figure, path)


def sparkline(values: Sequence[float], low: float | None = None, high: float | None = None) -> str:
    """One block character for each value, from `low` to `high` (the smallest and largest value if not given).

    NaN is a space, a value beyond the ends stands at the end, and where there is no height all are in the middle.

    >>> sparkline([0.0, 0.5, float("nan"), 1.0]), sparkline([3, 3]), sparkline([0.6, 0.7], low=0, high=1)
    ('▁▅ █', '▄▄', '▅▆')
    """
    finite = [value for value in values if math.isfinite(value)]
    bottom = min(finite, default=0.0) if low is None else low
    top = max(finite, default=0.0) if high is None else high
    if low is not None and high is not None and low > high:
        raise UsageError(f"sparkline: expected low <= high, found {low:g} > {high:g}")
    line = ""
    for value in values:
        if math.isnan(value):
            line += " "
        elif top <= bottom:
            line += BLOCKS[3]
        else:
            share = min(1.0, max(0.0, (value - bottom) / (top - bottom)))
            line += BLOCKS[min(7, int(8 * share))]
    return line


def titled(panel: Any, name: str, rows: Sequence[Row], below: str = "") -> None:
    """A panel's name, on how much it was measured, and a third line."""
    lines = [shortened(printable(name), 36), sizes(rows), below]
    panel.set_title("\n".join(line for line in lines if line))
    panel.grid(True)


def _series(panel: Any, points: Sequence[tuple[float, float]], look: dict[str, Any]) -> None:
    """A line through the points that were measured; a point alone needs a marker to be seen."""
    measured = [(x, y) for x, y in points if not math.isnan(y)]
    if len(measured) == 1 and "marker" not in look:
        look = {**look, "marker": "_", "markersize": 12}
    panel.plot([x for x, _ in measured], [y for _, y in measured], **look)


def _band(panel: Any, rows: Sequence[Row], key: str) -> None:
    """WA's 95 % interval; a bar where there is one point, of which a band would be too thin to be seen."""
    measured = [(number(row, key), *interval(row, "wa_")) for row in rows]
    measured = [point for point in measured if not math.isnan(point[1])]
    xs, lows, highs = ([point[i] for point in measured] for i in range(3))
    if len(measured) == 1:
        panel.vlines(xs, lows, highs, color=BLUE, alpha=0.4, linewidth=3, zorder=1)
    elif measured:
        panel.fill_between(xs, lows, highs, color=BLUE, zorder=1, **BAND)
