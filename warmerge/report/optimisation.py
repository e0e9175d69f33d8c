"""The figure of policy optimisation: control and proxy reward against steps and KL, a KL sweep, win rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.report import canvas
from warmerge.report.canvas import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILLION, printable
from warmerge.report.rows import Row, accuracy, groups, in_order, interval, number, place, short_names, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Entries = list[tuple[Any, str]]

_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, BLACK, "#E69F00", "#56B4E9", "#8F3F00")
_CONTROL: dict[str, Any] = {"linestyle": "-", "linewidth": 1.8, "zorder": 4}
_PROXY: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.0, "zorder": 3}
_PEAK: dict[str, Any] = {"marker": "o", "markersize": 6.5, "markerfacecolor": "white", "linestyle": "", "zorder": 6}
_COLLAPSE: dict[str, Any] = {"marker": "X", "markersize": 6.5, "markeredgecolor": "white", "linestyle": "", "zorder": 6}
_STYLES = ("-", "--", ":", "-.")
_STEP, _KL, _GAIN = "optimiser step", "KL to the start policy (nats per answer)", "gain (std of the start's answers)"


def optimisation_figure(rows: Sequence[Row], peaks: Sequence[Row], wins: Sequence[Row], path_stem: Path) -> list[Path]:
    """Control and proxy reward against steps and against KL, and what else was measured. Writes path_stem.png and .svg.

    A row with `run` is one run's, a row without is its group's. Groups stand in the order of the rows.

    Args:
        rows: `group`, `run`, `runs` (how many), `smooth` (steps in a mean), `step`, `kl`; `control_gain` and
            `proxy_gain`, those of groups each with `_low` and `_high`.
        peaks: `group`, `run`, `proxy`, `kl_coef`, `step`, `kl`, `control_gain`, `collapse_step`, `collapse_kl` and
            `collapse_control_gain`. Proxies with several `kl_coef` get a panel.
        wins: `file`, `policy`, `against`, `proxy`, `step`, `n`; `win`, `low` and `high` as fractions. May be empty.

    Raises:
        UsageError: no rows, a name or place is missing, or a value cannot be what its column says.
    """
    return canvas.save_both(draw_optimisation(rows, peaks, wins), path_stem)


def draw_optimisation(rows: Sequence[Row], peaks: Sequence[Row], wins: Sequence[Row]) -> Figure:
    """As `optimisation_figure`; axes for steps and for KL, then for a sweep and for win rates where there are any."""
    curves = groups([row for row in rows if not row.get("run")], "group")
    colours = _colours(list(curves))
    sweeps = _sweeps(peaks)
    count = 2 + bool(sweeps) + bool(wins)
    columns = 3 if count == 3 else 2
    with canvas.style():
        figure = canvas.new_figure(0.4 + 3.5 * columns, 0.1 + 3.1 * -(-count // columns))
        panels = canvas.grid(figure, count, columns)
        for panel, key, label in zip(panels, ("step", "kl"), (_STEP, _KL), strict=False):
            for group, own in curves.items():
                _curve(panel, in_order(own, "step"), key, colours[group])
            _marks(panel, peaks, key, colours)
            panel.set_title("against steps" if key == "step" else "against KL")
            panel.set_xlabel(label)
            panel.set_ylabel(_GAIN)
            panel.axhline(0, color=GREY, linewidth=0.7, zorder=1)
            panel.grid(True)
        entries = _entries(curves, peaks, colours)
        if sweeps:
            entries += _sweep(panels[2], sweeps, colours)
        if wins:
            entries += _wins(panels[-1], wins, colours)
        canvas.legend(figure, entries)
    return figure


def _colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each group; beyond the few that everybody tells apart, from a colour map."""
    if len(names) <= len(_COLOURS):
        return dict(zip(names, _COLOURS, strict=False))
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    scale = colormaps["turbo"]
    return {name: to_hex(scale(0.05 + 0.9 * i / (len(names) - 1))) for i, name in enumerate(names)}


def _curve(panel: Any, rows: Sequence[Row], key: str, colour: str) -> None:
    """Control and proxy of one group, with bands from the lowest to the highest run where there are several."""
    at = [place(row, key) for row in rows]
    several = any(number(row, "runs") > 1 for row in rows)
    for name, look, alpha in (("control_gain", _CONTROL, 0.2), ("proxy_gain", _PROXY, 0.09)):
        single = {"marker": "_", "markersize": 12} if len(at) == 1 else {}
        panel.plot(at, [number(row, name) for row in rows], color=colour, **look, **single)
        if several:
            lows, highs = zip(*(interval(row, f"{name}_") for row in rows), strict=True)
            panel.fill_between(at, lows, highs, color=colour, alpha=alpha, linewidth=0, zorder=2)


