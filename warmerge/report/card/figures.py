"""The pictures of a model card: the figures of `eval` and `lmc-curve`, drawn anew under public names."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warmerge.report.card.results import public_sets, read_results
from warmerge.report.figures import eval_figure, lmc_figure
from warmerge.report.rows import Row, ends, text


def eval_picture(evaluation: Mapping[str, Any], this: str, member_names: Mapping[str, str]) -> bytes:
    """PNG of an eval.json's figure; arguments as for `read_results`."""
    results = read_results(evaluation, this, member_names)
    rows = [
        {**row, "set": results.sets[text(row, "set")], "model": results.models[text(row, "model")]}
        for row in evaluation["rows"]
    ]
    return _png(eval_figure, rows)


def curve_picture(curve: Mapping[str, Any], member_names: Mapping[str, str]) -> bytes:
    """PNG of a curve.json's figure. `member_names`: every end of its paths -> public name."""
    names, sets = {"mean": "mean", **member_names}, public_sets((text(row, "set"), "") for row in curve["rows"])
    rows = []
    for row in curve["rows"]:
        first, second = (names[end] for end in ends(text(row, "path")))
        rows.append({**row, "set": sets[text(row, "set")], "path": f"{first} -> {second}"})
    return _png(lmc_figure, rows)


def _png(figure: Any, rows: Sequence[Row]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        png: Path = next(path for path in figure(rows, Path(folder) / "figure") if path.suffix == ".png")
        return png.read_bytes()
