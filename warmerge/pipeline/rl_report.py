"""`warmerge rl-report`: what runs of `warmerge rl` show of over-optimisation, as rows, figures and plain sentences.

OUT/rl-report.json, rl-report*.csv   every number; rl-report.png and .svg are drawn from them
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from warmerge.errors import UsageError, WarmergeError, plain
from warmerge.pipeline.found.rl_summary import RlReport, summary
from warmerge.pipeline.prepare import Spec
from warmerge.report.results import RL, check_results, write_results

__all__ = ["RlReport", "rl_report"]


def rl_report(
    folders: Sequence[Spec],
    out: Spec,
    *,
    smooth: int | None = None,
    margin: float = 0.5,
    winrates: Sequence[Spec] = (),
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> RlReport:
    """Sets runs beside each other: control and proxy reward against steps and KL, peaks, collapses, gains at equal KL.

    Runs that differ in nothing but their seed are a group, named by their proxy. Gains are in standard deviations of
    the start policy's answers.

    Args:
        folders: of runs, or folders that have runs in them.
        out: a folder for results and figures.
        smooth: measured points in a moving mean, an odd number; a twentieth of those of the shortest finished run
            if not given.
        margin: share of the gain at the peak that is lost in a collapse; above 0.
        winrates: results of `warmerge winrate`, to show beside.

    Raises:
        UsageError: an argument that cannot be used, or results that are there already.
        RefusedError: with all that is wrong with any of the runs or win rates.
        WarmergeError: the numbers are written, but no figure can be drawn of them.

    Example:
        >>> import warmerge
        >>> found = warmerge.rl_report(["runs/rl-warm", "runs/rl-single"], "report")  # doctest: +SKIP
        >>> found.peaks[0]["step"]  # doctest: +SKIP
        120
    """
    out = Path(out)
    if not folders:
        raise UsageError("no run is given: name folders that warmerge rl wrote")
    if not (math.isfinite(margin) and margin > 0):
        raise UsageError(f"--margin: expected a share above 0, found {margin}")
    check_results(out, RL, overwrite)
    found = summary(folders, str(out), smooth=smooth, margin=margin, winrates=winrates, command=command)
    try:
        write_results(out, RL, found.as_json(), overwrite=overwrite)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # The runs are anybody's: numbers that no axis holds are refused by matplotlib, each in its own words.
        where = f"{plain(str(out / RL))}.json"
        what = f"their figure cannot be drawn ({type(error).__name__}: {error}); look for huge numbers in the runs"
        raise WarmergeError(f"{where} has the numbers, but {what}") from error
    return found
