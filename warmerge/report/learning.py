"""The figure of a run: what each member learned of its training pairs, and what that was worth on others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.report import canvas
from warmerge.report.canvas import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILLION, printable
from warmerge.report.figures import forest, titled
from warmerge.report.rows import Row, accuracy, groups, number, place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More members than looks are drawn in grey: their names are in the table.
_LOOKS = [(color, style) for style in ("-", "--") for color in (BLUE, VERMILLION, GREEN, PURPLE, BLACK)]


def learning_figure(rows: Sequence[Row], accuracies: Sequence[Row], path_stem: Path) -> list[Path]:
    """Loss and accuracy on the training pairs by step, accuracies on validation sets. Writes path_stem.png and .svg.

    Args:
        rows: `member`, `step`, `lr`, `dropout`; `loss`, and `accuracy` as a fraction.
        accuracies: `set`, `model` ("start" or a member), `kind` ("start" or "member"), `n`; `accuracy`, `low` and
            `high` as fractions. May be empty.
    """
    return canvas.save_both(draw_learning(rows, accuracies), path_stem)


def draw_learning(rows: Sequence[Row], accuracies: Sequence[Row]) -> Figure:
    """As `learning_figure`; two axes for the training pairs, then one for each validation set."""
    from matplotlib.ticker import MaxNLocator

    members = groups(rows, "member")
    sets = groups(accuracies, "set") if accuracies else {}
    models = list(dict.fromkeys(str(row["model"]) for row in accuracies))
    count = 2 + len(sets)
    looks = _LOOKS if len(members) <= len(_LOOKS) else [(GREY, "-")] * len(members)
    with canvas.style():
        height = max(2.6, 0.75 + 0.19 * len(models))
        figure = canvas.new_figure(0.4 + 2.6 * min(count, 4), 0.1 + height * -(-count // 4))
        loss, right, *panels = canvas.grid(figure, count, min(count, 4))
        loss.set_title("training loss")
        right.set_title("share of training pairs right")
        for panel in (loss, right):
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
            panel.grid(True)
        for (color, style), own in zip(looks, members.values(), strict=False):
            _line(loss, [(place(row, "step"), number(row, "loss")) for row in own], color, style)
            _line(right, [(place(row, "step"), accuracy(row, "accuracy")) for row in own], color, style)
        for panel, name in zip(panels, sets, strict=True):
            titled(panel, name, sets[name])
            panel.set_yticks(range(len(models)), [printable(model) for model in models])
            panel.set_ylim(len(models) - 0.4, -0.6)
            panel.set_xlabel("accuracy (bar: 95 % interval)")
            forest(panel, sets[name], models)
        entries = []
        for (color, style), (name, own) in zip(looks, members.items(), strict=False):
            words = f"{printable(name)}: lr {number(own[0], 'lr'):g}, dropout {number(own[0], 'dropout'):g}"
            entries.append((canvas.line(color=color, linestyle=style), words))
        if len(members) > len(_LOOKS):
            entries = [(canvas.line(color=GREY), f"each of {len(members)} members")]
        canvas.legend(figure, entries)
    return figure


def _line(panel: Any, points: Sequence[tuple[float, float]], color: str, style: str) -> None:
    marker = "." if len(points) == 1 else ""
    panel.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.1, marker=marker)
