"""The figure of WARM's section 4.3: what features count in ensembles and averages, and what these are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.report import canvas
from warmerge.report.canvas import BLACK, BLUE, GREY, VERMILLION, printable
from warmerge.report.rows import Row, accuracy, groups, in_order, number, place, shortened, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# M of the average, from few to many: light to dark, and told apart by markers in print.
_SHADES = ("#7FC4EC", "#3D9BD3", BLUE, "#084B7A")
_MARKERS = ("o", "D", "^", "v")
_POINT: dict[str, Any] = {"linestyle": "", "markersize": 3.8, "markeredgewidth": 0.9, "zorder": 5}
_ENS: dict[str, Any] = {"color": VERMILLION, "linestyle": (0, (4, 2)), "zorder": 3}
_WA: dict[str, Any] = {"color": BLUE, "linestyle": "-", "zorder": 4}
_GUESS: dict[str, Any] = {"color": GREY, "linewidth": 0.8, "zorder": 1}
_COLUMNS = 4
_TITLE = 38  # characters that are as wide as a panel
_OUT = "out of distribution"


def theory_figure(
    rows: Sequence[Row], coefficients: Sequence[Row], features: Sequence[Row], path_stem: Path
) -> list[Path]:
    """Coefficients against p, and accuracies of each scenario against M. Writes path_stem.png and path_stem.svg.

    Lines are exact (`_law`), points simulated, with bars of 95 % from their standard errors (`_se`).

    Args:
        rows: `scenario`, `data` ("out of distribution" is drawn), `m` (none: M -> inf); `ens_law`, `wa_law` and, where
            simulated, `ens`, `ens_se`, `wa`, `wa_se` as fractions.
        coefficients: `p`, `m`, and the same columns.
        features: `scenario`, `count`, `p`, `sign`.

    Raises:
        UsageError: no rows, a name or place is missing, or a value cannot be what its column says.
    """
    return canvas.save_both(draw_theory(rows, coefficients, features), path_stem)


def draw_theory(rows: Sequence[Row], coefficients: Sequence[Row], features: Sequence[Row]) -> Figure:
    """As `theory_figure`; an axes for coefficients, then one for each scenario."""
    scenarios = groups([row for row in rows if text(row, "data") == _OUT], "scenario")
    count = 1 + len(scenarios)
    columns = min(_COLUMNS, count)
    with canvas.style():
        figure = canvas.new_figure(0.3 + 2.75 * columns, 0.3 + 2.9 * -(-count // columns))
        first, *panels = canvas.grid(figure, count, columns)
        _coefficients(first, coefficients)
        made = groups(features, "scenario")
        for panel, name in zip(panels, scenarios, strict=True):
            _accuracies(panel, scenarios[name])
            panel.set_title(f"{shortened(printable(name), _TITLE)}\n{_made_of(made.get(name, []))}")
        if panels:
            panels[0].set_ylabel("accuracy out of distribution")
        entries = [
            (canvas.line(**_ENS, marker="s", markerfacecolor="white"), "ENS: rewards averaged"),
            (canvas.line(**_WA, marker="o"), "WA: weights averaged"),
            (canvas.line(color=BLACK, marker="X", linestyle="", markeredgecolor="white", markersize=6.5), "one member"),
            (canvas.line(**_GUESS), "guessing"),
            (canvas.line(color=GREY, marker="o", linestyle=""), "points: simulated (bar: 95 % interval); lines: exact"),
        ]
        canvas.legend(figure, entries)
    return figure


def _coefficients(panel: Any, rows: Sequence[Row]) -> None:
    """ENS is one line for all M; the average has a line for each."""
    sizes: dict[float, list[Row]] = {}
    for row in rows:
        sizes.setdefault(_size(row), []).append(row)
    shown = _some(sorted(sizes))
    own = in_order(sizes[shown[0]], "p") if shown else []
    panel.plot([place(row, "p") for row in own], [accuracy(row, "ens_law") for row in own], **_ENS, label="ENS, any M")
    for i, m in enumerate(shown):
        ordered = in_order(sizes[m], "p")
        at, laws = [place(row, "p") for row in ordered], [accuracy(row, "wa_law") for row in ordered]
        # The last line, that of infinitely many, is black: it is what the others come to.
        limit = math.isinf(m)
        colour = BLACK if limit else _SHADES[min(i * len(_SHADES) // max(1, len(shown) - 1), len(_SHADES) - 1)]
        marker = _MARKERS[i % len(_MARKERS)]
        style = ":" if limit else "-"
        panel.plot(at, laws, color=colour, linestyle=style, linewidth=1.2, zorder=4)
        _points(panel, ordered, "p", "wa", colour, marker)
        entry = {"marker": "" if limit else marker, "markersize": 3.8, "linestyle": style, "linewidth": 1.2}
        panel.plot([], [], color=colour, label=f"WA, M {'→ ∞' if limit else f'= {m:.0f}'}", **entry)
    largest = [row for m in shown if not math.isinf(m) for row in sizes[m]][-len(own) :]
    _points(panel, largest, "p", "ens", VERMILLION, "s")
    panel.set_title("what a feature counts\nin the merged reward")
    panel.set_xlabel("p: share of runs that learn the feature")
    panel.set_ylabel("expected coefficient")
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.02, 1.02)
    panel.grid(True)
    panel.legend(loc="upper left", fontsize=7, handlelength=2.2, borderaxespad=0.3, labelspacing=0.35)


def _accuracies(panel: Any, rows: Sequence[Row]) -> None:
    limits = [row for row in rows if math.isinf(_size(row))]
    ordered = in_order([row for row in rows if not math.isinf(_size(row))], "m")
    at = [place(row, "m") for row in ordered]
    for name, look, marker in (("ens", _ENS, "s"), ("wa", _WA, "o")):
        panel.plot(at, [accuracy(row, f"{name}_law") for row in ordered], **look)
        for row in limits:
            panel.axhline(accuracy(row, f"{name}_law"), color=look["color"], linewidth=0.7, linestyle=":", zorder=2)
        _points(panel, [row for row in ordered if place(row, "m") != 1], "m", name, look["color"], marker)
    _points(panel, [row for row in ordered if place(row, "m") == 1], "m", "ens", BLACK, "X")
    panel.axhline(0.5, **_GUESS)
    if at[-1] > 30:
        panel.set_xscale("log")
    ticks = [place(row, "m") for row in ordered if not math.isnan(number(row, "ens"))]
    panel.set_xticks(ticks, [f"{m:.0f}" for m in ticks])
    panel.minorticks_off()
    panel.set_xlabel("number of members M (dotted: M → ∞)")
    panel.set_ylim(-0.03, 1.03)
    panel.grid(True)


def _points(panel: Any, rows: Sequence[Row], key: str, name: str, colour: str, marker: str) -> None:
    """What was simulated. ENS is hollow, so that what lies below it is seen."""
    for row in rows:
        value, se = accuracy(row, name), number(row, f"{name}_se")
        if math.isnan(value):
            continue
        if not math.isnan(se):
            panel.vlines(place(row, key), value - 1.96 * se, value + 1.96 * se, color=colour, linewidth=1.1, zorder=4)
        face = "white" if marker == "s" else colour
        look = {**_POINT, "markersize": 6.5, "markeredgecolor": "white"} if marker == "X" else _POINT
        panel.plot([place(row, key)], [value], color=colour, marker=marker, **{"markerfacecolor": face, **look})


def _made_of(rows: Sequence[Row]) -> str:
    """The features in one line: "6 of p 0.8, 20 of p 0.2 (flip)"."""
    worth: dict[float, str] = {1: "", -1: " (flip)", 0: " (vanish)"}
    parts = [f"{number(row, 'count'):.0f} of p {number(row, 'p'):g}{worth.get(place(row, 'sign'), '')}" for row in rows]
    for kept in range(len(parts), 0, -1):
        words = ", ".join([*parts[:kept], *(["..."] if kept < len(parts) else [])])
        if len(words) <= _TITLE:
            break
    return shortened(words, _TITLE, share=1.0) if parts else ""


def _some(sizes: Sequence[float]) -> list[float]:
    """At most four M, the smallest and the largest among them, and infinity: more lines would lie on each other."""
    finite = [m for m in sizes if not math.isinf(m)]
    if len(finite) > 4:
        finite = [finite[round(i * (len(finite) - 1) / 3)] for i in range(4)]
    return finite + [m for m in sizes if math.isinf(m)]


def _size(row: Row) -> float:
    m = number(row, "m")
    return math.inf if math.isnan(m) else m
