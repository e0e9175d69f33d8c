"""The figures of best-of-N: what each proxy's choice is worth, what the proxy believes it is worth, and who wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.errors import UsageError, quoted
from warmerge.report import canvas
from warmerge.report.canvas import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILLION, printable
from warmerge.report.rows import Row, accuracy, groups, in_order, interval, number, place, short_names, sizes, text
from warmerge.report.win_rates import win_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Look = dict[str, Any]

TARGETS = ("gold", "control")
# Kind of a proxy -> its words in the legend, width of its line; colours, line styles and markers, taken in turn.
# The lengths have no common divisor, so that as many proxies as their product stay distinguishable.
_KINDS: dict[str, tuple[str, float, tuple[str, ...], tuple[Any, ...], tuple[str, ...]]] = {
    "rm": ("one reward model", 1.0, (GREY, "#A0A0A0", "#303030"), ("-",), ("D", "v", "<", "P", ">", "X", "*")),
    "ensemble": ("ensemble", 1.3, (VERMILLION, "#8F3F00", "#F5A56B"), ("--", (0, (1.2, 1))), ("s", "p", "d", "h", "8")),
    "warm": ("weights averaged", 2.2, (BLUE, "#56B4E9", "#00385A"), ("-", (0, (4, 1))), ("o", "H", "s", "D", "v")),
    "baseline": ("baseline", 1.0, (BLACK,), (":", "-."), ("x", "+", "1")),
}
_OTHER = ("other", 1.0, (BLACK, "#806040"), ("-.",), ("x", "+", "1"))
_BASELINES: dict[str, Look] = {
    "length": {"color": PURPLE, "linestyle": "-", "marker": "^", "linewidth": 1.0},
    "random": {"color": GREY, "linestyle": ":", "marker": "", "linewidth": 1.4},
    "oracle": {"color": GREEN, "linestyle": "-", "marker": "", "linewidth": 1.4},
}
_RING = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "", "markeredgewidth": 1.1}
_KL = "upper bound on KL to the policy: log n - (n-1)/n (nats)"


def best_of_n_figure(rows: Sequence[Row], wins: Sequence[Row], path_stem: Path) -> list[Path]:
    """Rewards of the best of n, and win rates at the largest n. Writes path_stem and path_stem-wins, .png and .svg.

    Where no win rate was measured there is no second figure, and that of an earlier run is removed.

    Args:
        rows: `proxy`, `kind` ("rm", "ensemble", "warm" or "baseline"), `n`, `kl_bound` in nats, `prompts`; `gain` in
            standard deviations above the pool's mean; `gold` and `control` where there is such a target; `win`, as a
            fraction, against one random candidate. Each of these numbers with `_low` and `_high`.
        wins: `a`, `b`, `n`; `win`, `low` and `high` as fractions: how often a's choice is better than b's, each pair
            once; `target`, which judges this and the rows' `win`. May be empty.

    Raises:
        UsageError: no rows, a name or place is missing, or a value cannot be what its column says.
    """
    rewards, won = draw_rewards(rows), draw_wins(rows, wins)  # both before the first is written
    written = canvas.save_both(rewards, path_stem)
    beside = path_stem.with_name(f"{path_stem.name}-wins")
    if won is not None:
        return written + canvas.save_both(won, beside)
    for ending in (".png", ".svg"):
        beside.with_name(beside.name + ending).unlink(missing_ok=True)
    return written


def draw_rewards(rows: Sequence[Row]) -> Figure:
    """The first figure: an axes for each target that was measured, then one for the proxies' own rewards."""
    proxies = _proxies(rows)
    names, looks = _names(proxies, 28), _looks(proxies)
    targets = _targets(rows)
    bounds = {place(row, "n"): place(row, "kl_bound") for row in rows}
    with canvas.style():
        figure = canvas.new_figure(max(4.4, 0.4 + 3.5 * (1 + len(targets))), 3.9)
        panels = canvas.grid(figure, 1 + len(targets), 1 + len(targets))
        for panel, key in zip(panels, [*targets, "gain"], strict=True):
            _axes_of_n(panel, bounds)
            for proxy, own in proxies.items():
                _curve(panel, own, key, looks[proxy], len(proxies))
            if not panel.lines:
                panel.text(0.5, 0.5, "not measured", ha="center", color=GREY, transform=panel.transAxes)
        for panel, key in zip(panels, targets, strict=False):
            panel.set_title(f"{key} reward of the proxy's choice\n{_prompts(rows)}".rstrip())
            panel.set_ylabel(f"mean {key} reward")
        panels[-1].set_title("what the proxy believes: its own reward,\nin std above the pool's mean")
        panels[-1].set_ylabel("gain (std of the proxy's reward)")
        entries = []
        for proxy, own in proxies.items():
            name, kind = names[proxy], _kind(own[0])[0]
            entries.append((canvas.line(**looks[proxy]), name if kind in name else f"{name} ({kind})"))
        entries.append((canvas.patch(color=GREY, **canvas.BAND), "95 % interval"))
        if targets:
            entries.append((canvas.line(color=GREY, **_RING), "largest value of a line"))
        canvas.legend(figure, entries)
    return figure


