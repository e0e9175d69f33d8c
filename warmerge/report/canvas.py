"""How every figure looks, and how it is saved. The matplotlib state of the program around it stays as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmerge.errors import naming, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind people. Marker and line style tell them apart in print.
BLUE, VERMILLION, GREEN, PURPLE, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666", "#000000"
BAND = {"alpha": 0.18, "linewidth": 0}
_FONT = "DejaVu Sans"  # comes with matplotlib
_STYLE = {
    "font.family": _FONT,
    "font.size": 8,
    "axes.titlesize": 9,
    "figure.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    # Names come from files: "$" in one is a dollar, not the start of a formula.
    "text.parse_math": False,
    # Letters as outlines: the picture is the same where the font is not installed. The text stays in comments.
    "svg.fonttype": "path",
    "svg.hashsalt": "warmerge",
}
_endings: ContextVar[tuple[str, ...]] = ContextVar("endings", default=(".png", ".svg"))
# No date and no version: the same rows give the same bytes.
_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's defaults and ours for a while, whatever the user's matplotlibrc says (LaTeX, other fonts)."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches. It never asks for a display: no pyplot, no backend chosen for the whole program."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08)
    # Agg draws fewer than 65536 pixels each way: a picture of very many models gets coarser, not refused.
    figure = Figure(figsize=(width, height), dpi=min(200.0, 60_000 / max(width, height)), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Writes .png, .svg or .pdf, the same bytes for the same figure; the file appears whole or not at all."""
    ending, partial = path.suffix.lower(), path.with_name(f".{path.name}.partial")
    with style(), naming(path):
        partial.unlink(missing_ok=True)  # it may be a link that leads elsewhere, or what a run that was killed left
        with partial.open("xb") as file:
            figure.savefig(file, format=ending.removeprefix("."), metadata=_METADATA.get(ending))
        os.replace(partial, path)
    return path


@contextmanager
def svg_alone() -> Iterator[None]:
    """For a while no .png is written: of both it takes most of the time."""
    before = _endings.set((".svg",))
    try:
        yield
    finally:
        _endings.reset(before)


def save_both(figure: Figure, path_stem: Path) -> list[Path]:
    """Writes path_stem.png and path_stem.svg; a dot in the stem's name is kept."""
    return [save(figure, path_stem.with_name(path_stem.name + ending)) for ending in _endings.get()]


def printable(name: str) -> str:
    """`name` as it can be drawn: control characters, and characters that the font lacks, as escapes.

    An escape is ugly, but two names that differ still differ; as empty boxes they would look alike.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=_FONT)))
    return "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in plain(name))


def grid(figure: Figure, count: int, columns: int, **options: Any) -> list[Any]:
    """`count` axes in rows of `columns`; places that stay over are empty."""
    axes = list(figure.subplots(-(-count // columns), columns, squeeze=False, **options).flat)
    for spare in axes[count:]:
        spare.remove()
    return axes[:count]


def line(**look: Any) -> Any:
    """A line for the legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def patch(**look: Any) -> Any:
    """An area for the legend."""
    from matplotlib.patches import Patch

    return Patch(**look)


def legend(figure: Figure, entries: Sequence[tuple[Any, str]]) -> None:
    """One legend below all panels, where it covers no data; the figure grows by its height."""
    for columns in range(len(entries), 0, -1):
        # As matplotlib fills columns: the first ones get one more where the entries do not divide evenly.
        lines, longer = divmod(len(entries), columns)
        starts = [i * lines + min(i, longer) for i in range(columns + 1)]
        widest = [max(len(words) for _, words in entries[a:b]) for a, b in pairwise(starts)]
        # Inches: the line and the gaps of a column, and its longest text in letters of middling width.
        if sum(0.65 + 0.057 * letters for letters in widest) <= figure.get_figwidth():
            break
    figure.set_figheight(figure.get_figheight() + 0.17 * (lines + (longer > 0)))
    handles, labels = [handle for handle, _ in entries], [words for _, words in entries]
    figure.legend(handles=handles, labels=labels, loc="outside lower center", ncols=columns)