def _marks(panel: Any, peaks: Sequence[Row], key: str, colours: Mapping[str, str]) -> None:
    """Each run's own peak and collapse: of several runs they scatter about the mean line."""
    for row in peaks:
        if not row.get("run"):
            continue
        colour = colours.get(text(row, "group"), GREY)
        if number(row, "control_gain") > 0:
            panel.plot([place(row, key)], [number(row, "control_gain")], color=colour, **_PEAK)
        collapse = number(row, f"collapse_{key}"), number(row, "collapse_control_gain")
        if not math.isnan(collapse[0]):
            panel.plot(*([value] for value in collapse), color=colour, **_COLLAPSE)


def _sweeps(peaks: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of groups whose proxy was run with several KL coefficients, by proxy."""
    own = [row for row in peaks if not row.get("run")]
    by_proxy = groups(own, "proxy") if own else {}
    return {name: rows for name, rows in by_proxy.items() if len({place(row, "kl_coef") for row in rows}) > 1}


def _sweep(panel: Any, sweeps: Mapping[str, Sequence[Row]], colours: Mapping[str, str]) -> Entries:
    """Largest control gain against the KL coefficient: a grey line for each proxy, its groups in their colours."""
    names = short_names([printable(name) for name in sweeps], 24)
    entries = []
    for i, (name, rows) in enumerate(zip(names, sweeps.values(), strict=True)):
        ordered = sorted(rows, key=lambda row: place(row, "kl_coef"))
        at = [place(row, "kl_coef") for row in ordered]
        gains = [number(row, "control_gain") for row in ordered]
        look = {"color": GREY, "linestyle": _STYLES[i % 4], "linewidth": 1}
        panel.plot(at, gains, zorder=2, **look)
        entries.append((canvas.line(**look), f"{name} by KL coefficient"))
        for row, x, y in zip(ordered, at, gains, strict=True):
            colour = colours.get(text(row, "group"), GREY)
            panel.plot([x], [y], color=colour, marker="o", zorder=4)
            panel.vlines(x, *interval(row, "control_gain_"), color=colour, linewidth=1.2, zorder=3)
    coefficients = sorted({place(row, "kl_coef") for rows in sweeps.values() for row in rows})
    positive = [value for value in coefficients if value > 0]
    if len(positive) > 1 and positive[-1] / positive[0] >= 5:
        # 0 has its place on this scale too; below the smallest coefficient it is linear.
        panel.set_xscale("symlog", linthresh=positive[0])
    panel.set_xticks(coefficients, [f"{value:g}" for value in coefficients])
    panel.minorticks_off()
    panel.margins(x=0.12, y=0.15)
    panel.set_title("largest control gain")
    panel.set_xlabel("KL coefficient (bar: lowest to highest run)")
    panel.set_ylabel(_GAIN)
    panel.grid(True)
    return entries if len(sweeps) > 1 else []


def _wins(panel: Any, wins: Sequence[Row], colours: Mapping[str, str]) -> Entries:
    """Win rates against the step; where some have no step or no proxy, one below the other."""
    against = list(groups(wins, "against"))
    ns = sorted({int(place(row, "n")) for row in wins})
    sizes = f"n = {ns[0]}" if len(ns) == 1 else f"n = {ns[0]} to {ns[-1]}"
    beside = f" against {short_names([printable(against[0])], 26)[0]}" if len(against) == 1 else ""
    panel.set_title(f"win rate{beside} ({sizes})")
    panel.grid(True)
    if all(row.get("proxy") and not math.isnan(number(row, "step")) for row in wins):
        return _win_lines(panel, wins, against, colours)
    _win_bars(panel, wins, against)
    return []


def _win_lines(panel: Any, wins: Sequence[Row], against: Sequence[str], colours: Mapping[str, str]) -> Entries:
    """Points for each proxy and opponent, in the colour of the group that has the proxy's name, and a line through
    their means at each step."""
    from matplotlib.transforms import ScaledTranslation

    lines: dict[tuple[str, str], list[Row]] = {}
    for row in wins:
        lines.setdefault((text(row, "proxy"), text(row, "against")), []).append(row)
    others = [proxy for proxy in groups(wins, "proxy") if proxy not in colours]
    spare = [colour for colour in _COLOURS if colour not in colours.values()] or [GREY]
    own = {**colours, **{proxy: spare[i % len(spare)] for i, proxy in enumerate(others)}}
    for i, ((proxy, other), rows) in enumerate(lines.items()):
        # Side by side, so that intervals at one step do not hide each other.
        aside = ScaledTranslation((i - (len(lines) - 1) / 2) * 2.5 / 72, 0, panel.figure.dpi_scale_trans)
        look = {"color": own[proxy], "transform": panel.transData + aside}
        points = [(place(row, "step"), accuracy(row, "win"), *interval(row)) for row in rows]
        points = [point for point in points if not math.isnan(point[1])]
        steps = sorted({step for step, *_ in points})
        at_step = [[win for at, win, *_ in points if at == step] for step in steps]
        means = [sum(values) / len(values) for values in at_step]
        panel.plot(steps, means, zorder=4, linestyle=_STYLES[against.index(other) % 4], **look)
        for step, win, low, high in points:
            panel.plot([step], [win], marker="o", markersize=3, zorder=4, **look)
            panel.vlines(step, low, high, linewidth=1, zorder=3, **look)
        # What is drawn aside does not widen the axes by itself.
        seen = [(step, y) for step, *ys in points for y in (*ys, 0.5) if not math.isnan(y)]
        if seen:
            panel.update_datalim(seen)
    panel.autoscale_view()
    panel.axhline(0.5, color=BLACK, linewidth=0.8, linestyle="--", zorder=2)
    panel.set_xlabel(_STEP)
    panel.set_ylabel("win rate (bar: 95 % interval)")
    names = dict(zip(own, short_names([printable(name) for name in own], 30), strict=True))
    entries = [(canvas.line(color=own[proxy], marker="o", markersize=3), f"{names[proxy]}: wins") for proxy in others]
    if len(against) > 1:
        rivals = short_names([printable(name) for name in against], 30)
        styles = [canvas.line(color=GREY, linestyle=_STYLES[i % 4]) for i in range(len(against))]
        entries += [(style, f"wins against {name}") for style, name in zip(styles, rivals, strict=True)]
    return entries


def _win_bars(panel: Any, wins: Sequence[Row], against: Sequence[str]) -> None:
    names = [text(row, "policy") + (f" against {row['against']}" if len(against) > 1 else "") for row in wins]
    for y, row in enumerate(wins):
        panel.hlines(y, *interval(row), color=BLUE, linewidth=1.2, zorder=3)
        panel.plot([accuracy(row, "win")], [y], color=BLUE, marker="o", linestyle="", zorder=4)
    panel.axvline(0.5, color=BLACK, linewidth=0.8, linestyle="--", zorder=2)
    size = min(7.0, 150 / len(wins))  # points; the panel is about 170 high
    panel.set_yticks(range(len(wins)), short_names([printable(name) for name in names], 26), fontsize=size)
    panel.set_ylim(len(wins) - 0.4, -0.6)
    panel.set_xlim(-0.03, 1.03)
    panel.set_xlabel("win rate (bar: 95 % interval)")


def _entries(curves: Mapping[str, Sequence[Row]], peaks: Sequence[Row], colours: Mapping[str, str]) -> Entries:
    names = short_names([printable(group) for group in curves], 40)
    entries, several = [], False
    for name, (group, rows) in zip(names, curves.items(), strict=True):
        runs = max(place(row, "runs") for row in rows)
        several = several or runs > 1
        words = f"{name} ({runs:.0f} run{'s' if runs > 1 else ''})"
        entries.append((canvas.line(color=colours[group], linewidth=2.2), words))
    smooth = max(number(rows[0], "smooth") for rows in curves.values())
    means = f" (means of {smooth:.0f} steps)" if smooth > 1 else ""
    entries.append((canvas.line(color=GREY, **_CONTROL), f"control reward{means}"))
    entries.append((canvas.line(color=GREY, **_PROXY), "proxy reward"))
    if several:
        entries.append((canvas.patch(color=GREY, **canvas.BAND), "lowest to highest run; line: mean"))
    own = [row for row in peaks if row.get("run")]
    if any(number(row, "control_gain") > 0 for row in own):
        entries.append((canvas.line(color=GREY, **_PEAK), "highest control of a run"))
    if any(not math.isnan(number(row, "collapse_step")) for row in own):
        entries.append((canvas.line(color=GREY, **_COLLAPSE), "collapse of a run"))
    return entries