def draw_wins(rows: Sequence[Row], wins: Sequence[Row]) -> Figure | None:
    """The second figure: an axes with bars, then one with a matrix if there are `wins`; None without any win rate."""
    proxies = _proxies(rows)
    largest = max(place(row, "n") for row in rows)
    last = {proxy: own[-1] for proxy, own in proxies.items() if place(own[-1], "n") == largest}
    judges = list(groups(wins, "target")) if wins else _targets(rows)
    if wins and len(judges) > 1:
        raise UsageError(f"figure: expected one target in the wins, found {' and '.join(map(quoted, judges))}")
    # Of two targets without wins nothing says which one judged: then nothing is claimed.
    judged = f"\njudged by {printable(judges[0])}" if len(judges) == 1 else ""
    cells = _cells([row for row in wins if place(row, "n") == largest], list(proxies))
    if not cells and all(math.isnan(accuracy(row, "win")) for row in last.values()):
        return None
    names, looks, count = _names(proxies, 28), _looks(proxies), len(proxies)
    with canvas.style():
        # Both panels share their rows: a bar and its row of the matrix stand side by side.
        widths = [2.9, max(2.6, 0.4 * count)] if cells else [3.6]
        width = 0.6 + 0.062 * max(map(len, names.values())) + sum(widths)
        figure = canvas.new_figure(width, 1.4 + 0.27 * count)
        panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        figure.suptitle(", ".join(part for part in (f"best of {largest:.0f}", _prompts(rows)) if part))
        for y, proxy in enumerate(proxies):
            if proxy in last:
                _bar(panels[0], y, last[proxy], looks[proxy]["color"])
        panels[0].set_title("against one random candidate" + judged)
        panels[0].set_yticks(range(count), list(names.values()))
        panels[0].set_ylim(count - 0.5, -0.5)
        panels[0].spines["bottom"].set_bounds(0, 1)
        panels[0].set_xlim(0, 1.2)  # room for the numbers beside bars of 100 %
        panels[0].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        panels[0].set_xlabel("win rate in % (line: 95 % interval)")
        panels[0].axvline(0.5, color=BLACK, linewidth=0.8, linestyle="--", zorder=3)
        if cells:
            win_matrix(panels[1], cells, list(_names(proxies, 16).values()))
            panels[1].set_title("against one another" + judged)
    return figure


