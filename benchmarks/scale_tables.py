"""How what was measured grows: a power law and a line fitted to each series; tables and the figure of docs/scale.md."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The rows of each series: x, and what it took ("cpu", "wall", "peak", ...); what x is, by the series' name.
Rows = Mapping[str, Sequence[Mapping[str, float]]]
Words = Mapping[str, str]


@dataclass(frozen=True)
class Fit:
    """y against x: the exponent of a power law over all points and between the last two, and the line
    `fixed` + `slope` x; `bent` and `off` are how far (as a fraction) the worst point lies from each."""

    exponent: float
    bent: float
    last: float
    fixed: float
    slope: float
    off: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """Least squares: of logarithms for the power, of relative differences for the line, which has no negative start.

    >>> found = fit([1, 2, 4], [3, 5, 9])
    >>> round(found.fixed, 9), round(found.slope, 9), round(found.off, 9), round(found.last, 2)
    (1.0, 2.0, 0.0, 0.85)
    """
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    a, p = _line(logs, [1.0] * len(logs))
    bent = max(abs(math.expm1(v - a - p * u)) for u, v in logs)
    last = (logs[-1][1] - logs[-2][1]) / (logs[-1][0] - logs[-2][0])
    weights = [1 / y**2 for y in ys]
    fixed, slope = _line(list(zip(xs, ys, strict=True)), weights)
    if fixed < 0:
        slope = sum(w * x * y for w, x, y in zip(weights, xs, ys, strict=True))
        slope, fixed = slope / sum(w * x * x for w, x in zip(weights, xs, strict=True)), 0.0
    off = max(abs(fixed + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    return Fit(p, bent, last, fixed, slope, off)


def _line(points: Sequence[tuple[float, float]], weights: Sequence[float]) -> tuple[float, float]:
    """Start and slope of the weighted least-squares line."""
    total = sum(weights)
    x0, y0 = (sum(w * point[k] for w, point in zip(weights, points, strict=True)) / total for k in (0, 1))
    spread = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True)) / spread
    return y0 - slope * x0, slope


# --- tables and figure ------------------------------------------------------------------------------------------------


def summary(found: Rows, grows: Words) -> list[str]:
    """The table of fits: a row for each series."""
    lines = [
        "| series | what grows | from, to | CPU s | exponent (worst point off) | of the last step | "
        "line: fixed + each (worst point off) | MB above the libraries | / copy floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        xs, cpu = [row["x"] for row in rows], [row["cpu"] for row in rows]
        got = fit(xs, cpu)
        floors = sorted(row["cpu"] / row["floor_cpu"] for row in rows if "floor_cpu" in row)
        cells = [
            name, grows[name], f"{xs[0]:,g}, {xs[-1]:,g}", f"{cpu[0]:.2f}, {cpu[-1]:.2f}",
            f"{got.exponent:.2f} ({got.bent:.0%})", f"{got.last:.2f}",
            f"{got.fixed:.2f} s + {_seconds(got.slope)} ({got.off:.0%})",
            f"{rows[0]['peak']:.0f}, {rows[-1]['peak']:.0f}", f"{floors[0]:.1f} to {floors[-1]:.1f}" if floors else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _seconds(value: float) -> str:
    size = abs(value)
    return f"{value:.3g} s" if size >= 0.1 else f"{1e3 * value:.3g} ms" if size >= 1e-4 else f"{1e6 * value:.3g} us"


def points(found: Rows) -> list[str]:
    """Every point that was measured."""
    lines = [
        "| series | x | CPU s | wall s | peak MB | MB read | MB written | calls | floor CPU s | floor wall s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        for row in rows:
            floor = [f"{row[key]:.2f}" if key in row else "" for key in ("floor_cpu", "floor_wall")]
            numbers = [f"{row['cpu']:.2f}", f"{row['wall']:.2f}", f"{row['peak']:.0f}", f"{row['read']:,.1f}",
                       f"{row['written']:,.1f}", f"{row['calls']:,.0f}", *floor]  # fmt: skip
            lines.append("| " + " | ".join([name, f"{row['x']:,g}", *numbers]) + " |")
    return lines


def draw(found: Rows, grows: Words, path: Path) -> None:
    """A small panel for each series: CPU seconds against what grows, both on a logarithmic scale, with its line."""
    from warmerge.report import canvas

    columns = 4
    with canvas.style():
        figure = canvas.new_figure(10, 2.2 * -(-len(found) // columns) + 0.3)
        for i, (name, rows) in enumerate(found.items()):
            axes = figure.add_subplot(-(-len(found) // columns), columns, i + 1)
            xs, cpu = [row["x"] for row in rows], [row["cpu"] for row in rows]
            got = fit(xs, cpu)
            between = [xs[0] * (xs[-1] / xs[0]) ** (k / 50) for k in range(51)]
            axes.loglog(between, [got.fixed + got.slope * x for x in between], color=canvas.GREY, linewidth=1)
            axes.loglog(xs, cpu, "o", color=canvas.BLUE)
            if "floor_cpu" in rows[0]:
                axes.loglog(xs, [row["floor_cpu"] for row in rows], "s", color=canvas.VERMILLION, markersize=3)
            axes.set_title(f"{name}: x^{got.exponent:.2f}")
            axes.set_xlabel(textwrap.fill(grows[name], 32))
            axes.set_ylim(min(0.5 * min(cpu), axes.get_ylim()[0]), 2 * max(cpu))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, position: f"{value:,g}")
                axis.set_minor_formatter(lambda value, position: "")
            axes.set_xticks([xs[0], xs[-1]])
            axes.grid(True)
        figure.supylabel("CPU seconds (blue), a line fixed + each x (grey), copy floor (red)")
        figure.savefig(path, dpi=130, metadata={"Software": None})
