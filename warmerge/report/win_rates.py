"""The figure of win rates: a bar for each pair of policies, or where these are many, a matrix of all against all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.errors import UsageError, quoted
from warmerge.report import canvas
from warmerge.report.canvas import BLACK, BLUE, PURPLE, printable
from warmerge.report.rows import Row, accuracy, groups, interval, short_names, sizes, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More pairs than these, of which none is against the same policy as all others, make a matrix.
_BARS = 10
_LENGTH = {"color": PURPLE, "marker": "^", "markersize": 7, "markeredgecolor": "white", "linestyle": "", "zorder": 5}


def win_rate_figure(rows: Sequence[Row], path_stem: Path) -> list[Path]:
    """Win rates with their intervals. Writes path_stem.png and path_stem.svg.

    Args:
        rows: `policy`, `against`, `judge`; `win`, `low` and `high` as fractions; `length_win`, that of the longer
            answer; `n` prompts. Each pair once. Where there is no `win`, nothing was judged.

    Raises:
        UsageError: no rows, a name is missing, a pair stands twice, or a value cannot be what its column says.
    """
    return canvas.save_both(draw_win_rates(rows), path_stem)


def draw_win_rates(rows: Sequence[Row]) -> Figure:
    """The figure: an axes with bars where all are compared with one policy, or pairs are few; else with a matrix."""
    others = list(groups(rows, "against"))
    pairs = [(text(row, "policy"), text(row, "against")) for row in rows]
    twice = next((pair for i, pair in enumerate(pairs) if pair in pairs[:i] or pair[::-1] in pairs[:i]), None)
    if twice is not None or any(a == b for a, b in pairs):
        a, b = twice or next(pair for pair in pairs if pair[0] == pair[1])
        raise UsageError(f"figure: expected each pair of two policies once, found {quoted(a)} and {quoted(b)}")
    judges = list(groups(rows, "judge"))
    judged = f"judged by {short_names([printable(judges[0])], 36)[0]}" if len(judges) == 1 else ""
    beside = ", ".join(part for part in (judged, sizes([{"n": row.get("n")} for row in rows])) if part)
    with canvas.style():
        bars = len(others) == 1 or len(rows) <= _BARS
        return _bars(rows, others, beside) if bars else _matrix(rows, beside)


def _bars(rows: Sequence[Row], others: Sequence[str], beside: str) -> Figure:
    policies, rivals = _short([text(row, "policy") for row in rows]), _short(others, 30)
    names = [policies[text(row, "policy")] for row in rows]
    if len(others) > 1:
        # Over two lines: side by side two long names leave no room for the bars.
        names = [f"{name}\nagainst {rivals[text(row, 'against')]}" for name, row in zip(names, rows, strict=True)]
    widest = max(len(line) for name in names for line in name.split("\n"))
    with_length = any(not math.isnan(accuracy(row, "length_win")) for row in rows)
    figure = canvas.new_figure(0.5 + 0.062 * widest + 3.6, 1.1 + (0.27 if len(others) == 1 else 0.36) * len(rows))
    (panel,) = canvas.grid(figure, 1, 1)
    for y, row in enumerate(rows):
        value, (low, high), length = accuracy(row, "win"), interval(row), accuracy(row, "length_win")
        if math.isnan(value):
            panel.text(0.02, y, "nothing judged", va="center", fontsize=7)
            continue
        panel.barh(y, value, height=0.62, color=BLUE, alpha=0.7, zorder=2)
        panel.hlines(y, low, high, color=BLACK, linewidth=1.2, zorder=4)
        panel.text(1.15, y, f"{100 * value:.1f}", ha="right", va="center", fontsize=7)
        if not math.isnan(length):
            panel.plot([length], [y], **_LENGTH)
    panel.axvline(0.5, color=BLACK, linewidth=0.8, linestyle="--", zorder=3)
    panel.set_yticks(range(len(rows)), names)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(0, 1.16)  # room for the numbers beside bars of 100 %
    panel.spines["bottom"].set_bounds(0, 1)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    panel.set_xlabel("win rate in %", x=0.5 / 1.16)
    # Over the whole figure: above the bars alone a long name would run out of it.
    figure.suptitle(f"win rate against {rivals[others[0]]}\n{beside}" if len(others) == 1 else f"win rates\n{beside}")
    entries = [(canvas.line(color=BLACK, linewidth=1.2), "95 % interval")]
    if with_length:
        entries.append((canvas.line(**_LENGTH), "if the longer answer won"))
    canvas.legend(figure, entries)
    return figure


def _matrix(rows: Sequence[Row], beside: str) -> Figure:
    policies = list(dict.fromkeys(name for row in rows for name in (text(row, "policy"), text(row, "against"))))
    below, left, count = _short(policies, 20), _short(policies), len(policies)
    cells: dict[tuple[int, int], tuple[float, bool]] = {}
    for row in rows:
        a, b = policies.index(text(row, "policy")), policies.index(text(row, "against"))
        value, (low, high) = accuracy(row, "win"), interval(row)
        sure = low > 0.5 or high < 0.5  # False where there is no interval
        if not math.isnan(value):
            cells |= {(a, b): (value, sure), (b, a): (1 - value, sure)}
    longest = max(map(len, left.values()))
    figure = canvas.new_figure(max(4.4, 0.6 + 0.062 * longest + 0.44 * count), 1.9 + 0.3 * count)
    (panel,) = canvas.grid(figure, 1, 1)
    win_matrix(panel, cells, list(below.values()))
    panel.set_yticks(range(count), list(left.values()))
    figure.suptitle(f"win rates\n{beside}")
    return figure


def win_matrix(panel: Any, cells: Mapping[tuple[int, int], tuple[float, bool]], names: Sequence[str]) -> None:
    """Win rates of rows against columns, coloured from what is farthest from a half.

    Args:
        cells: (row, column) -> win rate as a fraction, and whether its interval excludes a half.
        names: of the columns; the rows have none.
    """
    values = [[math.nan] * len(names) for _ in names]
    for (i, j), (value, _) in cells.items():
        values[i][j] = value
    reach = max([0.1, *(abs(value - 0.5) for value, _ in cells.values())])
    panel.imshow(values, vmin=0.5 - reach, vmax=0.5 + reach, cmap="RdBu", aspect="auto")
    for (i, j), (value, sure) in cells.items():
        look = {"color": "white" if abs(value - 0.5) > 0.65 * reach else BLACK, "weight": "bold" if sure else "normal"}
        panel.text(j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=7, **look)
    panel.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_xlabel("row's win rate over the column in %\n(bold: the 95 % interval excludes 50 %)")


def _short(names: Sequence[str], width: int = 34) -> Mapping[str, str]:
    return dict(zip(names, short_names([printable(name) for name in names], width), strict=True))