def _proxies(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each proxy by n, in the order of first appearance. All that says where a row is drawn is checked."""
    proxies = {}
    for proxy, own in groups(rows, "proxy").items():
        kinds = groups(own, "kind")
        if len(kinds) > 1:
            found = " and ".join(quoted(kind) for kind in kinds)
            raise UsageError(f"figure: expected one kind for the proxy {quoted(proxy)}, found {found}")
        proxies[proxy] = in_order(own, "n")
        for n in (place(row, "n") for row in own):
            if n < 1 or not n.is_integer():
                raise UsageError(f"figure: expected a whole n >= 1 for the proxy {quoted(proxy)}, found {n:g}")
    return proxies


def _names(proxies: Mapping[str, Any], width: int) -> dict[str, str]:
    return dict(zip(proxies, short_names([printable(proxy) for proxy in proxies], width), strict=True))


def _kind(row: Row) -> Any:
    return _KINDS.get(text(row, "kind"), _OTHER)


def _looks(proxies: Mapping[str, Sequence[Row]]) -> dict[str, Look]:
    """How the line of each proxy looks; the k-th of a kind takes the k-th colour, style and marker of that kind."""
    looks: dict[str, Look] = {}
    seen: dict[str, int] = {}
    for proxy, own in proxies.items():
        kind = text(own[0], "kind")
        if kind == "baseline" and proxy in _BASELINES:
            looks[proxy] = _BASELINES[proxy] | {"zorder": 2}
            continue
        k = seen[kind] = seen.get(kind, -1) + 1
        _, width, *choices = _kind(own[0])
        color, style, marker = (choice[k % len(choice)] for choice in choices)
        looks[proxy] = {"color": color, "linestyle": style, "marker": marker, "linewidth": width, "markersize": 3.5}
        looks[proxy]["zorder"] = 5 if kind == "warm" else 4 if kind == "ensemble" else 3
    return looks


def _prompts(rows: Sequence[Row]) -> str:
    return sizes([{"prompts": row.get("prompts")} for row in rows])


def _targets(rows: Sequence[Row]) -> list[str]:
    return [key for key in TARGETS if any(not math.isnan(number(row, key)) for row in rows)]


def _axes_of_n(panel: Any, bounds: Mapping[float, float]) -> None:
    """n below, in powers of two, and above it the bound on the KL of the same n."""
    from matplotlib.ticker import NullLocator

    low, high = min(bounds), max(bounds)
    # A tick for each n; numbers at the largest n and at so many powers of two below it as have room.
    powers = [n for n in sorted(bounds) if math.log2(n).is_integer() and n < high / 1.4]
    named = [*powers, high][:: -math.ceil((len(powers) + 1) / 8)]
    margin = max(1.12, (high / low) ** 0.03)
    panel.set_xscale("log", base=2)
    panel.set_xlim(low / margin, high * margin)
    panel.set_xticks(sorted(bounds), [f"{n:.0f}" if n in named else "" for n in sorted(bounds)])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("n candidates to choose from")
    panel.grid(True)
    above = panel.secondary_xaxis("top")
    above.set_xticks(named, [f"{bounds[n]:.1f}" for n in named])
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel(_KL)
    above.set_zorder(3)  # else the grid is drawn over it


def _curve(panel: Any, rows: Sequence[Row], key: str, look: Look, proxies: int) -> None:
    """A proxy's line with its 95 % interval, and a ring where a target's line is highest.

    A baseline has no ring and a fainter band: the oracle only rises, and where a flat line is highest is chance.
    """
    points = [(place(row, "n"), number(row, key)) for row in rows]
    points = [(n, value) for n, value in points if not math.isnan(value)]
    if not points:
        return
    single = len(points) == 1
    more = {"marker": "_", "markersize": 12} if single and not look["marker"] else {}
    panel.plot(*zip(*points, strict=True), **look | more)
    baseline = rows[0]["kind"] == "baseline"
    if key in TARGETS and not baseline:
        at, value = max(points, key=lambda point: point[1])
        panel.plot([at], [value], color=look["color"], zorder=6, **_RING)
    band = [(place(row, "n"), *interval(row, f"{key}_")) for row in rows]
    ns, lows, highs = zip(*band, strict=True)
    if single:
        panel.vlines(ns, lows, highs, color=look["color"], alpha=0.6, linewidth=1, zorder=1)
    else:
        alpha = min(0.18, 0.9 / proxies) / (2 if baseline else 1)
        panel.fill_between(ns, lows, highs, color=look["color"], alpha=alpha, linewidth=0, zorder=1)


def _bar(panel: Any, y: float, row: Row, color: str) -> None:
    value, (low, high) = accuracy(row, "win"), interval(row, "win_")
    if math.isnan(value):
        return
    panel.barh(y, value, height=0.7, color=color, alpha=0.75, zorder=2)
    panel.hlines(y, low, high, color=BLACK, linewidth=1.1, zorder=4)
    panel.text(1.19, y, f"{100 * value:.1f}", ha="right", va="center", fontsize=7)


def _cells(wins: Sequence[Row], proxies: Sequence[str]) -> dict[tuple[int, int], tuple[float, bool]]:
    """(row, column) -> how often the row's choice is the better one, and whether its interval excludes a half."""
    cells: dict[tuple[int, int], tuple[float, bool]] = {}
    for row in wins:
        pair = text(row, "a"), text(row, "b")
        for proxy in pair:
            if proxy not in proxies:
                raise UsageError(f"figure: expected only proxies of the rows in the wins, found {quoted(proxy)}")
        a, b = (proxies.index(proxy) for proxy in pair)
        if a == b or (a, b) in cells:
            found = f"{quoted(pair[0])} and {quoted(pair[1])}"
            raise UsageError(f"figure: expected each pair of two proxies once in the wins, found {found}")
        value, (low, high) = accuracy(row, "win"), interval(row)
        sure = low > 0.5 or high < 0.5  # False where the interval was not measured
        cells[a, b], cells[b, a] = (value, sure), (1 - value, sure)
    return {cell: found for cell, found in cells.items() if not math.isnan(found[0])}
